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


def test_a_covariance_is_that_of_the_dense_matrix(problem):
    model, data, x = problem
    J = torch.cat([j.flatten(2) for j in laplace_torch.jacobian(model, x).values()], 2)
    P = laplace_torch.precision(model, data, "dense").to_dense()
    expected = J @ torch.linalg.inv(P + PRIOR * torch.eye(len(P), dtype=f64)) @ J.mT
    found = laplace_torch.covariance(
        laplace_torch.precision(model, data, "dense"), laplace_torch.jacobian(model, x), PRIOR
    )
    close(found, expected, 1e-10)


def test_scores_are_those_of_the_dense_matrix(problem):
    model, data, x = problem
    queries = x, torch.arange(4)
    each, wanted = (
        torch.cat([g.flatten(1) for g in influence.gradients(model, *d).values()], 1) for d in (data, queries)
    )
    F = natgrad.fisher(model, nn.CrossEntropyLoss(), data, "dense").to_dense()
    expected = wanted @ torch.linalg.inv(F + 0.1 * torch.eye(len(F), dtype=f64)) @ each.mT
    close(influence.scores(model, data, queries, "dense", "exact", 0.1), expected, 1e-10)


def test_the_posterior_is_that_of_laplace_torch(problem):
    pytest.importorskip("laplace")
    model, data, x = problem
    found = laplace_torch.agreement(model, data, x, PRIOR, skip=[])
    for structure in ("kron", "diag"):
        assert max(found[structure]) < 1e-12
    assert max(found["full"]) < 1e-5  # laplace-torch's is a product with an identity in float32


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
