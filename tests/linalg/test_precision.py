"""Products in few digits, where they may be: near the full ones, biases exact, and full where nothing is gained."""

import copy

import pytest
import torch
from torch import nn

import natgrad
from natgrad.capture.recorder import Recorder
from natgrad.curvature.products import tangent
from natgrad.linalg import Kronecker, KroneckerEigen, precision
from natgrad.linalg.precision import linear, matmul, matmul_precision
from oracles import fit

LARGE = 256  # products of three such widths are worth casting


@pytest.fixture(autouse=True)
def casting(monkeypatch):
    """As on a CPU that has products of bfloat16, though they may be slow here."""
    monkeypatch.setattr(precision, "_multiplies_in_bfloat16", lambda: True)


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def error(found, exact):
    assert found.dtype == torch.float32
    return float((found.double() - exact).norm() / exact.norm())


def product_of_three(n, dtype):
    B, V, A = (random(n + i, n + 1 + i).to(dtype) for i in range(3))
    return matmul(B, V, A)


def sum_of_two(n, dtype):
    h, W = random(2, n // 2, n).to(dtype), random(n + 1, n).to(dtype)
    return linear([(h, W), (h.roll(1, -1), W.roll(1, 0))], random(n + 1).to(dtype))


@pytest.mark.parametrize("compute", [product_of_three, sum_of_two])
def test_large_products_are_in_bfloat16_where_asked_for(compute):
    exact, full = compute(LARGE, torch.float64), compute(LARGE, torch.float32)
    assert error(full, exact) < 1e-6
    with matmul_precision("medium"):
        assert 1e-4 < error(compute(LARGE, torch.float32), exact) < 1e-2
        with matmul_precision("highest"):
            assert torch.equal(compute(LARGE, torch.float32), full)
        assert error(compute(LARGE, torch.float32), exact) > 1e-4
        assert torch.equal(compute(LARGE, torch.float64), exact)
    assert torch.equal(compute(LARGE, torch.float32), full)
    with matmul_precision("high"):
        assert torch.equal(compute(LARGE, torch.float32), full)


@pytest.mark.parametrize("compute", [product_of_three, sum_of_two])
def test_small_ones_are_not_cast(compute, monkeypatch):
    with matmul_precision("medium"):
        monkeypatch.setattr(torch.Tensor, "bfloat16", lambda t: pytest.fail("cast"))
        assert error(compute(16, torch.float32), compute(16, torch.float64)) < 1e-2


def test_the_size_of_a_product_counts_its_multiplications(monkeypatch):
    monkeypatch.setattr(precision, "WORTH_CASTING", 81)
    A, B = random(10, 4).float(), random(4, 2).float()  # 80 multiplications
    with matmul_precision("medium"):
        full = precision.matmul(A, B)
        monkeypatch.setattr(precision, "WORTH_CASTING", 80)
        assert torch.equal(full, A @ B)
        assert not torch.equal(precision.matmul(A, B), full)


def test_not_where_the_processor_has_no_such_products(monkeypatch):
    monkeypatch.setattr(precision, "_multiplies_in_bfloat16", lambda: False)
    with matmul_precision("medium"):
        monkeypatch.setattr(torch.Tensor, "bfloat16", lambda t: pytest.fail("cast"))
        product_of_three(LARGE, torch.float32)


def test_the_setting_is_as_it_was_after_an_error():
    before = torch.backends.mkldnn.matmul.fp32_precision
    with pytest.raises(RuntimeError), matmul_precision("medium"):
        matmul(random(2, 3), random(2, 3))
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    assert error(product_of_three(LARGE, torch.float32), product_of_three(LARGE, torch.float64)) < 1e-6


@pytest.mark.parametrize("bias", [True, False])
def test_biases_keep_their_digits(bias):
    b = random(LARGE) if bias else None
    with matmul_precision("medium"):
        out = linear([(torch.zeros(LARGE, LARGE), random(LARGE, LARGE))], b)
    assert torch.equal(out, (b if bias else torch.zeros(LARGE)).expand_as(out))


def spd(n):
    return torch.eye(n) + random(n, n) @ random(n, n).T / n


@pytest.mark.parametrize("make", [
    lambda: Kronecker(spd(LARGE), spd(LARGE + 1)),
    lambda: Kronecker(spd(LARGE), spd(LARGE + 1)).eigen(),
    lambda: KroneckerEigen(None, spd(LARGE + 1), 1 + random(LARGE + 1, LARGE).square()),
], ids=["Kronecker", "eigen", "eigen, one basis"])  # fmt: skip
def test_operators_multiply_in_the_precision_of_the_context(make):
    operator, V = make(), random(LARGE + 1, LARGE)
    full = operator @ V
    with matmul_precision("medium"):
        assert 1e-4 < error(operator @ V, full.double()) < 1e-2


@pytest.mark.parametrize("shape", [(LARGE,), (8, 32)], ids=["examples", "positions"])
@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_tangents_are_near_the_exact_ones_far_from_zero_too(shape, shift):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(LARGE, LARGE), nn.Tanh(), nn.Linear(LARGE, 4)), random(*shape, LARGE) + shift
    direction = {n: random(*p.shape) / p.shape[-1] for n, p in model.named_parameters()}
    for first in (dict(model.named_parameters()), direction):  # the shift makes no difference to the function
        first["0.bias"].data -= shift * first["0.weight"].data.sum(1)
    with Recorder(dict(model.named_parameters())) as recorder:
        model(x)
    with matmul_precision("medium"):
        _, found = tangent(model, lambda f: f(x), direction, recorder.uses)
    exact_model, exact_direction = copy.deepcopy(model).double(), {n: d.double() for n, d in direction.items()}
    _, exact = tangent(exact_model, lambda f: f(x.double()), exact_direction)
    assert 1e-5 < error(found, exact) < 2e-3


def test_training_is_as_good():
    """The same run in few digits and in all: lengths differ by rounding, errors after some steps hardly."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(LARGE, LARGE), nn.Tanh(), nn.Linear(LARGE, LARGE))
    x = random(512, LARGE)
    y = torch.sin(x @ random(LARGE, LARGE) / 16)
    after = []
    for how in ("medium", "highest"):
        twin = copy.deepcopy(model)
        opt = natgrad.KFAC(twin, nn.MSELoss(), matmul_precision=how, generator=torch.Generator().manual_seed(0))
        after.append(fit(opt, twin, x, y, 30)[-1])
    assert after[0] == pytest.approx(after[1], rel=0.1)
    assert after[1] < 0.1 * float(y.square().mean())
