"""A task of the user's own: `MODULE:FUNCTION`, which returns (model, loss, data) or (model, loss, data, evaluate)."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.checks.errors import UserError
from natgrad.study.split import NOTHING_LEFT
from natgrad.study.target import call, checked, parsed, words
from natgrad.study.task import Batch, Task
from natgrad.study.tasks import SUBSET, indices

FORM = "expected (model, loss, data) or (model, loss, data, evaluate)"
SIZE = 250
"""The default batch size."""


def own_task(name: str, target: str, seed: int) -> Task:
    """Calls the function after `torch.manual_seed(seed)`: the model is the one of that seed.

    `data` is one `(input, target)` pair, from which batches are drawn, or an iterable of batches, which is repeated.
    `evaluate` takes the model and returns a number, or numbers by name. Without it, the figure is the loss on the first
    2,000 examples.

    Raises:
        UserError: if there is no such function, or it raises, or it returns something else.
    """
    torch.manual_seed(seed)
    problem = call(target)
    evaluate: Any = None
    if isinstance(problem, (tuple, list)) and len(problem) == 4:
        *problem, evaluate = problem
        if not callable(evaluate):
            raise UserError(
                f"{target} returned a {type(evaluate).__name__} as its fourth value; expected evaluate(model), which "
                "returns a number, or numbers by name; return a function there, or leave it out."
            )
    model, loss, data = checked(target, problem, FORM)
    with _blamed(target, "reading its data"):
        sample = _sample_of(target, data)
    share = (lambda x: len(x)) if getattr(loss, "reduction", "mean") == "sum" else (lambda x: 1)

    @torch.no_grad()
    def mean_loss(model: nn.Module) -> float:
        x, y = sample(SUBSET)
        return loss(model(x), y).item() / share(x)

    figures_of = _named(target, evaluate) if evaluate is not None else lambda m: {"loss": mean_loss(m)}
    model.eval()
    with _blamed(target, "evaluating its model"):
        first = figures_of(model)
    model.train()
    if not first or {"step", "seconds"} & first.keys():
        came = "no figure" if not first else "a figure called step or seconds, which every run already has"
        raise UserError(f"evaluate of {target} returned {came}; expected a number, or numbers by name; correct it.")
    return Task(name, next(iter(first)), SIZE, loss, lambda _: model, _batches_of(data), figures_of, sample)


@contextlib.contextmanager
def _blamed(target: str, what: str) -> Iterator[None]:
    """Within the context, an exception from the user's code becomes a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{what}, the result of {target} raised {words(error)}; {FORM} that fit together; correct the function."
        ) from error


def digest(target: str) -> str:
    """A digest of the file with the function, to notice changes; empty if there is no file."""
    try:
        spec = importlib.util.find_spec(parsed(target).module)
        if spec is None or spec.origin is None:
            return ""
        return hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()[:16]
    except (UserError, ImportError, ValueError, OSError):
        return ""


def _named(target: str, evaluate: Callable[[nn.Module], Any]) -> Callable[[nn.Module], dict[str, float]]:
    """The result of `evaluate`, as numbers by name."""

    @torch.no_grad()
    def figures(model: nn.Module) -> dict[str, float]:
        came = evaluate(model)
        try:
            found = came if isinstance(came, Mapping) else {"figure": came}
            return {str(k): float(v) for k, v in found.items()}
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"evaluate of {target} returned a {type(came).__name__}; expected a number, or numbers by name, of "
                "which the first is the figure and lower is better."
            ) from error

    return figures


def _is_pair(data: Any) -> bool:
    return isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(t, Tensor) for t in data)


def _batches_of(data: Any) -> Callable[[int, int], Iterator[Batch]]:
    if _is_pair(data):
        x, y = data
        return lambda seed, size: ((x[i], y[i]) for i in indices(len(x), size, seed))

    def batches(seed: int, size: int) -> Iterator[Batch]:
        own = torch.Generator().manual_seed(seed).get_state()
        while True:
            source, count = iter(data), 0
            while True:
                # The data's random order should not depend on what an optimizer draws.
                others = torch.get_rng_state()
                torch.set_rng_state(own)
                try:
                    batch = next(source)
                except StopIteration:
                    break
                finally:
                    own = torch.get_rng_state()
                    torch.set_rng_state(others)
                count += 1
                yield batch
            if not count:
                raise UserError(NOTHING_LEFT)

    return batches


def _sample_of(target: str, data: Any) -> Callable[[int], Batch]:
    """The first examples."""
    if not _is_pair(data):
        data = _first_of(target, data)
    x, y = data
    return lambda count: (x[:count], y[:count])


def _first_of(target: str, data: Any) -> Batch:
    """The first batches, concatenated, up to `SUBSET` examples."""
    expected = "expected one (input, target) pair of tensors, or batches that are such pairs"
    if not isinstance(data, Iterable) or isinstance(data, Iterator):
        what = f"a {type(data).__name__}" + (", which can be read only once," if isinstance(data, Iterator) else "")
        raise UserError(f"{target} returned {what} as its data; {expected}; return a list or a DataLoader.")
    xs: list[Tensor] = []
    ys: list[Tensor] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for batch in data:
            if not _is_pair(batch):
                of = f" of {len(batch)}" if isinstance(batch, Sized) else ""
                raise UserError(
                    f"{target} returned data with a batch of type {type(batch).__name__}{of}; {expected}; correct the "
                    "data."
                )
            xs.append(batch[0])
            ys.append(batch[1])
            if sum(map(len, xs)) >= SUBSET:
                break
    if not xs:
        raise UserError(f"{target} returned data without a batch; {expected}; return at least one batch.")
    return torch.cat(xs), torch.cat(ys)
