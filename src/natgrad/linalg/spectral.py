"""The operations of every operator that concern its eigenvalues."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from natgrad.linalg.later import LATER

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

    from natgrad.linalg.density import SpectralDensity
    from natgrad.linalg.operator import Operator
    from natgrad.linalg.top import Eigenpairs


class Spectral:
    """The part of `Operator` that concerns eigenvalues."""

    @property
    def _operator(self) -> Operator:
        return cast("Operator", self)

    def eigenvalues(self) -> Tensor:
        """All eigenvalues, `(size,)`, in no particular order. For K-FAC they are products of the factors' eigenvalues.

        Raises:
            TypeError: if the structure cannot compute them, and the matrix is too large to be formed.
        """
        found: Tensor = LATER["eigenvalues"](self)
        return found

    def top_eigenvalues(
        self,
        k: int = 10,
        *,
        which: str = "largest",
        tol: float | None = None,
        max_products: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Eigenpairs:
        """The `k` largest eigenvalues with their vectors, from products: a restarted block Krylov method.

        Args:
            k: how many eigenvalues.
            which: `"largest"`, `"smallest"`, or largest in `"magnitude"`.
            tol: the largest residual `‖M v − λ v‖`, relative to the largest eigenvalue. None: about `eps^¾`.
            max_products: the maximum number of products. None: `50 k + 10 size`.
            generator: the source of the random start vectors.

        Returns:
            `(values, vectors, residuals)`; the vectors are stacked along a leading axis of size `k`.

        Raises:
            RuntimeError: if some eigenvalues have not converged.

        Reference: Stathopoulos & Wu (1994), "Thick restarting of the Davidson method"; Golub & Underwood (1977).
        """
        found: Eigenpairs = LATER["top_eigenvalues"](self, k, which, tol, max_products, generator)
        return found

    def spectral_density(
        self, samples: int = 10, steps: int = 100, generator: torch.Generator | None = None
    ) -> SpectralDensity:
        """The distribution of the eigenvalues: exact if `eigenvalues()` gives them, else an estimate by stochastic
        Lanczos quadrature, with `steps` products for each of `samples` random vectors.

        Reference: Ubaru, Chen & Saad (2017); Ghorbani, Krishnan & Xiao (2019), arXiv:1901.10159.
        """
        found: SpectralDensity = LATER["spectral_density"](self, samples, steps, generator)
        return found

    def norm(self, ord: str | int = "fro") -> Tensor:
        """A norm of the matrix, a scalar.

        Args:
            ord: `"fro"`, Frobenius; or `2`, the largest absolute eigenvalue: from the structure if it gives
                eigenvalues, else from products as in `top_eigenvalues`.

        Raises:
            TypeError: if the structure has no exact Frobenius norm.
            RuntimeError: if the largest eigenvalue has not converged.
        """
        if ord == "fro":
            return self._operator._norm()
        if ord != 2 or isinstance(ord, bool):
            raise ValueError(f"ord={ord!r} is unknown: expected 'fro' or 2")
        found: Tensor = LATER["spectral_norm"](self)
        return found

    def condition(self, damping: float = 0.0) -> Tensor:
        """The condition number: the largest eigenvalue of `M + damping I` divided by the smallest, a scalar.

        It is exact if `eigenvalues()` gives all eigenvalues, else computed from the largest and the smallest by
        products.

        Args:
            damping: `λ`.

        Raises:
            ValueError: if the damped matrix is not positive definite.
        """
        found: Tensor = LATER["condition"](self, damping)
        return found

    def project(self, v: Any, keep: float, *, which: str = "smallest") -> Any:
        """The part of `v` along the eigenvectors with the lowest (or the highest) curvature, in the form of `v`.

        A step that is projected on directions of low curvature hardly changes the outputs on the data of the matrix. So
        it can edit a model and preserve its other abilities.

        Args:
            v: a vector in any form, or many along leading axes.
            keep: the share of the directions to keep, over all layers together, from 0 to 1.
            which: `"smallest"` or `"largest"` eigenvalues.

        Raises:
            TypeError: if the structure has no eigenbasis and is too large to be formed.

        Reference: Ikram et al. (2026), "CrispEdit: Low-Curvature Projections for Scalable Non-Destructive LLM Editing",
        arXiv:2602.15823.
        """
        return LATER["project"](self, v, keep, which)

    def to_scipy(self) -> LinearOperator:
        """The matrix as a `scipy.sparse.linalg.LinearOperator` on flat NumPy vectors, for `eigsh`, `cg`, ...;
        `natgrad.linalg.External` converts back."""
        found: LinearOperator = LATER["to_scipy"](self)
        return found

    def __getitem__(self, names: Any) -> Operator:
        """The principal submatrix of some parameters, given by name, or of the parameters of modules: `F["fc1"]`,
        `F[["fc1.weight", "fc2.weight"]]`. If it consists of whole blocks, it keeps the structure."""
        found: Operator = LATER["submatrix"](self, names)
        return found

    def to(self, *args: Any, **kwargs: Any) -> Operator:
        """The same matrix with another dtype or on another device; the arguments are those of `Tensor.to`.

        Raises:
            TypeError: for a matrix that holds a model and data, as implicit ones do.
        """
        found: Operator = LATER["converted"](self, *args, **kwargs)
        return found
