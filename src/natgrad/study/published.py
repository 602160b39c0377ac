"""Curves of a public benchmark's optimizers, shown next to a study's own."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

TARGETS = (1e-4, 1e-5, 1e-6)


@dataclass(frozen=True)
class Curve:
    """An optimizer's run: its lowest error, and pairs of seconds and error."""

    optimizer: str
    best: float
    points: Sequence[tuple[float, float]]

    def first(self, target: float) -> float | None:
        """The seconds until the error is first at most `target`; None if it never is."""
        return next((seconds for seconds, error in self.points if error <= target), None)


@functools.cache
def _data() -> dict[str, Any]:
    text = resources.files("natgrad.study").joinpath("published_pinns.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


def source() -> str:
    """The source of the curves."""
    return str(_data()["source"])


def published(task: str) -> list[Curve]:
    """The published runs on a task; empty if there are none."""
    its = _data()["problems"].get(task, {"curves": {}})["curves"]
    return [Curve(name, run["best"], [(s, e) for s, e in run["points"]]) for name, run in its.items()]


def own(optimizer: str, result: dict[str, Any]) -> Curve:
    """A run of a study, as a curve."""
    points = [(p["seconds"], p["error"]) for p in result["curve"] if p["error"] is not None]
    return Curve(optimizer, min((error for _, error in points), default=float("inf")), points)


def fastest(curves: Sequence[Curve], target: float) -> tuple[float, str] | None:
    """The shortest time to reach an error, and its optimizer."""
    reached = [(seconds, c.optimizer) for c in curves if (seconds := c.first(target)) is not None]
    return min(reached, default=None)
