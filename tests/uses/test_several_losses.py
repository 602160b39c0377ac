"""Influence, posteriors and edits under an objective of several terms, against autograd."""

from math import log, pi

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev

import natgrad
from oracles import close, f64, randn

N, DAMPING, WEIGHTS = 24, 0.05, {"box": 0.5}
LOSSES = {"class": nn.CrossEntropyLoss(), "box": nn.MSELoss()}


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.kind, self.box = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 2)

    def forward(self, x):
        z = self.body(x).tanh()
        return {"class": self.kind(z), "box": self.box(z)}


def problem(n=N, seed=0):
    torch.manual_seed(0)
    model = Heads().double().eval()
    x, boxes = randn(n, 4, seed=seed), randn(n, 2, seed=seed + 1)
    return model, (x, {"class": torch.arange(n) % 3, "box": boxes})


def rows(model, data, losses=LOSSES, weights=WEIGHTS):
    """The gradient of every example's own sum of losses, `(n, size)`."""
    found, (x, y) = [], data
    for i in range(len(x)):
        out = model(x[i : i + 1])
        value = sum(weights.get(t, 1.0) * loss(out[t], y[t][i : i + 1]) for t, loss in losses.items())
        grads = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
        every = zip(grads, model.parameters(), strict=True)
        found.append(torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in every]))
    return torch.stack(found)


def jacobians(model, x):
    """By term: `(n, k, size)`."""
    own = {n: p.detach() for n, p in model.named_parameters()}

    def of(w, term):
        return functional_call(model, w, (x,))[term]

    return {t: torch.cat([J.flatten(2) for J in jacrev(of)(own, t).values()], 2) for t in LOSSES}


def dense(model, data):
    """The Gauss-Newton matrix of the weighted sum of mean losses."""
    x = data[0]
    J, p = jacobians(model, x), model(x)["class"].softmax(1).detach()
    D = p.diag_embed() - p[:, :, None] * p[:, None]
    of_class = (J["class"].mT @ D @ J["class"]).sum(0) / len(x)
    return of_class + WEIGHTS["box"] * 2 * (J["box"].mT @ J["box"]).sum(0) / (2 * len(x))


def scores(model, train, query, matrix, damping=DAMPING):
    inverse = torch.linalg.inv(matrix + damping * torch.eye(len(matrix), dtype=f64))
    return rows(model, query) @ inverse @ rows(model, train).mT


def test_influence_of_the_sum_is_that_of_autograd():
    model, train = problem()
    query = problem(5, seed=7)[1]
    how = {"damping": DAMPING, "weights": WEIGHTS}
    expected = scores(model, train, query, dense(model, train))
    close(natgrad.influence(model, LOSSES, train, query, "dense", **how), expected, 1e-9)
    found = natgrad.influence(model, LOSSES, train, query, "kfac", refine=100, **how)
    close(found, expected, 2e-3 * float(expected.abs().max()))
    itself = natgrad.influence(model, LOSSES, train, structure="dense", **how)
    close(itself, scores(model, train, train, dense(model, train)).diagonal(), 1e-9)
    half = slice(0, 9), slice(9, None)
    batches = [(train[0][s], {t: y[s] for t, y in train[1].items()}) for s in half]
    close(natgrad.influence(model, LOSSES, iter(batches), query, "dense", **how), expected, 1e-9)


class Once:
    """Batches whose second iteration stops the first, as those of a loader with persistent workers."""

    def __init__(self, batches):
        self.batches, self.place = batches, 0

    def __iter__(self):
        self.place = 0
        return self

    def __next__(self):
        if self.place == len(self.batches):
            raise StopIteration
        self.place += 1
        return self.batches[self.place - 1]


class Loader:
    def __init__(self, batches):
        self.iterator = Once(batches)

    def __iter__(self):
        return iter(self.iterator)


def test_the_terms_share_a_pass_over_the_data():
    model, (x, y) = problem()
    batches = [(x[i : i + 6], {t: its[i : i + 6] for t, its in y.items()}) for i in range(0, N, 6)]
    expected = natgrad.influence(model, LOSSES, batches, batches)
    assert torch.equal(natgrad.influence(model, LOSSES, Loader(batches), Loader(batches)), expected)


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "block", "diagonal"])
def test_every_structures_scores_are_those_of_its_own_matrix(structure):
    model, train = problem()
    query = problem(5, seed=7)[1]
    F = natgrad.fisher(model, LOSSES, train, structure, weights=WEIGHTS).to_dense()
    found = natgrad.influence(model, LOSSES, train, query, structure, damping=DAMPING, weights=WEIGHTS)
    close(found, scores(model, train, query, F), 1e-8)
    both = natgrad.influence(model, LOSSES, train, train, structure, damping=DAMPING, weights=WEIGHTS)
    close(natgrad.influence(model, LOSSES, train, structure=structure, damping=DAMPING, weights=WEIGHTS),
          both.diagonal(), 1e-8)  # fmt: skip
    by_token = natgrad.influence(model, LOSSES, train, query, structure, damping=DAMPING, weights=WEIGHTS, per="token")
    close(by_token.sum(2), found)


