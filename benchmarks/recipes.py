"""The gallery's eight objectives at equal processor time, with other seeds than the gallery's.

Each script runs as it is, but `torch.manual_seed(s)` seeds by another number. For each seed it prints the script's own
line, and the loss of natgrad's optimizer at its first step and at the end.

    python -m benchmarks.recipes 1 2
"""

from __future__ import annotations

import contextlib
import io
import runpy
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch

from benchmarks.machine import machine

FOLDER = Path(__file__).parents[1] / "examples" / "gallery"
RECIPES = ("vae", "detection", "distillation", "actor_critic", "burgers", "diffusion", "contrastive", "critic")


def run(name: str, seed: int) -> str:
    """What the script prints, and the curve of natgrad's run."""
    usual = torch.manual_seed
    said = io.StringIO()
    with tempfile.TemporaryDirectory() as pictures, contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch, "manual_seed", lambda s: usual(s + 1000 * seed)))
        stack.enter_context(mock.patch.object(sys, "argv", [name, pictures]))
        stack.enter_context(mock.patch.object(sys, "path", [str(FOLDER), *sys.path]))
        stack.enter_context(contextlib.redirect_stdout(said))
        found = runpy.run_path(str(FOLDER / f"{name}.py"))
    ours = found.get("ours") or found["kfac"]
    return f"{said.getvalue().strip()} [first step {ours.curve[0][1]:.4g}, at the end {ours.last():.4g}]"


def main() -> None:
    torch.set_num_threads(1)
    print(machine(), flush=True)
    for seed in map(int, sys.argv[1:] or ("1", "2")):
        for name in RECIPES:
            print(f"seed {seed}, {name}: {run(name, seed)}", flush=True)


if __name__ == "__main__":
    main()
