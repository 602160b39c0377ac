"""Every operator, with its dense matrix: the table that the contract suite goes through."""

from dataclasses import dataclass

import torch

from natgrad.linalg import (
    Block,
    BlockDiagonal,
    Centered,
    CenteredKronecker,
    ColumnBlock,
    CoordinateBlocks,
    Dense,
    Diagonal,
    DiagonalPlusLowRank,
    ExactBlock,
    Homogeneous,
    Kronecker,
    KroneckerEigen,
    Layout,
    LowRank,
    Operator,
    Rows,
    Space,
)
from oracles import centering, f64, homogeneous, homogeneous_kron, randn, spd


@dataclass
class Case:
    """An operator, its dense matrix in torch order, and what centered damping multiplies in that order: `TᵀT`."""

    op: Operator
    dense: torch.Tensor
    metric: torch.Tensor

    def damped(self, damping):
        return self.dense + damping * eye(len(self.dense))

    def damped_in_coordinates(self, damping):
        return self.dense + damping * self.metric


def kronecker(d_out, d_in, seed):
    A, B = spd(d_in, seed), spd(d_out, seed + 1)
    return Case(Kronecker(A, B), torch.kron(B, A), torch.eye(d_in * d_out, dtype=f64))


def centered(d_out, d_in, seed):
    C, B, m = spd(d_in, seed), spd(d_out, seed + 1), randn(d_in, seed=seed)
    T = centering(m, d_out)
    return Case(CenteredKronecker(covariance=C, mean=m, output=B), homogeneous_kron(homogeneous(C, m), B), T.mT @ T)


def homogeneous_(d_out, d_in, seed):
    A, B = spd(d_in + 1, seed), spd(d_out, seed + 1)
    return Case(Homogeneous(Kronecker(A, B)), homogeneous_kron(A, B), torch.eye((d_in + 1) * d_out, dtype=f64))


def dense(d_out, d_in, seed):
    M = spd(d_out * d_in + d_out, seed)
    space = Space(((d_out, d_in), (d_out,)))
    return Case(Dense(M, space), M, torch.eye(len(M), dtype=f64))


def block_diagonal(d_out, d_in, seed):
    """A weight stored transposed, then a centered layer, then a lone bias."""
    A, B = spd(d_in, seed), spd(d_out, seed + 1)
    middle, lone = centered(d_out, d_in, seed + 2), spd(d_out, seed + 4)
    blocks = {
        "late": Block(Dense(lone), ("c",)),
        "first": Block(Kronecker(A, B), ("v",), layout=Layout("transposed")),
        "middle": Block(middle.op, ("w", "b")),
    }
    space = Space(((d_in, d_out), (d_out, d_in), (d_out,), (d_out,)), ("v", "w", "b", "c"))
    matrix = torch.block_diag(torch.kron(A, B), middle.dense, lone)
    metric = torch.block_diag(torch.eye(len(A) * len(B), dtype=f64), middle.metric, torch.eye(d_out, dtype=f64))
    return Case(BlockDiagonal(blocks, space), matrix, metric)


def eye(n):
    return torch.eye(n, dtype=f64)


def positive(n, seed):
    return randn(n, seed=seed).abs() + 0.3


def diagonal(d_out, d_in, seed):
    values = positive(d_out * d_in, seed).view(d_out, d_in), positive(d_out, seed + 1)
    return Case(Diagonal(values), torch.cat([v.flatten() for v in values]).diag(), eye(d_out * (d_in + 1)))


def wide_input(d_out, d_in, seed):
    """A Kronecker product whose `A` is a diagonal."""
    A, B = positive(d_in, seed), spd(d_out, seed + 1)
    return Case(Kronecker(A, B), torch.kron(B, A.diag()), eye(d_in * d_out))


def wide_output(d_out, d_in, seed):
    """A centered one whose `B` is a diagonal."""
    C, B, m = spd(d_in, seed), positive(d_out, seed + 1), randn(d_in, seed=seed)
    T = centering(m, d_out)
    dense = homogeneous_kron(homogeneous(C, m), B.diag())
    return Case(CenteredKronecker(covariance=C, mean=m, output=B), dense, T.mT @ T)


