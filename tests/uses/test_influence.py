"""Influence scores against brute force: every gradient by autograd, the damped matrix inverted whole."""

import pytest
import torch
from torch import nn

import natgrad
from models import MODELS
from natgrad.uses.scores import Scores
from oracles import close, dense_curvature, f64, net, randn
from scored import DAMPING, gradients, problem

STRUCTURES = ["dense", "block", "kfac", "ekfac", "low_rank", "diagonal", "implicit"]


def brute(matrix, model, loss, train, query, damping=DAMPING):
    inverse = torch.linalg.inv(matrix + damping * torch.eye(len(matrix), dtype=f64))
    return gradients(model, loss, query) @ inverse @ gradients(model, loss, train).mT


LOSSES = {
    "cross-entropy": nn.CrossEntropyLoss(),
    "its sum": nn.CrossEntropyLoss(reduction="sum"),
    "weighted": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2, 0.5], dtype=f64)),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("structure", ["dense", "implicit"])
def test_the_scores_of_the_whole_matrix_are_those_of_brute_force(structure, name):
    model, loss, train, query = problem(LOSSES[name])
    found = natgrad.influence(model, loss, train, query, structure, damping=DAMPING)
    matrix = dense_curvature(model, loss, [train])
    close(found, brute(matrix, model, loss, train, query), 1e-8)


