"""Matrices of a model on data: `fisher`, `gauss_newton` and `hessian`."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from natgrad.capture.entry import entry
from natgrad.capture.graph import refuse_reentrant
from natgrad.capture.reading import example_gradients
from natgrad.checks.parameters import Selection
from natgrad.checks.values import check_choice, check_count, check_flag, check_max_dim
from natgrad.curvature.by_layers import of_layers
from natgrad.curvature.function import Model, as_module
from natgrad.curvature.implicit import ImplicitGaussNewton, ImplicitHessian, ImplicitSampled
from natgrad.curvature.low_rank import RANK
from natgrad.curvature.moments import MAX_DIM, SHARING
from natgrad.curvature.problem import Forward, Problem, check_mass
from natgrad.curvature.structures import STRUCTURES, Options
from natgrad.curvature.terms import Losses, Terms
from natgrad.distributed.gathering import jointly
from natgrad.linalg import Dense, Operator, Space

Chosen = str | Mapping[str, str]
ALL_STRUCTURES = ("implicit", "dense", *STRUCTURES)


@entry
def fisher(
    model: Model,
    loss: Losses,
    data: Any,
    structure: str | Mapping[str, str] = "kfac",
    *,
    estimator: str = "exact",
    samples: int = 1,
    centered: bool = True,
    sharing: str = "expand",
    max_dim: int = MAX_DIM,
    rank: int = RANK,
    params: Selection | Mapping[str, Tensor] = None,
    forward: Forward | None = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = False,
    weights: Mapping[str, float] | None = None,
) -> Operator:
    """The Fisher information `F = E[Jᵀ D J]` of a model on data, as an operator on its parameters.

    The matrix has the scale of the loss over the whole of `data`: a mean for `reduction="mean"`, a sum for `"sum"`. The
    mode of the model (`train` or `eval`) is not changed. The model runs once over the data.

    With a model in `DistributedDataParallel` every rank calls this with its own part of the data, which may be empty on
    some ranks, and gets the matrix of all the data. With `"block"` every rank holds the cases of all ranks. With
    `"implicit"` all ranks must compute a product together. If one rank raises an error, all ranks raise it.

    Args:
        model: any module. The matrix is over its trainable parameters. Or a function `f(params, x)`, with `params` the
            dictionary of its parameters.
        loss: an instance of one of torch's losses (`docs/losses.md` lists them; for `nn.GaussianNLLLoss` the model
            returns `(mean, var)`), `natgrad.losses.Likelihood` or `natgrad.losses.Convex`. Or a dictionary of such
            losses: the terms of a sum. Outputs and targets are then dictionaries with the same keys.
        data: one `(input, target)` pair, or an iterable of such batches. A tuple of tensors is one batch. A list is a
            list of batches. A list of two tensors is one pair if `forward` is not given, because a `DataLoader`
            collates pairs into lists. If `forward` is given, it is a list of two batches.
        structure: `"kfac"` (a Kronecker product for each layer), `"ekfac"` (its eigenbases with corrected
            eigenvalues), `"kfoc"` (the Kronecker product nearest to the exact block), `"low_rank"` (the largest
            eigenvalues of the exact block, plus a diagonal), `"diagonal"`, `"block"` (the exact block of each layer,
            stored as inputs and output gradients of the cases), `"dense"` (the full matrix), or `"implicit"` (products
            only). A dict gives each layer its own structure, by names of layers or patterns:
            `{"head": "block", "*": "kfac"}`.
        estimator: `"exact"` (all columns of a square root of `D`), `"mc"` (`samples` random labels for each
            case), or `"empirical"` (the gradients at the given targets).
        samples: the number of labels that `"mc"` draws for each case.
        centered: treat weight and bias separately, with the covariance of the inputs as the input factor (K-FAC and
            EKFAC of layers with a bias).
        max_dim: for factors with more rows than this, only the diagonal is kept (K-FAC and EKFAC).
        rank: the number of eigenvalues of each layer that `"low_rank"` keeps.
        sharing: for layers that are used at several positions: each position is a case (`"expand"`), or inputs are
            averaged and gradients summed over the positions first (`"reduce"`) (Eschenhagen et al. 2023).
        params: the names of the parameters of the matrix, or a predicate on names. Default: all trainable ones. Of a
            function: the tensors by name.
        forward: `forward(model, batch)` returns `(output, target)`. Needed if batches are not `(input, target)` pairs.
        generator: the source of the random labels of `"mc"`.
        dtype: the dtype of the matrix and of its sums, float32 or float64. Default: the dtype of the parameters, or
            float32 for a model in half precision.
        progress: show a progress bar over the batches.
        weights: weights of the terms by name, if there are several losses. Default: 1 for each.

    Returns:
        An operator with `@`, `quadratic`, `solve`, `inverse`, `trace`, `diagonal`, `to_dense`, ...

    Raises:
        TypeError: if the loss is not supported.
        ValueError: if shapes do not fit, the data is empty, or a value is not finite.
        NotImplementedError: if the structure does not support the use of a parameter, which is named; or if the model
            is under `fully_shard`.
        RuntimeError: inside `torch.inference_mode()`.

    Example:
        >>> import torch, natgrad
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(3, 2)
        >>> x, y = torch.randn(10, 3), torch.tensor([0, 1] * 5)
        >>> F = natgrad.fisher(model, torch.nn.CrossEntropyLoss(), (x, y))
        >>> step = F.solve({n: torch.ones_like(p) for n, p in model.named_parameters()}, damping=1e-3)
        >>> step["weight"].shape
        torch.Size([2, 3])

    Reference: Martens & Grosse (2015), arXiv:1503.05671; Martens (2014), arXiv:1412.1193.
    """
    check_structure(structure)
    problem = problem_of(
        model,
        loss,
        data,
        forward,
        weights,
        kind="fisher",
        estimator=estimator,
        samples=samples,
        params=params,
        generator=generator,
        dtype=dtype,
        progress=progress,
    )
    return matrix_of(problem, structure, Options(centered, sharing, max_dim, rank))


@entry
def gauss_newton(
    model: Model,
    loss: Losses,
    data: Any,
    structure: str | Mapping[str, str] = "kfac",
    *,
    centered: bool = True,
    sharing: str = "expand",
    max_dim: int = MAX_DIM,
    rank: int = RANK,
    params: Selection | Mapping[str, Tensor] = None,
    forward: Forward | None = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = False,
    estimator: str = "exact",
    samples: int = 1,
    weights: Mapping[str, float] | None = None,
) -> Operator:
    """The generalized Gauss-Newton matrix `G = E[Jᵀ D J]`, where `D` is the Hessian of the loss in the output.

    For losses with a canonical link it equals the Fisher information (Martens 2014, section 9): cross-entropy, squared
    error, logistic loss, Poisson with log rates. For Poisson with rates, `nn.GaussianNLLLoss` and
    `natgrad.losses.Likelihood` the two matrices differ. Gauss-Newton then has the estimator `"exact"` only. For the
    last two losses it may be indefinite: then use `"dense"` or `"implicit"`. The other structures raise ValueError,
    because they are built from a factor `S Sᵀ = D`.

    Args:
        model, loss, data, structure, centered, sharing, max_dim, rank: as for `fisher`.
        params, forward, generator: as for `fisher`.
        dtype, progress, weights: as for `fisher`.
        estimator, samples: as for `fisher`, if the two matrices are equal.

    Returns:
        An operator, as `fisher` does.

    Raises:
        TypeError: as `fisher` does.
        ValueError: as `fisher` does; if `D` is indefinite; and for an `estimator` that this `D` does not support.
        NotImplementedError: as `fisher` does.
        RuntimeError: as `fisher` does.

    Example:
        >>> import torch, natgrad
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> G = natgrad.gauss_newton(model, torch.nn.MSELoss(), (torch.eye(2), torch.zeros(2, 1)), "dense")
        >>> G.to_dense().round(decimals=3).tolist()
        [[1.0, 0.0], [0.0, 1.0]]

    Reference: Martens (2014), arXiv:1412.1193.
    """
    check_structure(structure)
    problem = problem_of(
        model,
        loss,
        data,
        forward,
        weights,
        kind="gauss_newton",
        estimator=estimator,
        samples=samples,
        params=params,
        generator=generator,
        dtype=dtype,
        progress=progress,
    )
    return matrix_of(problem, structure, Options(centered, sharing, max_dim, rank))


@entry
def hessian(
    model: Model,
    loss: Losses,
    data: Any,
    structure: str = "implicit",
    *,
    params: Selection | Mapping[str, Tensor] = None,
    forward: Forward | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = False,
    weights: Mapping[str, float] | None = None,
) -> Operator:
    """The Hessian of the objective in the parameters. It need not be positive semidefinite.

    It works for any layers, because it is computed by autograd alone.

    Args:
        model, loss, data, params, forward, dtype, progress, weights: as for `fisher`.
        structure: `"implicit"` (products only), `"dense"`, or `"block"` (one dense block for each module).

    Returns:
        An operator, as `fisher` does.

    Raises:
        TypeError: if the loss is not supported.
        ValueError: if shapes do not fit, the data is empty, or something is not finite.

    Example:
        >>> import torch, natgrad
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> H = natgrad.hessian(model, torch.nn.MSELoss(), (torch.eye(2), torch.zeros(2, 1)), "dense")
        >>> H.to_dense().round(decimals=3).tolist()
        [[1.0, 0.0], [0.0, 1.0]]

    Reference: Pearlmutter (1994), "Fast Exact Multiplication by the Hessian".
    """
    check_choice("structure", structure, ("implicit", "dense", "block"))
    problem = problem_of(model, loss, data, forward, weights, params=params, dtype=dtype, progress=progress)

    def of(own: Problem) -> Operator:
        own.curvature.check_hessian()
        implicit = ImplicitHessian(own)
        if structure == "implicit":
            return implicit
        matrix: Operator = implicit.formed() if structure == "dense" else implicit.block_diagonal()
        matrix.fingerprint = _norms(own.parameters)
        return matrix

    return _sum(problem, of) if isinstance(problem, Terms) else of(problem)


def problem_of(
    model: Model,
    loss: Losses,
    data: Any,
    forward: Forward | None,
    weights: Mapping[str, float] | None,
    **options: Any,
) -> Problem | Terms:
    """One loss's problem, or the weighted sum of several losses'."""
    model, options["params"] = as_module(model, options.get("params"))
    if isinstance(loss, Mapping):
        return Terms(model, loss, data, forward, weights, **options)
    if weights is not None:
        raise ValueError(
            f"weights={weights!r} need several losses, and loss is one; expected loss to be a dictionary of losses, "
            "or no weights"
        )
    return Problem(model, loss, data, forward=forward, **options)


def _sum(terms: Terms, matrix: Callable[[Problem], Operator]) -> Operator:
    """The weighted sum of the matrices of all terms."""
    each = (terms.weights[name] * matrix(problem) for name, problem in terms.problems.items())
    return reduce(operator.add, each)


def check_structure(structure: Any) -> None:
    """Raises TypeError or ValueError unless it is the name of a structure, or names by layer."""
    if isinstance(structure, Tensor):
        raise TypeError(
            "structure is a Tensor; expected its name, and data as one pair: (model, loss, (input, target), structure)"
        )
    if not isinstance(structure, Mapping):
        check_choice("structure", structure, ALL_STRUCTURES)


def matrix_of(problem: Problem | Terms, structure: Chosen, options: Options) -> Operator:
    """The matrix of any structure."""
    check_flag("centered", options.centered)
    check_choice("sharing", options.sharing, SHARING)
    check_max_dim(options.max_dim)
    check_count("rank", options.rank, "eigenvalues")
    if structure == "implicit":
        return _sum(problem, _implicit) if isinstance(problem, Terms) else _implicit(problem)
    if structure != "dense":
        matrix: Operator = of_layers(problem, structure, options)
    else:
        matrix = _sum(problem, _dense) if isinstance(problem, Terms) else _dense(problem)
    matrix.notes = problem.notes
    matrix.fingerprint = _norms(problem.parameters)
    return matrix


def _norms(parameters: Mapping[str, Tensor]) -> dict[str, float]:
    norms = torch.stack([p.detach().double().norm() for p in parameters.values()])
    return dict(zip(parameters, norms.tolist(), strict=True))


def _implicit(problem: Problem) -> Operator:
    return ImplicitGaussNewton(problem) if problem.estimator == "exact" else ImplicitSampled(problem)


def _dense(problem: Problem) -> Dense:
    """`Σ ± (Jᵀ s)(Jᵀ s)ᵀ` over all examples and columns, from autograd's gradients alone, for any layers."""
    parameters, curvature = problem.parameters, problem.curvature
    space = Space(tuple(tuple(p.shape) for p in parameters.values()), tuple(parameters))
    G = torch.zeros(space.size, space.size, dtype=problem.dtype, device=problem.device)
    mass = torch.zeros((), dtype=G.dtype, device=G.device)
    with jointly(problem.world, "the matrix"):
        for _, output, target in problem.recorded({}):
            refuse_reentrant(output)
            mass += curvature.normalizer(output, target)
            for sign, column in problem.signed_columns(output, target):
                for some in example_gradients(output, column, parameters):
                    S = space.flatten(some).to(G.dtype)
                    G.addmm_(S.mT, S, alpha=sign)
    problem.world.sum(G, "the matrix")
    problem.world.sum(mass, "the matrix")
    if not torch.isfinite(G).all():
        raise ValueError("the matrix has entries that are not finite; look for NaN or inf in targets or loss weights")
    check_mass(mass, curvature.is_mean)
    return Dense(G / mass if curvature.is_mean else G, space)
