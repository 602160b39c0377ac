"""Laplace posteriors against the dense algebra, formed by autograd, and on the models that people have."""

from math import log, pi

import pytest
import torch
from torch import nn
from torch.func import functional_call

import natgrad
from models import MODELS
from natgrad import LaplacePosterior
from natgrad.uses.links import bridge
from oracles import close, dense_curvature, f64, jacobian, net, randn, summed

N = 30
STRUCTURES = ["dense", "block", "kfac", "ekfac", "low_rank", "diagonal"]
CASES = {
    "classes": (nn.CrossEntropyLoss(), lambda: torch.arange(N) % 3),
    "numbers": (nn.MSELoss(), lambda: randn(N, 3, seed=5)),
    "yes or no": (nn.BCEWithLogitsLoss(), lambda: (randn(N, 3, seed=5) > 0).to(f64)),
    "counts": (nn.PoissonNLLLoss(), lambda: randn(N, 3, seed=5).abs().round()),
}


def problem(case="classes"):
    loss, target = CASES[case]
    torch.manual_seed(0)
    return net(4, 5, 3).eval(), loss, (randn(N, 4), target())


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def likelihood(model, loss, data, sigma):
    """The curvature of the negative log-likelihood, and the log-likelihood, of the sum over the data."""
    G = dense_curvature(model, summed(loss), [data])
    value = summed(loss)(model(data[0]), data[1]).detach()
    if not isinstance(loss, nn.MSELoss):
        return G, -value
    entries = data[1].numel()
    return G / (2 * sigma**2), -value / (2 * sigma**2) - entries * log(sigma * (2 * pi) ** 0.5)


def evidence(model, loss, data, delta, sigma=1.0):
    """`log p(data)` of the dense posterior, by the formula."""
    G, log_likelihood = likelihood(model, loss, data, sigma)
    theta = flat(model)
    delta = torch.as_tensor(delta, dtype=f64).expand(len(theta))
    terms = (delta * theta.square()).sum() - delta.log().sum() + torch.logdet(G + delta.diag())
    return log_likelihood - 0.5 * terms


@pytest.mark.parametrize("case", CASES)
def test_the_dense_posterior_is_the_formulas(case):
    model, loss, data = problem(case)
    P = natgrad.laplace(model, loss, data, "dense", prior_precision=0.7)
    G, _ = likelihood(model, loss, data, 1.0)
    close(P.log_marginal_likelihood(), evidence(model, loss, data, 0.7), 1e-10)
    inverse = torch.linalg.inv(G + 0.7 * torch.eye(len(G), dtype=f64))
    close(P.covariance.to_dense(), inverse, 1e-10)
    x = randn(7, 4, seed=3)
    J = jacobian(model, x, [n for n, _ in model.named_parameters()])[0].view(7, 3, -1)
    close(P.functional_variance(x), J @ inverse @ J.mT, 1e-10)
    close(P.functional_variance(x, diagonal=True), (J @ inverse @ J.mT).diagonal(dim1=1, dim2=2), 1e-10)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_batches_and_the_losss_reduction_change_nothing(reduction):
    model, loss, (x, y) = problem()
    P = natgrad.laplace(model, loss, (x, y), "block")
    batches = [(x[:7], y[:7]), (x[7:], y[7:])]
    other = natgrad.laplace(model, nn.CrossEntropyLoss(reduction=reduction), iter(batches), "block")
    close(other.log_marginal_likelihood(), P.log_marginal_likelihood())
    close(other.predict(x, batch_size=4), P.predict(x))


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("case", ["classes", "numbers"])
def test_every_structure_is_consistent_with_its_own_matrix(structure, case):
    """All figures are those of the dense algebra with the structure's matrix in the place of the whole one."""
    model, loss, data = problem(case)
    P = natgrad.laplace(model, loss, data, structure, prior_precision=0.3)
    F = natgrad.fisher(model, summed(loss), data, structure, centered=False).to_dense()
    F = F / 2 if case == "numbers" else F
    precision = F + 0.3 * torch.eye(len(F), dtype=f64)
    x = randn(7, 4, seed=3)
    J = jacobian(model, x, [n for n, _ in model.named_parameters()])[0].view(7, 3, -1)
    close(P.functional_variance(x), J @ torch.linalg.inv(precision) @ J.mT, 1e-9)
    _, log_likelihood = likelihood(model, loss, data, 1.0)
    terms = 0.3 * flat(model).square().sum() - len(F) * torch.tensor(0.3).log() + torch.logdet(precision)
    close(P.log_marginal_likelihood(), log_likelihood - 0.5 * terms, 1e-7)
    draws = P.sample_weights(20000, torch.Generator().manual_seed(0))
    moves = torch.cat([(draws[n] - p.detach()).flatten(1) for n, p in model.named_parameters()], 1)
    close(torch.cov(moves.mT), torch.linalg.inv(precision), 0.1)