class Odd(nn.Module):
    """A parameter that no layer kind covers: its rows come from autograd alone."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(randn(4, 3))

    def forward(self, x):
        return (x @ self.a.exp()).sin()


@pytest.mark.parametrize("model", [Odd(), net(4, 6, 3)], ids=["autograd", "layers"])
@pytest.mark.parametrize("structure", ["dense", "implicit"])
def test_examples_whose_target_is_ignored_have_a_score_of_zero(structure, model):
    _, loss, (x, y), query = problem(nn.CrossEntropyLoss(reduction="sum"))
    y = y.clone()
    y[[0, 7, 8]] = -100
    found = natgrad.influence(model.eval(), loss, (x, y), query, structure, damping=DAMPING)
    close(found, brute(dense_curvature(model, loss, [(x, y)]), model, loss, (x, y), query), 1e-8)
    close(found[:, [0, 7, 8]], torch.zeros(5, 3, dtype=f64), 0)


def test_squared_errors_likewise():
    model, loss = net(4, 6, 3).eval(), nn.MSELoss()
    train, query = (randn(20, 4), randn(20, 3, seed=2)), (randn(5, 4, seed=7), randn(5, 3, seed=3))
    found = natgrad.influence(model, loss, train, query, "dense", damping=DAMPING)
    close(found, brute(dense_curvature(model, loss, [train]), model, loss, train, query), 1e-9)


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_structures_scores_are_those_of_its_own_matrix(structure, centered):
    model, loss, train, query = problem()
    found = natgrad.influence(model, loss, train, query, structure, damping=DAMPING, centered=centered)
    F = natgrad.fisher(model, loss, train, structure, centered=centered)
    close(found, brute(F.to_dense(), model, loss, train, query), 1e-8)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_each_example_with_itself(structure):
    model, loss, train, _ = problem()
    both = natgrad.influence(model, loss, train, train, structure, damping=DAMPING)
    close(natgrad.influence(model, loss, train, structure=structure, damping=DAMPING), both.diagonal(), 1e-8)
    assert both.diagonal().min() > 0


def test_batches_change_nothing():
    model, loss, (x, y), (a, b) = problem()
    expected = natgrad.influence(model, loss, (x, y), (a, b))
    found = natgrad.influence(model, loss, iter([(x[:7], y[:7]), (x[7:], y[7:])]), [(a[:2], b[:2]), (a[2:], b[2:])])
    close(found, expected)


@pytest.mark.parametrize("structure", ["kfac", "diagonal"])
def test_refined_they_come_to_those_of_the_exact_matrix(structure):
    model, loss, (x, y), query = problem()
    train = [(x[:9], y[:9]), (x[9:], y[9:])]
    exact = natgrad.influence(model, loss, train, query, "dense", damping=DAMPING)
    errors = []
    for steps in (0, 2, 100):
        found = natgrad.influence(model, loss, train, query, structure, damping=DAMPING, refine=steps)
        errors.append(float((found - exact).norm() / exact.norm()))
    assert errors[2] < 2e-3 < errors[1] < errors[0]
    itself = natgrad.influence(model, loss, train, structure=structure, damping=DAMPING, refine=100)
    exact = natgrad.influence(model, loss, train, structure="dense", damping=DAMPING)
    close(itself, exact, 2e-3 * float(exact.max()))


def test_any_measure_of_a_query():
    model, loss, train, query = problem()
    found = natgrad.influence(model, loss, train, query, "dense", damping=DAMPING, measure=lambda f, y: -f[:, 0])
    matrix = dense_curvature(model, loss, [train])
    inverse = torch.linalg.inv(matrix + DAMPING * torch.eye(len(matrix), dtype=f64))
    wanted = gradients(model, lambda f, y: -f[0, 0], query)
    close(found, wanted @ inverse @ gradients(model, loss, train).mT)


def test_factors_are_used_again(tmp_path):
    model, loss, train, query = problem()
    F = natgrad.fisher(model, loss, train, "ekfac")
    F.save(tmp_path / "factors.safetensors")
    found = natgrad.influence(model, loss, train, query, factors=natgrad.load(tmp_path / "factors.safetensors"))
    assert torch.equal(found, natgrad.influence(model, loss, train, query))
    with pytest.raises(ValueError, match=r"factors belong to another model or other parameters: '0.weight' has shape"):
        natgrad.influence(net(4, 7, 3), loss, train, query, factors=F)
    with pytest.raises(ValueError, match="give the matrix of this model, and the same params="):
        natgrad.influence(model, loss, train, query, factors=F, params=["0.weight"])


def test_leaving_an_example_out_changes_the_loss_by_its_score():
    """A linear model, where the first order is nearly all: retrained without an example."""
    torch.manual_seed(0)
    model, loss, n = nn.Linear(3, 1).double().eval(), nn.MSELoss(), 60
    x, y = randn(n, 3), randn(n, 1, seed=1)
    decay = 0.1

    def solution(kept):
        X = torch.cat([x[kept], torch.ones(len(kept), 1, dtype=f64)], 1)
        A = 2 * X.mT @ X / n + decay * torch.eye(4, dtype=f64)
        return torch.linalg.solve(A, 2 * X.mT @ y[kept] / n)[:, 0]

    def put(theta):
        with torch.no_grad():
            model.weight.copy_(theta[None, :3])
            model.bias.copy_(theta[3:])

    query = randn(4, 3, seed=5), randn(4, 1, seed=6)
    put(solution(torch.arange(n)))
    scores = natgrad.influence(model, loss, (x, y), query, "dense", damping=decay)
    before = (model(query[0]) - query[1]).square()[:, 0].detach()
    for i in (0, 3, 11):
        put(solution(torch.tensor([j for j in range(n) if j != i])))
        after = (model(query[0]) - query[1]).square()[:, 0].detach()
        found, predicted = after - before, scores[:, i].as_subclass(torch.Tensor) / n
        assert (found - predicted).norm() < 0.2 * predicted.norm()


def test_the_largest_scores():
    scores = Scores(torch.tensor([[0.1, -2.0, 0.7], [3.0, 1.0, 2.0]]))
    assert scores.top(2).indices.tolist() == [[2, 0], [0, 2]]
    assert scores.top(1, against=True).values.tolist() == [[-2.0], [1.0]]
    with pytest.raises(ValueError, match="at most the 3 training examples"):
        scores.top(4)


@pytest.mark.parametrize("name", ["GPT-2", "ViT", "ResNet", "LoRA"])
def test_models_that_people_have(name):
    torch.manual_seed(0)
    example = MODELS[name]()
    example.model.eval()
    loss, query = nn.CrossEntropyLoss(), [(example.x[:2], example.y[:2])]
    found = natgrad.influence(example.model, loss, example.data, query, forward=example.forward)
    assert found.shape == (2, len(example.x))
    if name == "LoRA":
        return

    class Read(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = example.model

        def forward(self, x):
            return example.forward(self.inner, (x, None))[0]

    g = gradients(Read().double(), loss, (example.x if name == "GPT-2" else example.x.double(), example.y))
    own = natgrad.influence(
        example.model, loss, [(example.x if name == "GPT-2" else example.x.double(), example.y)], structure="diagonal",
        damping=1e6, forward=example.forward,
    )  # fmt: skip
    close(1e6 * own, g.square().sum(1), 1e-3)  # all but F + λ = λ
