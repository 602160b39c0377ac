"""A user-defined loss: the positive part of its Hessian in the output, by autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.checks.values import check_choice, described
from natgrad.losses.base import OutputCurvature

MOST_ENTRIES = 4096
"""The largest number of entries of an example's output, because its Hessian is formed."""
TOLERANCE = 1e-5
SEED = 1729
"""Of the check's own random vector: torch's own numbers are left as they are."""


class Convex(nn.Module):
    """The loss `fn(output, target)`. `D` is its Hessian in the output, computed by autograd.

    If the Hessian is indefinite (focal loss, robust losses that are not convex), `D` is its positive part: negative
    eigenvalues count as zero. `F.coverage()` and `opt.diagnostics` then say so.

    Args:
        fn: a function of output and target that returns one number for each example, `(examples,)`. It must be twice
            differentiable, and the number of an example must depend only on the output of this example.
        reduction: `"mean"` over the examples, or their `"sum"`.

    Raises:
        TypeError: if `fn` is not a function, or does not return a tensor.
        ValueError: if it does not return one number for each example, if examples depend on one another, or the
            reduction is unknown.

    Example:
        >>> import torch, natgrad
        >>> log_cosh = natgrad.losses.Convex(lambda f, y: (f - y).cosh().log().sum(1))
        >>> log_cosh(torch.zeros(4, 1), torch.ones(4, 1))
        tensor(0.4338)
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> G = natgrad.gauss_newton(model, log_cosh, (torch.ones(4, 1), torch.zeros(4, 1)), "dense")
        >>> G.to_dense().tolist()  # 1 − tanh²(0)
        [[1.0]]

    Reference: Schraudolph (2002), "Fast Curvature Matrix-Vector Products for Second-Order Gradient Descent".
    """

    def __init__(self, fn: Callable[[Tensor, Tensor], Tensor], reduction: str = "mean"):
        super().__init__()
        check_choice("reduction", reduction, ("mean", "sum"))
        if not callable(fn):
            raise TypeError(
                f"Convex: fn is {described(fn)}; expected a function of output and target that returns one number for "
                "each example: lambda f, y: (f - y).square().sum(1)"
            )
        self.fn, self.reduction = fn, reduction

    def each(self, output: Tensor, target: Any) -> Tensor:
        """One number for each example."""
        values = self.fn(output, target)
        if not isinstance(values, Tensor):
            raise TypeError(f"Convex: fn returned {described(values)}; expected a Tensor, one number for each example")
        if values.shape != output.shape[:1]:
            raise ValueError(
                f"Convex: fn returned shape {tuple(values.shape)} for an output of shape {tuple(output.shape)}; "
                f"expected one number for each example, {tuple(output.shape[:1])}: sum over all axes but the first"
            )
        return values

    def forward(self, output: Tensor, target: Any) -> Tensor:
        """The mean or the sum of `fn` over the examples."""
        values = self.each(output, target)
        return values.mean() if self.reduction == "mean" else values.sum()


