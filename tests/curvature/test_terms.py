"""Matrices of objectives of several terms: the weighted sum of the terms' own, against dense autograd."""

from math import prod

import pytest
import torch
from torch import nn

import natgrad
from oracles import close, randn

N, D, H, C = 7, 3, 4, 3
LOSSES = {"class": nn.CrossEntropyLoss(), "box": nn.MSELoss(reduction="sum")}
WEIGHTS = {"box": 0.5}


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(D, H), nn.Tanh(), nn.LayerNorm(H))
        self.logits, self.boxes = nn.Linear(H, C), nn.Linear(H, 2, bias=False)
        self.double()

    def forward(self, x):
        h = self.trunk(x)
        return {"class": self.logits(h), "box": self.boxes(h)}


def batch(n=N, seed=0):
    return randn(n, D, seed=seed), {"class": torch.arange(n) % C, "box": randn(n, 2, seed=seed + 1)}


def batches(count):
    return [batch(N - i, seed=i) for i in range(count)]


def rows_of(outputs, parameters):
    rows = [torch.autograd.grad(o, parameters, retain_graph=True, allow_unused=True) for o in outputs.flatten()]
    return torch.stack(
        [torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(r, parameters, strict=True)])
         for r in rows]
    )  # fmt: skip


def by_autograd(model, data):
    """`Σ_t ω_t Jᵀ D J`, written out: softmax's mean over all examples, and half the sum of squares' Hessian."""
    parameters, total, n = list(model.parameters()), 0, sum(len(x) for x, _ in data)
    for x, _ in data:
        out = model(x)
        p = out["class"].detach().softmax(1)
        D_class = torch.block_diag(*(torch.diag(q) - torch.outer(q, q) for q in p)) / n
        J, K = rows_of(out["class"], parameters), rows_of(out["box"], parameters)
        total = total + J.T @ D_class @ J + WEIGHTS["box"] * 2 * K.T @ K
    return total


def part_of(F, dense):
    """The entries of a dense matrix that are in the blocks of an operator."""
    sizes = [prod(s) for s in F.space.shapes]
    places = dict(zip(F.space.names, torch.arange(sum(sizes)).split(sizes), strict=True))
    out = torch.zeros_like(dense)
    for block in F.layers.values():
        rows = torch.cat([places[n] for n in block.names])
        out[rows[:, None], rows] = dense[rows[:, None], rows]
    return out


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("structure", ["implicit", "dense", "block", "diagonal"])
@pytest.mark.parametrize("kind", [natgrad.fisher, natgrad.gauss_newton])
def test_exact_structures_are_the_weighted_sum(structure, count, kind):
    model, data = TwoHeads(), batches(count)
    F = kind(model, LOSSES, data, structure, weights=WEIGHTS)
    dense = by_autograd(model, data)
    expected = {"block": part_of(F, dense) if structure == "block" else None, "diagonal": dense.diagonal().diag()}
    close(F.to_dense(), expected.get(structure, dense), 1e-10)
    v = randn(F.space.size)
    close(F.solve(v, 0.1), torch.linalg.solve(F.to_dense() + 0.1 * torch.eye(len(v)), v), 1e-6)


@pytest.mark.parametrize("centered", [True, False])
def test_kfac_of_one_forward_sums_the_output_factors(centered):
    model, data = TwoHeads(), batches(2)
    F = natgrad.fisher(model, LOSSES, data, "kfac", weights=WEIGHTS, centered=centered)
    own = [
        natgrad.fisher(model, loss, data, "kfac", forward=term(name), params=of(name), centered=centered)
        for name, loss in LOSSES.items()
    ]
    total = sum(w * whole(F, op) for w, op in zip((1.0, 0.5), own, strict=True))
    close(F.to_dense(), total, 1e-10)  # the inputs are the same ones


def term(name):
    return lambda model, b: (model(b[0])[name], b[1][name])


def of(name):
    other = {"class": "boxes", "box": "logits"}[name]
    return lambda n: not n.startswith(other)


