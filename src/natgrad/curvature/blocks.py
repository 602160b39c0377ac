"""From moments to operators: K-FAC's block of every layer, and the whole matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from math import prod

import torch
from torch import Tensor

from natgrad.capture.layer import Layer
from natgrad.curvature.groups import groups, tiled, united, whole
from natgrad.curvature.moments import AffineMoments, Moments, ScaleMoments
from natgrad.linalg import (
    Block,
    BlockDiagonal,
    Centered,
    CenteredKronecker,
    ColumnBlock,
    CoordinateBlocks,
    Dense,
    Diagonal,
    ExactBlock,
    Homogeneous,
    Kronecker,
    Operator,
    Space,
    factor,
)
from natgrad.linalg.centered import matrix_of
from natgrad.linalg.nearest import nearest_of_cases, nearest_of_columns
from natgrad.linalg.pieces import with_one

ELSE = "use structure='block', 'diagonal', 'dense' or 'implicit', or leave it out with params="


def assemble(layers: Mapping[Layer, Operator], parameters: Mapping[str, Tensor]) -> BlockDiagonal:
    """The matrix of all layers over their parameters, in the order of the parameters.

    Raises:
        NotImplementedError: if some rows of a parameter are in no layer.
    """
    names = tuple(n for n in parameters if any(n in layer.names for layer in layers))
    space = Space(tuple(tuple(parameters[n].shape) for n in names), names)
    return BlockDiagonal(named_blocks(layers, parameters), space)


def named_blocks(layers: Mapping[Layer, Operator], parameters: Mapping[str, Tensor]) -> dict[str, Block]:
    """Every layer's operator with its parameters, by the layer's name.

    Raises:
        NotImplementedError: if some rows of a parameter are in no layer.
    """
    blocks: dict[str, Block] = {}
    users: dict[str, str] = {}
    for layer, op in layers.items():
        for n in layer.names:
            if n in users:
                raise NotImplementedError(
                    f"{n!r} was used by {users[n]} in one batch and by {layer.function} in another, which make no "
                    f"block together; {ELSE}"
                )
            users[n] = layer.function
        shapes = tuple(tuple(parameters[n].shape) for n in layer.names)
        if sum(map(prod, shapes)) != op.space.size:
            raise NotImplementedError(
                f"{layer.names[0]!r} has shape {shapes[0]} and only some of its rows are used for the output; "
                "use structure='dense' or 'implicit', or leave it out with params="
            )
        blocks[layer.name] = Block(op, layer.names, layer.layout, shapes, layer.function)
    return blocks


def kfac_blocks(moments: Mapping[Layer, Moments], is_mean: bool, centered: bool) -> dict[Layer, Operator]:
    """K-FAC's operator of every layer, with all of its rows. The moments are reconciled."""
    blocks: dict[Layer, Operator] = {}
    for layers in groups(moments):
        if len({layer.scale for layer in layers}) > 1:
            blocks[united(layers)] = _vector(layers, moments, is_mean)
        elif len({layer.layout for layer in layers}) > 1:
            blocks[whole(layers)] = pooled({layer: moments[layer] for layer in layers}, is_mean)
        else:
            blocks |= tiled({layer: kfac_block(layer, moments[layer], is_mean, centered) for layer in layers})
    return blocks


def _vector(layers: Sequence[Layer], moments: Mapping[Layer, Moments], is_mean: bool) -> Operator:
    """The matrix of a vector that is used as a bias and as a scale: the sum of the matrices of both uses.

    Raises:
        NotImplementedError: for a matrix that is used in a product and as a scale.
    """
    first = layers[0]
    if any(layer.weight and not layer.scale for layer in layers) or any(len(layer.names) > 1 for layer in layers):
        raise NotImplementedError(
            f"{first.names[0]!r} is used by {' and by '.join(layer.function for layer in layers)}, whose sum has no "
            f"Kronecker factors; {ELSE}"
        )
    blocks = [kfac_block(layer, moments[layer], is_mean, False) for layer in layers]
    return Dense(torch.stack([block.to_dense() for block in blocks]).sum(0))


