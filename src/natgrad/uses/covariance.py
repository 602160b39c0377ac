"""The covariance `J Σ Jᵀ` of a batch's outputs, from the cases of each layer. The Jacobian is formed if it must."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.linalg import (
    Block,
    BlockDiagonal,
    ColumnBlock,
    Diagonal,
    ExactBlock,
    Homogeneous,
    KroneckerEigen,
    Operator,
    factor,
)
from natgrad.linalg.layout import PLAIN
from natgrad.uses.precision import Rescaled
from natgrad.uses.rows import Rows

BUDGET = 1 << 25
"""About how many numbers of a Jacobian are held at a time."""


def output_covariance(rows: Rows, covariance: BlockDiagonal, diagonal: bool = False) -> Float[Tensor, "n k *k2"]:
    """`J Σ Jᵀ` of every example, `(n, k, k)`, or its diagonal, `(n, k)`."""
    found = [_of_block(*pair, diagonal) for pair in _pairs(rows, covariance)]
    return torch.stack(found).sum(0) if found else _formed(rows, covariance, diagonal)


def _pairs(rows: Rows, covariance: BlockDiagonal) -> list[tuple[Block, ExactBlock, Block]]:
    """Each block of the covariance with the cases of its parameters; nothing where they are held in other blocks."""
    held = {n: (block, cases) for _, block, cases in rows.blocks() for n in block.names}
    pairs = []
    for sigma in covariance.layers.values():
        block, cases = held[sigma.names[0]]
        if sigma.names != block.names:
            if isinstance(cases, ColumnBlock) or len(block.names) != 2 or len(sigma.names) != 1:
                return []
            bias = sigma.names[0] == block.names[1]
            cases = ExactBlock(cases.h[..., :0] if bias else cases.h, cases.g, bias=bias)
            layout = PLAIN if bias else block.layout
            block = Block(cases, sigma.names, layout, (block.shapes[int(bias)],), block.function)
        pairs.append((block, cases, sigma))
    return pairs


def _of_block(block: Block, cases: ExactBlock, sigma: Block, diagonal: bool) -> Tensor:
    plain = (block.layout, block.shapes) == (sigma.layout, sigma.shapes) and not isinstance(cases, ColumnBlock)
    if plain and (eigen := _eigen(sigma.operator, cases)) is not None:
        return _in_eigenbasis(*eigen, diagonal)
    n, k = cases.g.shape[:2]
    step = max(1, BUDGET // max(1, k * cases.space.size))
    found = []
    for start in range(0, n, step):
        part = cases.part(slice(start, start + step))
        J = part.columns().mT.unflatten(0, part.g.shape[:2])
        named = block.named(cases.space.unflatten(J))
        solved = sigma.named(sigma.operator._matmul(sigma.parts(named)))
        found.append(_contracted(named, solved, diagonal))
    return torch.cat(found)


def _eigen(op: Operator, cases: ExactBlock) -> tuple[Tensor, Tensor, Tensor] | None:
    """Inputs `(n, t, i)` and gradients `(n, k, t, o)` in the eigenbases of `op`, and its eigenvalues `(o, i)`."""
    scales = (1.0, 1.0)
    if isinstance(op, Rescaled) and len(op.scales) == 2:
        scales, op = (op.scales[0], op.scales[1]), op.operator
    h, g = cases.h, cases.g
    if isinstance(op, Homogeneous):
        h = torch.cat([scales[0] * h, h.new_full((*h.shape[:2], 1), scales[1])], -1)
        op = op.stacked
    if isinstance(op, KroneckerEigen):
        return factor.rotate(h, None, op.U_A), factor.rotate(g, None, op.U_B), op.values
    if isinstance(op, Diagonal) and len(op.values) == 2 and h.shape[-1]:
        values = torch.cat([op.values[0], op.values[1][:, None]], 1)
        return torch.cat([h, h.new_ones(*h.shape[:2], 1)], -1), g, values
    if isinstance(op, Diagonal) and len(op.values) == 1 and op.values[0].ndim == 2:
        return h, g, op.values[0]
    return None


def _in_eigenbasis(h: Tensor, g: Tensor, values: Tensor, diagonal: bool) -> Tensor:
    """`Σ_oi values_oi (Σ_t g_kto h_ti)(Σ_t g_lto h_ti)`."""
    _, k, t, o = g.shape
    if t == 1:  # g_ko g_lo (Σ_i values_oi h_i²)
        weight = h[:, 0].square() @ values.mT
        if diagonal:
            return torch.einsum("nko,no->nk", g[:, :, 0].square(), weight)
        return (g[:, :, 0] * weight.unsqueeze(1)) @ g[:, :, 0].mT
    found = []
    step = max(1, BUDGET // max(1, k * o * h.shape[-1]))
    for its_h, its_g in zip(h.split(step), g.split(step), strict=True):
        J = its_g.mT @ its_h.unsqueeze(1)  # (n, k, o, i)
        if diagonal:
            found.append((J.square() * values).sum((-2, -1)))
        else:
            found.append((J * values).flatten(2) @ J.flatten(2).mT)
    return torch.cat(found)


def _formed(rows: Rows, covariance: BlockDiagonal, diagonal: bool) -> Tensor:
    """By the whole Jacobian, some examples at a time."""
    k = rows.output[0].numel()
    step = max(1, BUDGET // max(1, k * rows.space.size))
    found = []
    for start in range(0, len(rows), step):
        J = rows.part(slice(start, start + step)).dense()
        found.append(_contracted(J, covariance @ J, diagonal))
    return torch.cat(found)


def _contracted(J: dict[str, Tensor], solved: dict[str, Tensor], diagonal: bool) -> Tensor:
    if diagonal:
        return torch.stack([(J[n] * solved[n]).flatten(2).sum(2) for n in J]).sum(0)
    found = torch.stack([J[n].flatten(2) @ solved[n].flatten(2).mT for n in J]).sum(0)
    return (found + found.mT) / 2
