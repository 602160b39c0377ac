"""A residual report in words: what is good, what is bad, and what to do about it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from natgrad.report.residual import LayerResidual

CLOSE, FAR = 0.1, 0.5
"""Of `‖R‖/‖G‖`: up to the first K-FAC is called close to the exact block, above the second far from it."""
MOSTLY_NOISE = 0.5
"""The residual is mostly noise where less than this share of it would be left on unlimited data."""
FLOAT32 = 1e7
"""Condition numbers above this are more than float32 resolves, whose rounding is 6e-8."""
CENTERING_HELPS = 3.0
"""By how much centering lowers a condition number where it is worth a remark."""
MOST_NAMES = 6


class Advice(NamedTuple):
    """One remark: its `kind` is good, fair, bad or do."""

    kind: str
    text: str

    def __str__(self) -> str:
        return f"{LABELS[self.kind]}: {self.text}"


LABELS = {"good": "Good", "fair": "Fair", "bad": "Bad", "do": "What to do"}


def advice(report: Mapping[str, LayerResidual]) -> list[Advice]:
    """Remarks on the residuals, then on the condition numbers, then what to do."""
    close = [n for n, r in report.items() if r.relative <= CLOSE]
    fair = [n for n, r in report.items() if CLOSE < r.relative <= FAR]
    far = [n for n, r in report.items() if r.relative > FAR]
    flat = [n for n, r in report.items() if math.isnan(r.relative)]
    noisy = [n for n in fair + far if _left(report[n]) < MOSTLY_NOISE]
    singular = [n for n, r in report.items() if _worst(r) == math.inf]
    stretched = [n for n, r in report.items() if FLOAT32 < _worst(r) < math.inf]
    gains = {n: gain for n, r in report.items() if (gain := _gain(r)) >= CENTERING_HELPS}

    found: list[Advice] = []

    def say(kind: str, layers: Sequence[str], text: str) -> None:
        if layers:
            found.append(Advice(kind, f"{_layers(layers, len(report))}, {text}"))

    say("good", close, f"K-FAC is close to the exact block: ‖R‖/‖G‖ is at most {CLOSE:g}.")
    say("good", list(gains), f"centering lowers the condition number, {_times(gains)}.")
    say("fair", fair, f"K-FAC keeps most of the exact block: ‖R‖/‖G‖ is between {CLOSE:g} and {FAR:g}.")
    say("bad", far, f"K-FAC misses much of the exact block: ‖R‖/‖G‖ is above {FAR:g}{_above_one(report)}.")
    say("bad", flat, "the curvature is zero on these data, so that there is nothing to compare.")
    say(
        "bad",
        singular,
        "an input factor is singular: some inputs never vary, or depend linearly on others, or there are fewer cases "
        "than inputs.",
    )
    say("bad", stretched, f"a condition number is above {FLOAT32:g}, which is more than float32 resolves.")

    say(
        "do",
        noisy,
        "most of the residual comes from the small number of cases, not from K-FAC. Give more data before you judge.",
    )
    trusted = [n for n in far if n not in noisy]
    say(
        "do",
        trusted,
        'the matrix itself (for a posterior, influence, pruning) is better held with structure="ekfac", which is never '
        'farther from the exact block, or with structure="block", which is exact. To train with KFAC you may ignore '
        "this: judge by the loss.",
    )
    say("do", singular, "pass damping above 0 to solve, inverse, logdet and sample.")
    say(
        "do",
        stretched,
        "keep the damping above 1e-7 times the largest eigenvalue, or compute with dtype=torch.float64.",
    )
    say("do", list(gains), "keep centered=True, the default of natgrad.KFAC.")
    if not any(a.kind == "do" for a in found):
        found.append(Advice("do", "nothing. K-FAC represents these layers well."))
    return found


def _left(r: LayerResidual) -> float:
    """The share of the residual that would be left on unlimited data; 1 where that is not known."""
    if math.isnan(r.hsic_unbiased) or not r.norm:
        return 1.0
    return math.sqrt(max(r.hsic_unbiased, 0.0)) / r.norm


def _worst(r: LayerResidual) -> float:
    """The condition number of the factor that is inverted; 0 for a layer without one."""
    C = r.condition.C if r.condition.C is not None else r.condition.A
    return C if C is not None else 0.0


def _gain(r: LayerResidual) -> float:
    """By how much centering lowers the condition number; 1 where that is not known."""
    A, C = r.condition
    return A / C if A is not None and C is not None and math.isfinite(A) and math.isfinite(C) else 1.0


def _above_one(report: Mapping[str, LayerResidual]) -> str:
    """What a residual above 1 means, if there is one."""
    some = any(r.relative > 1 for r in report.values())
    return " (above 1 the zero matrix is nearer to the block than A ⊗ B)" if some else ""


def _times(gains: Mapping[str, float]) -> str:
    """From the least to the most."""
    low, high = min(gains.values(), default=1.0), max(gains.values(), default=1.0)
    if len(gains) < 2:
        return f"{low:.3g} times"
    return f"{low:.3g} to {high:.3g} times (median {statistics.median(gains.values()):.3g})"


def _layers(names: Sequence[str], of: int) -> str:
    """The layers' names, or the first of them and how many there are."""
    if len(names) == of and of > 1:
        return f"at all {of} layers"
    shown = ", ".join(names[:MOST_NAMES])
    if len(names) > MOST_NAMES:
        return f"at {len(names)} of {of} layers ({shown}, ...)"
    return f"at layer {shown}" if len(names) == 1 else f"at layers {shown}"
