"""The gradients of all examples in one backward pass, where a model's forward takes derivatives itself.

Every example gets its own copy `W_n`, `b_n` of the parameters. `F.linear(h, W, b)` is then `h_n W_nᵀ + b_n`, and so are
its uses within the derivatives that the forward takes: `g_n W_n`. All copies have the same values, so that the products
are those of the one `W`. The gradient in the copy of an example is the example's own.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

MOST = 1 << 26
"""Numbers in the copies' gradients; above, examples take a pass each."""
SEED = 1729
"""Of the check's own random column: torch's own numbers are left as they are."""
TOLERANCE = 1e-3
Rows = dict[str, Tensor]
"""By parameter, the gradients of all examples, `(examples, *shape)`."""


class Copies:
    """Gives the gradients of all examples, where copies can stand for the parameters: where these go into `F.linear`
    alone, whose rows are the output's. Each kind of batch is checked once against autograd's own gradients."""

    def __init__(self) -> None:
        self._works: dict[Hashable, bool] = {}

    def gradients(
        self,
        key: Hashable,
        run: Callable[[], Tensor],
        output: Tensor,
        parameters: Mapping[str, Tensor],
    ) -> Callable[[Tensor], Rows] | None:
        """A function that takes a column to the gradients of all examples; None where they cannot be had so.

        Args:
            key: what the answer depends on: shapes, and which modules are in training mode.
            run: runs the model again on the batch, with the same random numbers, and returns its output.
            output: that of the forward, with its graph.
            parameters: those that are trained, by name.
        """
        n = len(output)
        if not self._works.get(key, True) or n * sum(p.numel() for p in parameters.values()) > MOST:
            return None
        mode = _PerExample(parameters, n)
        with torch.enable_grad(), mode:
            again = run()

        def gradients(column: Tensor) -> Rows:
            leaves = [*mode.copies.values()]
            found = torch.autograd.grad(again, leaves, column, retain_graph=True, allow_unused=True)
            each = zip(mode.copies, leaves, found, strict=True)
            return {name: torch.zeros_like(copy) if g is None else g for name, copy, g in each}

        if key not in self._works:
            self._works[key] = again.requires_grad and _agrees(gradients, again, output, parameters)
        return gradients if self._works[key] else None


def _agrees(
    gradients: Callable[[Tensor], Rows], again: Tensor, output: Tensor, parameters: Mapping[str, Tensor]
) -> bool:
    """Whether the gradients of some random examples are in their own copies, and their sum is autograd's."""
    generator = torch.Generator().manual_seed(SEED)
    n, names, own = len(output), list(parameters), list(parameters.values())
    if any(g is not None for g in torch.autograd.grad(again.sum(), own, retain_graph=True, allow_unused=True)):
        return False  # a parameter is used in another way
    some = torch.rand(n, generator=generator) < 0.5
    some[int(torch.randint(n, (1,), generator=generator))] = True
    column = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    column[~some] = 0
    column = column.to(output.device, output.dtype)
    expected = torch.autograd.grad(output, own, column, retain_graph=True, allow_unused=True)
    found = gradients(column)
    for name, its in zip(names, expected, strict=True):
        g = found[name]
        its = torch.zeros_like(g[0]) if its is None else its
        size = float(its.norm()) + float(g.square().sum().sqrt())
        if float(g[~some.to(g.device)].abs().sum()) > 0 or not float((g.sum(0) - its).norm()) <= TOLERANCE * size:
            return False
    return True


class _PerExample(TorchFunctionMode):
    """Within, `F.linear` takes copies of the parameters, one for each of its rows."""

    def __init__(self, parameters: Mapping[str, Tensor], examples: int):
        super().__init__()
        self.copies = {n: p.detach().expand(examples, *p.shape).requires_grad_() for n, p in parameters.items()}
        self._examples = examples
        self._by_id = {id(p): self.copies[n] for n, p in parameters.items()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            out = self._linear(*args, **(kwargs or {}))
            if out is not None:
                return out
        return func(*args, **(kwargs or {}))

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
        """None where a parameter is no copy's, or the rows are others."""
        W, b = self._by_id.get(id(weight)), self._by_id.get(id(bias))
        if W is None or (bias is not None and b is None) or input.ndim < 2 or len(input) != self._examples:
            return None
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return None
        out = _Forward.apply(input, W)
        if b is not None:
            out = out + b.view(len(b), *[1] * (out.ndim - 2), -1)
        return out


class _Forward(torch.autograd.Function):
    """`h_n W_nᵀ`."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, W: Tensor) -> Tensor:
        ctx.save_for_backward(h, W)
        return h @ W[0].mT

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
        h, W = ctx.saved_tensors
        return _Backward.apply(g, W), _outer(g, h) if ctx.needs_input_grad[1] else None


class _Backward(torch.autograd.Function):
    """`g_n W_n`."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, W: Tensor) -> Tensor:
        ctx.save_for_backward(g, W)
        return g @ W[0]

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, Tensor | None]:
        g, W = ctx.saved_tensors
        return _Forward.apply(v, W), _outer(g, v) if ctx.needs_input_grad[1] else None


def _outer(g: Tensor, h: Tensor) -> Tensor:
    """`g_n h_nᵀ`, summed over the axes between the first and the last."""
    if g.ndim == 2:
        return g.unsqueeze(2) * h.unsqueeze(1)
    return g.flatten(1, -2).mT @ h.flatten(1, -2)
