"""`natgrad inspect`: the residual report of a user's own model."""

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from natgrad import residual
from natgrad.cli.errors import UserError
from natgrad.cli.report import check_seed, check_writable, write_json, write_page
from natgrad.losses.base import ESTIMATORS
from natgrad.options import did_you_mean
from natgrad.residual_figures import PANELS, draw
from natgrad.residual_report import COLUMNS, ResidualReport

EXPECTED = "expected (model, loss, data), as for natgrad.residual(model, loss, data)"


def run_inspect(target: str, estimator: str, seed: int, permutations: int, out: Path) -> None:
    """Measure what K-FAC leaves out on the model, loss and data of `MODULE:FUNCTION`, and write the report to `out`.

    Under torchrun the function is called on every rank, and gives its part of the data; rank 0 writes.
    """
    if estimator not in ESTIMATORS:
        raise UserError(
            f"--estimator was {estimator!r}; expected one of {', '.join(ESTIMATORS)}, or leave it out for exact"
            f"{did_you_mean(estimator, ESTIMATORS) or '.'}"
        )
    if permutations < 0:
        raise UserError(f"--permutations was {permutations}; expected 0 or more; leave it out for 200.")
    check_seed(seed)
    torch.manual_seed(seed)
    model, loss, data = load_problem(target)
    with _ranks(model) as (model, rank):
        if rank == 0:
            check_writable(out)
        report = _residual(target, model, loss, data, estimator, seed, permutations)
    if rank > 0:
        return
    console = Console()
    console.print(report.table(), markup=False, highlight=False, soft_wrap=True)
    settings = {"target": target, "estimator": estimator, "seed": seed, "permutations": permutations}
    page = write_all(report, settings, out)
    console.print(f"Report: {page}", soft_wrap=True, markup=False, highlight=False)


@contextlib.contextmanager
def _ranks(model: nn.Module) -> Iterator[tuple[nn.Module, int]]:
    """The model on the ranks that torchrun has started, and which of them this is; by itself, the model as it is."""
    if "WORLD_SIZE" not in os.environ or isinstance(model, DistributedDataParallel):
        yield model, dist.get_rank() if dist.is_initialized() else 0
        return
    on_gpu = any(p.is_cuda for p in model.parameters())
    began = not dist.is_initialized()
    if began:
        dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield DistributedDataParallel(model), dist.get_rank()
    finally:
        if began:
            dist.destroy_process_group()


def load_problem(target: str) -> tuple[nn.Module, nn.Module, Any]:
    """Import the module, from the current directory or from where Python finds it, and call the function.

    Raises:
        UserError: if there is no such module or function, or it raises, or what it returns is something else.
    """
    module_name, _, function_name = target.partition(":")
    if not (module_name and function_name) or ":" in function_name:
        raise UserError(
            f"{target!r} came; expected MODULE:FUNCTION, say training:problem for the function problem() in "
            "training.py; give such a name."
        )
    function = getattr(_load_module(module_name), function_name, None)
    if not callable(function):
        what = "is not a function" if function is not None else "does not exist"
        raise UserError(
            f"{function_name!r} {what} in module {module_name!r}; expected a function without arguments that returns "
            "(model, loss, data); define it there, or give another name."
        )
    try:
        problem = function()
    except Exception as error:
        raise UserError(
            f"{target} raised {_words(error)}; expected it to return (model, loss, data) when called without "
            "arguments; mend the function."
        ) from error
    return _checked(target, problem)


def write_all(report: ResidualReport, settings: dict[str, Any], out: Path) -> Path:
    """Write results.json, the pictures and report.html to `out`; return the report's path."""
    write_json({**settings, "layers": report.to_dict()}, out / "results.json")
    pictures = {name: out / f"{name}.png" for name in PANELS}
    for name, picture in pictures.items():
        draw(report, [PANELS[name]], picture)
    page = out / "report.html"
    write_page(
        "inspect.html.jinja",
        pictures,
        page,
        **settings,
        headings=COLUMNS,
        rows=report.rows(),
        cases=sorted({layer.cases for layer in report.values()}),
        unbounded=any(layer.bound is None for layer in report.values()),
    )
    return page


def _load_module(name: str) -> Any:
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise UserError(
                f"module {name!r} imports {error.name!r}, which is not installed; expected a module that can be "
                "imported; install what it needs."
            ) from error
        raise UserError(
            f"there is no module {name!r} in {here} or on sys.path; expected one, without the ending .py; change to "
            "its folder, or set PYTHONPATH."
        ) from error
    except Exception as error:
        raise UserError(
            f"importing module {name!r} raised {_words(error)}; expected a module that can be imported; mend it."
        ) from error


def _checked(target: str, problem: Any) -> tuple[nn.Module, nn.Module, Any]:
    if not isinstance(problem, (tuple, list)) or len(problem) != 3:
        came = f"a {type(problem).__name__}"
        if isinstance(problem, (tuple, list)):
            came += f" of {len(problem)}"
        raise UserError(f"{target} returned {came}; {EXPECTED}; return these three.")
    model, loss, data = problem
    for name, value in (("model", model), ("loss", loss)):
        if not isinstance(value, nn.Module):
            raise UserError(
                f"{target} returned a {type(value).__name__} as its {name}; {EXPECTED}; return a torch.nn.Module "
                "in its place."
            )
    return model, loss, data


def _residual(
    target: str, model: nn.Module, loss: nn.Module, data: Any, estimator: str, seed: int, permutations: int
) -> ResidualReport:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    generator = torch.Generator(device).manual_seed(seed)
    try:
        return residual(
            model, loss, data, estimator=estimator, generator=generator, permutations=permutations, progress=True
        )
    except (ValueError, TypeError, RuntimeError) as error:  # RuntimeError: the model's own, on data of another shape
        raise UserError(f"what {target} returned cannot be inspected: {_words(error)}") from error


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
