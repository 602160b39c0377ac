"""torch.compile, in every order of compiling and making the optimizer."""

import gc
import threading

import pytest
import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack

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


class Counted:
    """A backend that counts the calls of compiled code."""

    def __init__(self):
        self.calls = 0

    def __call__(self, graph, inputs):
        def counted(*args):
            self.calls += 1
            return graph.forward(*args)

        return counted


def test_compiled_code_is_used_between_statistics():
    backend = Counted()
    run(optimizer_first, "numbers", backend, steps=6)
    assert backend.calls == 6


def compiled_code_is_used():
    torch._dynamo.reset()
    backend = Counted()
    torch.compile(nn.Linear(2, 2), backend=backend)(torch.ones(1, 2))
    return backend.calls == 1


class Waiting(nn.Linear):
    """A layer whose forward tells that it has begun, and goes on when it is told."""

    def __init__(self):
        super().__init__(5, 3)
        self.begun, self.go_on, self.ended = threading.Event(), threading.Event(), threading.Event()

    def forward(self, x):
        self.begun.set()
        assert self.go_on.wait(60)
        return super().forward(x)


@pytest.mark.parametrize("ends_first", [0, 1])
def test_after_forwards_in_two_threads_compiled_code_is_used(ends_first):
    models = Waiting(), Waiting()
    opts = [MAKE["numbers"](model) for model in models]

    def forward(model, opt):
        opt.loss(model(X), Y).backward()
        opt.step()
        model.ended.set()

    threads = [threading.Thread(target=forward, args=pair) for pair in zip(models, opts, strict=True)]
    for model, thread in zip(models, threads, strict=True):
        thread.start()
        assert model.begun.wait(60)
    for model in (models[ends_first], models[1 - ends_first]):
        assert not compiled_code_is_used()  # while one of them is recorded
        model.go_on.set()
        assert model.ended.wait(60)
    for thread in threads:
        thread.join()
    assert compiled_code_is_used()


class Stopped(nn.Linear):
    def forward(self, x):
        raise KeyboardInterrupt


@pytest.mark.parametrize("make", MAKE)
def test_an_optimizer_deleted_after_an_interrupted_forward_leaves_no_mode(make):
    model = Stopped(5, 3)
    opt = MAKE[make](model)
    with pytest.raises(KeyboardInterrupt):
        model(X)
    assert _get_current_function_mode_stack()
    del opt
    gc.collect()
    assert not _get_current_function_mode_stack()
    assert compiled_code_is_used()
