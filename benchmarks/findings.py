"""What docs/findings.md is made of: a study's results as they are committed, its pictures, and the page's tables.

natgrad study centering --processes 2 && python -m benchmarks.findings natgrad-study/centering
natgrad study residual --processes 2 && python -m benchmarks.findings natgrad-study/residual
python -m benchmarks.findings                          # only the tables, of what is in docs/studies
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
DIGITS = 5
PICTURES = {
    "centering": ["pairs", "curves-curves", "curves-mnist"],
    "residual": ["residuals-perceptron", "residuals-curves", "conditions-curves"],
}
"""Those that the page shows."""


def rounded(value: Any) -> Any:
    """Floats of few digits, all the way down."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def commit(folder: Path) -> None:
    """Writes docs/studies/NAME.json, and the pictures to docs/images."""
    results = rounded(json.loads((folder / "results.json").read_text()))
    (DOCS / "studies").mkdir(exist_ok=True)
    name = results["study"]
    (DOCS / "studies" / f"{name}.json").write_text(json.dumps(results, separators=(",", ":")) + "\n")
    for picture in PICTURES[name]:
        shutil.copy(folder / f"{picture}.png", DOCS / "images" / f"study-{name}-{picture}.png")


def number(value: float) -> str:
    if value < 100:
        return f"{value:.2g}"
    return f"{value:.0f}" if value < 1e4 else f"{value:.0e}".replace("e+0", "e").replace("e+", "e")


def pair_rows(results: dict[str, Any]) -> Iterator[str]:
    """For each task and optimizer the ratio to the baseline, its interval, and on how many seeds it is better."""
    for name, task in results["tasks"].items():
        for p in task["pairs"]:
            r = p["ratio"]
            yield (
                f"| {name} | {p['optimizer']} | {number(r['mean'])} | {number(r['low'])} to {number(r['high'])} | "
                f"{p['better']} of {p['pairs']} |"
            )


def final_rows(results: dict[str, Any]) -> Iterator[str]:
    """For each task and optimizer the median of the last figures, the lowest and the highest."""
    for name, task in results["tasks"].items():
        for optimizer in dict.fromkeys(r["optimizer"] for r in task["runs"]):
            values = sorted(
                r["curve"][-1][task["figure"]]
                for r in task["runs"]
                if r["optimizer"] == optimizer and r["status"] == "finished"
            )
            ends = f"{values[0]:.3g} to {values[-1]:.3g}"
            yield f"| {name} | {optimizer} | {statistics.median(values):.3g} | {ends} |"


def layer_rows(results: dict[str, Any], kinds: tuple[str, ...]) -> Iterator[str]:
    """For each task and layer the medians over the baseline's seeds at the first and at the last measurement; of some
    condition numbers only a bound from below is known."""
    for name, task in results["tasks"].items():
        runs = [r["measured"] for r in task["runs"] if r["optimizer"] == results["baseline"] and r["measured"]]
        for layer in runs[0][0]["layers"]:
            cells = []
            for kind in kinds:
                ends = [[run[at]["layers"][layer] for run in runs] for at in (0, -1)]
                words = []
                for layers in ends:
                    known = [m[kind] for m in layers if m[kind] is not None]
                    bound = "≥ " if kind in ("A", "C") and any(m["floored"] for m in layers) else ""
                    words.append(bound + number(statistics.median(known)) if known else "–")
                cells.append(" → ".join(words) if words != ["–", "–"] else "–")
            yield f"| {name} | {layer} | {' | '.join(cells)} |"


def gain_rows(results: dict[str, Any]) -> Iterator[str]:
    """For each task and optimizer the geometric mean of cond A over cond C, over layers whose numbers are no bounds."""
    for name, task in results["tasks"].items():
        for optimizer in dict.fromkeys(r["optimizer"] for r in task["runs"]):
            runs = [r["measured"] for r in task["runs"] if r["optimizer"] == optimizer and r["measured"]]
            cells = []
            for at in (0, -1):
                layers = [m for run in runs for m in run[at]["layers"].values()]
                logs = [math.log(m["A"] / m["C"]) for m in layers if m["A"] and m["C"] and not m["floored"]]
                cells.append(f"{math.exp(statistics.fmean(logs)):.3g}" if logs else "–")
            yield f"| {name} | {optimizer} | {cells[0]} | {cells[1]} |"


def test_rows(results: dict[str, Any]) -> Iterator[str]:
    """For each task and optimizer how many of the tests of independence reject it at 5%."""
    for name, task in results["tasks"].items():
        for optimizer in dict.fromkeys(r["optimizer"] for r in task["runs"]):
            measured = [m for r in task["runs"] if r["optimizer"] == optimizer for m in r["measured"]]
            p = [layer["p_value"] for m in measured for layer in m["layers"].values() if layer["p_value"] is not None]
            yield f"| {name} | {optimizer} | {sum(v <= 0.05 for v in p)} of {len(p)} |"


MEASURES = ("relative", "unbiased", "cka", "output_spread", "input_spread", "A", "C")


def tables(name: str) -> list[str]:
    """The rows of the tables of docs/findings.md that are of this study."""
    results = json.loads((DOCS / "studies" / f"{name}.json").read_text())
    rows = [*final_rows(results), *pair_rows(results)]
    if any(r["measured"] for t in results["tasks"].values() for r in t["runs"]):
        rows = [*final_rows(results), *layer_rows(results, MEASURES), *test_rows(results), *gain_rows(results)]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="what a study wrote")
    options = parser.parse_args()
    if options.folder:
        commit(options.folder)
    for path in sorted((DOCS / "studies").glob("*.json")):
        print(f"\n{path.stem}")
        print("\n".join(tables(path.stem)))


if __name__ == "__main__":
    main()
