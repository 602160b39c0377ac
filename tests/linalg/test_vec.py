"""The two orders in which a matrix is flattened."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from natgrad.linalg import unvec, vec
from oracles import close, randn

sizes = st.integers(1, 5)


@given(rows=sizes, columns=sizes, seed=st.integers(0, 1000))
def test_vec_of_a_product_is_a_kronecker_product(rows, columns, seed):
    P, V, Q = randn(rows, rows, seed=seed), randn(rows, columns, seed=seed + 1), randn(columns, columns, seed=seed + 2)
    close(vec(P @ V @ Q), torch.kron(Q.mT.contiguous(), P) @ vec(V), 1e-12)
    close((P @ V @ Q).flatten(), torch.kron(P, Q.mT.contiguous()) @ V.flatten(), 1e-12)


@given(rows=sizes, columns=sizes, batch=st.lists(sizes, max_size=2))
def test_unvec_undoes_vec(rows, columns, batch):
    W = randn(*batch, rows, columns)
    assert torch.equal(unvec(vec(W), (rows, columns)), W)
    assert vec(W).shape == (*batch, rows * columns)


def test_unvec_with_a_shape_that_does_not_fit():
    with pytest.raises(ValueError, match=r"5 entries.*\(2, 3\) needs 6"):
        unvec(torch.zeros(5), (2, 3))
