"""What centering claims: the inverse from covariance and mean, the bias update, invariance to a shift of the inputs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from natgrad.linalg import Centered, CenteredKronecker, Dense, Homogeneous, Kronecker, homogeneous_inverse
from oracles import centering, close, f64, homogeneous, randn, spd

sizes, seeds = st.integers(1, 5), st.integers(0, 10_000)


@given(d_in=sizes, seed=seeds)
def test_homogeneous_inverse(d_in, seed):
    C, m = spd(d_in, seed), randn(d_in, seed=seed)
    close(homogeneous_inverse(C, m), torch.linalg.inv(homogeneous(C, m)), 1e-9)


@pytest.mark.parametrize("ridge", [0.0, torch.finfo(f64).eps])  # also if only rounding makes it definite
def test_homogeneous_inverse_of_a_singular_covariance(ridge):
    covariance = torch.ones(2, 2, dtype=f64)
    covariance[1, 1] += ridge
    with pytest.raises(ValueError, match=r"covariance C.*singular"):
        homogeneous_inverse(covariance, torch.zeros(2, dtype=f64))


@given(d_in=sizes, d_out=sizes, seed=seeds)
def test_centering_is_a_unimodular_congruence(d_in, d_out, seed):
    """`A ⊗ B = Tᵀ blockdiag(C ⊗ B, B) T` with `det T = 1`."""
    C, B, m = spd(d_in, seed), spd(d_out, seed + 1), randn(d_in, seed=seed)
    T = centering(m, d_out)
    Z = CenteredKronecker(covariance=C, mean=m, output=B)
    close(Z.to_dense(), T.mT @ torch.block_diag(torch.kron(B, C), B) @ T, 1e-9)
    close(Z.logdet(), d_out * torch.logdet(C) + (d_in + 1) * torch.logdet(B), 1e-9)


def cases(n, d_in, d_out, seed):
    """Inputs and pre-activation gradients of n cases, and the factors and gradients they have."""
    h, g = randn(n, d_in, seed=seed) + randn(d_in, seed=seed + 1), randn(n, d_out, seed=seed + 2)
    m = h.mean(0)
    C, B = (h - m).mT @ (h - m) / n, g.mT @ g / n
    return h, g, m, C, B, g.mT @ h / n, g.mean(0)


@given(d_in=sizes, d_out=sizes, seed=seeds)
def test_the_two_forms_of_the_bias_update_agree(d_in, d_out, seed):
    """`Δb = B⁻¹ ∇_b − ΔW m = E[(1 − mᵀ C⁻¹ (h − m)) B⁻¹ ∇_a]`."""
    h, g, m, C, B, grad_W, grad_b = cases(40, d_in, d_out, seed)
    dW, db = CenteredKronecker(covariance=C, mean=m, output=B).solve((grad_W, grad_b))
    B_inv, C_inv = torch.linalg.inv(B), torch.linalg.inv(C)
    scalar = 1 - (h - m) @ C_inv @ m
    close(db, (scalar.unsqueeze(1) * (g @ B_inv)).mean(0), 1e-8)
    close(dW, B_inv @ (g.mT @ (h - m) / len(h)) @ C_inv, 1e-8)


@given(d_in=sizes, d_out=sizes, seed=seeds)
def test_the_mean_pre_activation_moves_by_B_inverse_grad_b(d_in, d_out, seed):
    """Whatever the weights do: a step of `−λ Δ` moves `E[a]` by `−λ B⁻¹ ∇_b`."""
    h, _, m, C, B, grad_W, grad_b = cases(40, d_in, d_out, seed)
    step, (W, b) = 0.3, (randn(d_out, d_in, seed=seed), randn(d_out, seed=seed))
    dW, db = CenteredKronecker(covariance=C, mean=m, output=B).solve((grad_W, grad_b))
    before, after = h @ W.mT + b, h @ (W - step * dW).mT + (b - step * db)
    close((after - before).mean(0), -step * torch.linalg.solve(B, grad_b), 1e-8)


def moved_outputs(h, g, shift, style, centered):
    """How a damped step moves the pre-activations, for inputs `h + shift` and gradients `g` in them."""
    h = h + shift
    n, m = len(h), h.mean(0)
    C, B = (h - m).mT @ (h - m) / n, g.mT @ g / n
    plain = Homogeneous(Kronecker(homogeneous(C, m), B))
    op = CenteredKronecker(covariance=C, mean=m, output=B) if centered else plain
    dW, db = op.inverse(0.1, damping_style=style) @ (g.mT @ h / n, g.mean(0))
    return h @ dW.mT + db


@pytest.mark.parametrize("style", ["centered", "factored"])
@given(d_in=sizes, d_out=sizes, seed=seeds)
def test_the_centered_damped_step_ignores_a_shift_of_the_inputs(style, d_in, d_out, seed):
    h, g, *_ = cases(40, d_in, d_out, seed)
    shift = 3 + randn(d_in, seed=seed)
    close(moved_outputs(h, g, shift, style, True), moved_outputs(h, g, 0, style, True), 1e-9)


@pytest.mark.parametrize(("style", "centered"), [("exact", True), ("exact", False), ("factored", False)])
def test_the_step_with_plain_or_uncentered_damping_does_not(style, centered):
    h, g, *_ = cases(40, 4, 3, 0)
    here, there = (moved_outputs(h, g, shift, style, centered) for shift in (0, 3.0))
    assert (here - there).norm() > 0.01 * here.norm()


@given(d_in=sizes, d_out=sizes, seed=seeds, damping=st.sampled_from([1e-6, 0.1, 7.0]))
def test_plain_damping_is_that_of_the_homogeneous_product(d_in, d_out, seed, damping):
    """Centered or not, `A ⊗ B` is one matrix."""
    C, B, m = spd(d_in, seed), spd(d_out, seed + 1), randn(d_in, seed=seed)
    apart, together = CenteredKronecker(covariance=C, mean=m, output=B), Homogeneous(Kronecker(homogeneous(C, m), B))
    close(apart.inverse(damping).to_dense(), together.inverse(damping).to_dense(), 1e-9)
    close(apart.logdet(damping), together.logdet(damping), 1e-9)


@pytest.mark.parametrize("diagonal", [False, True])
def test_plain_damping_in_float32_with_inputs_far_from_zero(diagonal):
    """A covariance of one beside a mean of a thousand, whose square is beyond float32's digits."""
    C, B = spd(4, 0), spd(3, 1)
    C, m = C.diagonal().clone() if diagonal else C, torch.full((4,), 1000.0, dtype=f64)
    exact = CenteredKronecker(covariance=C, mean=m, output=B)
    op = CenteredKronecker(covariance=C.float(), mean=m.float(), output=B.float())
    close(op.logdet(0.1).double(), exact.logdet(0.1), 1e-5)
    close(op.inverse(0.1).trace().double(), exact.inverse(0.1).trace(), 1e-4)