def test_queries_of_one_term_and_some_parameters():
    """The class head's parameters alone, on which the boxes do not depend."""
    model, train = problem()
    query = problem(5, seed=7)[1]
    J = torch.linalg.inv(dense(model, train) + DAMPING * torch.eye(model_size(model), dtype=f64))
    of_class = rows(model, query, {"class": LOSSES["class"]})
    how = {"damping": DAMPING, "weights": WEIGHTS}
    found = natgrad.influence(model, LOSSES, train, query, "dense", measure="class", **how)
    close(found, of_class @ J @ rows(model, train).mT, 1e-9)
    only = ["kind.weight", "kind.bias"]
    alone = natgrad.influence(model, LOSSES, train, query, params=only, **how)
    outputs = {"forward": lambda m, b: (m(b[0])["class"], b[1]["class"]), "params": only, "damping": DAMPING}
    close(alone, natgrad.influence(model, LOSSES["class"], train, query, **outputs))


def model_size(model):
    return sum(p.numel() for p in model.parameters())


def test_checkpoints_of_several_terms():
    """Times so short that scores are inner products of gradients; and infinite time, the influence function."""
    model, train = problem()
    query = problem(5, seed=7)[1]
    how = {"weights": WEIGHTS, "checkpoints": [model.state_dict()]}
    short = natgrad.influence(model, LOSSES, train, query, damping=0.0, times=1e-6, **how)
    close(short / 1e-6, rows(model, query) @ rows(model, train).mT, 1e-4)
    for structure in ("dense", "kfac", "ekfac"):
        found = natgrad.influence(model, LOSSES, train, query, structure, damping=DAMPING, times=float("inf"), **how)
        F = natgrad.fisher(model, LOSSES, train, structure, weights=WEIGHTS, centered=False).to_dense()
        close(found, scores(model, train, query, F), 1e-8)


def test_what_has_no_meaning_is_refused_by_name():
    model, train = problem()
    with pytest.raises(ValueError, match=r"measure is a function, but there are several losses; expected the name"):
        natgrad.influence(model, LOSSES, train, train, measure=lambda f, y: f[:, 0])
    with pytest.raises(ValueError, match="measure='clas' is no term; expected one of 'class', 'box'"):
        natgrad.influence(model, LOSSES, train, train, measure="clas")
    with pytest.raises(
        ValueError, match="a batch of query has outputs of 24 of 'class', 12 of 'box'; expected as many"
    ):
        natgrad.influence(
            model, LOSSES, train, train,
            forward=lambda m, b: ({"class": m(b[0])["class"], "box": m(b[0])["box"][::2]},
                                  {"class": b[1]["class"], "box": b[1]["box"][::2]}),
        )  # fmt: skip
    with pytest.raises(ValueError, match="weights has 'boxes', which is no term"):
        natgrad.influence(model, LOSSES, train, train, weights={"boxes": 1.0})
    with pytest.raises(ValueError, match="need several losses, and loss is one"):
        natgrad.influence(model, LOSSES["class"], train, train, weights={"class": 1.0})


SIGMA = 0.7


def posterior(structure="dense", weights=WEIGHTS, sigma=SIGMA, **options):
    model, data = problem()
    noises = None if sigma is None else {"box": sigma}
    return natgrad.laplace(model, LOSSES, data, structure, weights=weights, sigma_noise=noises, **options), model, data


def precision(model, x, delta, sigma=SIGMA):
    """`Σ_t ω_t F_t + δ I`, over the sum of the examples."""
    J, p = jacobians(model, x), model(x)["class"].softmax(1).detach()
    D = p.diag_embed() - p[:, :, None] * p[:, None]
    F = (J["class"].mT @ D @ J["class"]).sum(0) + WEIGHTS["box"] / sigma**2 * (J["box"].mT @ J["box"]).sum(0)
    return F + delta * torch.eye(len(F), dtype=f64)


def evidence(model, data, delta, sigma=SIGMA):
    x, y = data
    out = {t: f.detach() for t, f in model(x).items()}
    likelihood = -nn.functional.cross_entropy(out["class"], y["class"], reduction="sum")
    squares = (out["box"] - y["box"]).square().sum() / (2 * sigma**2)
    likelihood = likelihood - WEIGHTS["box"] * (squares + y["box"].numel() * log(sigma * (2 * pi) ** 0.5))
    theta = torch.cat([p.detach().flatten() for p in model.parameters()])
    P = precision(model, x, delta, sigma)
    return likelihood - 0.5 * (delta * theta.square().sum() - len(P) * log(delta) + torch.logdet(P))


