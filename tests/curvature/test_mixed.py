"""A structure for each layer, and the errors of several structures beside one another."""

import pytest
import torch
from torch import nn

import natgrad
from natgrad.curvature.mixed import fits
from oracles import close, f64, net, randn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 3, 2), nn.GroupNorm(1, 3)
        self.mlp, self.head = net(12, 6, 4), nn.Linear(4, 3, bias=False)

    def forward(self, x):
        return self.head(self.mlp(self.norm(self.conv(x)).tanh().flatten(1)))


def problem():
    torch.manual_seed(0)
    x, y = randn(14, 1, 3, 3), torch.arange(14) % 3
    return Model().double(), nn.CrossEntropyLoss(), [(x[:6], y[:6]), (x[6:], y[6:])]


CHOICE = {"conv": "kfoc", "norm": "low_rank", "mlp.0": "ekfac", "mlp.*": "block", "head.weight": "diagonal"}
EACH = {"conv": "kfoc", "norm": "low_rank", "mlp.0": "ekfac", "mlp.2": "block", "head": "diagonal"}


@pytest.mark.parametrize("options", [{}, {"centered": False}, {"estimator": "mc"}])
def test_every_layer_has_the_block_of_its_structure(options):
    model, loss, data = problem()

    def of(structure):
        return natgrad.fisher(model, loss, data, structure, generator=torch.Generator().manual_seed(0), **options)

    F = of(CHOICE)
    assert list(F.space.names) == [n for n, _ in model.named_parameters()]
    for layer, structure in EACH.items():
        close(F.blocks[layer].to_dense(), of(structure).blocks[layer].to_dense())
    v = randn(F.space.size)
    assert torch.isfinite(F.solve(v, 0.1)).all()


def test_uses_take_them():
    model, loss, data = problem()
    model.eval()
    choice = {"head": "block", "*": "kfac"}
    scores = natgrad.influence(model, loss, data, data, choice, damping=0.1, centered=False)
    F = natgrad.fisher(model, loss, data, choice, centered=False)
    close(scores, natgrad.influence(model, loss, data, data, factors=F, damping=0.1))
    P = natgrad.laplace(model, loss, data, choice).fit_prior()
    assert torch.isfinite(P.log_marginal_likelihood())


def test_what_cannot_be_is_said():
    model, loss, data = problem()
    with pytest.raises(ValueError, match="structure has no entry for layer 'norm'"):
        natgrad.fisher(model, loss, data, {"conv": "kfac"})
    with pytest.raises(ValueError, match=r"'haed', which fits no layer.*did you mean 'head'"):
        natgrad.fisher(model, loss, data, {"haed": "block", "*": "kfac"})
    with pytest.raises(ValueError, match=r"structure\['conv'\]='dense' is unknown"):
        natgrad.fisher(model, loss, data, {"conv": "dense", "*": "kfac"})
    with pytest.raises(ValueError, match="structure is an empty dict"):
        natgrad.fisher(model, loss, data, {})


def test_patterns():
    assert fits("a.weight", "a")
    assert fits("layers.3.fc", "layers.*.fc")
    assert not fits("ab", "a")


@pytest.mark.parametrize("estimator", ["exact", "mc"])
@pytest.mark.parametrize("dtype", [torch.float32, f64])
def test_the_report_has_the_errors_of_other_structures(estimator, dtype):
    model, loss, data = problem()
    others = ["kfac", "ekfac", "kfoc", "diagonal", "block"]

    def seeded(**options):
        return {"generator": torch.Generator().manual_seed(0), "estimator": estimator, "centered": False} | options

    report = natgrad.residual(
        model.to(dtype), loss, [(x.to(dtype), y) for x, y in data], compare=others, permutations=0, **seeded()
    )
    tol = 1e-7 if dtype == f64 else 2e-3
    exact = natgrad.fisher(model, loss, [(x.to(dtype), y) for x, y in data], "block", **seeded())
    for name in others:
        M = natgrad.fisher(model, loss, [(x.to(dtype), y) for x, y in data], name, **seeded())
        for layer, r in report.items():
            G = exact.blocks[layer].to_dense().double()
            assert r.others[name] == pytest.approx(float((G - M.blocks[layer].to_dense()).norm() / G.norm()), abs=tol)
    for layer in ("conv", "mlp.0", "mlp.2", "head"):
        r = report[layer]
        assert r.others["kfac"] == pytest.approx(r.relative, abs=tol)
        assert r.others["kfoc"] <= r.others["kfac"] + tol
        assert r.others["ekfac"] <= r.others["kfac"] + tol
    assert "kfoc" in report.table().splitlines()[0]
    assert report.to_dict()["head"]["others"]["kfoc"] == report["head"].others["kfoc"]


def test_structures_to_compare_are_checked():
    with pytest.raises(ValueError, match=r"compare='kfaco' is unknown.*did you mean 'kfac'"):
        natgrad.residual(*problem(), compare=["kfaco"])