def wide(d_out, d_in, seed):
    """Both factors of a centered one are diagonals."""
    C, B, m = positive(d_in, seed), positive(d_out, seed + 1), randn(d_in, seed=seed)
    T = centering(m, d_out)
    dense = homogeneous_kron(homogeneous(C.diag(), m), B.diag())
    return Case(CenteredKronecker(covariance=C, mean=m, output=B), dense, T.mT @ T)


def corrected(d_out, d_in, seed):
    """EKFAC's form, not centered: any eigenvalues in a Kronecker product of bases."""
    U_A, U_B = (torch.linalg.qr(randn(d, d, seed=seed + d))[0] for d in (d_in, d_out))
    values = positive(d_out * d_in, seed)
    basis = torch.kron(U_B, U_A)
    return Case(KroneckerEigen(U_A, U_B, values.view(d_out, d_in)), (basis * values) @ basis.mT, eye(d_out * d_in))


def corrected_centered(d_out, d_in, seed):
    """Centered EKFAC's: the bias's part has its own eigenvalues in the weight's output basis."""
    weight, f, m = corrected(d_out, d_in, seed), positive(d_out, seed + 2), randn(d_in, seed=seed)
    bias = (weight.op.U_B * f) @ weight.op.U_B.mT
    return centered_of(weight, bias, m)


def centered_of(weight, bias, m):
    T = centering(m, len(bias))
    dense = T.mT @ torch.block_diag(weight.dense, bias) @ T
    return Case(Centered(weight.op, Dense(bias), m), dense, T.mT @ T)


def centered_by_hand(d_out, d_in, seed):
    """The bias's part has a basis of its own."""
    return centered_of(corrected(d_out, d_in, seed), spd(d_out, seed + 2), randn(d_in, seed=seed))


def wide_corrected(d_out, d_in, seed):
    """Centered EKFAC's with diagonal factors."""
    values, f, m = positive(d_out * d_in, seed), positive(d_out, seed + 1), 3 * randn(d_in, seed=seed)
    weight = Case(KroneckerEigen(None, None, values.view(d_out, d_in)), values.diag(), eye(d_out * d_in))
    T = centering(m, d_out)
    dense = T.mT @ torch.block_diag(weight.dense, f.diag()) @ T
    return Case(Centered(weight.op, Diagonal((f,)), m), dense, T.mT @ T)


def coordinates(d_out, d_in, seed):
    """Scale and shift of `d_out` coordinates."""
    pairs = randn(d_out, 6, 2, seed=seed)
    blocks = pairs.mT @ pairs / 6
    ww, wc, cc = blocks[:, 0, 0], blocks[:, 0, 1], blocks[:, 1, 1]
    dense = torch.cat([torch.cat([ww.diag(), wc.diag()], 1), torch.cat([wc.diag(), cc.diag()], 1)])
    T = eye(2 * d_out)
    T[d_out:, :d_out] = (wc / cc).diag()
    return Case(CoordinateBlocks.of_products(ww, wc, cc), dense, T.mT @ T)


def rows(d_out, d_in, seed):
    """The rows of one weight and bias in two layers, of unlike structure."""
    parts = [centered(d_out, d_in, seed), homogeneous_(2, d_in, seed + 5)]
    index = torch.arange((d_out + 2) * (d_in + 1))
    W, b = index[: (d_out + 2) * d_in].view(-1, d_in), index[(d_out + 2) * d_in :]
    dense, metric = torch.zeros(2, len(index), len(index), dtype=f64)
    for part, own in zip(parts, (slice(0, d_out), slice(d_out, None)), strict=True):
        places = torch.cat([W[own].flatten(), b[own]])
        dense[places[:, None], places] = part.dense
        metric[places[:, None], places] = part.metric
    return Case(Rows([part.op for part in parts]), dense, metric)