def test_the_posterior_of_several_losses_is_the_formulas():
    P, model, data = posterior(prior_precision=0.4)
    inverse, x = torch.linalg.inv(precision(model, data[0], 0.4)), randn(6, 4, seed=9)
    close(P.covariance.to_dense(), inverse, 1e-9)
    close(P.log_marginal_likelihood(), evidence(model, data, 0.4), 1e-9)
    P.temperature = 1.0
    close(P.log_marginal_likelihood(), evidence(model, data, 0.4), 1e-9)
    variance = P.functional_variance(x)
    for term, J in jacobians(model, x).items():
        close(variance[term], J @ inverse @ J.mT, 1e-9)
        close(P.functional_variance(x, term=term), variance[term])
        close(P.functional_variance(x, diagonal=True)[term], variance[term].diagonal(dim1=1, dim2=2))
    found = P.predict(x)
    close(found["box"].mean, model(x)["box"])
    close(found["box"].variance, variance["box"].diagonal(dim1=1, dim2=2) + SIGMA**2, 1e-9)
    alone = natgrad.LaplacePosterior(
        model, LOSSES["class"], P._evidence.matrix.M, 1.0, forward=lambda m, b: (m(b)["class"], None)
    )
    alone.prior_precision = 0.4
    close(found["class"], alone.predict(x), 1e-9)


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "block", "diagonal", "dense"])
def test_the_prior_is_fitted_and_each_structure_is_its_own_matrix(structure):
    P, model, data = posterior(structure)
    F = natgrad.fisher(
        model, {"class": nn.CrossEntropyLoss(reduction="sum"), "box": nn.MSELoss(reduction="sum")}, data, structure,
        weights={"box": WEIGHTS["box"] / (2 * SIGMA**2)}, centered=False,
    )  # fmt: skip
    close(P._evidence.matrix.M.to_dense(), F.to_dense(), 1e-9)
    before = P.log_marginal_likelihood()
    fitted = P.fit_prior()
    assert fitted.log_marginal_likelihood() > before
    assert fitted.sigma_noise == {"box": SIGMA}
    delta = float(P.prior_precision["body.weight"])
    for scale in (0.8, 1.25):
        assert P.log_marginal_likelihood(scale * delta) < fitted.log_marginal_likelihood()


def test_draws_are_of_one_model_for_all_terms():
    P = posterior(prior_precision=5.0)[0]
    x, n = randn(6, 4, seed=9), 20000
    draws = P.sample(x, n, generator=torch.Generator().manual_seed(0))
    variance = P.functional_variance(x)
    close(draws["box"].var(0), variance["box"].diagonal(dim1=1, dim2=2), 0.05)
    assert draws["class"].shape == (n, 6, 3)
    again = P.sample(x, n, generator=torch.Generator().manual_seed(0), term="box")
    assert torch.equal(again, draws["box"])
    networks = P.sample(x, 50, linearized=False)
    assert {t: d.shape for t, d in networks.items()} == {"class": (50, 6, 3), "box": (50, 6, 2)}
    assert P.predict(x, linearized=False, samples=20)["box"].variance.shape == (6, 2)
    assert P.predict(x, link={"class": "mc"})["class"].shape == (6, 3)


def test_a_noise_that_is_not_given_is_that_of_the_residuals():
    P, model, (x, y) = posterior(sigma=None)
    sigma = float((model(x)["box"] - y["box"]).detach().square().mean().sqrt())
    assert P.sigma_noise == {"box": pytest.approx(sigma)}
    close(P.log_marginal_likelihood(0.4), evidence(model, (x, y), 0.4, sigma), 1e-9)


def test_a_posterior_of_several_losses_is_saved_and_read(tmp_path):
    P, model, _ = posterior("kfac")
    x, path = randn(6, 4, seed=9), tmp_path / "posterior.safetensors"
    P.fit_prior().save(path)
    Q = natgrad.LaplacePosterior.load(path, model, LOSSES)
    assert torch.equal(Q.predict(x)["class"], P.predict(x)["class"])
    assert torch.equal(Q.predict(x)["box"].variance, P.predict(x)["box"].variance)
    assert torch.equal(Q.log_marginal_likelihood(), P.log_marginal_likelihood())
    with pytest.raises(ValueError, match=r"is for the loss 'class': CrossEntropyLoss, 'box': MSELoss, but loss is"):
        natgrad.LaplacePosterior.load(path, model, {"class": nn.CrossEntropyLoss(), "box": nn.L1Loss()})


