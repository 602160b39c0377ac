"""Per-example gradients and Jacobians, against autograd example by example."""

import pytest
import torch
from torch import nn

from natgrad.curvature.problem import Problem
from natgrad.uses.rows import loss_columns, measure_columns, outputs_problem, rows_of, unit_columns
from oracles import Power, close, f64, net, randn


def conv():
    layers = [nn.Conv2d(2, 3, 3, dtype=f64), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3, dtype=f64)]
    return nn.Sequential(*layers), randn(5, 2, 4, 4)


def normalized():
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)).double(), randn(5, 4)


def unsupported():
    return nn.Sequential(nn.Linear(4, 6), Power(6), nn.Linear(6, 3)).double(), randn(5, 4)


def tokens():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.embed(x).tanh()).transpose(1, 2)

    return Tagger().double(), torch.randint(7, (5, 6))


MODELS = {
    "perceptron": lambda: (net(4, 6, 3), randn(5, 4)),
    "conv": conv,
    "normalized": normalized,
    "unsupported": unsupported,
    "tokens": tokens,
}


def one_by_one(model, values):
    """The gradient of every scalar in the parameters, by autograd alone: `(values, *shape)` each."""
    names, leaves = zip(*model.named_parameters(), strict=True)
    rows = [torch.autograd.grad(v, leaves, retain_graph=True) for v in values]
    return {n: torch.stack(column) for n, column in zip(names, zip(*rows, strict=True), strict=True)}


@pytest.mark.parametrize("name", MODELS)
def test_the_rows_of_unit_columns_are_the_jacobian(name):
    model, x = MODELS[name]()
    problem = outputs_problem(model, [x])
    (rows,) = rows_of(problem, unit_columns)
    expected = one_by_one(model, model(x).flatten())
    found = rows.dense()
    for n in expected:
        close(found[n].flatten(0, 1), expected[n])
    v = {n: randn(2, *p.shape, seed=i) for i, (n, p) in enumerate(model.named_parameters())}
    products = sum(expected[n].flatten(1) @ v[n].flatten(1).mT for n in v).mT
    close(rows.times(v).flatten(1), products)
    c = randn(len(x), found["head.weight" if name == "tokens" else "0.weight"].shape[1])
    for n, total in rows.transposed(c).items():
        close(total, torch.einsum("r,r...->...", c.flatten(), expected[n]))
    flat = torch.cat([p.flatten(1) for p in expected.values()], 1)
    close(rows.gram(), flat @ flat.mT)


LOSSES = {
    "cross-entropy": (nn.CrossEntropyLoss(), lambda: torch.arange(5) % 3),
    "its sum, weighted": (
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2, 3], dtype=f64), reduction="sum"),
        lambda: torch.arange(5) % 3,
    ),
    "its mean, weighted and smoothed": (
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2, 3], dtype=f64), label_smoothing=0.1),
        lambda: torch.arange(5) % 3,
    ),
    "squared error": (nn.MSELoss(), lambda: randn(5, 3)),
    "logistic": (
        nn.BCEWithLogitsLoss(pos_weight=torch.tensor([2.0, 1, 1], dtype=f64)),
        lambda: randn(5, 3).sign() / 2 + 0.5,
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_rows_of_a_loss_are_the_gradients_of_each_example_by_itself(name):
    loss, target = LOSSES[name]
    model, x, y = net(4, 6, 3), randn(5, 4), target()
    problem = Problem(model, loss, (x, y))
    (rows,) = rows_of(problem, loss_columns(problem))
    expected = one_by_one(model, [loss(model(x[i : i + 1]), y[i : i + 1]) for i in range(5)])
    for n, p in rows.dense().items():
        close(p[:, 0], expected[n])


def test_an_example_whose_targets_are_all_ignored_has_no_gradient():
    model, x = tokens()
    y = torch.randint(3, (5, 6))
    y[1], y[2, :3] = -100, -100
    problem = Problem(model, nn.CrossEntropyLoss(), (x, y))
    (rows,) = rows_of(problem, loss_columns(problem))
    kept = [0, 2, 3, 4]
    expected = one_by_one(model, [problem.curvature.module(model(x[i : i + 1]), y[i : i + 1]) for i in kept])
    for n, p in rows.dense().items():
        close(p[kept, 0], expected[n])
        assert not p[1].any()


def test_a_measure_takes_the_losss_place():
    model, x, y = net(4, 6, 3), randn(5, 4), torch.arange(5) % 3
    problem = Problem(model, nn.CrossEntropyLoss(), (x, y))
    (rows,) = rows_of(problem, measure_columns(lambda f, y: f.gather(1, y[:, None])[:, 0]))
    expected = one_by_one(model, model(x)[range(5), y])
    for n, p in rows.dense().items():
        close(p[:, 0], expected[n])
    with pytest.raises(ValueError, match="one number for each example"):
        list(rows_of(problem, measure_columns(lambda f, y: f)))


def test_a_parameter_that_a_batch_does_not_use_has_rows_of_zeros():
    class Switch(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 3, dtype=f64), nn.Linear(4, 3, dtype=f64)

        def forward(self, x):
            return (self.a if x[0, 0] > 0 else self.b)(x)

    model, x = Switch(), randn(5, 4)
    x[0, 0] = 1.0
    (rows,) = rows_of(outputs_problem(model, [x]), unit_columns)
    found = rows.dense()
    assert found["a.weight"].any()
    assert not found["b.weight"].any()
    assert found["b.bias"].shape == (5, 3, 3)
