"""An exception or Ctrl-C within a step leaves parameters, buffers and optimizer as they were."""

import copy
import signal

import pytest
import torch
from torch import nn

import natgrad
from natgrad.optim.whole import uninterrupted
from oracles import f64

X = torch.randn(24, 5, dtype=f64, generator=torch.Generator().manual_seed(0))
Y = torch.arange(24) % 3
CE = nn.CrossEntropyLoss()


class Stumbling(nn.Module):
    """Raises at a forward that is counted down to."""

    def __init__(self):
        super().__init__()
        self.a, self.bn, self.b = nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)
        self.left, self.error = -1, None

    def forward(self, x):
        self.left -= 1
        if self.left == 0:
            raise self.error
        return self.b(self.bn(self.a(x)).tanh())


MAKE = {
    "adaptive": lambda m: natgrad.KFAC(m, CE, adapt_every=1, average=0.9),
    "ekfac": lambda m: natgrad.KFAC(m, CE, structure="ekfac", statistics_every=2, bases_every=2, adapt_every=2),
    "numbers": lambda m: natgrad.KFAC(m, CE, lr=0.05, momentum=0.9, adapt_every=1),
    "orthogonalized": lambda m: natgrad.KFAC(m, CE, structure="input", orthogonalize=True, adapt_every=1),
    "exact": lambda m: natgrad.NaturalGradient(m, CE, momentum=None),
    "cg": lambda m: natgrad.NaturalGradient(m, CE, solver="cg"),
}


def flat(value):
    """All tensors and numbers in nested containers."""
    if isinstance(value, dict):
        return [t for k in value for t in (k, *flat(value[k]))]
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in flat(v)]
    return [value]


def alike(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(a, b, strict=True)
    )


@pytest.mark.pairs
@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("warm", [0, 3])
@pytest.mark.parametrize("name", MAKE)
def test_an_exception_in_any_forward_of_a_step(name, warm, error):
    torch.manual_seed(0)
    model = Stumbling().double()
    if name == "exact":
        model.bn.eval()
    opt = MAKE[name](model)

    def forward():
        loss = opt.loss(model(X), Y)
        opt.zero_grad()
        loss.backward()

    for _ in range(warm):
        forward()
        opt.step()
    raised = 0
    for at in (1, 2, 4, 7):
        forward()
        before = copy.deepcopy(flat([model.state_dict(), opt.state_dict()]))
        model.left, model.error = at, error
        try:
            opt.step()
        except type(error):
            raised += 1
            model.left = -1
            assert alike(flat([model.state_dict(), opt.state_dict()]), before)
            opt.step()  # what was pending still is
        model.left = -1
        assert opt.diagnostics["accepted"] in (True, False)
    assert raised


def test_an_exception_in_a_users_penalty():
    model = Stumbling().double()
    opt = natgrad.KFAC(model, CE, adapt_every=1)
    calls = []

    def penalty():
        calls.append(1)
        if len(calls) == 3:
            raise ZeroDivisionError
        return 1e-3 * model.a.weight.square().sum()

    (opt.loss(model(X), Y) + opt.plus(penalty)).backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ZeroDivisionError):
        opt.step()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    opt.step()
    assert opt.diagnostics["accepted"]


@pytest.fixture
def handler_of_ctrl_c():
    """Sets the handler. It is not Python's own if a shell runs the tests in the background: Ctrl-C is then ignored."""
    before = signal.getsignal(signal.SIGINT)
    yield lambda handler: signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGINT, before)


def interrupted():
    """A change that Ctrl-C comes into. Gives what was done."""
    done = []

    def change():
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            done.append("the rest")

    return done, change


def test_ctrl_c_waits_for_the_end_of_a_change(handler_of_ctrl_c):
    handler_of_ctrl_c(signal.default_int_handler)
    done, change = interrupted()
    with pytest.raises(KeyboardInterrupt):
        change()
    assert done == ["the rest"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_that_is_ignored_stays_ignored(handler_of_ctrl_c):
    handler_of_ctrl_c(signal.SIG_IGN)
    done, change = interrupted()
    change()
    assert done == ["the rest"]
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
