"""Estimates by products: unbiased, with a standard error that is one, repeatable."""

import math

import pytest
import torch

from natgrad.linalg import Dense, Diagonal
from oracles import close, f64, randn, spd

M, SMALL = Dense(spd(12, 0)), Dense(spd(4, 0))
REPETITIONS = 120


def generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("estimate", "truth"),
    [
        (lambda g: M.estimate_trace(40, generator=g), M.trace()),
        (lambda g: M.estimate_diagonal(40, generator=g), M.diagonal()),
        (lambda g: SMALL.estimate_logdet(0.5, samples=40, steps=4, generator=g), SMALL.logdet(0.5)),
    ],
    ids=["trace", "diagonal", "logdet"],
)
def test_is_unbiased_and_its_error_is_a_standard_error(estimate, truth):
    """Over many repetitions, `(estimate − truth)/error` has mean 0 and standard deviation 1 (of t with 39 degrees)."""
    estimates = [estimate(generator(seed)) for seed in range(REPETITIONS)]
    scores = torch.stack([(e.value - truth) / e.standard_error for e in estimates])
    assert (scores.mean(0).abs() < 5 / math.sqrt(REPETITIONS)).all()
    assert (scores.std(0) - 1).abs().max() < 0.25


def test_a_diagonal_matrix_has_no_error():
    D = Diagonal((randn(3, 2).abs(), randn(4).abs()))
    estimate = D.estimate_diagonal(2, generator(0))
    for value, error, truth in zip(estimate.value, estimate.standard_error, D.diagonal(), strict=True):
        close(value, truth, 1e-14)
        assert error.max() < 1e-15
    close(D.estimate_trace(2, generator(0)).value, D.trace(), 1e-14)


def test_the_error_falls_with_the_root_of_the_samples():
    few, many = (M.estimate_trace(n, generator(1)).standard_error.item() for n in (100, 10_000))
    assert 7 < few / many < 14


def test_repeats_with_its_generator():
    first, again = (M.estimate_logdet(0.1, 5, 12, generator(3)) for _ in range(2))
    assert torch.equal(first.value, again.value)
    assert "±" in repr(first)


@pytest.mark.parametrize("samples", [1, 0])
def test_too_few_samples_for_an_error(samples):
    for operation in (M.estimate_trace, M.estimate_diagonal, lambda n: M.estimate_logdet(0.1, n)):
        with pytest.raises(ValueError, match=f"samples={samples}.*at least 2"):
            operation(samples)


def test_an_indefinite_matrix_has_no_logdet():
    indefinite = Dense(torch.diag(torch.tensor([1.0, -2.0], dtype=f64)))
    with pytest.raises(ValueError, match="indefinite"):
        indefinite.estimate_logdet(0.1, 4, 2, generator(0))


def test_steps_that_are_none():
    with pytest.raises(ValueError, match="steps=0"):
        M.estimate_logdet(0.1, 4, 0)
