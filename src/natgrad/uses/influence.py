"""Influence functions: which training examples speak for a prediction?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.checks.parameters import Selection
from natgrad.checks.values import check_choice, check_count, check_function, described
from natgrad.curvature.matrices import fisher
from natgrad.curvature.problem import Forward, Problem
from natgrad.linalg import BlockDiagonal, Operator
from natgrad.linalg.arguments import check_damping
from natgrad.uses.covariance import output_covariance
from natgrad.uses.order import rows_in_order
from natgrad.uses.refined import ByCases, refined
from natgrad.uses.rows import Rows, loss_columns, measure_columns
from natgrad.uses.scores import Queries, Scores
from natgrad.uses.subset import moved, warn_in_training

PER = {"example": "one score for each training example", "token": "one for each position of its inputs"}
TOLERANCE = 1e-3
"""The relative residual at which a refined query counts as solved."""


def influence(
    model: nn.Module,
    loss: nn.Module,
    train: Any,
    query: Any = None,
    structure: str | Mapping[str, str] = "ekfac",
    *,
    damping: float = 1e-3,
    refine: int = 0,
    rank: int | None = None,
    per: str = "example",
    measure: Callable[[Tensor, Any], Tensor] | None = None,
    factors: Operator | None = None,
    estimator: str = "exact",
    samples: int = 1,
    centered: bool = True,
    sharing: str = "expand",
    params: Selection = None,
    forward: Forward | None = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> Scores:
    """How much each training example speaks for each query: the influence scores

        s_qi = ∇ℓ_qᵀ (F + λ I)⁻¹ ∇ℓ_i

    To first order the query's loss grows by `s_qi / N` if example `i` is left out of `N`, so positive speaks for. `ℓ_i`
    is the loss of the example by itself, as the loss module gives it, and `F` the Fisher information of the objective
    over `train`, which for losses of canonical links is the Gauss-Newton matrix. Batches are streamed, and gradients of
    training examples formed some at a time; the queries' gradients are held, `queries x parameters` numbers.

    Args:
        model: a trained model, in evaluation mode.
        loss: its loss, any that `natgrad.fisher` takes.
        train: the training data, as for `natgrad.fisher`: a pair, or an iterable of batches that can be read twice, in
            a fixed order.
        query: data of the same form. None: the influence of every training example on itself, `(training examples,)`.
        structure: any of `natgrad.fisher`.
        damping: `λ`. It should be about the weight decay of the training, and not far below a tenth of the mean of
            the curvature's diagonal.
        refine: at most so many steps of conjugate gradients on the exact Fisher information, from the structure's
            solution and preconditioned by it.
        rank: keep the preconditioned query gradients of each weight matrix in this rank, `rank (d_in + d_out)` numbers.
        per: `"example"`, or `"token"`: `(queries, training examples, positions)`, the share of each position of the
            layers' inputs, which sum to the score.
        measure: `measure(output, target)`, one number for each example, in the place of the query's loss. Like a loss
            it should fall where the prediction gets better.
        factors: the matrix, where it is there already: what `natgrad.fisher`, `gauss_newton` or `load` returned.
        estimator, samples, centered, sharing, params, forward, generator, dtype, progress: as for `natgrad.fisher`.

    Returns:
        A tensor `(queries, training examples)`, whose `top(k)` are the examples with the largest scores.

    Raises:
        TypeError, ValueError, NotImplementedError: as `natgrad.fisher` does.
        ValueError: also if a query has no gradient, data are shuffled, or `factors` are of another model or of other
            weights.
        RuntimeError: if the damped matrix is not positive definite.

    Example:
        >>> import torch, natgrad
        >>> _ = torch.manual_seed(0)
        >>> train = torch.randn(40, 3), torch.arange(40) % 2
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).eval()
        >>> scores = natgrad.influence(model, torch.nn.CrossEntropyLoss(), train, (train[0][:2], train[1][:2]))
        >>> scores.shape, scores.top(1).indices.shape
        (torch.Size([2, 40]), torch.Size([2, 1]))

    Reference: Koh & Liang (2017), arXiv:1703.04730; Grosse et al. (2023), arXiv:2308.03296.
    """
    check_damping(damping)
    check_choice("per", per, PER, meanings=PER)
    check_count("refine", refine, "steps", least=0)
    if rank is not None:
        check_count("rank", rank)
    check_function("measure", measure, "of the output and the target that returns one number for each example")
    if per == "token" and (rank is not None or query is None):
        raise ValueError("per='token' takes queries of full rank; leave rank out, and give query=")
    train = list(train) if isinstance(train, Iterator) else train

    def problem(data: Any) -> Problem:
        return Problem(model, loss, data, params=params, forward=forward, dtype=dtype, progress=progress)

    training = problem(train)
    warn_in_training(training.model)
    F = _checked(factors, training)
    if F is None:
        F = fisher(
            model, loss, train, structure, estimator=estimator, samples=samples, centered=centered, sharing=sharing,
            params=params, forward=forward, generator=generator, dtype=dtype, progress=progress,
        )  # fmt: skip
    inverse = F.inverse(damping)
    exact = ByCases(training) if refine else None

    def solved(b: Tensor) -> Tensor:
        x = inverse @ b
        return x if exact is None else refined(exact, damping, inverse, b, x, refine, TOLERANCE)

    def trained() -> Iterator[Rows]:
        return rows_in_order("train", training, train, loss_columns(training))

    if query is None:
        refine_by = None if exact is None else solved
        return Scores(torch.cat([_with_itself(rows, inverse, refine_by) for rows in trained()]))
    query = list(query) if isinstance(query, Iterator) else query
    asked = problem(query)
    columns = measure_columns(measure) if measure else loss_columns(asked)
    gradients = _gradients(rows_in_order("query", asked, query, columns))
    space = F.space
    v = dict(zip(space.names or (), space.unflatten(solved(gradients)), strict=True))
    queries = Queries(v, rank)
    score = queries.position_scores if per == "token" else queries.scores
    each = [score(rows) for rows in trained()]
    return Scores(torch.cat(each, 1))


def _checked(factors: Any, problem: Problem) -> Operator | None:
    """Factors that are given, if they are a matrix of the problem's parameters."""
    if factors is None:
        return None
    if not isinstance(factors, Operator):
        raise TypeError(f"factors is {described(factors)}; expected a matrix: natgrad.load(path), if it was saved")
    own = {n: tuple(p.shape) for n, p in problem.parameters.items()}
    theirs = dict(zip(factors.space.names or (), factors.space.shapes, strict=False))
    if list(own.items()) != list(theirs.items()):
        other = next((n for n in [*theirs, *own] if own.get(n) != theirs.get(n)), "")
        raise ValueError(
            f"factors are of another model or of other parameters: {other!r} has shape {theirs.get(other)} there and "
            f"{own.get(other)} here; give the matrix of this model, and the same params="
        )
    if changed := moved(factors, problem.parameters):
        raise ValueError(
            f"factors were computed at other weights of the model: {changed!r} has changed since; compute them at the "
            "weights of now, or load those of then. To use them as they are, pass 1.0 * factors"
        )
    if factors.dtype != problem.dtype or factors.device != problem.device:
        raise ValueError(
            f"factors are {factors.dtype} on {factors.device}, and the gradients {problem.dtype} on {problem.device}; "
            f"expected the same: factors.to({str(problem.device)!r}, {problem.dtype})"
        )
    return factors


