"""Laplace posteriors and influence scores beside laplace-torch and kronfluence, where they are installed."""

import pytest
import torch
from torch import nn

import natgrad
from benchmarks import influence, laplace_torch
from oracles import close, f64, randn

pytestmark = pytest.mark.filterwarnings("ignore")
PRIOR = 0.7


@pytest.fixture
def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, influence.CLASSES)).double()
    return model, (randn(30, 5), torch.randint(influence.CLASSES, (30,))), randn(4, 5, seed=1)


def test_scores_are_those_of_the_dense_matrix(problem):
    model, data, x = problem
    queries = x, torch.arange(4)
    each, wanted = (
        torch.cat([g.flatten(1) for g in influence.gradients(model, *d).values()], 1) for d in (data, queries)
    )
    F = natgrad.fisher(model, nn.CrossEntropyLoss(), data, "dense").to_dense()
    expected = wanted @ torch.linalg.inv(F + 0.1 * torch.eye(len(F), dtype=f64)) @ each.mT
    close(influence.scores(model, data, queries, "dense", "exact", 0.1), expected, 1e-10)


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("task", ["classification", "regression"])
def test_the_posterior_is_that_of_laplace_torch(problem, structure, subset, task):
    pytest.importorskip("laplace")
    model, (x, y), others = problem
    data = x, y if task == "classification" else randn(len(y), influence.CLASSES, seed=2)
    found = laplace_torch.agreement(model, data, others, PRIOR, structure, subset, task)
    assert len(found) >= 4
    assert max(found.values()) < (1e-5 if structure == "full" else 1e-10), found  # full: an identity in float32


def test_draws_predict_what_those_of_laplace_torch_do(problem):
    pytest.importorskip("laplace")
    model, data, x = problem
    largest, rms = laplace_torch.sampled(model, data, x, PRIOR, draws=1000)
    assert largest < 5
    assert rms < 1.5


def test_scores_are_those_of_kronfluence(problem):
    pytest.importorskip("kronfluence")
    model, data, x = problem
    found = influence.agreement(model, data, (x, torch.arange(4)), damping=0.01)
    assert len(found) == 6
    assert max(found.values()) < 1e-12