class ConvexCurvature(OutputCurvature):
    """`D = U max(e, 0) Uᵀ`, from the eigenvalues `e` of every example's Hessian."""

    def __init__(self, module: Convex, kind: str = "fisher"):
        super().__init__(module, kind)
        self.clipped = 0.0
        """The largest share of examples with negative eigenvalues of the Hessian, over the batches so far."""
        self._separate: set[torch.Size] = set()

    @property
    def notes(self) -> tuple[str, ...]:
        if not self.clipped:
            return ()
        return (
            f"the loss's Hessian in the output is indefinite for up to {100 * self.clipped:.0f}% of a batch's "
            "examples: its positive part is in the matrix",
        )

    def _check(self, output: Tensor, target: Any) -> None:
        if output.ndim == 0:
            raise ValueError("Convex: output is a scalar; expected an axis of examples first: output.unsqueeze(0)")
        if output.shape in self._separate:
            return
        self._check_apart(output, target)
        self._separate.add(output.shape)

    def check(self, output: Tensor, target: Any) -> None:
        """Checks only the output: `fn` decides which targets it accepts."""
        self._check(output, target)

    def _check_apart(self, output: Tensor, target: Any) -> None:
        """Raises ValueError if the number of one example depends on the output of another."""
        with torch.enable_grad():
            f = output.detach().requires_grad_()
            values = self.module.each(f, target)
            if not values.requires_grad:
                raise ValueError("Convex: what fn returned does not depend on the output; look for a detach()")
            chosen = torch.arange(len(f), device=f.device) % 2 == 0
            (g,) = torch.autograd.grad(values[chosen].sum(), f, materialize_grads=True)
        if len(f) > 1 and float(g[~chosen].abs().max()) > TOLERANCE * float(g.abs().max()):
            raise ValueError(
                "Convex: the number of one example depends on the outputs of others; expected independent ones. Let "
                "the model return the input of a loss of single examples (for a contrastive loss within a batch, the "
                "logits for nn.CrossEntropyLoss)"
            )

    def normalizer(self, output: Tensor, target: Any) -> Tensor:
        return output.new_tensor(float(len(output)))

    def product(self, output: Tensor, target: Any, v: Tensor) -> Tensor:
        e, U = self._eigen(output, target)
        v_ = v.reshape(len(v), -1).to(e.dtype)
        Dv = e * v_ if U is None else (U @ (e * (U.mT @ v_.unsqueeze(-1)).squeeze(-1)).unsqueeze(-1)).squeeze(-1)
        return Dv.to(v.dtype).view(v.shape)

    def exact_columns(self, output: Tensor, target: Any) -> Iterator[Tensor]:
        e, U = self._eigen(output, target)
        kept = [k for k in range(e.shape[1]) if bool((e[:, k] > 0).any())]
        for k in kept or [0]:
            root = e[:, k : k + 1].sqrt()
            if U is None:
                column = torch.zeros_like(e)
                column[:, k : k + 1] = root
            else:
                column = U[:, :, k] * root
            yield column.to(output.dtype).view(output.shape)

    def sampled_column(self, output: Tensor, target: Any, generator: torch.Generator | None) -> Tensor:
        """`U √e z` for random signs `z`, so that `E[s sᵀ] = D`."""
        e, U = self._eigen(output, target)
        signs = 2 * torch.randint(2, e.shape, generator=generator, device=e.device).to(e.dtype) - 1
        s = e.sqrt() * signs
        return (s if U is None else (U @ s.unsqueeze(-1)).squeeze(-1)).to(output.dtype).view(output.shape)

    def _eigen(self, output: Tensor, target: Any) -> tuple[Tensor, Tensor | None]:
        """Positive eigenvalues (zeros in place of others) and eigenvectors of every example's Hessian, in float64; None
        where those are the entries of the output, each by itself."""
        product = self._hessian(output, target)
        U: Tensor | None = None
        e = self._diagonal(output, product)
        if e is None:
            e, U = torch.linalg.eigh(self._blocks(output, product).double())
        rounding = e.abs().amax(1, keepdim=True) * torch.finfo(output.dtype).eps * 8 * e.shape[1]
        share = float((e < -rounding).any(1).double().mean())
        self.clipped = max(self.clipped, share)
        return torch.where(e > rounding, e, 0.0), U

    def _hessian(self, output: Tensor, target: Any) -> Callable[[Tensor], Tensor]:
        """`v ↦ H v` for every example, by a second backward pass."""
        with torch.enable_grad():
            f = output.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(
                self.module.each(f, target).sum(), f, create_graph=True, materialize_grads=True
            )

        def product(v: Tensor) -> Tensor:
            if not gradient.requires_grad:  # the function is linear
                return torch.zeros_like(output)
            (Hv,) = torch.autograd.grad(gradient, f, v, retain_graph=True, materialize_grads=True)
            if not torch.isfinite(Hv).all():
                raise ValueError(
                    "Convex: the Hessian in the output has entries that are not finite; look for kinks in fn"
                )
            return Hv

        return product

    @staticmethod
    def _diagonal(output: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor | None:
        """The Hessian's diagonals `(examples, size)`, if that is all of it: if `H z = (H 1) ∘ z` for a random `z`."""
        z = torch.randn(output.shape, generator=torch.Generator().manual_seed(SEED), dtype=torch.float64)
        z = z.to(output.device, output.dtype)
        diagonal, Hz = (product(v).reshape(len(output), -1) for v in (torch.ones_like(output), z))
        off = (Hz - diagonal * z.view(diagonal.shape)).abs().amax(1)
        rounding = 32 * torch.finfo(output.dtype).eps * diagonal.abs().amax(1)
        return diagonal.double() if bool((off <= rounding).all()) else None

    @staticmethod
    def _blocks(output: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
        """The Hessian of every example, `(examples, size, size)` for outputs of `size` entries."""
        examples, size = len(output), output[0].numel()
        if size > MOST_ENTRIES:
            raise ValueError(
                f"Convex: an example's output has {size} entries that depend on one another, and its Hessian is formed "
                f"up to {MOST_ENTRIES}; expected fewer, or a loss of torch's own, whose curvature has a closed form"
            )
        unit = torch.eye(size, dtype=output.dtype, device=output.device)
        rows = [product(row.expand(examples, size).reshape(output.shape)) for row in unit]
        D = torch.stack([row.reshape(examples, size) for row in rows], 1)
        return (D + D.mT) / 2
