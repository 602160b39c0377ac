"""`natgrad plan`: the cost of a step on many devices."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from natgrad.checks.errors import UserError
from natgrad.checks.values import did_you_mean
from natgrad.curvature.kfac import KfacStructure
from natgrad.curvature.problem import Problem
from natgrad.distributed.plan import SCHEMES, Machine, Prediction, Settings, best, predict
from natgrad.distributed.sizes import MODELS, Size, sizes_of
from natgrad.report.words import visible
from natgrad.study.target import load_problem

UNITS = {"flops": ("TFLOP/s", 1e12), "bandwidth": ("GB/s", 1e9), "latency": ("µs", 1e-6), "memory": ("GiB", 2.0**30)}
LEAST = 1e-4
"""Seconds: a shorter step is not worth a prediction."""


def run_plan(target: str, ranks: str, machine: Path | None, given: dict[str, float | None], settings: Settings) -> None:
    """Print the predictions for a model on several numbers of ranks, for both schemes.

    `given` are constants of the machine in the units of `UNITS`. None: the value from the file, or else the default.
    """
    counts = counts_of(ranks)
    if settings.batch < 1:
        raise UserError(f"--batch was {settings.batch}; expected the batch size on each rank, at least 1.")
    constants = machine_of(machine, given)
    layers = layers_of(target)
    table = Table(box=None, pad_edge=False)
    headings = ("ranks", "scheme", "ms a step", "of it sending", "GiB a rank", "")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("scheme", "") else "right")
    last = {}
    for n in counts:
        predictions = [predict(layers, n, scheme, constants, settings) for scheme in SCHEMES]
        chosen = best(predictions, constants.memory)
        for p in predictions:
            table.add_row(*_row(p, p is chosen, constants.memory))
        last = {p.scheme: p for p in predictions}
    console = Console()
    millions = sum(layer.parameters for layer in layers) / 1e6
    console.print(
        f"{visible(target)}: {millions:,.1f}M parameters in {len(layers)} layers, {settings.batch} examples a rank",
        markup=False,
    )
    console.print(table)
    console.print(f"On {counts[-1]} ranks, ms a step:")
    for scheme, p in last.items():
        spent = ", ".join(f"{what} {1e3 * s:.3g}" for what, s in p.seconds.items() if s > 0)
        console.print(f"  {scheme}: {spent}", soft_wrap=True)
    console.print(assumed(constants, machine), soft_wrap=True, markup=False)
    if any(p.time < LEAST for p in last.values()):
        console.print("Less than 0.1 ms is less than Python takes to start a step: measure a model of this size.")


def assumed(constants: Machine, file: Path | None) -> str:
    """What the prediction takes a device to be."""
    values = {name: getattr(constants, name) / unit for name, (_, unit) in UNITS.items()}
    said = ", ".join(f"{name} {value:.3g} {UNITS[name][0]}" for name, value in values.items())
    return f"Assumed for a device: {said}" + ("" if file else " (for yours: --machine, from benchmarks/constants.py)")


def _row(p: Prediction, chosen: bool, memory: float) -> tuple[str, ...]:
    remark = "← use this" if chosen else "does not fit" if p.held > memory else ""
    return str(p.ranks), p.scheme, f"{1e3 * p.time:,.3g}", f"{p.sending / p.time:.0%}", f"{p.held / 2**30:,.2f}", remark


def counts_of(ranks: str) -> list[int]:
    """Numbers of ranks, separated by commas."""
    try:
        counts = [int(n) for n in ranks.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise UserError(f"--ranks was {ranks!r}; expected numbers separated by commas, such as 1,8,64.")
    return counts


def machine_of(file: Path | None, given: dict[str, float | None]) -> Machine:
    """The constants of a device, from a file and from options."""
    names = [f.name for f in fields(Machine)]
    constants: dict[str, Any] = {}
    if file is not None:
        try:
            constants = json.loads(file.read_text())
            good = set(constants) <= set(names) and all(v is False or float(v) > 0 for v in constants.values())
        except OSError as error:
            raise UserError(
                f"--machine was {file}, which cannot be read ({error.strerror}); expected a file that "
                "benchmarks/constants.py wrote."
            ) from error
        except (ValueError, TypeError):
            good = False
        if not good:
            raise UserError(
                f"--machine {file} does not have positive numbers for some of {', '.join(names)}; expected "
                "a file that benchmarks/constants.py wrote."
            )
    for name, value in given.items():
        if value is not None:
            if not value > 0:
                raise UserError(f"--{name} was {value:g}; expected a positive number, in {UNITS[name][0]}.")
            constants[name] = value * UNITS[name][1]
    return replace(Machine(), **constants)


def layers_of(target: str) -> list[Size]:
    """The layers of a known model, or of one that a function returns."""
    if target in MODELS:
        return MODELS[target]()
    if ":" not in target:
        raise UserError(
            f"{target!r} is not a model; expected {', '.join(MODELS)}, or MODULE:FUNCTION for a function that returns "
            f"(model, loss, data), as for natgrad inspect{did_you_mean(target, MODELS) or '.'}"
        )
    model, loss, data, forward = load_problem(target)
    structure = KfacStructure()
    try:
        problem = Problem(model, loss, data, estimator="mc", forward=forward)
        cases = next(iter(problem.cases()))
        structure.add(cases)
        return sizes_of(structure.moments, problem.parameters, cases.examples)
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        raise UserError(f"no plan is possible for what {target} returned: {type(error).__name__}: {error}") from error
