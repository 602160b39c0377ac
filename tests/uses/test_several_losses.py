"""Influence, posteriors and edits under an objective of several terms, against autograd."""

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
    with pytest.raises(ValueError, match=r"measure is a function.*the losses are several; expected the name of one"):
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
