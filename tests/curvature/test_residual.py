"""`natgrad.residual` against the dense difference of the exact block and K-FAC's, and where it must vanish."""

import json
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import natgrad
from cases_by_hand import MODELS, ByHand
from natgrad.curvature.independence import unbiased_hsic
from oracles import f64, meant, net, randn, summed

CLASSES = 3
WEIGHTED = nn.CrossEntropyLoss(torch.tensor([0.5, 2.0, 1.3], dtype=f64), ignore_index=1)


def labels(*shape):
    return torch.randint(CLASSES, shape, generator=torch.Generator().manual_seed(1))


def check_against_dense(model, loss, data, estimator="exact", sharing="expand", **options):
    """Compares every layer's norms with those of `fisher`'s dense blocks; returns the report."""

    def blocks(structure):
        generator = torch.Generator().manual_seed(5)
        return natgrad.fisher(
            model, loss, data, structure, estimator=estimator, samples=2, sharing=sharing, generator=generator
        ).blocks

    generator = torch.Generator().manual_seed(5)
    report = natgrad.residual(
        model,
        loss,
        data,
        estimator=estimator,
        samples=2,
        sharing=sharing,
        generator=generator,
        **{"permutations": 3} | options,
    )
    exact, kfac = blocks("block"), blocks("kfac")
    assert list(report) == list(exact)
    for name, r in report.items():
        G = exact[name].to_dense()
        R = G - kfac[name].to_dense()
        assert r.block_norm == pytest.approx(G.norm().item(), rel=1e-8)
        assert r.norm == pytest.approx(R.norm().item(), abs=1e-8 * r.block_norm)
        assert r.relative == pytest.approx(r.norm / r.block_norm)
        assert R.norm() > 1e-3 * G.norm()  # there is something to find
    return report


@pytest.mark.parametrize("estimator", ["exact", "mc", "empirical"])
@pytest.mark.parametrize("reduction", [meant, summed])
@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), WEIGHTED], ids=["plain", "weighted"])
@pytest.mark.parametrize("batches", [1, 3])
def test_norms_are_those_of_the_dense_matrices(estimator, reduction, loss, batches):
    x, y = randn(20, 4), labels(20)
    data = list(zip(x.tensor_split(batches), y.tensor_split(batches), strict=True))
    report = check_against_dense(net(4, 5, CLASSES), reduction(loss), data, estimator, chunk=8 if batches > 1 else 2000)
    for r in report.values():
        assert r.norm <= r.bound
        assert r.cases == (20 if loss is not WEIGHTED else int((y != WEIGHTED.ignore_index).sum()))


def test_layers_without_bias():
    report = check_against_dense(net(4, 5, CLASSES, bias=False), nn.CrossEntropyLoss(), (randn(12, 4), labels(12)))
    assert all(r.condition.C is None and r.condition.A >= 1 for r in report.values())


def test_a_layer_of_a_bias_alone():
    report = natgrad.residual(net(4, 5, 2), nn.MSELoss(), (randn(9, 4), randn(9, 2)), params=["0.bias"])
    (r,) = report.values()
    assert r.condition == (None, None)
    assert r.input_spread == r.norm == 0  # x = 1, whatever the case


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("reduction", [meant, summed])
@pytest.mark.parametrize("model", ["pooled", "sequence", "twice"])
@pytest.mark.parametrize("chunk", [8, 30, 2000], ids=["by cases", "formed in parts", "formed"])
def test_norms_with_several_positions(model, sharing, reduction, chunk):
    loss, positions = reduction(nn.CrossEntropyLoss()), () if model == "twice" else (3,)
    data = [
        (randn(n, *positions, 4, seed=n), labels(n, *positions) if model == "sequence" else labels(n)) for n in (5, 6)
    ]
    model = MODELS[model](4, 5, bias=True)
    report = check_against_dense(model, loss, data, sharing=sharing, chunk=chunk)
    shared = report["first"]
    assert shared.bound is None
    assert shared.cases == 11 * ((len(model.uses) - 1 if not positions else 3) if sharing == "expand" else 1)


