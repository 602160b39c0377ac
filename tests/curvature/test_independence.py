"""HSIC and its kin on pairs of matrices, against the matrices themselves and against populations known exactly."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from natgrad.curvature.independence import Kernel, dependence, permutation_p_value, unbiased_hsic
from oracles import close, f64, randn


def matrices(z):
    """`Z_i = Σ_k z_ik z_ikᵀ`, each as one row."""
    return torch.einsum("nki,nkj->nij", z, z).flatten(1)


def kernel(z, chunk=2000):
    return Kernel(z, matrices(z).mean(0).view(z.shape[-1], -1), chunk)


def measure(x, y, *, chunk=2000, permutations=0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return dependence(kernel(x, chunk), kernel(y, chunk), chunk=chunk, permutations=permutations, generator=generator)


def covariance(x, y):
    """`‖E[(X − E X) ⊗ (Y − E Y)]‖` of the cases as a population of their own."""
    X, Y = matrices(x), matrices(y)
    return ((X - X.mean(0)).mT @ (Y - Y.mean(0)) / len(x)).norm().item()


@given(n=st.integers(1, 9), k=st.integers(1, 3), d=st.integers(1, 9), seed=st.integers(0, 10**6))
def test_centered_kernel_is_that_of_the_centered_matrices(n, k, d, seed):
    """Where the matrices are formed (they are small beside k), and where they are not."""
    z = randn(n, k, d, seed=seed)
    K, cases = kernel(z), torch.arange(n)
    Z = matrices(z)
    close(K.block(cases, cases), Z @ Z.mT)
    Z = Z - Z.mean(0)
    close(K.centered(K.block(cases, cases), cases, cases), Z @ Z.mT)


def test_a_covariance_far_below_the_second_moment_is_not_lost():
    """At 1e-6 of it, `‖G‖² − 2⟨G, A ⊗ B⟩ + ‖A ⊗ B‖²` would be wrong in the third digit."""
    x, y = 1 + 1e-6 * randn(300, 1, 3), randn(300, 2, 2, seed=1)
    assert measure(x, y).covariance == pytest.approx(covariance(x, y), rel=1e-4)


@pytest.mark.parametrize("n", [20, 33])
def test_parts_add_up_to_the_whole(n):
    x, y = randn(n, 1, 3), randn(n, 2, 2, seed=1)
    whole, parts = measure(x, y), measure(x, y, chunk=8)
    assert whole.covariance == pytest.approx(covariance(x, y))
    for name in ("covariance", "second_moment", "x_spread", "y_spread", "cka"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name), rel=1e-10)


@given(n=st.integers(2, 12), k=st.integers(1, 3), seed=st.integers(0, 10**6))
def test_covariance_is_at_most_the_product_of_the_spreads(n, k, seed):
    found = measure(randn(n, 1, 3, seed=seed), randn(n, k, 2, seed=seed + 1))
    assert found.covariance <= found.x_spread * found.y_spread * (1 + 1e-12)
    assert 0 <= found.cka <= 1 + 1e-12


def test_cka_of_a_thing_with_itself_is_one():
    x = randn(15, 1, 3)
    assert measure(x, 2 * x).cka == pytest.approx(1)


# The unbiased estimate ---------------------------------------------------------------------------------

ATOMS = 6


def population():
    """As many equally likely pairs as there are atoms; inputs and curvature depend weakly."""
    x = randn(ATOMS, 1, 2)
    return x, randn(ATOMS, 1, 2, seed=1) + 0.3 * x


def check_mean(estimates, exact):
    estimates = torch.tensor(estimates, dtype=f64)
    error = estimates.std() / math.sqrt(len(estimates))
    assert error < 0.1 * exact  # else anything would do
    assert (estimates.mean() - exact).abs() < 4 * error


def resampled(n, times):
    generator = torch.Generator().manual_seed(2)
    for _ in range(times):
        yield torch.randint(ATOMS, (n,), generator=generator)


def test_unbiased_estimate_has_the_mean_of_the_population():
    x, y = population()
    K, L = (matrices(z) @ matrices(z).mT for z in (x, y))
    exact = covariance(x, y) ** 2
    draws = list(resampled(10, 3000))
    check_mean([unbiased_hsic(K[i][:, i], L[i][:, i]) for i in draws], exact)
    # The biased one does not: it is the square of the residual's norm on the draw.
    biased = torch.tensor([covariance(x[i], y[i]) ** 2 for i in draws[:1000]])
    assert biased.mean() - exact > 4 * biased.std() / math.sqrt(len(biased))


def test_unbiased_estimate_in_parts_has_it_too():
    x, y = population()
    estimates = [measure(x[i], y[i], chunk=8).unbiased for i in resampled(20, 1000)]
    check_mean(estimates, covariance(x, y) ** 2)


def test_unbiased_estimate_is_the_mean_over_distinct_quadruples():
    """Song et al. (2012), eq. 4: a U-statistic of order 4."""
    K, L = (M @ M.mT for M in (randn(5, 3), randn(5, 2, seed=1)))
    distinct = [
        K[i, j] * (L[i, j] + L[q, r] - 2 * L[i, q])
        for i, j, q, r in torch.cartesian_prod(*[torch.arange(5)] * 4).tolist()
        if len({i, j, q, r}) == 4
    ]
    assert unbiased_hsic(K, L) == pytest.approx(sum(distinct).item() / len(distinct))


# The test of independence ------------------------------------------------------------------------------


def p_value(x, y, permutations, seed):
    (X, Y), generator = (matrices(x), matrices(y)), torch.Generator().manual_seed(seed)
    return permutation_p_value(X @ X.mT, Y @ Y.mT, permutations, generator=generator)


def test_p_values_are_uniform_where_independent():
    count = 300
    found = [p_value(randn(15, 1, 2, seed=2 * s), randn(15, 2, 2, seed=2 * s + 1), 49, s) for s in range(count)]
    p = torch.tensor(found, dtype=f64)
    # Kolmogorov-Smirnov against the uniform distribution on 1/50, ..., 1: 1.63/√n is the 1 % point.
    grid = torch.arange(1, 51, dtype=f64) / 50
    empirical = (p <= grid[:, None] + 1e-12).double().mean(1)
    assert (empirical - grid).abs().max() < 1.63 / math.sqrt(count)
    assert ((p * 50).round() - p * 50).abs().max() < 1e-9


def test_p_value_is_the_least_possible_where_dependent():
    x = randn(40, 1, 3)
    assert measure(x, x + 0.1 * randn(40, 1, 3, seed=1), permutations=99).p_value == 0.01


def test_p_value_takes_one_part():
    """Of 40 cases in parts of 8, 8 are permuted: the generator gives one order of 40, then orders of 8."""
    x, y = randn(40, 1, 3), randn(40, 1, 2, seed=1)
    generator = torch.Generator().manual_seed(0)
    part = torch.randperm(40, generator=generator)[:8]
    (X, Y), Z = (matrices(z)[part] for z in (x, y)), 30
    expected = permutation_p_value(X @ X.mT, Y @ Y.mT, Z, generator=generator)
    assert measure(x, y, chunk=8, permutations=Z).p_value == expected


def test_without_variation_nothing_is_found():
    x, y = torch.ones(10, 1, 2, dtype=f64), randn(10, 1, 2)
    found = measure(x, y, permutations=9)
    assert found.x_spread == 0
    assert math.isnan(found.cka)
    assert found.p_value == 1
    assert math.isnan(measure(x[:3], y[:3]).unbiased)