def _gradients(batches: Iterator[Rows]) -> Tensor:
    """The query gradients, `(queries, size)`."""
    found = [rows.space.flatten(tuple(p[:, 0] for p in rows.dense().values())) for rows in batches]
    gradients = torch.cat(found)
    size = gradients.norm(dim=1)
    if not torch.isfinite(size).all():
        raise ValueError(
            f"the gradient of query {int((~torch.isfinite(size)).nonzero()[0])} is not finite; look for NaN or inf in "
            "the queries"
        )
    if (size == 0).any():
        raise ValueError(
            f"query {int((size == 0).nonzero()[0])} has no gradient: its loss does not depend on the parameters, or "
            "all of its targets are ignored; leave it out"
        )
    return gradients


def _with_itself(rows: Rows, inverse: Operator, solved: Callable[[Tensor], Tensor] | None) -> Tensor:
    """`∇ᵀ (F + λ I)⁻¹ ∇` of every example."""
    if solved is None and isinstance(inverse, BlockDiagonal):
        return output_covariance(rows, inverse, diagonal=True)[:, 0]
    found = []
    step = max(1, (1 << 25) // rows.space.size)
    for start in range(0, len(rows), step):
        part = rows.part(slice(start, start + step))
        g = rows.space.flatten(tuple(p[:, 0] for p in part.dense().values()))
        found.append((g * (inverse @ g if solved is None else solved(g))).sum(1))
    return torch.cat(found)
