"""Influence functions: which training examples speak for a prediction?"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from natgrad.capture.entry import entry
from natgrad.checks.parameters import Selection
from natgrad.checks.values import check_choice, check_count, described
from natgrad.curvature.function import Model, as_module
from natgrad.curvature.matrices import check_structure, matrix_of, problem_of
from natgrad.curvature.problem import Forward, Problem
from natgrad.curvature.structures import Options
from natgrad.curvature.terms import Losses
from natgrad.linalg import Operator
from natgrad.linalg.arguments import check_damping
from natgrad.uses.objective import Objective
from natgrad.uses.queries import held, of_measure, query_gradients
from natgrad.uses.refined import ByCases, refined
from natgrad.uses.rows import loss_columns
from natgrad.uses.scores import Scores, of_themselves, scores_of
from natgrad.uses.subset import moved, warn_in_training
from natgrad.uses.unrolled import Checkpoint, averaged, read_segments, unrolled_queries, weights_kept

PER = {"example": "one score for each training example", "token": "one for each position of its inputs"}
TOLERANCE = 1e-3
"""The relative residual at which a refined query counts as solved."""


@entry
def influence(
    model: Model,
    loss: Losses,
    train: Any,
    query: Any = None,
    structure: str | Mapping[str, str] = "ekfac",
    *,
    damping: float = 1e-3,
    refine: int = 0,
    rank: int | None = None,
    per: str = "example",
    measure: Callable[[Tensor, Any], Tensor] | str | None = None,
    factors: Operator | None = None,
    checkpoints: Sequence[Checkpoint] | None = None,
    times: float | int | Sequence[float | int] | None = None,
    segments: int | None = None,
    weights: Mapping[str, float] | None = None,
    estimator: str = "exact",
    samples: int = 1,
    centered: bool | None = None,
    sharing: str = "expand",
    params: Selection | Mapping[str, Tensor] = None,
    forward: Forward | None = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> Scores:
    """How much each training example supports the prediction on each query: the influence scores

        s_qi = ∇ℓ_qᵀ (F + λ I)⁻¹ ∇ℓ_i

    To first order, the loss of query `q` grows by `s_qi / N` if example `i` is left out of the `N` training examples.
    So a positive score means support. `ℓ_i` is the loss of one example alone, and `F` is the Fisher information of the
    objective over `train`. For losses with canonical links this is the Gauss-Newton matrix. The training batches are
    read one after the other, and only some of their gradients are in memory at a time. The gradients of all queries are
    kept in memory: `queries x parameters` numbers.

    With a model in `DistributedDataParallel` every rank gives its own part of `train`, possibly none, and the same
    `query`. The matrix is that of all the data, and each rank gets the scores of its own examples.

    With `checkpoints` of the training, the scores take account of the whole training, which need not have converged.
    The training is divided into segments. Each segment `ℓ` is modelled as gradient descent with the matrix `F_ℓ` and
    the gradients `∇ℓ_i,ℓ`, which are means over the segment's checkpoints. With its time `t_ℓ`, the sum of the learning
    rates of its steps,

        s_qi = ∇ℓ_qᵀ Σ_ℓ S_L ⋯ S_ℓ+1 φ_ℓ ∇ℓ_i,ℓ
        S_ℓ = exp(−t_ℓ (F_ℓ + λ I)),    φ_ℓ = (I − S_ℓ) (F_ℓ + λ I)⁻¹

    This is the method SOURCE. One checkpoint and infinite time give the first formula. For K-FAC and EKFAC, the factors
    are averaged.

    Args:
        model: a trained model, in evaluation mode; with `checkpoints`, at the end of the training.
        loss: its loss, any that `natgrad.fisher` takes; or a dictionary of losses, the terms of a sum. Outputs and
            targets are then dictionaries with the same keys, and `ℓ_i` is the weighted sum of the losses of example
            `i`.
        train: the training data, as for `natgrad.fisher`: a pair, or an iterable of batches that can be read twice, in
            a fixed order.
        query: data of the same form. None: the influence of every training example on itself, `(training examples,)`.
        structure: any of `natgrad.fisher`.
        damping: `λ`. Choose about the weight decay of the training, but not much less than a tenth of the mean of the
            curvature's diagonal. With `checkpoints`, choose the weight decay.
        refine: the maximum number of steps of conjugate gradients on the exact Fisher information. They start from the
            solution of `structure`, which is also the preconditioner.
        rank: keep the preconditioned query gradient of each weight matrix as a matrix of this rank: `rank (d_in +
            d_out)` numbers. The queries are then worked on batch by batch.
        per: `"example"`, or `"token"` for a score of each position of the layers' inputs: `(queries, training examples,
            positions)`. The scores of all positions sum to the score of the example.
        measure: `measure(output, target)` returns one number for each query, which is used instead of the query's loss.
            Like a loss, it should be lower for better predictions. With several losses: the name of the loss to use for
            the queries.
        factors: the matrix, if you have computed it before: the result of `natgrad.fisher`, `gauss_newton` or `load`.
        checkpoints: state dicts of the model during its training, or files of them (`torch.save` or safetensors), in
            order. Afterwards the model has its own weights again.
        times: for each checkpoint, the learning rate times the number of steps that it stands for; with momentum `β`,
            divide by `1 − β`. `math.inf` means until convergence. One number holds for all checkpoints.
        segments: the number of segments, all with equally many checkpoints. None: one for each checkpoint.
        weights: if there are several losses, their weights by name, as for `natgrad.fisher`.
        centered: as for `natgrad.fisher`. None: True, but False with `checkpoints`, because centered EKFAC has no
            eigenbasis for large layers.
        estimator, samples, sharing, params, forward, generator, dtype, progress: as for `natgrad.fisher`.

    Returns:
        A tensor `(queries, training examples)`, whose `top(k)` are the examples with the largest scores.

    Raises:
        TypeError, ValueError, NotImplementedError: as `natgrad.fisher` does.
        ValueError: also if a query has no gradient, if the data are shuffled, if `factors` or `checkpoints` belong to
            another model, if `factors` were computed at other weights, if scores are not finite, or if ranks have
            different queries.
        NotImplementedError: for the influence of examples on themselves on several ranks, with `refine` or
            `"implicit"`.
        RuntimeError: if the damped matrix is not positive definite.

    Example:
        >>> import torch, natgrad
        >>> _ = torch.manual_seed(0)
        >>> train = torch.randn(40, 3), torch.arange(40) % 2
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).eval()
        >>> scores = natgrad.influence(model, torch.nn.CrossEntropyLoss(), train, (train[0][:2], train[1][:2]))
        >>> scores.shape, scores.top(1).indices.shape
        (torch.Size([2, 40]), torch.Size([2, 1]))

    Reference: Koh & Liang (2017), arXiv:1703.04730; Grosse et al. (2023), arXiv:2308.03296; with checkpoints: Bae, Lin,
    Lorraine & Grosse (2024), arXiv:2405.12186.
    """
    check_damping(damping)
    check_structure(structure)
    check_choice("per", per, PER, meanings=PER)
    check_count("refine", refine, "steps", least=0)
    if rank is not None:
        check_count("rank", rank)
    if per == "token" and (rank is not None or query is None):
        raise ValueError("per='token' needs query= and does not work with rank=; give query=, and leave rank out")
    if measure is not None and query is None:
        raise ValueError("measure= is for queries, and there are none; give query=, or leave measure out")
    if checkpoints is None and (times is not None or segments is not None):
        raise ValueError("times= and segments= need checkpoints=, which is not given; leave them out")
    model, params = as_module(model, params)
    train = list(train) if isinstance(train, Iterator) else train
    how: dict[str, Any] = {
        "forward": forward, "weights": weights, "estimator": estimator, "samples": samples, "params": params,
        "generator": generator, "dtype": dtype, "progress": progress,
    }  # fmt: skip
    objective = Objective(problem_of(model, loss, train, **how))
    warn_in_training(objective.model)
    asked: Objective | None = None
    columns: Callable[[Problem], Any] = loss_columns
    query = list(query) if isinstance(query, Iterator) else query
    if query is not None:
        asked = Objective(problem_of(model, loss, query, **how))
        asked, columns = of_measure(asked, measure)
    options = Options(checkpoints is None if centered is None else centered, sharing)
    if checkpoints is not None:
        _check_alone(structure, query=query, refine=refine, factors=factors)
        stretches = read_segments(objective.model, checkpoints, times, segments)
        assert asked is not None
        parts, of_each = zip(*query_gradients(asked, query, columns), strict=True)
        gradients, layers = torch.cat(parts), [layer for its in of_each for layer in its]
        del parts
        found = []
        with weights_kept(objective.model):
            matrices = [(averaged(objective, s.states, structure, options), s.time) for s in stretches]
            for (states, _), v in zip(stretches, unrolled_queries(matrices, gradients, damping), strict=True):
                for state in states:
                    objective.model.load_state_dict(state)
                    queries = [held(matrices[0][0], v / len(states), rank, layers)]
                    found.append(scores_of(objective, train, queries, per))
        return Scores(torch.stack(found).sum(0))
    if query is None and objective.world.size > 1 and (refine or structure == "implicit"):
        raise NotImplementedError(
            "the influence of examples on themselves with refine= or structure='implicit' takes products that all "
            "ranks compute together, and each rank has its own examples; give query=, or another structure"
        )
    F = _checked(factors, objective)
    if F is None:
        F = matrix_of(objective.problem, structure, options)
    inverse = F.inverse(damping)
    exact: Operator | None = None
    if refine:
        each = zip(objective.weights, objective.terms.values(), strict=True)
        exact = reduce(operator.add, (ByCases(p) if w == 1 else w * ByCases(p) for w, p in each))

    def solved(b: Tensor) -> Tensor:
        x = inverse @ b
        return x if exact is None else refined(exact, damping, inverse, b, x, refine, TOLERANCE, objective.world)

    if asked is None:
        return Scores(of_themselves(objective, train, inverse, None if exact is None else solved))
    if rank is None:
        gradients = torch.cat([g for g, _ in query_gradients(asked, query, columns)])
        queries = [held(F, solved(gradients))]
    else:  # one batch after the other, so that few are held in full
        queries = [held(F, solved(g), rank, layers) for g, layers in query_gradients(asked, query, columns)]
    return Scores(scores_of(objective, train, queries, per))


def _check_alone(structure: Any, query: Any, refine: int, factors: Any) -> None:
    """What influence through checkpoints does not take."""
    if query is None:
        raise ValueError("with checkpoints= there is no self-influence; give query=, which may be the training data")
    if refine:
        raise ValueError(f"refine={refine} works with one matrix, but checkpoints= has several; leave one of them out")
    if factors is not None:
        raise ValueError("factors= is one matrix, but each segment of checkpoints= has its own; leave factors out")
    if structure == "implicit":
        raise ValueError(
            "structure='implicit' has no eigenvectors, which checkpoints= need; use 'ekfac', 'kfac', 'diagonal', "
            "'block' or 'dense'"
        )


def _checked(factors: Any, problem: Objective) -> Operator | None:
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
            f"factors belong to another model or other parameters: {other!r} has shape {theirs.get(other)} there and "
            f"{own.get(other)} here; give the matrix of this model, and the same params="
        )
    if changed := moved(factors, problem.parameters):
        raise ValueError(
            f"factors were computed at other weights of the model: {changed!r} has changed since; compute them at the "
            "present weights, or load the earlier weights. To use them as they are, pass 1.0 * factors"
        )
    if factors.dtype != problem.dtype or factors.device != problem.device:
        raise ValueError(
            f"factors are {factors.dtype} on {factors.device}, and the gradients {problem.dtype} on {problem.device}; "
            f"expected the same: factors.to({str(problem.device)!r}, {problem.dtype})"
        )
    return factors
