import pytest
import torch

from natgrad.linalg import Kronecker
from natgrad.linalg.eigen import eigh, inverse_from_cholesky, semidefinite
from oracles import close, f64, randn, spd


def test_eigenvalues_that_rounding_put_below_zero_count_as_zero():
    X = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    A = X @ X.mT  # rank 5 in float32: eigenvalues of either sign around zero
    assert torch.linalg.eigvalsh(A)[0] < 0
    K = Kronecker(A, 1e3 * torch.eye(3))
    solved = K.solve(torch.ones(3, 40), damping=1e-4)
    assert torch.isfinite(solved).all()


def test_an_indefinite_factor_is_an_error_that_says_so():
    with pytest.raises(ValueError, match=r"factor B is indefinite: its smallest eigenvalue is -2"):
        Kronecker(torch.eye(2), torch.diag(torch.tensor([1.0, -2.0]))).solve(torch.ones(2, 2), damping=0.1)


def test_eigenvalues_above_rounding_stay_as_they_are():
    e = torch.tensor([0.0, 1e-3, 1.0])
    assert torch.equal(semidefinite(e, "e"), e)


@pytest.mark.parametrize("function", [eigh, lambda M, what: inverse_from_cholesky(M, what, 0.0)])
def test_nan_is_an_error_that_names_the_matrix(function):
    with pytest.raises(ValueError, match="the factor A"):
        function(torch.full((2, 2), torch.nan), "the factor A")


def test_the_inverse_is_that_of_the_dense_solver():
    M = spd(7, 0)
    close(inverse_from_cholesky(M, "M", 0.0) @ randn(7), torch.linalg.solve(M, randn(7)), 1e-12)


@pytest.mark.parametrize("smallest", [1.0, 1e-2, 1e-6])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e20])
def test_a_float32_inverse_keeps_three_digits_whatever_the_scale(smallest, scale):
    U = torch.linalg.qr(randn(30, 30, seed=1))[0]
    M = (U * torch.linspace(smallest, 1, 30, dtype=f64)) @ U.mT
    inverse = inverse_from_cholesky((M * scale).float(), "M", 1.0).double() * scale
    error = (inverse @ M - torch.eye(30, dtype=f64)).norm() / 30**0.5
    # What rounding M itself to float32 does grows with the condition number as well.
    assert error < max(1e-3, 1e-7 / smallest * 30)
