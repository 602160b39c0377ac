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


@pytest.mark.parametrize("what", ["loss", "all"])
@pytest.mark.parametrize("make", [*MAKE, "newton muon"])
def test_a_compiled_function_may_have_the_loss_and_the_step_in_it(make, what):
    def losses(compiled):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
        opt = natgrad.NewtonMuon(model) if make == "newton muon" else MAKE[make](model)
        measure = CE if make == "newton muon" else opt.loss

        def forward():
            return measure(model(X), Y)

        def train():
            loss = forward()
            opt.zero_grad()
            loss.backward()
            opt.step()
            return loss

        if compiled and what == "loss":
            forward = torch.compile(forward, backend="eager")
        if compiled and what == "all":
            train = torch.compile(train, backend="eager")
        return torch.stack([train().detach() for _ in range(3)])

    close(losses(True), losses(False), 1e-5)


def test_a_matrix_may_be_made_within_a_compiled_function():
    model = nn.Linear(5, 3)
    make = torch.compile(lambda: natgrad.fisher(model, CE, (X, Y), "kfac"), backend="eager")
    close(make().to_dense(), natgrad.fisher(model, CE, (X, Y), "kfac").to_dense(), 1e-6)


@pytest.mark.parametrize("make", MAKE)
def test_a_compiled_model_in_a_closure_is_used_as_compiled(make):
    def count(closure_in_step):
        torch._dynamo.reset()
        model, backend = nn.Linear(5, 3), Counted()
        opt, compiled = MAKE[make](model), torch.compile(model, backend=backend)

        def closure():
            opt.zero_grad()
            loss = opt.loss(compiled(X), Y)
            loss.backward()
            return loss

        for _ in range(4):
            if closure_in_step:
                opt.step(torch.enable_grad()(closure))
            else:
                closure()
                opt.step()
        return backend.calls

    assert count(True) == count(False)


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


@pytest.mark.parametrize("recording_ends", ["within", "after"])
def test_the_users_own_stance_that_overlaps_a_recording_is_restored(recording_ends):
    model = Stopped(5, 3)
    opt = MAKE["numbers"](model)

    def interrupted():
        with pytest.raises(KeyboardInterrupt):
            model(X)

    def ended():
        model.forward = lambda x: nn.functional.linear(x, model.weight, model.bias)
        opt.loss(model(X), Y)

    if recording_ends == "within":  # it began before the user's, and ends before it
        interrupted()
        with torch.compiler.set_stance("fail_on_recompile"):
            ended()
            with pytest.raises(RuntimeError, match="fail_on_recompile"):
                compiled_code_is_used()
    else:  # it began within the user's, and ends after it
        with torch.compiler.set_stance("fail_on_recompile"):
            interrupted()
        ended()
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
