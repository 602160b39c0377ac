"""On a GPU: the same matrices and the same steps as on the CPU, in float64; training in half precision; resumption."""

import copy
import math
import statistics
import warnings

import pytest
import torch
from torch import nn

import natgrad
from layers.networks import NETWORKS, make
from models import MODELS
from oracles import close, net, parameter_vector, randn

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
LOSS = nn.CrossEntropyLoss()
GPU = torch.device("cuda")


def steps(model, opt, x, y, count):
    losses = []
    for _ in range(count):
        loss = opt.loss(model(x), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("structure", ["dense", "block", "kfac", "ekfac", "diagonal"])
def test_the_matrix_is_the_cpus(name, structure):
    model, x, y = make(name)
    here = natgrad.fisher(model, LOSS, (x, y), structure)
    there = natgrad.fisher(model.to(GPU), LOSS, (x.to(GPU), y.to(GPU)), structure)
    v = randn(here.space.size)
    close((there @ v.to(GPU)).cpu(), here @ v, 1e-9)
    close(there.solve(v.to(GPU), 0.1).cpu(), here.solve(v, 0.1), 1e-7)
    close(there.trace().cpu(), here.trace(), 1e-9)


@pytest.mark.parametrize("make_matrix", [natgrad.fisher, natgrad.hessian], ids=["fisher", "hessian"])
@pytest.mark.parametrize("name", ["LSTM", "attention", "attention, masked", "conv2d", "layer norm", "group norm"])
def test_products_are_the_cpus(name, make_matrix):
    model, x, y = make(name)
    model.eval()
    here = make_matrix(model, LOSS, (x, y), "implicit")
    v = randn(here.space.size)
    expected = here @ v
    there = make_matrix(model.to(GPU), LOSS, (x.to(GPU), y.to(GPU)), "implicit")
    close((there @ v.to(GPU)).cpu(), expected, 1e-9)


def test_products_with_a_batchs_own_averages_are_the_cpus():
    model, x, y = make("batch norm")
    model.train()
    here, there = copy.deepcopy(model), model.to(GPU)
    here = natgrad.fisher(here, LOSS, (x, y), "implicit")
    there = natgrad.fisher(there, LOSS, (x.to(GPU), y.to(GPU)), "implicit")
    v = randn(here.space.size)
    close((there @ v.to(GPU)).cpu(), here @ v, 1e-9)


@pytest.mark.parametrize("estimator", ["exact", "empirical"])
def test_the_residual_is_the_cpus(estimator):
    model, x, y = net(4, 6, 3), randn(32, 4), torch.arange(32) % 3
    here = natgrad.residual(model, LOSS, (x, y), estimator=estimator, permutations=0)
    there = natgrad.residual(model.to(GPU), LOSS, (x.to(GPU), y.to(GPU)), estimator=estimator, permutations=0)
    assert list(here) == list(there)
    for layer in here:
        assert float(there[layer].relative) == pytest.approx(float(here[layer].relative), rel=1e-7)


OPTIONS = {
    "kfac": {},
    "not centered": {"centered": False},
    "exact damping": {"damping_style": "exact"},
    "ekfac": {"structure": "ekfac", "bases_every": 10},
    "diagonal": {"structure": "diagonal"},
    "input": {"structure": "input"},
    "fixed": {"lr": 0.1, "momentum": 0.9, "damping": 0.1, "statistics_every": 2, "inverses_every": 4},
    "orthogonalized": {"structure": "input", "orthogonalize": True, "lr": 0.01, "momentum": 0.9},
}


def trained(device, options, count=20):
    torch.manual_seed(0)
    model, x, y = net(5, 8, 3).to(device), randn(40, 5).to(device), (torch.arange(40) % 3).to(device)
    opt = natgrad.KFAC(model, LOSS, estimator="exact", weight_decay=1e-3, **options)
    return steps(model, opt, x, y, count), parameter_vector(model).cpu()


@pytest.mark.parametrize("name", OPTIONS)
def test_steps_are_the_cpus(name):
    losses, here = trained("cpu", OPTIONS[name])
    same, there = trained(GPU, OPTIONS[name])
    assert losses == pytest.approx(same, rel=1e-7)
    close(there, here, 1e-6)


def test_natural_gradient_is_the_cpus():
    found = []
    for device in ("cpu", GPU):
        torch.manual_seed(0)
        model, x, y = net(3, 6, 1).to(device), randn(20, 3).to(device), randn(20, 1, seed=1).to(device)
        opt = natgrad.NaturalGradient(model, nn.MSELoss())
        steps(model, opt, x, y, 10)
        found.append(parameter_vector(model).cpu())
    close(*found, 1e-5)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "compiled"])
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16, None], ids=["bfloat16", "float16", "float32"])
def test_KFAC_trains_the_models_that_people_have(name, precision):
    example = MODELS[name]()
    model, x, y = example.model.to(GPU), example.x.to(GPU), example.y.to(GPU)
    opt = natgrad.KFAC(model, LOSS, output=example.read)
    scaler = torch.amp.GradScaler(enabled=precision is torch.float16)
    losses = []
    for _ in range(20):
        with torch.autocast("cuda", precision, enabled=precision is not None):
            returned = model(x)
        loss = opt.loss(returned, y)
        opt.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        losses.append(loss.item())
    assert all(map(math.isfinite, losses))
    assert min(losses[-3:]) < 0.97 * losses[0]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_resumes_bit_for_bit(options):
    x, y = randn(40, 5).to(GPU), (torch.arange(40) % 3).to(GPU)
    model = net(5, 8, 3).to(GPU)
    opt = natgrad.KFAC(model, LOSS, **options)
    steps(model, opt, x, y, 5)
    again = net(5, 8, 3).to(GPU)
    fresh = natgrad.KFAC(again, LOSS, **options)
    again.load_state_dict(copy.deepcopy(model.state_dict()))
    fresh.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert steps(again, fresh, x, y, 9) == steps(model, opt, x, y, 9)