def exact(d_out, d_in, seed):
    """More columns than rows, so that it is definite; three columns and two positions for each example."""
    n = d_out * (d_in + 1)
    h, g = randn(n, 2, d_in, seed=seed), randn(n, 3, 2, d_out, seed=seed + 1)
    G = torch.zeros(n, n, dtype=f64)
    for i in range(n):
        for k in range(3):
            W = sum(torch.outer(g[i, k, t], h[i, t]) for t in range(2))
            s = torch.cat([W.flatten(), g[i, k].sum(0)])
            G += torch.outer(s, s) / n
    return Case(ExactBlock(h, g, bias=True, scale=1 / n), G, eye(n))


def columns(d_out, d_in, seed):
    """A layer's exact block from its columns."""
    n = d_out * d_in + 1
    S = randn(n, 3, n, seed=seed)
    dense = sum(torch.outer(s, s) for s in S.flatten(0, 1)) / n
    return Case(ColumnBlock(S, ((d_out, d_in), (1,)), scale=1 / n), dense, eye(n))


def kernel(d_out, d_in, seed):
    """The kernel of a transposed convolution, in two groups, as a matrix of named parts."""
    own, layout = (2 * d_in, d_out, 3), Layout("deconvolution", groups=2)
    matrix = spd(2 * d_out * d_in * 3, seed)
    block = Block(Dense(matrix, Space(((2 * d_out, 3 * d_in),))), ("k",), layout=layout, shapes=(own,))
    index = torch.arange(len(matrix)).view(own)
    order = []  # group, output feature, input channel, place from the last to the first
    for group in range(2):
        for o in range(d_out):
            for i in range(d_in):
                order += [index[group * d_in + i, o, x] for x in (2, 1, 0)]
    order = torch.stack(order)
    dense = torch.zeros_like(matrix)
    dense[order[:, None], order] = matrix
    return Case(BlockDiagonal({"deconv": block}, Space((own,), ("k",))), dense, eye(len(matrix)))


def scaled(d_out, d_in, seed):
    """A multiple of what has none of its own structure."""
    case = exact(d_out, d_in, seed)
    return Case(2.5 * case.op, 2.5 * case.dense, case.metric)


def low_rank(d_out, d_in, seed):
    """Half of the eigenvalues its own, the others all alike."""
    size = d_out * d_in + d_out
    U = torch.linalg.qr(randn(size, size, seed=seed))[0][:, : (size + 1) // 2]
    e = positive(U.shape[1], seed + 1)
    dense = (U * e) @ U.mT + 0.7 * (eye(size) - U @ U.mT)
    return Case(LowRank(U, e, 0.7, Space(((d_out, d_in), (d_out,)))), dense, eye(size))


def diagonal_plus_low_rank(d_out, d_in, seed):
    """Some of the low rank's eigenvalues below zero, as an inverse has them."""
    size = d_out * d_in + d_out
    d, U = 2 + positive(size, seed), randn(size, min(size, 3), seed=seed) / size**0.5
    e = positive(U.shape[1], seed + 1) * torch.tensor([1.0, -0.3, 2.0], dtype=f64)[: U.shape[1]]
    dense = d.diag() + (U * e) @ U.mT
    if torch.linalg.eigvalsh(dense)[0] < 0.1:
        e, dense = e.abs(), d.diag() + (U * e.abs()) @ U.mT
    return Case(DiagonalPlusLowRank(d, U, e, Space(((d_out, d_in), (d_out,)))), dense, eye(size))


CASES = [
    kronecker,
    centered,
    homogeneous_,
    dense,
    block_diagonal,
    diagonal,
    wide_input,
    wide_output,
    wide,
    corrected,
    corrected_centered,
    wide_corrected,
    centered_by_hand,
    coordinates,
    rows,
    exact,
    columns,
    kernel,
    scaled,
    low_rank,
    diagonal_plus_low_rank,
]
# Damped in centered coordinates they are other matrices.
CENTERED = [centered, wide_output, wide, corrected_centered, wide_corrected, centered_by_hand, coordinates, rows]
CENTERED.append(block_diagonal)
# Held as cases: there are neither factors nor centered coordinates to damp.
UNFACTORED = [exact, columns, scaled]