def whole(F, op):
    """A matrix over some parameters as one over all."""
    sizes = [prod(s) for s in F.space.shapes]
    places = dict(zip(F.space.names, torch.arange(sum(sizes)).split(sizes), strict=True))
    rows, out = (
        torch.cat([places[n] for n in op.space.names]),
        torch.zeros(F.space.size, F.space.size, dtype=torch.float64),
    )
    out[rows[:, None], rows] = op.to_dense()
    return out


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
def test_kfac_of_two_forwards_has_the_partial_traces_of_the_sum(structure):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, H), nn.Tanh(), nn.Linear(H, 1)).double()
    losses = {"inside": nn.MSELoss(), "edge": nn.MSELoss()}
    inside, edge = randn(9, D, seed=1), 3 + randn(4, D, seed=2)

    def forward(m, _):
        return {"inside": m(inside), "edge": m(edge)}, {"inside": torch.zeros(9, 1), "edge": torch.zeros(4, 1)}

    weights = {"inside": 1.0, "edge": 10.0}
    F = natgrad.fisher(model, losses, [None], structure, forward=forward, weights=weights, centered=False)
    exact = natgrad.fisher(model, losses, [None], "block", forward=forward, weights=weights)
    own = {
        name: natgrad.fisher(model, losses[name], (x, torch.zeros(len(x), 1)), "kfac", centered=False)
        for name, x in (("inside", inside), ("edge", edge))
    }
    for name, block in F.layers.items():
        M, parts = block.operator.to_dense(), [w * own[n].layers[name].operator.to_dense() for n, w in weights.items()]
        if structure == "ekfac":
            close(M.trace(), exact.layers[name].operator.to_dense().trace(), 1e-10)
            continue
        out = block.operator.space.shapes[0][0]
        close(M.trace(), sum(p.trace() for p in parts), 1e-10)
        if len(block.names) == 1:
            for axis in (0, 1):
                close(traced(M, out, axis), sum(traced(p, out, axis) for p in parts), 1e-10)


def traced(M, out, axis):
    M = M.view(out, len(M) // out, out, len(M) // out)
    return M.diagonal(dim1=axis, dim2=axis + 2).sum(-1)


@pytest.mark.parametrize("structure", ["dense", "block", "kfac", "ekfac", "diagonal"])
def test_sampled_labels_have_the_exact_matrix_for_a_mean(structure):
    model, data = TwoHeads(), batches(2)
    exact = natgrad.fisher(model, LOSSES, data, structure, weights=WEIGHTS).to_dense()
    options = {"weights": WEIGHTS, "estimator": "mc", "samples": 100}
    F = natgrad.fisher(model, LOSSES, data, structure, generator=torch.Generator().manual_seed(0), **options)
    assert (F.to_dense() - exact).norm() < 0.26 * exact.norm()


def test_a_weight_of_zero_leaves_the_other_term():
    model, data = TwoHeads(), batches(2)
    F = natgrad.fisher(model, LOSSES, data, "kfac", weights={"box": 0.0}, params=of("class"))
    close(
        F.to_dense(), natgrad.fisher(model, LOSSES["class"], data, forward=term("class"), params=of("class")).to_dense()
    )


def test_parameters_of_one_head_alone():
    model, data = TwoHeads(), batches(2)
    for structure in ("dense", "block", "kfac", "implicit"):
        F = natgrad.fisher(model, LOSSES, data, structure, params=["boxes.weight"], weights=WEIGHTS)
        own = natgrad.fisher(model, LOSSES["box"], data, structure, params=["boxes.weight"], forward=term("box"))
        close(F.to_dense(), 0.5 * own.to_dense(), 1e-10)


@pytest.mark.parametrize("structure", ["implicit", "dense", "block"])
def test_the_hessian(structure):
    model, data = TwoHeads(), batches(2)
    H = natgrad.hessian(model, LOSSES, data, structure, weights=WEIGHTS)
    own = [natgrad.hessian(model, loss, data, structure, forward=term(name)) for name, loss in LOSSES.items()]
    close(H.to_dense(), own[0].to_dense() + 0.5 * own[1].to_dense(), 1e-8)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weights": {"boxes": 1.0}}, r"weights has 'boxes', which is no term; expected one of 'class', 'box'.*'box'"),
        ({"weights": {"box": -1.0}}, r"the weight of 'box' is .*expected a finite number, 0 or more"),
        ({"loss": {}}, "loss is an empty dictionary"),
        ({"loss": {"class": nn.CrossEntropyLoss(), "cls": nn.MSELoss()}}, r"the outputs have no 'cls', only 'class'"),
        ({"data": (randn(N, D), randn(N, 2))}, r"the targets are .*expected a dictionary with an entry for each"),
        ({"loss": nn.CrossEntropyLoss(), "weights": {"a": 1.0}}, "weights=.* and loss is one"),
        (
            {"data": (randn(N, D), {"class": randn(N, 2), "box": randn(N, 2)})},
            "^term 'class': CrossEntropyLoss: output ",
        ),
    ],
    ids=lambda v: v if isinstance(v, str) else "-".join(v),
)
def test_what_is_refused(change, said):
    options = {"loss": LOSSES, "data": batch()} | change
    with pytest.raises(ValueError, match=said):
        natgrad.fisher(TwoHeads(), options.pop("loss"), options.pop("data"), "kfac", **options)
