"""Functions of a dictionary of tensors, as models."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

import natgrad
from oracles import close, net, randn

LOSS = nn.CrossEntropyLoss()
X, Y = randn(12, 4), torch.arange(12) % 3


def f(params, x):
    return (x @ params["a.W"].mT + params["a.b"]).tanh() @ params["V"].mT


def tensors():
    return {"a.W": randn(5, 4, seed=1), "a.b": randn(5, seed=2), "V": randn(3, 5, seed=3)}


class Twin(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(4, 5).double(), nn.Linear(5, 3, bias=False).double()
        own = tensors()
        self.load_state_dict({"a.weight": own["a.W"], "a.bias": own["a.b"], "out.weight": own["V"]})

    def forward(self, x):
        return self.out(self.a(x).tanh())


@pytest.mark.parametrize("structure", ["dense", "implicit", "kfac", "ekfac", "block", "diagonal"])
def test_its_matrix_is_that_of_the_same_module(structure):
    own = natgrad.fisher(f, LOSS, (X, Y), structure, params=tensors())
    assert own.space.names == ("a.W", "a.b", "V")
    twin = natgrad.fisher(Twin(), LOSS, (X, Y), structure)
    v = randn(own.space.size, seed=4)
    close(own @ v, twin @ v)
    close(own.solve(v, damping=0.1), twin.solve(v, damping=0.1), 1e-6)


def test_other_functions_take_it_too():
    twin, own = Twin(), tensors()
    v = randn(40, seed=4)
    close(natgrad.hessian(f, LOSS, (X, Y), params=own) @ v, natgrad.hessian(twin, LOSS, (X, Y)) @ v)
    close(natgrad.gauss_newton(f, LOSS, (X, Y), params=own) @ v, natgrad.gauss_newton(twin, LOSS, (X, Y)) @ v)
    close(natgrad.jacobian(f, X, params=own) @ v, natgrad.jacobian(twin, X) @ v)
    close(natgrad.ntk(f, X, params=own).to_dense(), natgrad.ntk(twin, X).to_dense())
    query = X[:2], Y[:2]
    close(natgrad.influence(f, LOSS, (X, Y), query, params=own), natgrad.influence(twin, LOSS, (X, Y), query))
    P, other = (natgrad.laplace(m, LOSS, (X, Y)).fit_prior() for m in (natgrad.Function(f, own), twin))
    close(P.predict(X), other.predict(X), 1e-8)


def test_a_module_by_functional_call():
    model = net(4, 6, 3)
    own = natgrad.fisher(
        lambda params, x: functional_call(model, params, x),
        LOSS,
        (X, Y),
        "dense",
        params=dict(model.named_parameters()),
    )
    close(own.to_dense(), natgrad.fisher(model, LOSS, (X, Y), "dense").to_dense())


def test_tensors_are_not_copied():
    own = tensors()
    F = natgrad.fisher(f, LOSS, (X, Y), "implicit", params=own)
    v = randn(40, seed=4)
    before = F @ v
    own["V"].mul_(2)
    close(F @ v, natgrad.fisher(f, LOSS, (X, Y), "implicit", params=own) @ v)
    assert (F @ v - before).abs().max() > 1e-3
