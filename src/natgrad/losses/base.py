"""The interface of all losses: their curvature in the output."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.checks.values import check_choice, described

ESTIMATORS = ("exact", "mc", "empirical")
"""Where the columns `S` come from: a square root of `D`, labels drawn from the model, or the given targets."""
KINDS = ("fisher", "gauss_newton")


class OutputCurvature(ABC):
    """`D(f, y)` of one loss module, for outputs in the shapes of this module. Axis 0 of the output is the example.

    `kind="fisher"`: `E[s sᵀ]`, where `s` is the loss's gradient in `f` at a label drawn from the model.
    `"gauss_newton"`: the loss's Hessian in `f` at the target, which may be indefinite. All methods are for the *sum*
    over cases; `normalizer` is the divisor of the loss's mean.

    Args:
        module: the loss, with `reduction` `"mean"` or `"sum"`.
        kind: `"fisher"` or `"gauss_newton"`.

    Raises:
        ValueError: if the kind or the reduction is unknown.

    Example:
        >>> import torch, natgrad
        >>> D = natgrad.losses.output_curvature(torch.nn.CrossEntropyLoss())
        >>> output, target = torch.zeros(1, 2), torch.tensor([0])
        >>> D.product(output, target, torch.tensor([[1.0, 0.0]]))  # diag(p) − p pᵀ, with p = (½, ½)
        tensor([[ 0.2500, -0.2500]])
        >>> columns = list(D.exact_columns(output, target))
        >>> sum(torch.outer(s[0], s[0]) for s in columns).round(decimals=3).tolist()
        [[0.25, -0.25], [-0.25, 0.25]]

    Reference: Martens (2014), arXiv:1412.1193, section 9.
    """

    canonical = True
    """Whether the Hessian equals the Fisher information for every target, as for canonical links."""
    nonnegative = False
    """Whether the loss is never negative."""
    reductions: tuple[str, ...] = ("mean", "sum")
    """The module's reductions that give one number."""

    def __init__(self, module: nn.Module, kind: str = "fisher"):
        self.module: Any = module
        self.kind = kind
        check_choice("kind", kind, KINDS)
        if module.reduction not in self.reductions:
            raise ValueError(
                f"{type(module).__name__} has reduction={module.reduction!r}; the matrix of an objective needs "
                f"{' or '.join(map(repr, self.reductions))}: make the loss with one of them"
            )

    @property
    def is_mean(self) -> bool:
        """Whether the loss is a mean over cases, not their sum."""
        return bool(self.module.reduction == "mean")

    @property
    def is_fisher(self) -> bool:
        """Whether `D` is the Fisher information, by `kind` or because the two are equal."""
        return self.canonical or self.kind == "fisher"

    def check_estimator(self, estimator: str) -> None:
        """Raises ValueError if the estimator is unknown, or if this `D` does not support it."""
        check_choice("estimator", estimator, ESTIMATORS)
        if estimator != "exact" and not self.is_fisher:
            raise ValueError(
                f"estimator={estimator!r} estimates the Fisher information, which differs from the Gauss-Newton matrix "
                f"of {type(self.module).__name__}; use natgrad.fisher, or estimator='exact'"
            )

    def join(self, output: Any) -> Tensor:
        """Joins what the model returned into one tensor, the `output` of the other methods.

        Raises:
            ValueError: if the loss does not accept it.
        """
        if not isinstance(output, Tensor):
            raise ValueError(
                f"the model returned {described(output)}; expected a tensor. Pass forward=lambda model, batch: "
                "(output, target), where output is the tensor that the loss takes"
            )
        return output

    def loss(self, output: Tensor, target: Any) -> Tensor:
        """The loss itself."""
        value: Tensor = self.module(output, target)
        return value

    def check(self, output: Tensor, target: Any) -> None:
        """Raises TypeError if the target is not a tensor, and ValueError if output and target do not fit this loss:
        their devices and shapes, the target's dtype and classes."""
        if not isinstance(target, Tensor):
            raise TypeError(
                f"{type(self.module).__name__}: target is {described(target)}; expected a Tensor, as by "
                "torch.as_tensor(target)"
            )
        if target.device != output.device:
            raise ValueError(
                f"{type(self.module).__name__}: target is on {target.device} and output on {output.device}; expected "
                f"one device: target.to({str(output.device)!r})"
            )
        self._check(output, target)

    @abstractmethod
    def _check(self, output: Tensor, target: Tensor) -> None:
        """Raises ValueError if output and target do not fit this loss."""

    @abstractmethod
    def normalizer(self, output: Tensor, target: Tensor) -> Tensor:
        """The divisor of the sum for `reduction="mean"`: a scalar."""

    @abstractmethod
    def product(self, output: Tensor, target: Tensor, v: Tensor) -> Tensor:
        """`D v`, in the shape of the output."""

    @abstractmethod
    def exact_columns(self, output: Tensor, target: Tensor) -> Iterator[Tensor]:
        """At least one column `s_k` in the shape of the output, with `Σ_k s_k s_kᵀ = D` for every example.

        Raises:
            ValueError: if `D` is indefinite.
        """

    def signed_columns(self, output: Tensor, target: Any) -> Iterator[tuple[int, Tensor]]:
        """Columns with signs, `Σ_k ± s_k s_kᵀ = D`. They also exist if `D` is indefinite."""
        for s in self.exact_columns(output, target):
            yield 1, s

    @abstractmethod
    def sampled_column(self, output: Tensor, target: Tensor, generator: torch.Generator | None) -> Tensor:
        """One random column `s` with `E[s sᵀ] = D`: the loss's gradient at a label drawn from the model."""

    def ignored(self, output: Tensor, target: Any) -> Tensor | None:
        """Which targets the loss ignores, in the target's shape; None if it ignores none."""
        return None

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the user about the matrix."""
        return ()

    def stand_in(self, output: Tensor) -> Tensor:
        """Some target of the form that this loss accepts, for a `D` that does not depend on the target.

        Raises:
            TypeError: if `D` depends on the target.
        """
        raise self._needs_target("at the targets")

    def _needs_target(self, why: str) -> TypeError:
        return TypeError(
            f"opt.predict takes outputs without targets, and the curvature of {type(self.module).__name__} is {why}; "
            "expected a loss whose curvature is that of a predictive distribution, such as nn.CrossEntropyLoss(), "
            "nn.MSELoss() or natgrad.losses.Likelihood(fn), without weights of classes"
        )

    def case_weight(self, output: Tensor, target: Any) -> Tensor:
        """The weight of each case, broadcastable to the output."""
        return output.new_ones(())

    def columns(
        self,
        output: Tensor,
        target: Any,
        estimator: str = "exact",
        samples: int = 1,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """The columns `S` of the chosen estimator.

        Monte Carlo columns contain the factor `1/√samples`, so the expectation is `D` for any number of them.
        The empirical column is the loss's own gradient, in which the case weight counts once.

        Raises:
            ValueError: if this `D` does not support the estimator, or is indefinite.
        """
        self.check_estimator(estimator)
        output = output.detach()
        if estimator == "exact":
            yield from self.exact_columns(output, target)
        elif estimator == "mc":
            for _ in range(samples):
                yield self.sampled_column(output, target, generator) / samples**0.5
        else:
            with torch.enable_grad():
                f = output.requires_grad_()
                total = self.loss(f, target) * (self.normalizer(output, target) if self.is_mean else 1)
                (gradient,) = torch.autograd.grad(total, f)
            weight = self.case_weight(output.detach(), target).expand_as(output)
            yield torch.where(weight > 0, gradient / weight.sqrt(), 0.0)

    def indefinite(self) -> ValueError:
        """Returns the error for a `D` without a factor `S Sᵀ`."""
        return ValueError(
            f"the Gauss-Newton matrix of {type(self.module).__name__} is indefinite: the loss's Hessian in the output "
            "has negative eigenvalues, so it has no factor S Sᵀ. Use natgrad.fisher, which is semidefinite, or "
            "structure='dense' or 'implicit'"
        )

    def _same_shape(self, output: Tensor, target: Tensor) -> None:
        if output.shape != target.shape:
            raise ValueError(
                f"{type(self.module).__name__}: output has shape {tuple(output.shape)} and target "
                f"{tuple(target.shape)}; expected the same shape (reshape the target; nothing is broadcast)"
            )
        if output.ndim == 0:
            raise ValueError(
                f"{type(self.module).__name__}: output is a scalar; expected an axis of examples first: "
                "output.unsqueeze(0), and the same for the target"
            )

    def _wrong_dtype(self, target: Tensor, expected: str) -> ValueError:
        return ValueError(f"{type(self.module).__name__}: target has dtype {target.dtype}; expected {expected}")


def one_by_one(root: Tensor, axes: int = 0) -> Iterator[Tensor]:
    """For every entry of an example, the column with only this entry of `root`. The last `axes` count as one entry."""
    entries = root.reshape(len(root), -1, *root.shape[root.ndim - axes :])
    for j in range(entries.shape[1]):
        column = root.new_zeros(entries.shape)
        column[:, j] = entries[:, j]
        yield column.view(root.shape)
