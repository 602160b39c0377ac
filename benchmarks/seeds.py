"""One experiment for several seeds, from the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.machine import machine


def over_seeds(
    one_seed: Callable[[int], Mapping[str, object]], doc: str | None
) -> tuple[dict[str, Tensor], Path | None]:
    """Every figure by name, the seeds on axis 0, and where a picture is to be drawn, if anywhere. The options are
    `--seeds` and `--plot`; the machine is printed first."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    print(machine())
    runs = [one_seed(seed) for seed in range(args.seeds)]
    return {name: torch.tensor([run[name] for run in runs]) for name in runs[0]}, args.plot