def test_products_alone_predict_as_the_dense_matrix_does():
    model, loss, data = problem()
    implicit, dense = (natgrad.laplace(model, loss, data, s, prior_precision=0.3) for s in ("implicit", "dense"))
    x = randn(5, 4, seed=3)
    close(implicit.functional_variance(x), dense.functional_variance(x), 1e-7)
    assert abs(implicit.log_marginal_likelihood() - dense.log_marginal_likelihood()) < 1
    found, expected = (P.fit_prior().prior_precision["0.weight"] for P in (implicit, dense))
    assert abs(found / expected - 1) < 0.1
    with pytest.raises(TypeError, match="sample"):
        implicit.sample_weights(3)


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


def test_the_temperature_divides_the_likelihood():
    model, loss, data = problem()
    P = natgrad.laplace(model, loss, data, "dense", prior_precision=0.7, temperature=0.25)
    G, _ = likelihood(model, loss, data, 1.0)
    close(P.covariance.to_dense(), torch.linalg.inv(4 * G + 0.7 * torch.eye(len(G), dtype=f64)), 1e-10)
    P.temperature = 1.0
    close(P.log_marginal_likelihood(), evidence(model, loss, data, 0.7), 1e-10)


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


def test_probabilities_are_near_their_mean_over_draws():
    model, loss, data = problem()
    P, x = natgrad.laplace(model, loss, data, "dense", prior_precision=10.0), randn(6, 4, seed=3)
    draws = P.sample(x, 20000, generator=torch.Generator().manual_seed(0))
    close(draws.sum(2), torch.ones(20000, 6, dtype=f64))
    mean = draws.mean(0)
    close(P.predict(x, link="mc", samples=20000, generator=torch.Generator().manual_seed(1)), mean, 0.01)
    close(P.predict(x, link="probit"), mean, 0.05)
    for link in ("probit", "bridge", "bridge_norm"):
        close(P.predict(x, link=link).sum(1), torch.ones(6, dtype=f64))


def test_the_bridge_undoes_the_laplace_approximation_of_a_dirichlet():
    """In softmax coordinates that has the mean log α − mean log α, and the covariance below (MacKay 1998)."""
    alpha = randn(4, 5).exp() + 1
    K, r = 5, 1 / alpha
    mean = alpha.log() - alpha.log().mean(1, keepdim=True)
    covariance = torch.diag_embed(r) - (r[:, :, None] + r[:, None, :] - r.sum(1)[:, None, None] / K) / K
    # shifted and spread along (1, ..., 1), which no probability sees
    close(bridge(mean + 3.0, covariance + 0.7), alpha / alpha.sum(1, keepdim=True))


def test_without_uncertainty_the_prediction_is_the_models():
    model, loss, data = problem()
    P, x = natgrad.laplace(model, loss, data, prior_precision=1e12), randn(6, 4, seed=3)
    for link in ("probit", "mc"):
        close(P.predict(x, link=link), model(x).softmax(1), 1e-4)
    close(P.predict(x, linearized=False, samples=3), model(x).softmax(1), 1e-4)


