"""From recorded uses and an output to each layer's moments: where cases are formed and summed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from natgrad.capture import Use
from natgrad.layers.affine import cases
from natgrad.moments import AffineMoments

SHARING = ("expand", "reduce")


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


def layer_moments(
    uses: Sequence[Use],
    output: Tensor,
    columns: Iterable[Tensor],
    mass: Tensor,
    *,
    sharing: str = "expand",
    dtype: torch.dtype | None = None,
) -> dict[Layer, AffineMoments]:
    """The moments of every layer on one batch: one pass over inputs, one backward to the outputs per column.

    No weight gradient is computed. The graph behind `output` is kept.

    Raises:
        NotImplementedError: if a weight is used both as it is and transposed.
        RuntimeError: if an input was changed in place after its use.
        ValueError: if an input has no axis of examples.
    """
    layers = layers_of(uses)
    moments: dict[Layer, AffineMoments] = {}
    with torch.no_grad():
        for layer, its_uses in layers.items():
            for use in its_uses:
                use.check_input()
                _check_examples(use, output)
            # A layer without a weight has inputs of width zero.
            h = _gather([cases(u.h) if layer.weight else cases(u.h)[..., :0] for u in its_uses], sharing, "mean")
            d_out = its_uses[0].a.shape[-1]
            moments[layer] = AffineMoments.of_inputs(h.to(dtype or h.dtype), d_out, mass.to(dtype or mass.dtype))
    edges = [use.edge for use in uses]
    for column in columns if edges else ():
        gradients = torch.autograd.grad(output, edges, column.to(output.dtype), retain_graph=True, allow_unused=True)
        with torch.no_grad():
            g = {
                use: torch.zeros_like(use.a) if gu is None else gu.reshape(use.a.shape)
                for use, gu in zip(uses, gradients, strict=True)
            }
            for layer, its_uses in layers.items():
                rows = _gather([cases(g[use]) for use in its_uses], sharing, "sum")
                moments[layer].add_gradients(rows.to(dtype or rows.dtype))
    return moments


def merge(
    parts: Iterable[Mapping[Layer, AffineMoments]],
) -> dict[Layer, AffineMoments]:
    """The moments of all cases, from those of the parts."""
    total: dict[Layer, AffineMoments] = {}
    for part in parts:
        for layer, moments in part.items():
            total[layer] = total[layer] + moments if layer in total else moments
    return total


def _check_examples(use: Use, output: Tensor) -> None:
    if use.h.ndim < 2 and len(output) != 1:
        raise ValueError(
            f"the input of {use.weight or use.bias!r} has shape {tuple(use.h.shape)}, and the output "
            f"{tuple(output.shape)} counts {len(output)} examples; expected an axis of examples first, in both: "
            "model(x.unsqueeze(0)) for a single one"
        )


def _gather(uses: list[Tensor], sharing: str, over: str) -> Tensor:
    """Rows of all uses: each position a case (`expand`), or positions and uses averaged or summed (`reduce`)."""
    if sharing == "expand":
        return torch.cat([u.flatten(0, 1) for u in uses])
    positions = torch.cat(uses, 1)
    return positions.mean(1) if over == "mean" else positions.sum(1)
