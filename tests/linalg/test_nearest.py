"""The nearest Kronecker product against the singular value decomposition of the rearranged matrix."""

import pytest
import torch

from natgrad.linalg.nearest import nearest_of_cases, nearest_of_columns
from oracles import close, f64, randn


def exact(h, g):
    """`Σ_ik s sᵀ` on matrices in torch order, `(o, i, o, i)`."""
    S = torch.einsum("nkto,nti->nkoi", g, h).flatten(0, 1)
    return torch.einsum("mab,mcd->abcd", S, S)


def by_svd(G):
    """The best `A`, `B`: the first singular pair of the matrix `(o o, i i)`."""
    o, i = G.shape[:2]
    U, s, Vt = torch.linalg.svd(G.permute(0, 2, 1, 3).reshape(o * o, i * i))
    return Vt[0].view(i, i), s[0] * U[:, 0].view(o, o), s


def product(A, B):
    return torch.einsum("ac,bd->abcd", B, A)


@pytest.mark.parametrize("t", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_it_is_the_best_one_and_positive_semidefinite(t, seed):
    h, g = randn(30, t, 4, seed=seed), randn(30, 2, t, 3, seed=seed + 10)
    h = h + 1  # as activations are
    A, B = nearest_of_cases(h, g, torch.eye(4, dtype=f64))
    S = torch.einsum("nkto,nti->nkoi", g, h).flatten(0, 1)
    close(product(*nearest_of_columns(S, torch.eye(4, dtype=f64))), product(A, B), 1e-6)
    G = exact(h, g)
    best_A, best_B, s = by_svd(G)
    error = (G - product(A, B)).norm()
    best = (G - product(best_A, best_B)).norm()
    assert abs(float(error - best)) < 1e-12 * float(G.norm())
    close(product(A, B) / s[0], product(best_A, best_B) / s[0], 1e-6)
    assert torch.linalg.eigvalsh(A)[0] > -1e-12
    assert torch.linalg.eigvalsh(B)[0] > -1e-12 * B.norm()
    assert float(A.norm()) == pytest.approx(2.0)  # that of the start


def test_a_kronecker_product_is_found_exactly():
    h = torch.tensor([[1.0, 2.0], [1.0, 2.0]], dtype=f64).unsqueeze(1)
    g = randn(2, 1, 1, 3)
    A, B = nearest_of_cases(h, g, torch.eye(2, dtype=f64))
    close(product(A, B), exact(h, g))


def test_zeros_stay_zeros():
    h, g = randn(5, 1, 2), torch.zeros(5, 1, 1, 3, dtype=f64)
    assert not nearest_of_cases(h, g, torch.eye(2, dtype=f64))[1].any()
    assert not nearest_of_cases(0 * h, g + 1, torch.zeros(2, 2, dtype=f64))[1].any()