@pytest.mark.parametrize("case", ["numbers", "counts"])
def test_predicted_numbers_are_the_moments_of_draws(case):
    model, loss, data = problem(case)
    P, x = natgrad.laplace(model, loss, data, "dense", prior_precision=20.0), randn(6, 4, seed=3)
    found = P.predict(x)
    f = P.sample(x, 100000, generator=torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(1)
    y = f + torch.randn(f.shape, dtype=f64, generator=g) if case == "numbers" else torch.poisson(f.exp(), g)
    close(found.mean, y.mean(0), 0.03)
    close(found.variance, y.var(0), 0.06)
    close(found.functional_variance, f.var(0), 0.03)


def test_a_learned_noise_and_any_likelihood():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = net(4, 5, 2)

        def forward(self, x):
            mean, spread = self.body(x).chunk(2, 1)
            return mean, nn.functional.softplus(spread) + 0.1

    torch.manual_seed(0)
    model, data, x = Two().eval(), (randn(N, 4), randn(N, 1, seed=2)), randn(5, 4, seed=3)
    found = natgrad.laplace(model, nn.GaussianNLLLoss(), data, "dense", prior_precision=30.0).predict(x)
    mean, spread = model(x)
    close(found.mean, mean.detach())
    assert (found.variance > spread).all()
    close(found.variance - found.functional_variance, spread.detach())

    one = net(4, 5, 1).eval()
    normal = natgrad.losses.Likelihood(lambda f: torch.distributions.Normal(f, 0.7))
    own = natgrad.laplace(one, normal, data, "dense", prior_precision=2.0)
    squared = natgrad.laplace(one, nn.MSELoss(), data, "dense", prior_precision=2.0, sigma_noise=0.7)
    close(own.log_marginal_likelihood(), squared.log_marginal_likelihood(), 1e-9)
    drawn = own.predict(x, samples=50000, generator=torch.Generator().manual_seed(0))
    close(drawn.mean, squared.predict(x).mean, 0.01)
    close(drawn.variance, squared.predict(x).variance, 0.02)


def test_draws_of_networks_are_networks_at_drawn_weights():
    model, loss, data = problem()
    P, x = natgrad.laplace(model, loss, data), randn(5, 4, seed=3)
    weights = P.sample_weights(4, torch.Generator().manual_seed(3))
    found = P.sample(x, 4, linearized=False, generator=torch.Generator().manual_seed(3))
    for i in range(4):
        close(found[i], functional_call(model, {n: w[i] for n, w in weights.items()}, x).softmax(1).detach())


@pytest.mark.parametrize("subset", ["last_layer", "2", ["2.weight", "2.bias"], lambda name: name.startswith("2")])
def test_the_last_layer_alone(subset):
    model, loss, (x, y) = problem()
    P = natgrad.laplace(model, loss, (x, y), "dense", subset, prior_precision=0.5)
    assert P.covariance.space.names == ("2.weight", "2.bias")
    head, h = model[2], model[:2](x).detach()
    alone = natgrad.laplace(nn.Sequential(head).eval(), loss, (h, y), "dense", prior_precision=0.5)
    close(P.predict(x), alone.predict(h))


@pytest.mark.parametrize("name", ["GPT-2", "BERT", "ViT", "LoRA", "ResNet", "LSTM"])
def test_models_that_people_have(name):
    torch.manual_seed(0)
    example = MODELS[name]()
    example.model.eval()
    P = natgrad.laplace(example.model, nn.CrossEntropyLoss(), example.data, "ekfac", forward=example.forward)
    P.fit_prior("layer" if name == "LoRA" else "one")
    probabilities = P.predict((example.x, None))
    output = example.forward(example.model, (example.x, None))[0]
    assert probabilities.shape == output.shape
    assert torch.allclose(probabilities.sum(1), torch.ones_like(probabilities[:, 0]), atol=1e-5)
    if name == "LoRA":
        assert all("lora" in n for n in P.covariance.space.names)


def test_saved_and_loaded_it_predicts_the_same(tmp_path):
    model, loss, data = problem("numbers")
    x = randn(5, 4, seed=3)
    for structure in STRUCTURES:
        P = natgrad.laplace(model, loss, data, structure, temperature=0.5).fit_prior("layer")
        P.save(tmp_path / "posterior.safetensors")
        back = LaplacePosterior.load(tmp_path / "posterior.safetensors", model, loss)
        assert torch.equal(back.predict(x).variance, P.predict(x).variance)
        assert back.log_marginal_likelihood() == P.log_marginal_likelihood()


def test_a_file_of_another_model_is_refused(tmp_path):
    model, loss, data = problem()
    path = tmp_path / "posterior.safetensors"
    natgrad.laplace(model, loss, data, subset="last_layer").save(path)
    with pytest.raises(ValueError, match=r"is for another model: its '2\.weight' of shape"):
        LaplacePosterior.load(path, net(4, 6, 3), loss)
    with pytest.raises(ValueError, match="is for the loss CrossEntropyLoss, but loss is MSELoss"):
        LaplacePosterior.load(path, model, nn.MSELoss())
    with pytest.raises(ValueError, match=r"holds a dict, not a matrix.*LaplacePosterior.load"):
        natgrad.load(path)
    natgrad.fisher(model, loss, data).save(path)
    with pytest.raises(ValueError, match="holds no Laplace posterior"):
        LaplacePosterior.load(path, model, loss)


@pytest.mark.parametrize("name", ["0.weight", "2.weight"])
def test_a_model_that_was_trained_on_is_refused(name):
    model, loss, data = problem()
    P = natgrad.laplace(model, loss, data, subset="last_layer")
    with torch.no_grad():
        dict(model.named_parameters())[name].add_(0.1)
    with pytest.raises(ValueError, match=f"'{name}' has changed since the posterior was computed"):
        P.predict(data[0])


def test_a_model_in_training_mode_is_warned_of():
    model = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3)).double()
    with pytest.warns(RuntimeWarning, match="'1' \\(Dropout\\) is in training mode"):
        natgrad.laplace(model, nn.CrossEntropyLoss(), (randn(N, 4), torch.arange(N) % 3))


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
    with pytest.raises(ValueError, match="is not usable: expected a number > 0, as a prior of precision zero"):
        natgrad.laplace(model, loss, data, prior_precision=value)
    P = natgrad.laplace(model, loss, data, prior_precision=2.0)
    with pytest.raises(ValueError, match="expected a number > 0"):
        P.prior_precision = {"0": 1.0, "2": value}
    assert (
        P.log_marginal_likelihood() == natgrad.laplace(model, loss, data, prior_precision=2.0).log_marginal_likelihood()
    )  # as it was
    with pytest.raises(ValueError, match=r"temperature=.* is not usable"):
        natgrad.laplace(model, loss, data, temperature=value)


