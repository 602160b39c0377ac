"""Forward mode with the outputs of a recorded forward is forward mode without them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

import natgrad
from layers.networks import NETWORKS, make
from natgrad.capture.recorder import Recorder
from natgrad.curvature.products import tangent
from oracles import close, f64, fit, randn


class Counted(TorchFunctionMode):
    """How often each function was called."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls.append(func)
        return func(*args, **(kwargs or {}))


def both(model, x, names=None):
    """`J d` with recorded uses, and without."""
    parameters = {n: p for n, p in model.named_parameters() if names is None or n in names}
    d = {n: randn(1, *p.shape, seed=i)[0] for i, (n, p) in enumerate(parameters.items())}
    with Recorder(parameters) as recorder:
        model(x)
    _, found = tangent(model, lambda forward: forward(x), d, recorder.uses)
    _, expected = tangent(model, lambda forward: forward(x), d)
    return found, expected


@pytest.mark.parametrize("name", NETWORKS)
def test_of_every_kind(name):
    model, x, _ = make(name)
    close(*both(model, x), 1e-12)


@pytest.mark.parametrize("names", [["0.weight"], ["0.bias"], ["3.bias"], ["3.weight"], ["0.bias", "3.weight"]])
@pytest.mark.parametrize("inplace", [False, True])
def test_of_some_parameters_and_functions_in_place(names, inplace):
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(inplace=inplace), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 2, groups=2), nn.Flatten()
    ).to(f64)
    close(*both(model, randn(3, 2, 5, 5), names), 1e-12)


def test_a_convolution_is_not_computed_again():
    model, x = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Conv1d(3, 2, 2, groups=1)).to(f64), randn(3, 2, 7)
    parameters = dict(model.named_parameters())
    d = {n: randn(*p.shape) for n, p in parameters.items()}
    with Recorder(parameters) as recorder:
        model(x)
    with Counted() as counted:
        tangent(model, lambda forward: forward(x), d, recorder.uses)
    assert counted.calls.count(F.conv1d) == 3  # of the input with a tangent, one more


def test_another_path_than_the_recorded_one_is_computed():
    model, x = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)).to(f64), randn(3, 2)
    parameters = dict(model.named_parameters())
    d = {n: randn(*p.shape) for n, p in parameters.items()}
    with Recorder(parameters) as recorder:
        model(x)
    turned = copy.copy(model)
    turned.forward = lambda x: model[0](model[2](x))
    found = tangent(turned, lambda forward: forward(x), d, recorder.uses)[1]
    close(found, tangent(turned, lambda forward: forward(x), d)[1], 1e-12)


@pytest.mark.parametrize("times", [2, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_a_module_that_is_registered_twice_keeps_its_parameters(times, tied):
    """torch.func.functional_call leaves other tensors in it."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(3, 3), nn.Tanh()).double()
    model = nn.Sequential(*[block] * times, nn.Linear(3, 3).double())
    if tied:
        model[-1].weight = block[0].weight
    before = dict(model.named_parameters())
    data = torch.randn(6, 3, dtype=torch.float64), torch.arange(6) % 3
    F, dense = (natgrad.fisher(model, nn.CrossEntropyLoss(), data, s) for s in ("implicit", "dense"))
    v = torch.randn(F.space.size, dtype=torch.float64)
    torch.testing.assert_close(F @ v, dense @ v, rtol=1e-9, atol=1e-12)
    opt = natgrad.KFAC(model, nn.CrossEntropyLoss())
    losses = fit(opt, model, *data, 4)
    assert losses[-1] < losses[0]
    assert all(p is before[n] for n, p in model.named_parameters())