def damped_factors(A, B, damping):
    pi = ((A.trace() / len(A)) / (B.trace() / len(B))).sqrt()
    eye_A, eye_B = torch.eye(len(A), dtype=f64), torch.eye(len(B), dtype=f64)
    return A + pi * damping**0.5 * eye_A, B + damping**0.5 / pi * eye_B


@given(d_in=sizes, d_out=sizes, seed=seeds, damping=st.sampled_from([1e-6, 0.1, 7.0]))
def test_factored_damping(d_in, d_out, seed, damping):
    """`(C + π√λ I) ⊗ (B + √λ/π I)` for the weight, `B + λ I` for the mean pre-activation."""
    C, B, m = spd(d_in, seed), spd(d_out, seed + 1), randn(d_in, seed=seed)
    damped_C, damped_B = damped_factors(C, B, damping)
    K = Kronecker(C, B).inverse(damping, damping_style="factored")
    close(K.to_dense(), torch.linalg.inv(torch.kron(damped_B, damped_C)), 1e-8)

    T, bias = centering(m, d_out), B + damping * torch.eye(d_out, dtype=f64)
    Z = CenteredKronecker(covariance=C, mean=m, output=B).inverse(damping, damping_style="factored")
    damped = T.mT @ torch.block_diag(torch.kron(damped_B, damped_C), bias) @ T
    close(Z.to_dense(), torch.linalg.inv(damped), 1e-8)


def test_factored_damping_of_a_factor_that_is_zero():
    K = Kronecker(torch.zeros(2, 2, dtype=f64), torch.eye(2, dtype=f64))
    close(K.inverse(0.25, damping_style="factored").to_dense(), torch.eye(4, dtype=f64) / (0.5 * 1.5), 1e-12)


def test_a_block_that_would_be_damped_by_a_dense_matrix_too_large_says_so():
    """Of KFOC, whose bias's part is not diagonal in the weight's output basis."""
    A, B = torch.eye(200, dtype=f64), torch.eye(150, dtype=f64)
    B[0, 1] = B[1, 0] = 0.5
    block = Centered(Kronecker(A, B.diagonal().diag()), Dense(B), torch.ones(200, dtype=f64))
    with pytest.raises(TypeError, match=r"a centered block of 30150 rows, .* use centered=False"):
        block.inverse(1e-3)
    assert block.inverse(1e-3, damping_style="centered").space == block.space
