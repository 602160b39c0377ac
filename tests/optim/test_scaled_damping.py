"""Marquardt's damping and the line search, against dense formulas and brute force."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

import natgrad
from natgrad.linalg.block_diagonal import Block, BlockDiagonal
from natgrad.linalg.exact import ExactBlock
from natgrad.linalg.joint import Joint
from natgrad.linalg.space import Space
from natgrad.optim.preconditioner.scaled import SMALLEST, ScaledDamping
from natgrad.optim.trial import HALVINGS
from oracles import close, dense_curvature, f64, flat, net, randn

N, D = 12, 3
X, Y = randn(N, D), randn(N, 2, seed=1)
DAMPING = 0.05
LOSS = nn.MSELoss()


def step(opt, model, x=X, y=Y):
    """One step; the change of the parameters."""
    before = flat(model.parameters())
    opt.zero_grad()
    opt.loss(model(x), y).backward()
    opt.step()
    return flat(model.parameters()) - before


def scaled(F, exponent):
    """`(diag F / mean(diag F))^p`."""
    d = F.diagonal()
    return (d / d.mean()).clamp_min(SMALLEST).pow(exponent).diag()


@pytest.mark.parametrize("eta", [0.0, 0.2])
@pytest.mark.parametrize("exponent", [0.5, 1.0])
@pytest.mark.parametrize("solver", ["dual", "primal", None])
def test_the_step_is_the_formula(solver, exponent, eta):
    """`(F + λ M + η I)⁻¹ (∇ + η θ + λ μ M Δ₋)`, over three steps."""
    model, mu = net(D, 5, 2), 0.8
    opt = natgrad.NaturalGradient(
        model, LOSS, lr=0.7, momentum=mu, damping=DAMPING, scaling=exponent, solver=solver, weight_decay=eta
    )
    previous = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=f64)
    for _ in range(3):
        F, theta = dense_curvature(model, LOSS, [(X, Y)]), flat(model.parameters())
        g = flat(torch.autograd.grad(LOSS(model(X), Y), list(model.parameters()))) + eta * theta
        M = scaled(F, exponent)
        damped = F + DAMPING * M + eta * torch.eye(len(F), dtype=f64)
        previous = torch.linalg.solve(damped, g + DAMPING * mu * M @ previous)
        close(step(opt, model), -0.7 * previous, 1e-9)


@pytest.mark.parametrize("estimator", ["mc", "empirical"])
def test_the_length_of_a_step_with_drawn_labels_is_the_models(estimator):
    """`α = Δᵀ∇ / Δᵀ(F + λM)Δ` with the exact `F`, where `Δ` is the direction of the estimated one."""
    model = net(D, 5, 2)
    opt = natgrad.NaturalGradient(
        model, LOSS, damping=DAMPING, scaling=1.0, momentum=None, estimator=estimator, accelerate=False,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    g = flat(torch.autograd.grad(LOSS(model(X), Y), list(model.parameters())))
    F = dense_curvature(model, LOSS, [(X, Y)])
    drawn = []
    preconditioner = opt.recipe.preconditioner
    own = preconditioner.damped_gram

    def damped_gram(directions, damping):
        drawn.append(preconditioner._matrix.to_dense())
        return own(directions, damping)

    preconditioner.damped_gram = damped_gram
    delta = step(opt, model)
    length = opt.diagnostics["lr"]
    direction = -delta / length
    damped = float(direction @ (F + DAMPING * scaled(drawn[0], 1.0)) @ direction)
    assert length == pytest.approx(float(direction @ g) / damped, rel=1e-9)


def test_a_given_damping_is_levenbergs_and_an_adaptive_one_is_scaled():
    def scaling(**options):
        model = net(D, 5, 2)
        opt = natgrad.NaturalGradient(model, LOSS, **options)
        step(opt, model)
        return opt.diagnostics.get("scaling")

    assert scaling() == 0.5
    assert scaling(damping=0.1) is scaling(solver="cg") is scaling(scaling=0.0) is None
    assert scaling(damping=0.1, scaling=1.0) == 1.0


def test_by_default_the_damping_is_scaled_if_that_costs_little():
    """A wide layer of a few cases: the Gram matrix comes from pairs of positions, and its columns would cost more."""
    for width, expected in ((5, 0.5), (400, None)):
        model = net(D, width, width, 2)
        opt = natgrad.NaturalGradient(model, LOSS)
        step(opt, model)
        assert opt.diagnostics.get("scaling") == expected


def test_units_of_the_inputs_do_not_matter_with_marquardts_damping():
    """If the inputs are divided by 100 and the weights multiplied by it, the outputs move alike, up to the size of
    `λ`, which counts in units of the mean of the diagonal."""
    model, inputs = net(D, 5, 2), torch.tensor([1.0, 10.0, 0.1], dtype=f64)
    twin = copy.deepcopy(model)
    twin[0].weight.data /= inputs
    F, G = (dense_curvature(m, LOSS, [(x, Y)]) for m, x in ((model, X), (twin, X * inputs)))
    dampings = DAMPING, DAMPING * float(G.diagonal().mean() / F.diagonal().mean())
    outputs = []
    for m, x, damping in ((model, X, dampings[0]), (twin, X * inputs, dampings[1])):
        opt = natgrad.NaturalGradient(m, LOSS, damping=damping, scaling=1.0, accelerate=False, lr=1.0)
        step(opt, m, x)
        outputs.append(m(x).detach())
    close(outputs[0], outputs[1], 1e-8)


def test_without_curvature_the_damping_is_levenbergs():
    zero = ExactBlock(torch.zeros(2, 1, 3, dtype=f64), torch.zeros(2, 1, 1, 2, dtype=f64), bias=False)
    F = Joint(BlockDiagonal({"a": Block(zero, ("a",))}, Space(((2, 3),), ("a",))))
    v = randn(6)
    close(ScaledDamping(F, 0.5, None).inverse(DAMPING, 0.0) @ v, v / DAMPING)


class TestLineSearch:
    def proposed(self, model, **options):
        """The whole step, and the losses at its halves, quarters, ..."""
        twin = copy.deepcopy(model)
        delta = step(natgrad.NaturalGradient(twin, LOSS, damping=DAMPING, line_search=False, **options), twin)
        losses = []
        for k in range(HALVINGS + 1):
            other = copy.deepcopy(model)
            torch.nn.utils.vector_to_parameters(flat(model.parameters()) + 0.5**k * delta, other.parameters())
            losses.append(LOSS(other(X), Y).item())
        return delta, losses

    @pytest.mark.parametrize("damping", [1e-6, 1e-3, 1.0])
    def test_halves_the_step_until_the_loss_rises(self, damping, monkeypatch):
        monkeypatch.setitem(globals(), "DAMPING", damping)
        model = net(D, 5, 2)
        for p in model.parameters():
            p.data *= 4  # so that the model bends
        delta, losses = self.proposed(model, accelerate=False)
        first = next(k for k in range(HALVINGS) if losses[k + 1] >= losses[k])
        opt = natgrad.NaturalGradient(model, LOSS, damping=damping, accelerate=False, line_search=True)
        loss = LOSS(model(X), Y).item()
        change = step(opt, model)
        if losses[first] > loss:
            assert not opt.diagnostics["accepted"]
            return
        close(change, 0.5**first * delta, 1e-12)
        assert opt.diagnostics["loss_after"] == pytest.approx(losses[first], rel=1e-12)
        assert opt.diagnostics.get("shortened", 1) == 0.5**first

    def test_a_step_without_a_finite_loss_is_halved_until_it_has_one(self):
        class Cliff(nn.Module):
            def __init__(self):
                super().__init__()
                self.w = nn.Parameter(torch.zeros(1, 1, dtype=f64))

            def forward(self, x):
                out = x @ self.w
                return torch.where(out.abs() < 0.3, out, torch.full_like(out, float("inf")))

        model, x = Cliff(), torch.ones(4, 1, dtype=f64)
        opt = natgrad.NaturalGradient(model, LOSS, damping=1e-9, line_search=True, accelerate=False)
        opt.loss(model(x), x).backward()
        opt.step()
        assert opt.diagnostics["accepted"]
        assert opt.diagnostics["shortened"] == 0.25
        assert model.w.item() == pytest.approx(0.25, rel=1e-6)

    def test_an_adaptive_fit_comes_to_rounding(self):
        model, x = net(1, 10, 1), torch.linspace(-2, 2, 40, dtype=f64).unsqueeze(1)
        opt = natgrad.NaturalGradient(model, LOSS, line_search=True)
        losses = []
        for _ in range(40):
            loss = opt.loss(model(x), x.sin())
            opt.zero_grad()
            loss.backward()
            opt.step()
            losses.append(loss.item())
        assert losses[-1] < 1e-8
        assert all(b <= a * (1 + 1e-3) for a, b in pairwise(losses))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"line_search": True, "lr": 0.1}, "line_search=True was given with lr=0.1"),
            (
                {"line_search": True, "momentum": None},
                "momentum=None: expected lr=None and a number for momentum",
            ),
            ({"line_search": 1}, "line_search=1"),
            ({"scaling": 1.5}, r"scaling=1\.5"),
            ({"scaling": -0.5}, r"scaling=-0\.5"),
            ({"scaling": 0.5, "solver": "cg"}, "scaling=0.5 works only with solver='dual' or 'primal'"),
        ],
    )
    def test_bad_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            natgrad.NaturalGradient(net(D, 5, 2), LOSS, **options)
