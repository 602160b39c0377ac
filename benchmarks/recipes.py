"""The gallery's eight objectives at equal processor time, with other seeds than the gallery's.

Each script runs as it is, but `torch.manual_seed(s)` seeds by another number. For each seed it prints the script's own
line, and the loss of natgrad's optimizer at its first step and at the end.

    python -m benchmarks.recipes 1 2
"""

from __future__ import annotations

import contextlib
import io
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch

from benchmarks.machine import machine

FOLDER = Path(__file__).parents[1] / "examples" / "gallery"
RECIPES = ("vae", "detection", "distillation", "actor_critic", "burgers", "diffusion", "contrastive", "critic")


def run(name: str, seed: int) -> str:
    """What the script prints, and the losses of natgrad's run; in this process."""
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
    if sys.argv[1:2] == ["--one"]:
        torch.set_num_threads(1)
        print(run(sys.argv[2], int(sys.argv[3])))
        return
    print(machine(), flush=True)
    for seed in sys.argv[1:] or ("1", "2"):
        for name in RECIPES:
            call = [sys.executable, "-m", "benchmarks.recipes", "--one", name, seed]  # scripts set torch's dtype
            done = subprocess.run(call, capture_output=True, text=True, check=True)
            print(f"seed {seed}, {name}: {done.stdout.strip()}", flush=True)


if __name__ == "__main__":
    main()
