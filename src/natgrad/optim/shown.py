"""The text form of an optimizer: one line, or a table for notebooks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from natgrad.report.notebook import table

if TYPE_CHECKING:
    from natgrad.optim.optimizer import CurvatureOptimizer


def line(opt: CurvatureOptimizer) -> str:
    """`KFAC(structure='kfac', lr=adaptive, momentum=adaptive, damping=adaptive, 3 layers, 1,234 parameters)`."""
    numbers = [f"{name}={_setting(opt, name)}" for name in ("lr", "momentum")]
    layers = opt.recipe.preconditioner.layers_known()
    counts = [*([f"{len(layers)} layers"] if layers else []), f"{_size(opt):,} parameters"]
    chosen = [f"{name}={value!r}" for name, value in opt.recipe.preconditioner.chosen().items()]
    return f"{type(opt).__name__}({', '.join([*chosen, *numbers, f'damping={_damping(opt)}', *counts])})"


def html(opt: CurvatureOptimizer) -> str:
    """A table of the settings, the last values of what is adaptive, the layers, and the last step."""
    last = opt.diagnostics
    rows = [(name, str(value)) for name, value in opt.recipe.preconditioner.chosen().items()]
    for name, key in (("step size", "lr"), ("momentum", "momentum")):
        rows.append((name, _with_last(_setting(opt, key), last.get(key))))
    rows.append(("damping", _with_last(_damping(opt), opt.recipe.damping.value)))
    decays = _alike(group["weight_decay"] for group in opt.param_groups)
    if decays != "0":
        decoupled = any(group["decoupled_weight_decay"] for group in opt.param_groups)
        rows.append(("weight decay", f"{decays}{', decoupled' if decoupled else ''}"))
    rows.append(("layers", _few(opt.recipe.preconditioner.layers_known()) or "seen in the first step"))
    rows.append(("last step", _said(last)))
    faults = last.get("faults")
    if faults:
        rows.append(("faults", ", ".join(f"{name} {count}" for name, count in faults.items())))
    groups = f", in {len(opt.param_groups)} groups" if len(opt.param_groups) > 1 else ""
    note = f"{_size(opt):,} parameters{groups}, {opt.journal.steps:,} steps taken"
    return table(type(opt).__name__, note, ("setting", "value"), rows, words=(0, 1), wraps=True)


def _size(opt: CurvatureOptimizer) -> int:
    return sum(p.numel() for group in opt.param_groups for p in group["params"])


def _alike(values: Iterable[Any]) -> str:
    return " / ".join(dict.fromkeys("adaptive" if v is None else f"{v:.4g}" for v in values))


def _setting(opt: CurvatureOptimizer, name: str) -> str:
    return _alike(group[name] for group in opt.param_groups)


def _damping(opt: CurvatureOptimizer) -> str:
    return "adaptive" if opt.recipe.damping.adaptive else f"{opt.recipe.damping.value:.4g}"


def _with_last(setting: str, value: float | None) -> str:
    return f"{setting}, now {value:.3g}" if setting == "adaptive" and value is not None else setting


def _few(layers: list[str], most: int = 8) -> str:
    more = f" and {len(layers) - most:,} more" if len(layers) > most else ""
    return f"{len(layers)}: {', '.join(layers[:most])}{more}" if layers else ""


def _said(last: dict[str, Any]) -> str:
    if not last:
        return "none yet"
    if not last["accepted"]:
        return f"rejected: {last['reason']}"
    return f"accepted, from a loss of {last['loss']:.4g}" if "loss" in last else "accepted"
