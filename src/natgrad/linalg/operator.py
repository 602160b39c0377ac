"""The interface that every matrix of this library implements."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from os import PathLike
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from natgrad.checks.values import ByLayer, check_choice, check_count, check_generator, described
from natgrad.linalg.arguments import check_damping, check_plain
from natgrad.linalg.later import LATER
from natgrad.linalg.precision import compute_in_own_precision
from natgrad.linalg.space import Parts, Space, check_order
from natgrad.linalg.spectral import Spectral

if TYPE_CHECKING:
    from natgrad.linalg.coverage import Coverage
    from natgrad.linalg.stochastic import Estimate

DENSE_LIMIT = 20_000
TRACES = {"hutchinson": "estimate_trace", "hutch++": "hutch_plus_plus", "xtrace": "xtrace"}


class Operator(Spectral, ABC):
    """A symmetric matrix `M`, known by its products with vectors: the interface of every matrix of this library.

    A vector `v` has one of the forms of the operator's `space`, and the result has the same form. For a model's matrix:
    a `dict` of name to tensor, or one flat tensor of `space.size` numbers in the order of `named_parameters()`. For a
    matrix of one layer: the pair `(W, b)`, or `W` alone. `damping` is Tikhonov's: `M + λ I`, for every structure. An
    operation that a structure cannot do raises TypeError and names a structure that can. If an operation needs a
    positive definite matrix and the damped matrix is not, it raises ValueError.

    Example:
        >>> import torch, natgrad
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(2, 1)
        >>> M = natgrad.fisher(model, torch.nn.MSELoss(), (torch.randn(20, 2), torch.zeros(20, 1)), "dense")
        >>> v = {"weight": torch.ones(1, 2), "bias": torch.zeros(1)}
        >>> torch.allclose((M @ v)["weight"].sum(), M.quadratic(v))
        True
        >>> M.solve(v, damping=1e-3)["bias"].shape, M.to_dense().shape, M.sample(7, damping=1e-3)["weight"].shape
        (torch.Size([1]), torch.Size([3, 3]), torch.Size([7, 1, 2]))

    A subclass defines `space`, `_matmul`, and as many of the other underscored methods as it can compute exactly;
    the others raise and name a structure that can.
    """

    space: Space
    dtype: torch.dtype
    device: torch.device
    has_coordinates = False
    """Whether `coordinates` differ from the parameters."""
    notes: tuple[str, ...] = ()
    """The notes below the table of `coverage()`."""
    fingerprint: Mapping[str, float] = MappingProxyType({})
    """For a model's matrix: the norms of the parameters at which it was computed. A sum or a multiple has none."""

    def __init_subclass__(cls) -> None:
        compute_in_own_precision(cls)

    # What a subclass defines ---------------------------------------------------------------------------

    @abstractmethod
    def _matmul(self, parts: Parts) -> Parts:
        """The product with a vector given by its parts, each with any leading batch axes."""

    def inverse(self, damping: float = 0.0, *, damping_style: str = "exact") -> Operator:
        """The operator `(M + λ I)⁻¹`. It is factorized once: keep it for repeated solves.

        The styles `"centered"` and `"factored"` damp in other ways. The optimizers use them: in centered coordinates, a
        shift of a layer's inputs does not change what a step does to the layer's function.

        Args:
            damping: `λ`, a finite number, at least zero.
            damping_style: `"exact"`: `M + λ I`. `"centered"`: `M + λ TᵀT`, which adds the identity in the centered
                coordinates `T (W, b) = (W, b + W m)` of K-FAC and EKFAC for a layer with a bias; the same as `"exact"`
                for a layer without such coordinates. `"factored"`: for a Kronecker product, `(A + π√λ I) ⊗ (B + √λ/π
                I)` with `π² = (tr A / d_in) / (tr B / d_out)`, in centered coordinates if there are any.

        Raises:
            ValueError: if the damped matrix is not positive definite.
            TypeError: if the structure has no such inverse.
        """
        raise self._cannot("inverse")

    def power(self, exponent: float, damping: float = 0.0) -> Operator:
        """The operator `(M + λ I)^exponent`.

        Args:
            exponent: any number. With −½ the operator whitens.
            damping: `λ`.

        Raises:
            ValueError: if the damped matrix is not positive definite.
            TypeError: if the structure has no such power.
        """
        raise self._cannot("power")

    def logdet(self, damping: float = 0.0) -> Tensor:
        """`log det (M + λ I)`, a scalar.

        Args:
            damping: `λ`.

        Raises:
            ValueError: if the damped matrix is not positive definite.
            TypeError: if the structure has no log-determinant; then try `estimate_logdet`.
        """
        raise self._cannot("logdet")

    def trace(self) -> Tensor:
        """The sum of the diagonal."""
        raise self._cannot("trace")

    def _norm(self) -> Tensor:
        raise self._cannot("norm")

    def _diagonal(self) -> Parts:
        raise self._cannot("diagonal")

    def _inverse_factor(self, parts: Parts, damping: float) -> Parts:
        """`L z` for standard normal `z`, where `L Lᵀ = (M + damping I)⁻¹`."""
        raise self._cannot("sample")

    def coordinates(self, parts: Parts) -> Parts:
        """A vector in centered coordinates, `(W, b + W m)`, or in units of the inputs; unchanged without either."""
        return parts

    def from_coordinates(self, parts: Parts) -> Parts:
        """The inverse of `coordinates`."""
        return parts

    def trace_in_coordinates(self) -> Tensor:
        """The trace in centered coordinates, `tr(T⁻ᵀ M T⁻¹)`: the scale to compare a centered damping with."""
        return self.trace()

    def apart(self, parts: Parts) -> Parts:
        """`coordinates(M v)`, which an inverse computes before `M v` itself."""
        return self.coordinates(self._matmul(parts))

    def _scaled(self, factor: float) -> Operator:
        """`factor M`, with the same structure if possible."""
        scaled: Operator = LATER["Scaled"](self, factor)
        return scaled

    def _plus(self, other: Operator) -> Operator | None:
        """`M + other` if the two have the same structure, else None."""
        return None

    def _dense(self) -> Tensor:
        eye = torch.eye(self.space.size, dtype=self.dtype, device=self.device)
        return self.space.flatten(self._matmul(self.space.unflatten(eye))).mT

    @property
    def blocks(self) -> dict[str, Operator]:
        """Each layer's own operator, by the layer's name: the principal submatrix of its parameters."""
        return ByLayer({name: LATER["Restriction"](self, names) for name, names in self.space.groups().items()})

    # What follows from that ----------------------------------------------------------------------------

    def __matmul__(self, v: Any) -> Any:
        """`M v`, in the form of `v`. Leading axes hold several vectors."""
        parts, join = self._read(v, f"{self._label()} @ v")
        return join(self._matmul(parts))

    def quadratic(self, v: Any) -> Tensor:
        """`vᵀ M v`: a scalar, or one for each vector if `v` has leading axes."""
        parts, _ = self._read(v, f"{self._label()}.quadratic(v)")
        lead, products = parts[0].shape[: parts[0].ndim - len(self.space.shapes[0])], self._matmul(parts)
        return torch.stack([(a * b).reshape(*lead, -1).sum(-1) for a, b in zip(parts, products, strict=True)]).sum(0)

    def solve(
        self,
        v: Any,
        damping: float = 0.0,
        *,
        damping_style: str = "exact",
        preconditioner: Operator | None = None,
        x0: Any = None,
        tol: float | None = None,
        max_iter: int | None = None,
    ) -> Any:
        """`(M + damping I)⁻¹ v`, in the form of `v`. For repeated solves, keep `inverse(damping)`.

        If any of the last four arguments is given, conjugate gradients compute the solution. They need only products.
        Otherwise implicit matrices use conjugate gradients, and all other structures an exact inverse.

        Args:
            v: a vector in any form, or many along leading axes.
            damping: `λ`.
            damping_style: as for `inverse`.
            preconditioner: a cheaper matrix `K` of the same parameters, such as K-FAC's, a `Diagonal` or the result of
                `natgrad.linalg.nystrom`. The closer it is to this matrix, the fewer products are needed.
            x0: where the iterations start, in the form of `v`. None: zero.
            tol: the relative residual `‖(M + λI) x − v‖ / ‖v‖` at which to stop. None: `eps^¾`.
            max_iter: the maximum number of products. None: ten times the size.

        Raises:
            ValueError: if the damped matrix is not positive definite, or the preconditioner is for other parameters.
            RuntimeError: if conjugate gradients do not reach `tol`.
        """
        parts, join = self._read(v, f"{self._label()}.solve(v)")
        options = {"preconditioner": preconditioner, "tol": tol, "max_iter": max_iter}
        if x0 is None and not any(option is not None for option in options.values()):
            return self.inverse(damping, damping_style=damping_style) @ v
        check_plain("a solution by conjugate gradients", damping_style)
        start = None if x0 is None else self._read(x0, f"{self._label()}.solve(x0=)")[0]
        return join(LATER["iterative_solve"](self, parts, damping, x0=start, **options))

    def diagonal(self) -> Any:
        """The diagonal, as a vector: a tensor, a tuple or a dict, like the operator's vectors."""
        return self._form(self._diagonal())

    def sample(self, n: int, damping: float = 0.0, generator: torch.Generator | None = None) -> Any:
        """`n` draws from `N(0, (M + damping I)⁻¹)`, along a leading axis of size n."""
        check_count("n", n, "draws")
        check_damping(damping)
        check_generator(generator, self.device)
        z = tuple(
            torch.randn(n, *s, dtype=self.dtype, device=self.device, generator=generator) for s in self.space.shapes
        )
        return self._form(self._inverse_factor(z, damping))

    def to_dense(self, order: str = "torch") -> Tensor:
        """The dense matrix, `(size, size)`. Parameters are flattened row by row (`order="torch"`) or column by column
        (`"vec"`).

        Raises:
            ValueError: if the size is above `DENSE_LIMIT`.
        """
        check_order(order)
        if self.space.size > DENSE_LIMIT:
            raise ValueError(
                f"{self._label()} has {self.space.size} rows: as a dense matrix it would take "
                f"{self.space.size**2 * self.dtype.itemsize / 2**30:.1f} GB. The limit is {DENSE_LIMIT} rows; "
                "use products and solves, or blocks"
            )
        dense = self._dense()
        if order == "torch":
            return dense
        index = self.space.columns_index(dense.device)
        return dense[index[:, None], index]

    # Sums and multiples --------------------------------------------------------------------------------

    def __add__(self, other: Any) -> Operator:
        """`M + other`, for another operator on the same vectors."""
        if not isinstance(other, Operator):
            return NotImplemented
        if other.space != self.space:
            raise ValueError(
                f"the sum of two matrices needs the same parameters: the first acts on {self.space.describe()}, "
                f"the second on {other.space.describe()}; compute both from one model"
            )
        added = self._plus(other)
        if added is None:
            added = LATER["Sum"]([self, other])
        return added

    def __sub__(self, other: Any) -> Operator:
        """`M − other`."""
        return self + -1 * other if isinstance(other, Operator) else NotImplemented

    def __rmul__(self, factor: Any) -> Operator:
        """`factor M`, for a finite number."""
        if not isinstance(factor, (int, float)):
            return NotImplemented
        if not math.isfinite(factor):
            raise ValueError(f"a matrix was scaled by {factor}; expected a finite number: check how it was computed")
        return self._scaled(float(factor))

    __mul__ = __rmul__

    # Estimates from products ---------------------------------------------------------------------------

    def estimate_trace(
        self, samples: int = 100, generator: torch.Generator | None = None, method: str = "hutchinson"
    ) -> Estimate:
        """The trace from `samples` products, with its standard error.

        Args:
            samples: the number of products.
            generator: the source of the random vectors.
            method: `"hutchinson"` uses random signs (1990). `"hutch++"` (Meyer, Musco, Musco & Woodruff 2021) and
                `"xtrace"` (Epperly, Tropp & Webber 2024) are more accurate if a few eigenvalues make up most of the
                trace.
        """
        check_choice("method", method, TRACES)
        estimate: Estimate = LATER[TRACES[method]](self, samples, generator)
        return estimate

    def estimate_diagonal(self, samples: int = 100, generator: torch.Generator | None = None) -> Estimate:
        """The diagonal from `samples` products with random signs (Bekas et al. 2007), with its standard error."""
        estimate: Estimate = LATER["estimate_diagonal"](self, samples, generator)
        return estimate

    def estimate_logdet(
        self, damping: float = 0.0, samples: int = 30, steps: int = 50, generator: torch.Generator | None = None
    ) -> Estimate:
        """`log det (M + damping I)` by stochastic Lanczos quadrature (Ubaru, Chen & Saad 2017).

        Each of `samples` probes takes `steps` products. The standard error does not include the quadrature error, which
        decreases geometrically with `steps`, and faster for a better conditioned matrix.
        """
        estimate: Estimate = LATER["estimate_logdet"](self, damping, samples, steps, generator)
        return estimate

    # Saving --------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The matrix as nested plain dictionaries of tensors, numbers and names; tensors are not copied.

        Raises:
            TypeError: for a matrix that holds a model and data, as implicit ones do.
        """
        state: dict[str, Any] = LATER["dump"](self)
        return state

    def save(self, path: str | PathLike[str]) -> None:
        """Writes the matrix to a safetensors file with a checksum, which `natgrad.load` reads.

        The file is written completely or not at all; a symbolic link stays a link.

        Raises:
            TypeError: for a matrix that holds a model and data.
            OSError: if the file cannot be written; an existing file is then unchanged.
        """
        LATER["save"](self, path)

    # What it is --------------------------------------------------------------------------------------

    def describe(self) -> str:
        """A short description of the structure."""
        return self._label()

    def coverage(self) -> Coverage:
        """A table of every parameter: how it is used, the structure that represents it, its memory.

        Example:
            >>> import torch, natgrad
            >>> model = torch.nn.Sequential(torch.nn.Embedding(9, 2), torch.nn.Flatten(), torch.nn.Linear(6, 2))
            >>> data = torch.arange(6).view(2, 3), torch.tensor([0, 1])
            >>> print(natgrad.fisher(model, torch.nn.CrossEntropyLoss(), data).coverage())
            parameter  shape  use        structure                        memory
            0.weight   9 x 2  embedding  A ⊗ B, A 9 (diagonal), B 2       52 B
            2.weight   2 x 6  linear     C ⊗ B and B, centered, C 6, B 2  184 B
            2.bias     2      linear     C ⊗ B and B, centered, C 6, B 2
            all                                                           236 B
        """
        coverage: Coverage = LATER["coverage_of"](self)
        return coverage

    def _read(self, v: Any, context: str) -> tuple[Parts, Callable[[Parts], Any]]:
        """The parts of `v`, and the function that restores its form. Raises ValueError if it is not a vector of this
        space, or has another dtype or device."""
        parts, join = self.space.split(v, context)
        for label, part in zip(self.space.labels(), parts, strict=True):
            if part.dtype != self.dtype or part.device != self.device:
                raise ValueError(
                    f"{context}: {label} is {part.dtype} on {part.device}, but the matrix is {self.dtype} on "
                    f"{self.device}; expected the same: .to({str(self.device)!r}, {self.dtype})"
                )
        return parts, join

    def _source(self, generator: torch.Generator | None) -> torch.Generator | None:
        """The source of random vectors."""
        return generator

    def _form(self, parts: Parts) -> Any:
        if self.space.names is not None:
            return dict(zip(self.space.names, parts, strict=True))
        return parts[0] if len(parts) == 1 else parts

    def _label(self) -> str:
        return type(self).__name__

    def _cannot(self, operation: str) -> TypeError:
        others = ["structure='dense' for a small model", "'block'", "'kfac'"]
        if operation in ("trace", "diagonal", "logdet"):
            others.append(f"estimate_{operation}(samples=...)")
        return TypeError(f"{self._label()} has no exact {operation}; use {', '.join(others[:-1])} or {others[-1]}")

    def _repr_html_(self) -> str:
        return str(LATER["operator_html"](self))

    def __repr__(self) -> str:
        return f"{self._label()}(size={self.space.size}, dtype={self.dtype})"


def check_operator(kind: str, name: str, value: Any) -> None:
    """Raises TypeError unless it is an operator."""
    if not isinstance(value, Operator):
        raise TypeError(f"of {kind}, {name} is {described(value)}; expected an Operator")
