"""The exact block at a size at which it cannot be formed."""

import subprocess
import sys

import pytest
import torch

from natgrad.linalg import ExactBlock
from oracles import close, f64, randn

SOLVE = """
import resource, torch
from natgrad.linalg import ExactBlock
torch.manual_seed(0)
h, g = torch.randn(2000, 1, 784), torch.randn(2000, 1, 1, 1000)
G = ExactBlock(h, g, bias=True, scale=1 / 2000)
v = (torch.randn(1000, 784), torch.randn(1000))
inverse = G.inverse(0.1)
u = inverse @ v
back = G @ u
error = max(((b + 0.1 * x - w).norm() / w.norm()).item() for b, x, w in zip(back, u, v))
print(error, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux alone")
def test_a_solve_with_785000_rows_and_2000_cases_takes_less_than_2_GiB():
    run = subprocess.run([sys.executable, "-c", SOLVE], capture_output=True, text=True, check=True)
    error, peak = map(float, run.stdout.split())
    assert error < 1e-3  # of the residual, in float32 and at a condition of 4,000
    assert peak < 2  # GiB, with torch's own


def test_to_dense_refuses_by_name_what_would_not_fit():
    G = ExactBlock(torch.zeros(2, 1, 784), torch.zeros(2, 1, 1, 1000), bias=True)
    with pytest.raises(
        ValueError, match=r"785000 rows: as a dense matrix it would take 2295\.\d GB\. The limit is 20000"
    ):
        G.to_dense()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("n", "k", "t"), [(4, 2, 1), (3, 2, 3), (9, 3, 2)], ids=["wide", "positions", "tall"])
def test_every_way_through_the_gram_matrix_is_that_of_the_columns(n, k, t, bias):
    """Products, inverse, powers, log-determinant and spectrum against `S Sᵀ` with columns formed one by one."""
    h, g = randn(n, t, 3), randn(n, k, t, 2, seed=1)
    G = ExactBlock(h, g, bias=bias, scale=0.3)
    columns = []
    for i in range(n):
        for j in range(k):
            W = sum(torch.outer(g[i, j, s], h[i, s]) for s in range(t))
            columns.append(torch.cat([W.flatten(), *([g[i, j].sum(0)] if bias else [])]))
    S = torch.stack(columns, 1) * 0.3**0.5
    dense = S @ S.T
    eye = torch.eye(len(dense), dtype=f64)
    close(G.to_dense(), dense, 1e-12)
    close(G.gram(), S.T @ S, 1e-12)
    close(G.columns(), S, 1e-12)
    for damping in (1e-3, 1.0):
        damped = dense + damping * eye
        close(G.inverse(damping).to_dense(), torch.linalg.inv(damped), 1e-8)
        close(G.logdet(damping), torch.logdet(damped), 1e-9)
        e, Q = torch.linalg.eigh(damped)
        close(G.power(-0.5, damping).to_dense(), (Q * e**-0.5) @ Q.T, 1e-8)
    e = torch.linalg.eigvalsh(dense)[-len(G.spectrum()) :]
    close(G.spectrum(), e.clamp_min(0), 1e-10)
    assert G.rank_bound == n * k


@pytest.mark.parametrize("order", ["torch", "vec"])
def test_the_notes_four_parts(order):
    """`WW`, `Wb`, `bW` and `bb` are the parts of the dense block."""
    G = ExactBlock(randn(5, 2, 3), randn(5, 2, 2, 4, seed=1), bias=True)
    dense, w = G.to_dense(order), 12
    close(G.WW.to_dense(order), dense[:w, :w], 1e-12)
    close(G.Wb.to_dense(order), dense[:w, w:], 1e-12)
    close(G.bW.to_dense(order), dense[w:, :w], 1e-12)
    close(G.bb.to_dense(order), dense[w:, w:], 1e-12)
    close(G.bW.mT.to_dense(order), G.Wb.to_dense(order), 1e-12)
    b, W = randn(4), randn(4, 3, seed=2)
    close((G.Wb @ b).flatten(), G.Wb.to_dense() @ b, 1e-12)
    close(G.bW @ W, G.bW.to_dense() @ W.flatten(), 1e-12)


@pytest.mark.parametrize("part", ["Wb", "bW"])
def test_an_unknown_order_of_a_part_is_an_error(part):
    G = ExactBlock(randn(5, 2, 3), randn(5, 2, 2, 4, seed=1), bias=True)
    with pytest.raises(ValueError, match="order='numpy'"):
        getattr(G, part).to_dense("numpy")


def test_undamped_it_is_singular_where_it_has_fewer_columns_than_rows():
    G = ExactBlock(randn(2, 1, 3), randn(2, 1, 1, 4), bias=True)
    for operation in (G.inverse, G.logdet, lambda: G.power(-0.5)):
        with pytest.raises(ValueError, match=r"16 rows and a rank of at most 2, so it is singular; pass a damping"):
            operation()
