"""Models whose forward takes derivatives itself: one residual, written in three ways, has one matrix and one step."""

import pytest
import torch
from torch import nn

import natgrad
from oracles import close, f64, fit, randn

X, TARGET = randn(9, 2), torch.ones(9, 1, dtype=f64)


class Residual(nn.Module):
    """`Δu(x)` of a small network `u`."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.u = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)).double()

    def point(self, z):
        return self.u(z[None])[0, 0]


class ByAutograd(Residual):
    def forward(self, x):
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(self.u(x).sum(), x, create_graph=True)
        second = [torch.autograd.grad(slope[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2)]
        return sum(second)[:, None]


class ByHessians(Residual):
    def forward(self, x):
        return torch.func.vmap(lambda z: torch.func.hessian(self.point)(z).diagonal().sum())(x)[:, None]


class ByForwardMode(Residual):
    def forward(self, x):
        def along(e):
            def slope(z):
                return torch.func.jvp(self.point, (z,), (e,))[1]

            return lambda z: torch.func.jvp(slope, (z,), (e,))[1]

        unit = torch.eye(2, dtype=x.dtype)
        return sum(torch.func.vmap(along(e))(x) for e in unit)[:, None]


WAYS = [ByAutograd, ByHessians, ByForwardMode]
every_way = pytest.mark.parametrize("way", WAYS)


def by_hand(model):
    """The objective's gradient and `2 JᵀJ / n`, row by row."""
    parameters = list(model.parameters())
    output = model(X)
    rows = [torch.autograd.grad(o, parameters, retain_graph=True, allow_unused=True) for o in output.flatten()]
    flat = [[torch.zeros_like(p) if g is None else g for g, p in zip(r, parameters, strict=True)] for r in rows]
    J = torch.stack([torch.cat([g.flatten() for g in row]) for row in flat])
    return 2 * J.T @ (output - TARGET).detach()[:, 0] / len(X), 2 * J.T @ J / len(X)


@every_way
@pytest.mark.parametrize("structure", ["dense", "implicit"])
def test_the_matrix(way, structure):
    model = way()
    F = natgrad.fisher(model, nn.MSELoss(), (X, TARGET), structure)
    close(F @ torch.eye(F.space.size, dtype=f64), by_hand(ByAutograd())[1], 1e-10)


@every_way
@pytest.mark.parametrize("solver", ["dual", "primal", "cg"])
def test_the_exact_step(way, solver):
    model = way()
    g, F = by_hand(ByAutograd())
    options = {"solver": solver, "lr": 0.5, "momentum": 0.0, "damping": 0.01}
    opt = natgrad.NaturalGradient(model, nn.MSELoss(), **options, **({"tolerance": 1e-13} if solver == "cg" else {}))
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    opt.loss(model(X), TARGET).backward()
    opt.step()
    moved = torch.cat([p.detach().flatten() for p in model.parameters()]) - start
    close(moved, -0.5 * torch.linalg.solve(F + 0.01 * torch.eye(len(F), dtype=f64), g), 1e-7)


@every_way
def test_adaptive_steps_measure_the_loss(way):
    model = way()
    opt = natgrad.NaturalGradient(model, nn.MSELoss())
    losses = fit(opt, model, X, TARGET, 25)
    assert losses[-1] < 0.05 * losses[0]


@every_way
@pytest.mark.parametrize("structure", ["kfac", "ekfac", "block", "diagonal"])
def test_structures_of_layers_name_the_parameters(way, structure):
    with pytest.raises(NotImplementedError, match=r"no layer kind covers 'u\.0\.weight'"):
        natgrad.fisher(way(), nn.MSELoss(), (X, TARGET), structure)
    model = way()
    if structure != "block":
        opt = natgrad.KFAC(model, nn.MSELoss(), structure=structure)
        with pytest.raises(NotImplementedError, match=r"no layer kind covers 'u\.0\.weight'"):
            opt.loss(model(X), TARGET)


class Slopes(Residual):
    """`∂u/∂x`, of which a loss of classes takes the two entries for logits."""

    def forward(self, x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(self.u(x).sum(), x, create_graph=True)[0]


@pytest.mark.parametrize("estimator", ["exact", "empirical"])
def test_rows_whose_targets_are_ignored_have_rows_of_zeros(estimator):
    model, loss = Slopes(), nn.CrossEntropyLoss()
    y = torch.tensor([0, -100, 1, 1, -100, 0, 1, -100, 0])
    F = natgrad.fisher(model, loss, (X, y), "dense", estimator=estimator).to_dense()
    parameters = list(model.parameters())
    slopes = torch.autograd.grad(loss(model(X), y), parameters, allow_unused=True)
    g = torch.cat(
        [(torch.zeros_like(p) if v is None else v).flatten() for v, p in zip(slopes, parameters, strict=True)]
    )
    options = {"solver": "dual", "lr": 0.5, "momentum": 0.0, "damping": 0.01, "estimator": estimator}
    opt = natgrad.NaturalGradient(model, loss, **options)
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    opt.loss(model(X), y).backward()
    opt.step()
    moved = torch.cat([p.detach().flatten() for p in model.parameters()]) - start
    close(moved, -0.5 * torch.linalg.solve(F + 0.01 * torch.eye(len(F), dtype=f64), g), 1e-8)
