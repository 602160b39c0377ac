"""`hessian` against finite differences of the gradient, and what is its own; its operations are in the contract."""

import pytest
import torch
from torch import nn

import natgrad
from oracles import close, f64, net, numel, randn

N, CLASSES = 6, 3
STRUCTURES = ["implicit", "dense"]


def problem(activation=nn.Tanh):
    return net(4, 5, CLASSES, activation=activation), nn.CrossEntropyLoss(), (randn(N, 4), torch.arange(N) % CLASSES)


def gradient(model, loss, data):
    grads = torch.autograd.grad(loss(model(data[0]), data[1]), list(model.parameters()))
    return torch.cat([g.flatten() for g in grads])


def is_the_difference_of_gradients(H, model, loss, data):
    flat, step = nn.utils.parameters_to_vector, 1e-4
    start = flat(model.parameters()).detach().clone()
    for seed in range(3):
        v, gradients = randn(numel(model), seed=seed), []
        for sign in (1, -1):
            nn.utils.vector_to_parameters(start + sign * step * v, model.parameters())
            gradients.append(gradient(model, loss, data))
        nn.utils.vector_to_parameters(start, model.parameters())
        close(H @ v, (gradients[0] - gradients[1]) / (2 * step), 1e-6)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_hessian_is_the_difference_of_gradients(structure):
    model, loss, data = problem()
    is_the_difference_of_gradients(natgrad.hessian(model, loss, data, structure), model, loss, data)


def test_the_hessian_of_a_saddle_is_indefinite_and_says_so():
    model, loss, data = (
        net(1, 1, 1, bias=False),
        nn.MSELoss(),
        (torch.ones(1, 1, dtype=f64), torch.ones(1, 1, dtype=f64)),
    )
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    H = natgrad.hessian(model, loss, data, "dense")  # of (1 − u tanh v)² at zero
    close(H.to_dense(), torch.tensor([[0.0, -2.0], [-2.0, 0.0]], dtype=f64), 1e-12)
    for operation in (H.logdet, lambda d: H.power(-0.5, d), lambda d: H.sample(1, d), lambda d: H.inverse(d)):
        with pytest.raises(ValueError, match=r"indefinite.*larger damping"):
            operation(0.1)
    with pytest.raises(RuntimeError, match="not positive definite; pass a larger damping"):
        natgrad.hessian(model, loss, data).solve(torch.tensor([1.0, 1.0], dtype=f64), 0.1)
    close(H.solve(torch.tensor([1.0, 1.0], dtype=f64), 3.0), torch.ones(2, dtype=f64), 1e-12)


@pytest.mark.parametrize("structure", [*STRUCTURES, "block"])
def test_the_model_is_left_as_it_was(structure):
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, CLASSES)).double()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    natgrad.hessian(model, *problem()[1:], structure) @ randn(numel(model))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("structure", [*STRUCTURES, "block"])
def test_a_parameter_without_curvature_has_zeros(structure):
    model, loss, data = problem()
    model.idle = nn.Linear(2, 2, dtype=f64)
    model.forward = lambda x: model[2](model[1](model[0](x)))
    H = natgrad.hessian(model, loss, data, structure).to_dense()
    assert (H[-6:] == 0).all()
    without = nn.Sequential(*[model[i] for i in range(3)])
    close(H[:-6, :-6], natgrad.hessian(without, loss, data, structure).to_dense(), 1e-12)


def test_structures_that_a_hessian_has_not():
    with pytest.raises(ValueError, match=r"structure='kfac' is unknown: expected one of 'implicit', 'dense', 'block'"):
        natgrad.hessian(*problem(), "kfac")


class Attention(nn.Module):
    """One head of torch's fused attention."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 6), nn.Linear(2, CLASSES)

    def forward(self, x):
        h = nn.functional.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1))
        return self.out(h.mean(1))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_of_fused_attention(structure):
    model, loss, data = Attention().double(), nn.CrossEntropyLoss(), (randn(N, 3, 4), torch.arange(N) % CLASSES)
    is_the_difference_of_gradients(natgrad.hessian(model, loss, data, structure), model, loss, data)