def test_the_last_layer_of_every_head():
    P, model, (x, _) = posterior(subset="last_layer")
    assert list(P.weights) == ["kind.weight", "kind.bias", "box.weight", "box.bias"]
    variance = P.functional_variance(x)
    own = torch.cat(list(jacobians(model, x).values()), 1)[:, :, model.body.weight.numel() + 5 :]
    inverse = P.covariance.to_dense()
    close(variance["class"], (own @ inverse @ own.mT)[:, :3, :3], 1e-9)
    close(variance["box"], (own @ inverse @ own.mT)[:, 3:, 3:], 1e-9)
    boxes = posterior(subset=["box"])[0]
    assert not boxes.functional_variance(x)["class"].any()
    assert (boxes.functional_variance(x, diagonal=True)["box"] > 0).all()


def test_what_a_posterior_of_several_losses_refuses():
    P, model, data = posterior()
    x = data[0]
    with pytest.raises(
        ValueError, match="noise=True is for one loss: with several losses the matrix depends on their noises"
    ):
        P.fit_prior(noise=True)
    with pytest.raises(ValueError, match="sigma_noise cannot be set with several losses"):
        P.sigma_noise = 0.3
    with pytest.raises(ValueError, match=r"sigma_noise has 'class', which is no term with nn.MSELoss"):
        natgrad.laplace(model, LOSSES, data, sigma_noise={"class": 1.0})
    with pytest.raises(ValueError, match="with several losses expected a dictionary by term"):
        natgrad.laplace(model, LOSSES, data, sigma_noise=0.5)
    with pytest.raises(ValueError, match="with one loss expected a number > 0"):
        natgrad.laplace(nn.Linear(4, 1).double(), nn.MSELoss(), (x, x[:, :1]), sigma_noise={"box": 1.0})
    with pytest.raises(ValueError, match=r"sigma_noise\['box'\]"):
        natgrad.laplace(model, LOSSES, data, sigma_noise={"box": 0.0})
    with pytest.raises(ValueError, match=r"link is a str; expected a dictionary by term"):
        P.predict(x, link="mc")
    with pytest.raises(ValueError, match="link names 'clas', which is no term"):
        P.predict(x, link={"clas": "mc"})
    with pytest.raises(ValueError, match="term='clas' is unknown; expected one of 'class', 'box'"):
        P.predict(x, term="clas")
    tuples = natgrad.LaplacePosterior(model, LOSSES, P._evidence.matrix.M, 1.0, forward=lambda m, b: (m(b)["box"], 0))
    with pytest.raises(ValueError, match="with several losses expected a dictionary with an entry for each of 'class'"):
        tuples.predict(x)
    with pytest.raises(TypeError, match="SmoothL1Loss gives no distribution of targets"):
        natgrad.laplace(model, {"class": nn.CrossEntropyLoss(), "box": nn.SmoothL1Loss()}, data).predict(x)
    robust = natgrad.laplace(model, {"class": nn.CrossEntropyLoss(), "box": nn.SmoothL1Loss()}, data)
    assert robust.predict(x, term="class").shape == (N, 3)
    assert robust.functional_variance(x)["box"].shape == (N, 2, 2)


def test_matrices_of_several_losses_prune_merge_and_hold():
    model, data = problem()
    F = natgrad.fisher(model, LOSSES, data, weights=WEIGHTS)
    penalty = natgrad.ewc(model, F, strength=2.0)
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    with torch.no_grad():
        model.box.bias += 0.3
    move = torch.cat([p.detach().flatten() for p in model.parameters()]) - start
    close(penalty().detach(), move @ F.to_dense() @ move, 1e-9)
    other, _ = problem()
    G = natgrad.fisher(model, LOSSES, data, weights=WEIGHTS)
    merged = natgrad.merge([model, other], [G, natgrad.fisher(other, LOSSES, data, weights=WEIGHTS)])
    assert set(merged(data[0])) == set(LOSSES)
    pruned = natgrad.prune(model, G, 0.5)
    sizes = [(int(m.sum()), m.numel()) for m in pruned.masks.values()]
    assert sum(kept for kept, _ in sizes) == sum(n for _, n in sizes) - round(sum(n for _, n in sizes) / 2)


def test_what_several_losses_say_is_unlearned():
    """One step without damping goes along `(F + λ I)⁻¹ ∇`, with the gradient of the sum."""
    model, data = problem()
    forget = data[0][:5], {t: y[:5] for t, y in data[1].items()}
    F = natgrad.fisher(model, LOSSES, data, "dense", weights=WEIGHTS)
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    step = F.solve(rows(model, forget).mean(0), damping=0.1)
    found = natgrad.unlearn(model, LOSSES, forget, F, steps=1, step_size=0.01, damping=0.1, weights=WEIGHTS)
    close(torch.cat([p.detach().flatten() for p in model.parameters()]) - start, 0.01 * step, 1e-9)
    assert found.losses[1] > found.losses[0]
