"""torch.compile, in every order of compiling and making the optimizer."""

import pytest
import torch
from torch import nn

import natgrad
from oracles import close, fit

X = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
Y = torch.arange(64) % 3
CE = nn.CrossEntropyLoss()


def plain(model, make, backend):
    return make(model), model


def optimizer_first(model, make, backend):
    return make(model), torch.compile(model, backend=backend)


def compiled_first(model, make, backend):
    compiled = torch.compile(model, backend=backend)
    return make(compiled), compiled


def optimizer_of_the_plain_one(model, make, backend):
    compiled = torch.compile(model, backend=backend)
    return make(model), compiled


def in_place_first(model, make, backend):
    model.compile(backend=backend)
    return make(model), model


def in_place_afterwards(model, make, backend):
    opt = make(model)
    model.compile(backend=backend)
    return opt, model


def a_part(model, make, backend):
    model[0].compile(backend=backend)
    return make(model), model


def the_training_function(model, make, backend):
    return make(model), torch.compile(lambda x: model(x), backend=backend)


ORDERS = [
    optimizer_first, compiled_first, optimizer_of_the_plain_one, in_place_first, in_place_afterwards, a_part,
    the_training_function,
]  # fmt: skip
MAKE = {
    "adaptive": lambda m: natgrad.KFAC(m, CE),
    "numbers": lambda m: natgrad.KFAC(m, CE, lr=0.05, momentum=0.9, damping=0.1, statistics_every=2),
    "exact": lambda m: natgrad.NaturalGradient(m, CE),
}


def run(order, make, backend, steps=4):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    opt, forward = order(model, MAKE[make], backend)
    return torch.tensor(fit(opt, forward, X, Y, steps))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("make", MAKE)
@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.__name__)
def test_steps_are_those_without_it(order, make, backend):
    close(run(order, make, backend), run(plain, make, backend), 1e-3 if make == "exact" else 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("make", MAKE)
@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.__name__)
def test_steps_are_those_without_it_by_inductor(order, make):
    close(run(order, make, "inductor"), run(plain, make, "eager"), 1e-3)


def test_without_graph_breaks_it_is_refused_with_the_cure():
    with pytest.raises(torch._dynamo.exc.Unsupported, match="compile without fullgraph=True"):
        run(lambda m, make, backend: (make(m), torch.compile(m, backend=backend, fullgraph=True)), "adaptive", "eager")


def test_compiled_code_is_used_between_statistics():
    calls = []

    def backend(graph, inputs):
        def counted(*args):
            calls.append(1)
            return graph.forward(*args)

        return counted

    run(optimizer_first, "numbers", backend, steps=6)
    assert len(calls) == 6