def kfac_block(layer: Layer, moments: Moments, is_mean: bool, centered: bool) -> Operator:
    """`A ⊗ B` of one layer, or the blocks of a scale's coordinates."""
    if isinstance(moments, ScaleMoments):
        products = moments.means(is_mean)
        return Diagonal((products[0],)) if len(products) == 1 else CoordinateBlocks.of_products(*products)
    assert isinstance(moments, AffineMoments)
    return affine_block(layer, moments, moments.B(is_mean), centered)


def affine_block(layer: Layer, moments: AffineMoments, B: Tensor, centered: bool) -> Operator:
    """`A ⊗ B` of one layer with any output factor; `B` for a layer without a weight."""
    if layer.weight is None:
        return matrix_of(B)
    if layer.bias and centered:
        return CenteredKronecker(covariance=moments.C, mean=moments.mean, output=B)
    block = Kronecker(input_factor(layer, moments, centered=False), B)
    return Homogeneous(block) if layer.bias else block


def nearest_block(layer: Layer, exact: ExactBlock, m: AffineMoments, centered: bool) -> Operator:
    """The Kronecker product nearest to the exact block of a layer with a weight."""
    scale, apart = exact.scale, bool(centered and layer.bias)
    start = input_factor(layer, m, centered)
    if isinstance(exact, ColumnBlock):
        W, *b = exact.space.unflatten(exact.S.flatten(0, 1))
        if layer.bias:  # S (h - m) or S [h; 1], of which b is the sum of the gradients
            W = W - b[0].unsqueeze(2) * m.mean if apart else torch.cat([W, b[0].unsqueeze(2)], 2)
        A, B = nearest_of_columns(W, start)
    else:
        h, g = exact.h, exact.g
        if layer.bias:
            h = h - m.mean if apart else with_one(h)
        A, B = nearest_of_cases(h, g, start)
        b = [g.sum(2).flatten(0, 1)]
    weight = Kronecker(A, scale * B)
    if apart:
        return Centered(weight, matrix_of(scale * (b[0].mT @ b[0])), m.mean)
    return Homogeneous(weight) if layer.bias else weight


def pooled(moments: Mapping[Layer, Moments], is_mean: bool) -> Kronecker:
    """One Kronecker product for a weight that is used both as `W` and as `Wᵀ`.

    Every use `u` gives a product `L_u ⊗ R_u` of a factor for the rows and a factor for the columns. The inverse of the
    sum of these products does not have this form. Therefore the sum is replaced by the product with the same partial
    traces, and hence the same trace: `(Σ L_u tr R_u) ⊗ (Σ R_u tr L_u) / Σ tr L_u tr R_u`.

    Raises:
        NotImplementedError: for a kernel that is used in convolutions and in transposed convolutions, because their
            factors belong to different axes.
    """
    if any(layer.layout.form == "deconvolution" for layer in moments):
        raise NotImplementedError(
            f"{next(iter(moments)).names[0]!r} is the kernel of convolutions and of transposed ones, whose sum has no "
            f"Kronecker factors; {ELSE}"
        )
    lefts, rights, traces = [], [], []
    for layer, m in moments.items():
        assert isinstance(m, AffineMoments)
        left, right = (m.A, m.B(is_mean)) if layer.layout.form == "transposed" else (m.B(is_mean), m.A)
        l, r = factor.diagonal(left).sum(), factor.diagonal(right).sum()
        lefts.append(r * left)
        rights.append(l * right)
        traces.append(l * r)
    total = torch.stack(traces).sum()
    share = torch.where(total > 0, 1 / total, 0.0)
    return Kronecker(share * reduce(factor.add, rights), reduce(factor.add, lefts))


def input_factor(layer: Layer, moments: AffineMoments, centered: bool) -> Tensor:
    """The input factor of a layer with a weight: `C` if weight and bias are centered, else `E[x xᵀ]`, or `E[h hᵀ]`
    without a bias. Or its diagonal."""
    if not layer.bias:
        return moments.A
    return moments.C if centered else homogeneous(moments)


def homogeneous(moments: AffineMoments) -> Tensor:
    """`A = E[x xᵀ]` for `x = [h; 1]`, or its diagonal."""
    one = moments.mean.new_ones(1)
    if moments.scatter.ndim == 1:
        return torch.cat([moments.A, one])
    x = torch.cat([moments.mean, one])
    return torch.block_diag(moments.C, x.new_zeros(1, 1)) + torch.outer(x, x)
