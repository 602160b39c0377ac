"""How a parameter's tensor maps to the matrix `(d_out, d_in)` that its layer multiplies with."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from natgrad.checks.values import check_choice, check_count

FORMS = ("plain", "transposed", "deconvolution")


@dataclass(frozen=True)
class Layout:
    """The map from a parameter's tensor to the operator's, and back; leading axes are kept.

    A `"plain"` tensor is read row by row: `(d_out, d_in)`, or a convolution's kernel `(d_out, channels, *space)`. A
    `"transposed"` tensor is `(d_in, d_out)`. A `"deconvolution"` tensor is the kernel of a transposed convolution,
    `(channels, d_out / groups, *space)`; it belongs to a convolution with the flipped kernel.

    Args:
        form: `"plain"`, `"transposed"` or `"deconvolution"`.
        groups: of a transposed convolution.

    Example:
        >>> import torch
        >>> from natgrad.linalg import Layout
        >>> Layout("transposed").to_operator(torch.tensor([[1, 2, 3], [4, 5, 6]]), (2, 3), (3, 2)).tolist()
        [[1, 4], [2, 5], [3, 6]]
    """

    form: str = "plain"
    groups: int = 1

    def __post_init__(self) -> None:
        check_choice("form", self.form, FORMS)
        check_count("groups", self.groups, "groups")

    def to_operator(self, t: Tensor, own: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """From a parameter's shape `own` to the operator's `shape`."""
        if t.shape == shape and self.form == "plain":
            return t
        lead = t.shape[: t.ndim - len(own)]
        if self.form == "transposed":
            return t.reshape((*lead, *shape[::-1])).mT
        if self.form == "deconvolution":
            space = range(-len(own) + 2, 0)
            t = t.unflatten(len(lead), (self.groups, own[0] // self.groups)).flip([*space])
            t = t.transpose(len(lead) + 1, len(lead) + 2)
        return t.reshape((*lead, *shape))

    def to_parameter(self, t: Tensor, own: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """The inverse of `to_operator`."""
        if t.shape == own and self.form == "plain":
            return t
        lead = t.shape[: t.ndim - len(shape)]
        if self.form == "transposed":
            return t.mT.reshape((*lead, *own))
        if self.form == "deconvolution":
            t = t.reshape(*lead, self.groups, own[1], own[0] // self.groups, *own[2:])
            t = t.transpose(len(lead) + 1, len(lead) + 2).flip([*range(-len(own) + 2, 0)])
        return t.reshape((*lead, *own))


PLAIN = Layout()