def own_probabilities(P, x):
    """By the probit approximation, from the outputs and their variances."""
    f, v = P.model(x).detach(), P.functional_variance(x, diagonal=True)
    return f / (1 + pi / 8 * v).sqrt()


@pytest.mark.parametrize("loss", [nn.SoftMarginLoss(), nn.MultiLabelSoftMarginLoss()])
def test_other_logistic_losses_predict_probabilities(loss):
    model, _, (x, y) = problem("yes or no")
    P = natgrad.laplace(model, loss, (x, 2 * y - 1 if isinstance(loss, nn.SoftMarginLoss) else y), "dense")
    close(P.predict(x), own_probabilities(P, x).sigmoid())
    close(P.predict(x, link="mc", samples=20000), P.predict(x), 0.02)
    assert 0 < P.predict(x, linearized=False).min() < P.sample(x, 3).max() < 1


def test_log_probabilities_have_all_links():
    model, _, (x, y) = problem()
    P = natgrad.laplace(nn.Sequential(*model, nn.LogSoftmax(1)), nn.NLLLoss(), (x, y), "dense")
    close(P.predict(x), own_probabilities(P, x).softmax(1))
    for link in ("mc", "bridge", "bridge_norm"):
        close(P.predict(x, link=link).sum(1), torch.ones(N, dtype=f64))


WITHOUT_DISTRIBUTION = {
    "L1Loss": (nn.L1Loss(), nn.Identity(), "numbers"),
    "HuberLoss": (nn.HuberLoss(), nn.Identity(), "numbers"),
    "SmoothL1Loss": (nn.SmoothL1Loss(), nn.Identity(), "numbers"),
    "Convex": (natgrad.losses.Convex(lambda f, y: (f - y).pow(4).sum(1)), nn.Identity(), "numbers"),
    "BCELoss": (nn.BCELoss(), nn.Sigmoid(), "yes or no"),
}


@pytest.mark.parametrize("name", WITHOUT_DISTRIBUTION)
def test_a_loss_without_a_distribution_of_targets_is_named(name):
    loss, last, case = WITHOUT_DISTRIBUTION[name]
    model, _, data = problem(case)
    P = natgrad.laplace(nn.Sequential(*model, last), loss, data).fit_prior()
    for linearized in (True, False):
        with pytest.raises(TypeError, match=rf"{name} gives no distribution of targets.*P.functional_variance\(x\)"):
            P.predict(data[0], linearized=linearized)
    assert P.functional_variance(data[0]).shape == (N, 3, 3)
    assert P.sample(data[0], 2).shape == (2, N, 3)


def test_data_without_a_target_are_said():
    model, loss, (x, y) = problem()
    P = natgrad.laplace(model, loss, (x, torch.full_like(y, -100)), "dense")
    with pytest.raises(ValueError, match=r"the data do not depend on the weights: .* look for targets that are all"):
        P.fit_prior()