def test_batches_of_different_lengths():
    data = [(randn(5, t, 4, seed=t), labels(5)) for t in (2, 4)]
    report = check_against_dense(MODELS["pooled"](4, 5, bias=True), nn.CrossEntropyLoss(), data)
    assert report["first"].cases == 5 * 2 + 5 * 4


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), WEIGHTED, summed(WEIGHTED)], ids=["mean", "weighted", "sum"])
def test_figures_are_those_of_the_cases_formed_by_hand(loss):
    model, data = MODELS["mlp"](4, 5, bias=True), (randn(12, 4), labels(12))
    report = natgrad.residual(model, loss, data)
    hand = ByHand.of(model, loss, [data])
    for layer, examples in hand.examples.items():
        r = report[layer.name]
        examples = [e for e in examples if e.kept[0]]
        n = len(examples)
        x = torch.stack([torch.cat([e.h[0], e.h.new_ones(1)]) for e in examples])
        X = torch.einsum("ni,nj->nij", x, x).flatten(1)
        Y = n * hand.scale * torch.stack([(e.g[:, 0].mT @ e.g[:, 0]).flatten() for e in examples])  # E[Y] = B
        X0, Y0 = X - X.mean(0), Y - Y.mean(0)
        covariance = X0.mT @ Y0 / n
        assert r.norm == pytest.approx(covariance.norm().item(), rel=1e-8)
        assert r.norm == pytest.approx((hand.exact(layer) - hand.kfac(layer)).norm().item(), rel=1e-8)
        assert r.block_norm == pytest.approx((X.mT @ Y / n).norm().item(), rel=1e-8)
        assert r.input_norm == pytest.approx(X.mean(0).norm().item())
        assert r.output_norm == pytest.approx(Y.mean(0).norm().item())
        assert r.input_spread == pytest.approx((X0.square().sum() / n).sqrt().item())
        assert r.output_spread == pytest.approx((Y0.square().sum() / n).sqrt().item())
        assert r.bound == pytest.approx(r.input_spread * r.output_spread)
        alignment = covariance.square().sum() * n**2 / ((X0 @ X0.mT).norm() * (Y0 @ Y0.mT).norm())
        assert r.cka == pytest.approx(alignment.item())
        assert r.hsic_unbiased == pytest.approx(unbiased_hsic(X @ X.mT, Y @ Y.mT), rel=1e-6)
        assert pytest.approx(torch.linalg.cond(x.mT @ x).item(), rel=1e-6) == r.condition.A
        assert pytest.approx(torch.linalg.cond(x[:, :-1].mT.cov()).item(), rel=1e-6) == r.condition.C


# Where nothing is left out -----------------------------------------------------------------------------


def test_one_case_has_no_residual():
    report = natgrad.residual(net(4, 5, CLASSES), nn.CrossEntropyLoss(), (randn(1, 4), labels(1)))
    for r in report.values():
        assert r.relative < 1e-7
        assert r.bound == 0
        assert math.isnan(r.cka)
        assert math.isnan(r.hsic_unbiased)
        assert r.condition == (math.inf, math.inf)


def test_a_linear_network_with_squared_error_has_no_residual():
    model = nn.Sequential(nn.Linear(4, 5, dtype=f64), nn.Linear(5, 2, dtype=f64))
    for r in natgrad.residual(model, nn.MSELoss(), (randn(30, 4), randn(30, 2))).values():
        assert r.relative < 1e-7
        assert r.input_spread > 0.1
        assert r.output_spread == 0
        assert r.p_value == 1