@pytest.mark.parametrize(("first", "then"), [("cpu", GPU), (GPU, "cpu")])
def test_a_run_goes_on_on_another_device(first, then):
    x, y = randn(40, 5), torch.arange(40) % 3
    model = net(5, 8, 3).to(first)
    opt = natgrad.KFAC(model, LOSS)
    losses = steps(model, opt, x.to(first), y.to(first), 5)
    other = net(5, 8, 3).to(then)
    fresh = natgrad.KFAC(other, LOSS)
    other.load_state_dict(model.state_dict())
    fresh.load_state_dict(opt.state_dict())
    losses += steps(other, fresh, x.to(then), y.to(then), 5)
    assert fresh.diagnostics["accepted"]
    assert losses[-1] < losses[4]


def waits(call):
    """How often the host waits for the GPU."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(w.message) for w in caught)


@pytest.mark.parametrize(("options", "most"), [({"lr": 0.1, "momentum": 0.9, "damping": 0.1}, 4), ({}, 10)])
def test_an_ordinary_step_waits_for_the_gpu_a_few_times_only(options, most):
    """For the losses and their scales, the penalty, and whether gradient and direction are finite; where the step is
    adaptive also for the quadratic model."""
    x, y = randn(40, 5).to(GPU), (torch.arange(40) % 3).to(GPU)
    model = net(5, 8, 3).to(GPU)
    opt = natgrad.KFAC(model, LOSS, weight_decay=1e-3, statistics_every=10, inverses_every=100, **options)
    steps(model, opt, x, y, 21)
    counts = []
    for _ in range(7):
        loss = opt.loss(model(x), y)
        opt.zero_grad()
        loss.backward()
        counts.append(waits(opt.step))
    assert 0 < statistics.median(counts) <= most, counts
