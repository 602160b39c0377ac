"""From recorded uses and an output to each layer's cases: its inputs, and a gradient for each column of `D`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from natgrad.capture import Use
from natgrad.layers.affine import rows


@dataclass(frozen=True)
class Layer:
    """The parameters that share a block: a weight, a bias, or a weight with its bias."""

    weight: str | None
    bias: str | None
    transposed: bool

    @property
    def name(self) -> str:
        """The module's name for its `weight`, else the parameter's own."""
        own = self.weight or self.bias or ""
        return own.removesuffix(".weight") if self.weight else own

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(n for n in (self.weight, self.bias) if n is not None)


def layers_of(uses: Sequence[Use]) -> dict[Layer, list[Use]]:
    """The uses of each layer. A weight and a bias share a block if they are always used together.

    Raises:
        NotImplementedError: if a weight is used both as it is and transposed.
    """
    partners: dict[str, set[str | None]] = {}
    for use in uses:
        if use.weight:
            partners.setdefault(use.weight, set()).add(use.bias)
        if use.bias:
            partners.setdefault(use.bias, set()).add(use.weight)
    layers: dict[Layer, list[Use]] = {}
    orientation: dict[str, bool] = {}
    for use in uses:
        if use.weight and orientation.setdefault(use.weight, use.transposed) != use.transposed:
            raise NotImplementedError(
                f"{use.weight!r} is used both as W and as Wᵀ: one Kronecker product cannot hold both. "
                "Use structure='dense' or 'implicit', or leave it out with params="
            )
        together = bool(use.weight and use.bias) and (
            partners[use.weight or ""] == {use.bias} and partners[use.bias or ""] == {use.weight}
        )
        if together:
            keys = [Layer(use.weight, use.bias, use.transposed)]
        else:
            keys = [Layer(use.weight, None, use.transposed)] if use.weight else []
            keys += [Layer(None, use.bias, False)] if use.bias else []
        for key in keys:
            layers.setdefault(key, []).append(use)
    return layers


@dataclass
class Cases:
    """One batch: what went into every layer, and column by column the gradient in what came out of it.

    Each is a list with a tensor for every use of the layer, `(example, position, features)`. A layer without a
    weight has inputs of width zero.
    """

    h: dict[Layer, list[Tensor]]
    columns: Iterable[dict[Layer, list[Tensor]]]
    """The gradients `g`, one dictionary for each column `s_k` of the output, each a backward pass when it is read."""
    d_out: dict[Layer, int]
    mass: Tensor
    """What the loss's mean divides by."""
    examples: int

    def kept(self) -> Cases:
        """The same, with all columns in memory, so that they can be read again."""
        self.columns = list(self.columns)
        return self

    def by_example(self, layer: Layer, uses: Sequence[Tensor]) -> Tensor:
        """The uses one after the other along the positions: `(example, all positions, features)`.

        Raises:
            ValueError: if axis 0 is not that of the output's examples.
        """
        for use in uses:
            if len(use) != self.examples:
                raise ValueError(
                    f"layer {layer.name!r} was used on {len(use)} rows where the output has {self.examples} examples: "
                    "which rows belong together cannot be told. Keep examples on axis 0 and positions on the axes "
                    "after it, or use structure='kfac' with sharing='expand'"
                )
        return torch.cat(list(uses), 1)


def read_cases(
    uses: Sequence[Use], output: Tensor, columns: Iterable[Tensor], mass: Tensor, dtype: torch.dtype | None = None
) -> Cases:
    """The cases of every layer on one batch. Each column takes one backward pass, to the layers' outputs alone.

    No weight gradient is computed. The graph behind `output` is kept.

    Raises:
        NotImplementedError: if a weight is used both as it is and transposed.
        RuntimeError: if an input was changed in place after its use.
        ValueError: if an input has no axis of examples.
    """
    layers = layers_of(uses)
    h: dict[Layer, list[Tensor]] = {}
    with torch.no_grad():
        for layer, its_uses in layers.items():
            for use in its_uses:
                use.check_input()
                _check_examples(use, output)
            inputs = [rows(u.h) if layer.weight else rows(u.h)[..., :0] for u in its_uses]
            h[layer] = [t.to(dtype or t.dtype) for t in inputs]
    d_out = {layer: its_uses[0].a.shape[-1] for layer, its_uses in layers.items()}
    gradients = _gradients(uses, layers, output, columns, dtype)
    return Cases(h, gradients, d_out, mass.to(dtype or mass.dtype), len(output))


def _gradients(
    uses: Sequence[Use],
    layers: dict[Layer, list[Use]],
    output: Tensor,
    columns: Iterable[Tensor],
    dtype: torch.dtype | None,
) -> Iterator[dict[Layer, list[Tensor]]]:
    edges = [use.edge for use in uses]
    for column in columns if edges else ():
        gradients = torch.autograd.grad(output, edges, column.to(output.dtype), retain_graph=True, allow_unused=True)
        g = {
            use: rows(torch.zeros_like(use.a) if gu is None else gu.reshape(use.a.shape)).to(dtype or use.a.dtype)
            for use, gu in zip(uses, gradients, strict=True)
        }
        yield {layer: [g[use] for use in its_uses] for layer, its_uses in layers.items()}


def _check_examples(use: Use, output: Tensor) -> None:
    if use.h.ndim < 2 and len(output) != 1:
        raise ValueError(
            f"the input of {use.weight or use.bias!r} has shape {tuple(use.h.shape)}, and the output "
            f"{tuple(output.shape)} counts {len(output)} examples; expected an axis of examples first, in both: "
            "model(x.unsqueeze(0)) for a single one"
        )
