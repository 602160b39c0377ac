"""The table of docs/pinns.md: what runs of `natgrad study pinns` have come to, beside the published best.

natgrad study pinns && python -m benchmarks.pinns natgrad-study/pinns --save docs/curves/pinns.json
python -m benchmarks.pinns docs/curves/pinns.json

Folders of several studies, or files that `--save` has written, are put together. Seconds are those of the study's
clock, which is printed. Kept runs are enough: the study need not have come to its end.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from natgrad.study.pinns import SETTINGS
from natgrad.study.published import TARGETS, Curve, fastest, own, published

HEADINGS = ("problem", "seeds", "seconds", "ms a step", "to 1e-4", "to 1e-5", "to 1e-6", "error by then", "error ever")
Run = dict[str, Any]


KEPT = ("task", "optimizer", "setting", "seed", "status", "what")
MACHINE = ("cpu", "threads", "torch", "natgrad")


def runs_of(sources: Sequence[Path], optimizer: str) -> dict[str, list[Run]]:
    """The finished runs of an optimizer on each problem, by seed. Sources are folders of studies, or saved files."""
    every: list[Run] = []
    for source in sources:
        if source.is_dir():
            every += [json.loads(path.read_text(encoding="utf-8")) for path in (source / "runs").glob("*.json")]
        else:
            every += json.loads(source.read_text(encoding="utf-8"))
    found: dict[str, list[Run]] = {}
    for run in sorted(every, key=lambda r: (r["task"], r["seed"])):
        if run["task"] in SETTINGS and run["optimizer"] == optimizer and run["status"] == "finished":
            found.setdefault(run["task"], []).append(run)
    return found


def save(runs: Sequence[Run], path: Path) -> None:
    """One line for each run; numbers of the curves have five digits."""
    lines = ",\n".join(json.dumps({key: run[key] for key in KEPT} | _short(run)) for run in runs)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def _short(run: Run) -> Run:
    curve = [{key: value and float(f"{value:.5g}") for key, value in point.items()} for point in run["curve"]]
    return {"curve": curve, "machine": {key: run["machine"].get(key) for key in MACHINE}}


def spread(values: Sequence[float], digits: int) -> str:
    """The median, and the range in brackets if the values differ."""
    low, middle, high = (_number(v, digits) for v in (min(values), statistics.median(values), max(values)))
    return middle if low == high else f"{middle} ({low} to {high})"


def _number(value: float, digits: int) -> str:
    return "–" if value == float("inf") else f"{value:.{digits}g}".replace("e-0", "e-").replace("e+0", "e")


def beside(mine: Sequence[float], theirs: float, digits: int, whose: str = "") -> str:
    """Ours over the seeds / the published one; bold where every seed is ahead."""
    words = spread(mine, digits)
    if max(mine) < theirs:
        words = f"**{words}**"
    return f"{words} / {_number(theirs, digits)}{whose}"


def to_target(curves: Sequence[Curve], theirs: Sequence[Curve], target: float) -> tuple[list[float], float]:
    """Our times to an error, and the shortest published one; infinite where it is not reached."""
    best = fastest(theirs, target)
    return [t if (t := c.first(target)) is not None else float("inf") for c in curves], best[0] if best else float(
        "inf"
    )


def median_seconds(runs: Sequence[Run]) -> float:
    return statistics.median(r["curve"][-1]["seconds"] for r in runs)


def lowest_by(theirs: Sequence[Curve], seconds: float) -> tuple[float, str]:
    """The lowest published error within so many seconds, and whose it is."""
    return min(((e, c.optimizer) for c in theirs for s, e in c.points if s <= seconds), default=(1.0, "none"))


def row(name: str, runs: Sequence[Run]) -> str:
    """One line of the table: ours / theirs, with the lowest errors within our seconds, and within all of theirs."""
    theirs = published(name)
    lowest = min(theirs, key=lambda c: c.best)
    curves = [own(r["optimizer"], r) for r in runs]
    last = [r["curve"][-1] for r in runs]
    cells = [beside(*to_target(curves, theirs, target), 3) for target in TARGETS]
    seconds = median_seconds(runs)
    pace = statistics.median(1000 * p["seconds"] / max(1, p["step"]) for p in last)
    by_then, whose = lowest_by(theirs, seconds)
    bests = [c.best for c in curves]
    cells += [beside(bests, by_then, 2, f" ({whose})"), beside(bests, lowest.best, 2, f" ({lowest.optimizer})")]
    return f"| `{name}` | {len(runs)} | {seconds:.0f} | {pace:.0f} | {' | '.join(cells)} |"


def is_ahead(name: str, runs: Sequence[Run]) -> bool:
    """Whether every seed is ahead of every published run, in the lowest error and in the time to every target that one
    of these reached."""
    theirs, curves = published(name), [own(r["optimizer"], r) for r in runs]
    pairs = [([c.best for c in curves], min(c.best for c in theirs))]
    pairs += [to_target(curves, theirs, target) for target in TARGETS if fastest(theirs, target)]
    return all(max(ours) < other for ours, other in pairs)


def is_ahead_by_then(name: str, runs: Sequence[Run]) -> bool:
    """Whether the median of the lowest errors is below all that the published runs had after the same seconds."""
    by_then, _ = lowest_by(published(name), median_seconds(runs))
    return statistics.median(own(r["optimizer"], r).best for r in runs) < by_then


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path, nargs="+")
    parser.add_argument("--optimizer", default="NaturalGradient")
    parser.add_argument("--save", type=Path, help="write the runs into this file")
    options = parser.parse_args()
    found = runs_of(options.sources, options.optimizer)
    every = [run for runs in found.values() for run in runs]
    if options.save:
        save(every, options.save)
    clocks = sorted({run["what"].get("clock", "wall") for run in every})
    machines = sorted({f"{r['machine'].get('cpu')}, {r['machine'].get('threads')} threads" for r in every})
    print(f"clock: {', '.join(clocks)}; {'; '.join(machines)}\n")
    print(f"| {' | '.join(HEADINGS)} |\n|{' --- |' * len(HEADINGS)}")
    for name in SETTINGS:
        if name in found:
            print(row(name, found[name]))
    for words, test in (
        ("in the lowest error and to every target, every seed", is_ahead),
        ("at equal seconds, median", is_ahead_by_then),
    ):
        names = [name for name in SETTINGS if name in found and test(name, found[name])]
        print(f"\nahead {words}: {len(names)} of {len(found)}: {', '.join(names)}")
    print(f"\nnot run: {', '.join(n for n in SETTINGS if n not in found)}")


if __name__ == "__main__":
    main()
