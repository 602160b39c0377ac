"""The prior of a Laplace posterior: its fit, priors for parts of the weights, and what is refused."""

import pytest
import torch
from torch import nn

import natgrad
from oracles import close, f64, jacobian, randn, summed
from posteriors import STRUCTURES, problem


def gradients(P, per, noise=False):
    """Slopes of the evidence in the logarithms of its precisions (and noise), by differences."""
    base, h = P.prior_precision, 1e-4
    names = list(base)
    groups = {"one": [names], "layer": [names[:2], names[2:]], "parameter": [[n] for n in names]}[per]
    slopes = []
    for group in groups:
        moved = [{n: d * (1 + s * h) if n in group else d for n, d in base.items()} for s in (1, -1)]
        up, down = (P.log_marginal_likelihood(m) for m in moved)
        slopes.append((up - down) / (2 * h))
    if noise:
        up, down = (P.log_marginal_likelihood(sigma_noise=P.sigma_noise * (1 + s * h)) for s in (1, -1))
        slopes.append((up - down) / (2 * h))
    return torch.stack(slopes)


@pytest.mark.parametrize("per", ["one", "layer", "parameter"])
@pytest.mark.parametrize("structure", ["dense", "block", "kfac", "diagonal"])
def test_the_fitted_prior_has_the_largest_evidence(structure, per):
    model, loss, data = problem()
    P = natgrad.laplace(model, loss, data, structure)
    before = P.log_marginal_likelihood()
    after = P.fit_prior(per).log_marginal_likelihood()
    assert after > before
    assert gradients(P, per).abs().max() < 1e-4
    for scale in (0.5, 2.0):
        assert P.log_marginal_likelihood({n: scale * d for n, d in P.prior_precision.items()}) < after


def test_finer_priors_fit_better_and_entries_best():
    model, loss, data = problem()
    P = natgrad.laplace(model, loss, data, "diagonal")
    values = [float(P.fit_prior(per).log_marginal_likelihood()) for per in ("one", "layer", "parameter", "entry")]
    assert values == sorted(values)
    for n, delta in P.prior_precision.items():  # θ²δ² + hθ²δ − h = 0, the maximum for a diagonal
        t, h = dict(model.named_parameters())[n].detach().square(), P._evidence.matrix.M.diagonal()[n]
        close(t * delta.square() + h * t * delta - h, torch.zeros_like(t), 1e-3)


@pytest.mark.parametrize("structure", ["dense", "kfac", "ekfac", "diagonal"])
@pytest.mark.parametrize("per", ["one", "layer", "parameter", "entry"])
def test_a_prior_is_fitted_in_float32_as_in_float64(structure, per):
    """Some inputs never vary, and a weight is zero: those keep their precision where each weight has its own."""
    model, loss, (x, y) = problem()
    x[:, 0] = 0
    with torch.no_grad():
        model[0].weight[1, 1] = 0
    found = []
    for dtype in (f64, torch.float32):
        data = x.to(dtype), y
        found.append(natgrad.laplace(model.to(dtype), loss, data, structure).fit_prior(per).prior_precision)
    for n, expected in found[0].items():
        assert (found[1][n].double() / expected - 1).abs().max() < 0.02
    if per == "entry":
        assert (found[0]["0.weight"][:, 0] == 1).all()
        assert found[0]["0.weight"][1, 1] == 1


def test_the_noise_is_fitted_with_the_prior():
    model, loss, data = problem("numbers")
    P = natgrad.laplace(model, loss, data, "dense").fit_prior("layer")
    assert gradients(P, "layer", noise=True).abs().max() < 1e-3
    given = natgrad.laplace(model, loss, data, "dense", sigma_noise=0.5).fit_prior()
    assert given.sigma_noise == 0.5
    assert given.fit_prior(noise=True).sigma_noise != 0.5


def test_priors_of_their_own_in_one_block():
    """The weight and the bias of a K-FAC block, and each entry of a diagonal."""
    model, loss, data = problem()
    names = [n for n, _ in model.named_parameters()]
    deltas = {n: 0.3 + i for i, n in enumerate(names)}
    spread = torch.cat([torch.full((p.numel(),), deltas[n], dtype=f64) for n, p in model.named_parameters()])
    x = randn(5, 4, seed=3)
    J = jacobian(model, x, names)[0].view(5, 3, -1)
    for structure in STRUCTURES:
        for centered in (False, True):
            P = natgrad.laplace(model, loss, data, structure, prior_precision=deltas, centered=centered)
            F = natgrad.fisher(model, summed(loss), data, structure, centered=centered).to_dense()
            inverse = torch.linalg.inv(F + spread.diag())
            close(P.functional_variance(x), J @ inverse @ J.mT, 1e-9)
            close(P._posterior.logdet(), -torch.logdet(inverse), 1e-9)
            draws = P.sample_weights(20000, torch.Generator().manual_seed(0))
            moves = torch.cat([(draws[n] - p.detach()).flatten(1) for n, p in model.named_parameters()], 1)
            close(torch.cov(moves.mT), inverse, 0.1)


def test_an_evidence_without_a_maximum_is_said():
    model, loss, data = problem()
    with torch.no_grad():
        model[2].bias.zero_()
    P = natgrad.laplace(model, loss, data, "diagonal")
    with pytest.raises(ValueError, match=r"the weights of '2\.bias' are all zero"):
        P.fit_prior("parameter")
    P.fit_prior("layer")
    dead = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double().eval()
    with torch.no_grad():
        dead[0].bias.fill_(-100.0)
    P = natgrad.laplace(dead, loss, data, "kfac")
    with pytest.raises(ValueError, match="do not depend on the weights of '0'"):
        P.fit_prior("layer")


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_a_prior_that_is_none_is_refused(value):
    model, loss, data = problem()
    with pytest.raises(ValueError, match="is not usable: expected a finite number > 0, as a prior of precision zero"):
        natgrad.laplace(model, loss, data, prior_precision=value)
    P = natgrad.laplace(model, loss, data, prior_precision=2.0)
    with pytest.raises(ValueError, match="expected a finite number > 0"):
        P.prior_precision = {"0": 1.0, "2": value}
    assert (
        P.log_marginal_likelihood() == natgrad.laplace(model, loss, data, prior_precision=2.0).log_marginal_likelihood()
    )  # as it was
    with pytest.raises(ValueError, match=r"temperature=.* is not usable"):
        natgrad.laplace(model, loss, data, temperature=value)


def test_data_without_a_target_are_said():
    model, loss, (x, y) = problem()
    P = natgrad.laplace(model, loss, (x, torch.full_like(y, -100)), "dense")
    with pytest.raises(ValueError, match=r"the data do not depend on the weights: .* look for targets that are all"):
        P.fit_prior()