class Gated(nn.Module):
    """One layer, whose output is multiplied by what the data say: its output curvature is theirs alone."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2, dtype=f64)

    def forward(self, x):
        return self.layer(x[:, :3]) * x[:, 3:]


def gated(h, gates):
    x = torch.cat([h, gates], 1)
    return natgrad.residual(Gated(), nn.MSELoss(), (x, torch.zeros(len(x), 2, dtype=f64)))["layer"]


def test_a_full_factorial_design_has_no_residual():
    h, gates = randn(6, 3), randn(5, 2, seed=1)
    r = gated(h.repeat_interleave(5, 0), gates.repeat(6, 1))
    assert r.relative < 1e-7
    assert r.cka < 1e-12
    assert r.bound > 0.01
    assert r.p_value == 1  # no order of the cases is more independent


def test_inputs_that_gate_themselves_are_found_dependent():
    h = randn(60, 3)
    r = gated(h, h[:, :2])
    assert r.relative > 0.1
    assert r.cka > 0.5
    assert r.p_value == 1 / 201
    assert 0 < r.hsic_unbiased < 2 * r.norm**2


@given(n=st.integers(2, 12), seed=st.integers(0, 10**6), reduction=st.sampled_from(["mean", "sum"]))
def test_the_spreads_bound_the_residual(n, seed, reduction):
    x, y = randn(n, 3, seed=seed), randn(n, 2, seed=seed + 1)
    for r in natgrad.residual(net(3, 4, 2), nn.MSELoss(reduction=reduction), (x, y), permutations=0).values():
        assert r.norm <= r.bound * (1 + 1e-9) + 1e-7 * r.block_norm
        assert math.isnan(r.p_value)


# The report --------------------------------------------------------------------------------------------


@pytest.fixture
def report():
    x = randn(12, 4)
    x[:, 0] = 0  # a singular factor
    return natgrad.residual(net(4, 5, CLASSES, bias=False), nn.CrossEntropyLoss(), (x, labels(12)))


def test_table_is_aligned(report):
    header, *lines = report.table().splitlines()
    assert repr(report) == report.table()
    assert header.split()[:3] == ["layer", "‖R‖/‖G‖", "‖R‖"]
    assert [line.split()[0] for line in lines] == ["0", "2"]
    assert {len(line) for line in lines} == {len(header)}
    assert float(lines[0].split()[1]) == pytest.approx(report["0"].relative, rel=1e-2)
    assert lines[0].split()[-2:] == ["inf", "–"]


def test_to_dict_survives_json(report):
    figures = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert figures["2"]["norm"] == report["2"].norm
    assert figures["0"]["condition"] == {"A": "inf", "C": None}


def test_plot_writes_a_picture(report, tmp_path):
    report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_an_unknown_layer_gets_the_known_ones(report):
    with pytest.raises(KeyError, match=r"no layer is called '1'; expected one of '0', '2'"):
        report["1"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"chunk": 7}, "chunk=7 .* at least 8"),
        ({"permutations": -1}, "permutations=-1 .* at least 0"),
        ({"sharing": "both"}, "sharing='both' is unknown: expected one of 'expand', 'reduce'"),
        ({"estimator": "some"}, "estimator='some' is unknown"),
    ],
)
def test_mistakes(options, words):
    with pytest.raises(ValueError, match=words):
        natgrad.residual(net(4, CLASSES), nn.CrossEntropyLoss(), (randn(5, 4), labels(5)), **options)


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        natgrad.residual(net(4, CLASSES), nn.CrossEntropyLoss(), (randn(5, 4) * math.nan, labels(5)))


LARGE = """
import resource, sys, torch, natgrad
x, y = torch.randn(2000, 784), torch.randint(1000, (2000,))
r = natgrad.residual(
    torch.nn.Linear(784, 1000), torch.nn.CrossEntropyLoss(), (x, y), estimator="mc", params=["weight", "bias"],
    permutations=2,
)
r.plot(sys.argv[1])
assert "matplotlib.pyplot" not in sys.modules
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


def test_memory_of_a_large_layer(tmp_path):
    """Its block would have 785,000 rows. Nor is pyplot, whose backend is global, ever touched."""
    pytest.importorskip("resource")
    if sys.platform != "linux":
        pytest.skip("ru_maxrss is in KiB on Linux alone")
    run = subprocess.run(
        [sys.executable, "-c", LARGE, str(tmp_path / "plot.png")], capture_output=True, text=True, check=True
    )
    assert float(run.stdout) < 2  # GiB, with torch's own
