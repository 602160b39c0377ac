"""The weights that an autoencoder of a study starts from, and its images, as arrays: for `kfac_jax_peer.py`.

python -m benchmarks.export curves --seeds 0 1 2
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from torch import nn

from natgrad.study.tasks import TASKS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["curves", "mnist"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path())
    options = parser.parse_args()

    task = TASKS[options.task]()
    assert task.images is not None
    options.out.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        linears = [m for m in task.make_model(seed).modules() if isinstance(m, nn.Linear)]
        arrays = {f"W{i}": m.weight.detach().numpy() for i, m in enumerate(linears)}
        arrays |= {f"b{i}": m.bias.detach().numpy() for i, m in enumerate(linears)}
        about = {"task": task.name, "seed": seed, "weight_decay": task.weight_decay}
        np.savez(options.out / f"{task.name} seed {seed}.npz", images=task.images.numpy(), **arrays, **about)


if __name__ == "__main__":
    main()
