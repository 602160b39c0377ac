"""The linear datamodeling score: do influence scores predict the losses after training on subsets of the data?"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from natgrad.checks.files import write_whole
from natgrad.checks.values import check_count, check_flag, check_function, check_within, described
from natgrad.checks.warning import warn

Retrain = Callable[[Tensor, Any], Tensor]


@dataclass(frozen=True)
class LDS:
    """What `natgrad.lds` returns.

    Args:
        score: the mean of `per_query`, between −1 and 1.
        standard_error: the standard error of this mean, over the queries.
        per_query: Spearman's correlation of predicted and measured losses over the subsets, `(queries,)`.
        losses: the loss of every query after training on every subset, `(subsets, queries)`.
        members: the examples that each subset contains, `(subsets, training examples)`.

    Example:
        >>> import torch, natgrad
        >>> scores = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
        >>> result = natgrad.lds(scores, lambda kept, seed: -scores[:, kept].sum(1), subsets=6)
        >>> round(result.score, 4)
        1.0
    """

    score: float
    standard_error: float
    per_query: Float[Tensor, " queries"]
    losses: Float[Tensor, "subsets queries"]
    members: Bool[Tensor, "subsets examples"]

    def __float__(self) -> float:
        return self.score

    def __repr__(self) -> str:
        return f"LDS({self.score:.3f} ± {self.standard_error:.3f}, {len(self.losses)} subsets)"


def lds(
    scores: Tensor,
    retrain: Retrain | None = None,
    *,
    subsets: int = 50,
    fraction: float = 0.5,
    seed: int = 0,
    path: str | PathLike[str] | None = None,
    at_once: int = 1,
    progress: bool = False,
) -> LDS:
    """The linear datamodeling score: how well influence scores predict the losses of models that are trained on random
    subsets of the data.

    For a subset, the scores predict that the loss of query `q` is an increasing function of `−Σ_i s_qi`, where the sum
    is over the examples `i` in the subset. The score is Spearman's correlation of this prediction with the measured
    loss, over the subsets. Its mean over the queries is at most 1, and about 0 for scores without information.

    Most of the time is spent on training. With a `path`, every result is written to this file as soon as it is known.
    If a call was interrupted, the same call continues where it stopped. Other scores can then be evaluated without any
    training.

    Args:
        scores: `(queries, training examples)`, as `natgrad.influence` returns them: a positive score means support.
        retrain: `retrain(indices, seed)` trains a model from scratch on the training examples of these indices, a
            sorted `LongTensor`, and returns the loss of every query, `(queries,)`. None: all results are in the file.
        subsets: the number of subsets.
        fraction: the share of the training examples that each subset has.
        seed: the random seed of the subsets, `>= 0`. The `k`-th training has the seed `seed + k`.
        path: a file for the results. It is created if it does not exist.
        at_once: how many subsets `retrain` takes in one call, for example to train an ensemble under `torch.vmap`. It
            then gets `(at_once, kept)` indices and a list of seeds, and returns `(at_once, queries)`. The last call may
            have fewer.
        progress: show a progress bar over the subsets.

    Raises:
        TypeError: if results are missing and `retrain` is not given.
        ValueError: if the file has results of other subsets, or if losses have a wrong shape or are not finite.

    Example:
        >>> import torch, natgrad
        >>> x = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
        >>> def retrain(indices, seed):  # the "model" is the mean of its training examples
        ...     return (x[indices].mean(0) - x[:3]).square().sum(1)
        >>> (x[:3] @ x.mT).shape  # scores that speak for examples in the query's direction
        torch.Size([3, 20])
        >>> bool(natgrad.lds(x[:3] @ x.mT, retrain).score > 0.3)
        True

    Reference: Ilyas et al. (2022), arXiv:2202.00622; Park et al. (2023), arXiv:2303.14186.
    """
    if not isinstance(scores, Tensor) or scores.ndim != 2:
        raise ValueError(f"scores is {described(scores)}; expected a Tensor of shape (queries, training examples)")
    if not len(scores) or scores.is_complex():
        what = "complex" if scores.is_complex() else "of no query"
        raise ValueError(f"scores are {what}; expected real numbers, of at least one query")
    if not torch.isfinite(scores).all():
        raise ValueError(
            f"{int((~torch.isfinite(scores)).sum())} of {scores.numel()} scores are not finite; look for a damping "
            "that is too small, or for NaN in the model"
        )
    check_count("subsets", subsets, "subsets", least=2)
    check_count("seed", seed, least=0)
    check_within("fraction", fraction, "(0, 1)")
    check_count("at_once", at_once, "subsets")
    check_flag("progress", progress)
    check_function("retrain", retrain, "of indices and a seed that returns the loss of every query")
    queries, examples = scores.shape
    kept = round(fraction * examples)
    if not 0 < kept < examples:
        raise ValueError(
            f"fraction={fraction} of {examples} training examples are {kept}; expected at least 1, and fewer than all"
        )
    if path is not None and not isinstance(path, (str, PathLike)):
        raise TypeError(f"path is {described(path)}; expected the name of a file")
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randperm(examples, generator=generator)[:kept].sort().values for _ in range(subsets)]
    results = Results(path, {"examples": examples, "queries": queries, "fraction": fraction, "seed": seed})
    todo = [k for k in range(subsets) if k not in results.losses]
    if todo and retrain is None:
        raise TypeError(f"{len(todo)} of {subsets} subsets have not been trained yet; give retrain=")
    groups = [todo[i : i + at_once] for i in range(0, len(todo), at_once)]
    for group in _tracked(groups) if progress else groups:
        assert retrain is not None
        if at_once == 1:
            results.add(group, _checked(retrain(drawn[group[0]], seed + group[0]), (queries,))[None])
        else:
            indices, seeds = torch.stack([drawn[k] for k in group]), [seed + k for k in group]
            results.add(group, _checked(retrain(indices, seeds), (len(group), queries)))
    losses = torch.tensor([results.losses[k] for k in range(subsets)], dtype=torch.float64)
    members = torch.zeros(subsets, examples, dtype=torch.bool)
    for k, indices in enumerate(drawn):
        members[k, indices] = True
    predicted = -(members.to(torch.float64) @ scores.detach().as_subclass(Tensor).cpu().double().mT)
    each = correlations(predicted.mT, losses.mT)
    for what, values in (("found losses", losses), ("scores' sums", predicted)):
        if same := int((values == values[0]).all(0).sum()):
            warn(f"the {what} of {same} of {queries} queries are the same for all subsets; such queries count as 0")
    error = float(each.std()) / queries**0.5 if queries > 1 else float("nan")
    return LDS(float(each.mean()), error, each, losses, members)


class Results:
    """The losses found, by subset, in memory and in a file: a line that says of what, and a line for each subset."""

    def __init__(self, path: str | PathLike[str] | None, of: dict[str, Any]):
        self.path = None if path is None else Path(path)
        self.losses: dict[int, list[float]] = {}
        if self.path is None:
            return
        if self.path.is_dir() or not self.path.parent.is_dir():
            what = "is a folder" if self.path.is_dir() else f"is in no folder, as there is no {self.path.parent}"
            raise ValueError(f"path={str(self.path)!r} {what}; expected the name of a file in a folder that is there")
        title = json.dumps({"natgrad lds": of})
        found_there = self.path.read_text(encoding="utf-8", errors="replace") if self.path.exists() else ""
        if title.startswith(found_there):  # a new file, or one that was cut off in its first line
            self._write([title])
            return
        first, *lines = found_there.split("\n")
        theirs = _read(first)
        if not isinstance(theirs, dict) or theirs.get("natgrad lds") != of:
            found = theirs.get("natgrad lds", "other things") if isinstance(theirs, dict) else "other things"
            raise ValueError(f"{self.path} holds results of {found}, and these are of {of}; give another path")
        whole = [first]
        for line in lines:
            if not line or (row := _read(line)) is None:  # one that was cut off is trained again
                continue
            if not _is_result(row, of["queries"]):
                raise ValueError(
                    f"{self.path} has a line that is not a result, {line[:60]!r}; expected those that natgrad.lds "
                    "wrote. Take the line out, or give another path"
                )
            self.losses[row["subset"]] = row["losses"]
            whole.append(line)
        self._write(whole)

    def _write(self, lines: list[str]) -> None:
        assert self.path is not None
        write_whole(self.path, ["".join(f"{line}\n" for line in lines).encode()])

    def add(self, subsets: list[int], losses: Float[Tensor, "subsets queries"]) -> None:
        """Keeps the losses of some subsets, in the file before anything else is done."""
        new = dict(zip(subsets, losses.tolist(), strict=True))
        self.losses |= new
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps({"subset": k, "losses": its}) + "\n" for k, its in new.items())


def correlations(a: Float[Tensor, "q s"], b: Float[Tensor, "q s"]) -> Float[Tensor, " q"]:
    """Spearman's, row by row; zero where a row is constant."""
    a, b = (ranks(t) for t in (a, b))
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    size = a.norm(dim=1) * b.norm(dim=1)
    return torch.where(size > 0, (a * b).sum(1) / size, 0.0)


def ranks(t: Float[Tensor, "q s"]) -> Float[Tensor, "q s"]:
    """Of every entry in its row; equal ones share their mean."""
    ordered = t.sort(1).values.contiguous()
    low, high = (torch.searchsorted(ordered, t.contiguous(), right=side) for side in (False, True))
    return (low + high).to(t.dtype) / 2


def _read(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def _is_result(row: Any, queries: int) -> bool:
    if not isinstance(row, dict) or not isinstance(row.get("subset"), int):
        return False
    losses = row.get("losses")
    return isinstance(losses, list) and len(losses) == queries and all(isinstance(one, float) for one in losses)


def _checked(losses: Any, shape: tuple[int, ...]) -> Tensor:
    if not isinstance(losses, Tensor) or losses.shape != shape:
        raise ValueError(f"retrain returned {described(losses)}; expected the loss of each query: shape {shape}")
    if not torch.isfinite(losses).all():
        raise ValueError(
            f"{int((~torch.isfinite(losses)).sum())} of {losses.numel()} losses that retrain returned are not finite; "
            "look for a training that diverged"
        )
    return losses.detach().double().cpu()


def _tracked(groups: list[list[int]]) -> Iterable[list[int]]:
    from rich.progress import track

    return track(groups, "subsets")
