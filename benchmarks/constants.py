"""The constants of a machine for `natgrad plan`: products, factorizations, and what is sent between its devices.

torchrun --nproc-per-node 2 benchmarks/constants.py machine.json
natgrad plan gpt2-small --machine machine.json

All processes measure at once, as they share what they share in training. Without torchrun nothing is sent, and the
constants of the link are left at their defaults.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from math import ceil, log2
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="where to write them")
    parser.add_argument("--width", type=int, default=1024, help="of the matrices")
    arguments = parser.parse_args()
    device = torch.device("cpu")
    if "WORLD_SIZE" in os.environ:
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    found = constants(arguments.width, device)
    if not dist.is_initialized() or dist.get_rank() == 0:
        arguments.file.write_text(json.dumps(found, indent=1) + "\n")
        print(arguments.file.read_text(), end="")
    if dist.is_initialized():
        dist.destroy_process_group()


def constants(width: int, device: torch.device) -> dict[str, Any]:
    """Of the slowest of the ranks. The cores that compute are those that send, so nothing overlaps but on a GPU."""
    A = torch.randn(width, width, device=device)
    S = A @ A.mT + width * torch.eye(width, device=device)
    found = {
        "flops": 2 * width**3 / seconds(lambda: A @ A, device),
        "inverse_flops": width**3 / seconds(lambda: torch.cholesky_inverse(torch.linalg.cholesky(S)), device),
    }
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if ranks > 1:
        shard, small = torch.ones(2**20 // ranks, device=device), torch.ones(1, device=device)
        shards = [torch.ones_like(shard) for _ in range(ranks)]
        hops = ceil(log2(ranks))
        short = seconds(lambda: dist.all_reduce(small), device) / 2
        gathered = seconds(lambda: dist.all_gather(shards, shard), device)
        scattered = seconds(lambda: dist.reduce_scatter(shard, shards), device)
        found["latency"] = short / hops
        sent = 2 * shard.nbytes * (ranks - 1)
        found["bandwidth"] = sent / max(gathered + scattered - 2 * short, 1e-9)
        values = torch.tensor(list(found.values()), dtype=torch.float64, device=device)
        values[2] *= -1  # of latencies the largest
        dist.all_reduce(values, dist.ReduceOp.MIN)
        values[2] *= -1
        found = dict(zip(found, values.tolist(), strict=True))
    if device.type == "cuda":
        found["memory"] = float(torch.cuda.get_device_properties(device).total_memory)
    return {**found, "overlap": device.type == "cuda"}


def seconds(work: Callable[[], object], device: torch.device, rounds: int = 9) -> float:
    """Of one call, by the median."""
    taken = []
    for _ in range(rounds + 2):
        if dist.is_initialized():
            dist.barrier()
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    return sorted(taken[2:])[rounds // 2]


if __name__ == "__main__":
    main()
