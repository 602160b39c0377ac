"""Tables and plots of what was run."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Run = dict[str, Any]
PEERS = ("Adam", "Muon", "SOAP", "Shampoo", "kfac-jax")


def load(folder: Path) -> list[Run]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def final(run: Run) -> float:
    value = run["curve"][-1][run["figure"]]
    return value if value == value else float("inf")


def best_setting(runs: Iterable[Run], task: str, contestant: str) -> dict[str, Any] | None:
    """The setting with the lowest final figure on the first seed that was run."""
    own = [r for r in runs if (r["task"], r["contestant"]) == (task, contestant)]
    first = min((r["seed"] for r in own), default=0)
    return min((r for r in own if r["seed"] == first), key=final, default={"setting": None})["setting"]


def time_to(run: Run, figure: float) -> float | None:
    """The seconds until the figure is reached for good: the first point from which on the curve stays below."""
    curve = run["curve"]
    reached = None
    for point in reversed(curve):
        if not point[run["figure"]] <= figure:
            break
        reached = point["seconds"]
    return reached


def table(runs: Sequence[Run], task: str) -> str:
    """Markdown: each contestant at its best setting, over the seeds."""
    own = [r for r in runs if r["task"] == task]
    names = list(dict.fromkeys(r["contestant"] for r in own))
    chosen = {n: [r for r in own if r["contestant"] == n and r["setting"] == best_setting(own, task, n)] for n in names}
    seeds = sorted({r["seed"] for r in own})
    peers = {n: rs for n, rs in chosen.items() if n in PEERS}
    best = min(peers, key=lambda n: statistics.median(map(final, peers[n])), default=None)
    head = [
        f"{task}: {own[0]['figure']} after {own[0]['seconds']:g} s",
        "ms/step",
        *(f"seed {s}" for s in seeds),
        "median",
    ]
    if best:
        head.append(f"seconds to {best}'s last")
    rows = []
    for name, its in sorted(chosen.items(), key=lambda item: statistics.median(map(final, item[1]))):
        by_seed = {r["seed"]: r for r in its}
        last = [r["curve"][-1] for r in its]
        label = " ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in its[0]["setting"].items())
        row = [f"{name} ({label})" if label else name]
        row.append(f"{statistics.median(1e3 * p['seconds'] / max(1, p['step']) for p in last):.1f}")
        row += [f"{final(by_seed[s]):.4g}" if s in by_seed else "" for s in seeds]
        row.append(f"{statistics.median(map(final, its)):.4g}")
        if best:
            targets = {r["seed"]: final(r) for r in peers[best]}
            times = [time_to(by_seed[s], targets[s]) for s in by_seed if s in targets]
            row.append(", ".join("–" if t is None else f"{t:.0f}" for t in times))
        rows.append(row)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plot(runs: Sequence[Run], task: str, path: Path) -> None:
    """The figure over time, each contestant at its best setting: a line a seed."""
    import matplotlib.pyplot as plt

    own = [r for r in runs if r["task"] == task]
    figure, axes = plt.subplots(figsize=(7, 4.2), constrained_layout=True)
    for i, name in enumerate(dict.fromkeys(r["contestant"] for r in own)):
        best = best_setting(own, task, name)
        for j, r in enumerate(r for r in own if r["contestant"] == name and r["setting"] == best):
            seconds = [p["seconds"] for p in r["curve"]]
            values = [p[r["figure"]] for p in r["curve"]]
            axes.plot(seconds, values, color=f"C{i}", label=name if j == 0 else None, alpha=0.8, lw=1.3)
    values = sorted(p[r["figure"]] for r in own for p in r["curve"][len(r["curve"]) // 8 :])
    axes.set_yscale("log")
    axes.set_ylim(0.9 * values[0], values[int(0.97 * len(values))])
    axes.set_xlabel("seconds of training")
    axes.set_ylabel(own[0]["figure"])
    axes.set_title(task)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write_report(folder: Path) -> None:
    """Prints every task's table, and writes `tables.md` and a plot of each task beside the runs."""
    runs = load(folder)
    tables = []
    for task in dict.fromkeys(r["task"] for r in runs):
        tables.append(table(runs, task))
        plot(runs, task, folder / f"{task}.png")
        print(tables[-1], end="\n\n")
    machine = {f"{r['machine']}, torch {r['torch']}" for r in runs}
    (folder / "tables.md").write_text("\n\n".join(tables) + f"\n\nMeasured on {'; '.join(sorted(machine))}.\n")
