"""The exact natural gradient against dense solves, and what its step must not depend on."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import natgrad
from oracles import close, dense_curvature, f64, flat, net, randn, rejected

N, D, C = 12, 4, 3
X, LABELS = randn(N, D), torch.arange(N) % C
SOLVERS = ["dual", "primal", "cg"]
DAMPING = 0.05
FIXED = {"lr": 1.0, "momentum": 0.0, "damping": DAMPING, "tolerance": 1e-14}


class Tied(nn.Module):
    """One weight used twice, both times without its bias."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(0.3 * randn(D, D))
        self.out = nn.Linear(D, C, dtype=f64)

    def forward(self, x):
        return self.out(F.linear(F.linear(x, self.weight).tanh(), self.weight).tanh())


def model_of(tied=False):
    torch.manual_seed(0)
    return Tied() if tied else net(D, 5, C)


def stepped(model, loss, batches, **options):
    """The change of the parameters in one step over equal microbatches."""
    model = copy.deepcopy(model)
    before = flat(model.parameters())
    opt = natgrad.NaturalGradient(model, loss, **options)
    for x, y in batches:
        (opt.loss(model(x), y) / len(batches)).backward()
    opt.step()
    assert opt.diagnostics["accepted"], opt.diagnostics
    return flat(model.parameters()) - before


def solved(model, loss, x, y, eta=0.0):
    """`−(Jᵀ D J + (λ + η) I)⁻¹ (∇ + η θ)` with the mean loss's matrices from autograd."""
    G = dense_curvature(model, loss, [(x, y)])
    theta = flat(model.parameters())
    g = flat(torch.autograd.grad(loss(model(x), y), list(model.parameters()))) + eta * theta
    return -torch.linalg.solve(G + (DAMPING + eta) * torch.eye(len(g), dtype=f64), g)


LOSSES = [(nn.CrossEntropyLoss(label_smoothing=0.1), LABELS), (nn.MSELoss(), randn(N, C, seed=1))]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("tied", [False, True])
class TestAgainstTheDenseSolve:
    @pytest.mark.parametrize(("loss", "y"), LOSSES)
    def test_mean(self, solver, tied, loss, y):
        model = model_of(tied)
        close(stepped(model, loss, [(X, y)], solver=solver, **FIXED), solved(model, loss, X, y))

    def test_the_matrix_of_fisher(self, solver, tied):
        model, loss = model_of(tied), nn.CrossEntropyLoss()
        matrix = natgrad.fisher(model, loss, (X, LABELS), structure="dense")
        g = flat(torch.autograd.grad(loss(model(X), LABELS), list(model.parameters())))
        close(stepped(model, loss, [(X, LABELS)], solver=solver, **FIXED), -matrix.solve(g, damping=DAMPING))

    def test_a_sum_is_damped_as_the_mean_is(self, solver, tied):
        model, summed = model_of(tied), nn.CrossEntropyLoss(reduction="sum")
        expected = solved(model, nn.CrossEntropyLoss(), X, LABELS)
        close(stepped(model, summed, [(X, LABELS)], solver=solver, **FIXED), expected)

    def test_microbatches(self, solver, tied):
        model, loss = model_of(tied), nn.CrossEntropyLoss()
        parts = list(zip(X.chunk(3), LABELS.chunk(3), strict=True))
        close(stepped(model, loss, parts, solver=solver, **FIXED), solved(model, loss, X, LABELS))

    def test_weight_decay(self, solver, tied):
        model, loss, eta = model_of(tied), nn.CrossEntropyLoss(), 0.2
        came = stepped(model, loss, [(X, LABELS)], solver=solver, weight_decay=eta, **FIXED)
        close(came, solved(model, loss, X, LABELS, eta))


def run(opt, model, steps, x=X, y=LABELS):
    losses = []
    for _ in range(steps):
        loss = opt.loss(model(x), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    return losses


def test_the_quadratic_model_asks_for_the_whole_step():
    model = model_of()
    opt = natgrad.NaturalGradient(model, nn.CrossEntropyLoss(), damping=DAMPING)
    run(opt, model, 1)
    assert opt.diagnostics["lr"] == pytest.approx(1, abs=1e-9)


def test_adaptive_fits_to_rounding():
    model, x = net(1, 10, 1), torch.linspace(-2, 2, 40, dtype=f64).unsqueeze(1)
    losses = run(natgrad.NaturalGradient(model, nn.MSELoss()), model, 40, x, x.sin())
    assert losses[-1] < 1e-6 < losses[0]


@pytest.mark.parametrize("solver", SOLVERS)
def test_resumes_bit_for_bit(solver):
    model = model_of()
    opt = natgrad.NaturalGradient(model, nn.CrossEntropyLoss(), solver=solver)
    run(opt, model, 3)
    other = copy.deepcopy(model)
    resumed = natgrad.NaturalGradient(other, nn.CrossEntropyLoss(), solver=solver)
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    run(opt, model, 3)
    run(resumed, other, 3)
    assert torch.equal(flat(model.parameters()), flat(other.parameters()))


@pytest.mark.parametrize(("max_size", "solver"), [(1000, "dual"), (10, "cg")])
def test_solver_is_chosen_by_size(max_size, solver):
    model = model_of()
    opt = natgrad.NaturalGradient(model, nn.CrossEntropyLoss(), max_size=max_size)
    run(opt, model, 1)
    assert opt.diagnostics["solver"] == solver


def test_a_loss_that_is_not_finite_leaves_the_parameters():
    model = model_of()
    opt = natgrad.NaturalGradient(model, nn.CrossEntropyLoss())
    run(opt, model, 1)
    before = flat(model.parameters())
    run(opt, model, 1, x=X * float("nan"))
    rejected(opt, "not finite")
    assert torch.equal(flat(model.parameters()), before)
    assert not opt.diagnostics["accepted"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "lu"}, "solver"),
        ({"max_size": 0}, "max_size=0"),
        ({"max_iterations": 0}, "max_iterations=0"),
        ({"tolerance": 1.0}, "tolerance=1.0"),
        ({"damping_decay": 0.0}, "damping_decay=0.0"),
        ({"solver": "cg", "estimator": "mc"}, "estimator='mc'"),
        ({"damping": -1.0}, "damping=-1.0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        natgrad.NaturalGradient(model_of(), nn.CrossEntropyLoss(), **options)
