"""What a step costs, in AdamW steps of the same model and batch, measured in turns in one run; and what it keeps.

python -m benchmarks.cost
python -m benchmarks.cost --precision medium   # torch's own products in less precision too, for all
python -m benchmarks.cost --task perceptron --batch 128 --threads 1   # 10-64-64-1
python -m benchmarks.cost --task text-256 --batch 16 --threads 1 --block 16 --warm-up 1 \\
    --only Muon NewtonMuon 'NewtonMuon, both sides'
python -m benchmarks.cost --memory             # what each optimizer keeps per parameter
python -m benchmarks.cost --profile            # where K-FAC's time goes
"""

from __future__ import annotations

import argparse
import copy
import cProfile
import platform
import pstats
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.study.optimizers import OPTIMIZERS
from natgrad.study.task import Batch, Task
from natgrad.study.tasks import TASKS

BLOCK = 40
"""Steps: a multiple of the intervals between statistics, inverses and adaptations."""
WARM_UP = 5
"""Blocks, after which KFAC's intervals have grown to what they stay at."""
FIXED = {"lr": 1e-2, "momentum": 0.9, "damping": 1.0, "statistics_every": 10, "inverses_every": 100}


WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "AdamW": ("AdamW", {"lr": 1e-3}),
    "SOAP": ("SOAP", {"lr": 1e-3}),
    "Shampoo": ("Shampoo", {"lr": 1e-3}),
    "KFAC": ("KFAC", {}),
    "KFAC, not centered": ("KFAC", {"centered": False}),
    "KFAC, fixed step size": ("KFAC", FIXED),
    "EKFAC": ("KFAC", {"structure": "ekfac"}),
    "Muon": ("Muon", {"lr": 0.02, "rest": 0.03, "adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.1}),
    "NewtonMuon": ("NewtonMuon", {"lr": 0.02}),
    "NewtonMuon, both sides": ("NewtonMuon", {"lr": 0.02, "sides": "both"}),
    "KFAC, input factor": ("KFAC", {"structure": "input", "lr": 1e-3, "momentum": 0.9}),
}


def perceptron() -> Task:
    """A small network, whose step is mostly Python's time: noisy targets of ten features."""
    source = torch.Generator().manual_seed(0)
    x = torch.randn(4096, 10, generator=source)
    y = (x[:, :1] * x[:, 1:2]).sin() + 0.3 * torch.randn(4096, 1, generator=source)

    def make_model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(10, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))

    def batches(seed: int, size: int) -> Iterator[Batch]:
        own = torch.Generator().manual_seed(seed)
        while True:
            rows = torch.randint(len(x), (size,), generator=own)
            yield x[rows], y[rows]

    return Task("perceptron", "loss", 128, nn.MSELoss(), make_model, batches, lambda _: {}, lambda _: (x[:2], y[:2]))


MEASURED = {name: TASKS[name] for name in ("curves", "mnist", "text-64", "text-128", "text-256")}
MEASURED["perceptron"] = perceptron


def step_of(name: str, model: nn.Module, task: Task) -> tuple[Callable[[Batch], None], list[Any]]:
    """A function that takes a step, and the optimizers behind it."""
    use, setting = WAYS[name]
    stepper = OPTIMIZERS[use].make(model, task, setting)
    return stepper.step, stepper.optimizers


def memory(task: Task, batches: Iterator[Batch]) -> None:
    """Bytes of each optimizer's `state_dict` over those of the parameters."""
    print(f"| {task.name} | numbers kept per parameter |\n| --- | --- |")
    for name in WAYS:
        model = task.make_model(0)
        step, made = step_of(name, model, task)
        for _ in range(60):
            step(next(batches))
        kept = {t.untyped_storage().data_ptr(): t for opt in made for t in tensors(opt.state_dict())}
        own = sum(p.nbytes for p in model.parameters())
        print(f"| {name} | {sum(t.nbytes for t in kept.values()) / own:.2f} |", flush=True)


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for v in value.values():
            yield from tensors(v)
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from tensors(v)
    elif hasattr(value, "__dict__"):  # Shampoo keeps its matrices in objects of its own
        yield from tensors(vars(value))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="curves", choices=list(MEASURED))
    parser.add_argument("--batch", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--blocks", type=int, default=6, help="blocks of steps of each")
    parser.add_argument("--block", type=int, default=BLOCK, help="steps in a block")
    parser.add_argument("--warm-up", type=int, default=WARM_UP, help="blocks that are not counted")
    parser.add_argument("--only", nargs="+", default=["AdamW", "KFAC", "KFAC, fixed step size"])
    parser.add_argument("--precision", choices=["highest", "high", "medium"], default="highest")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()

    torch.set_float32_matmul_precision(options.precision)
    torch.set_num_threads(options.threads)
    task = MEASURED[options.task]()
    batches = task.batches(0, options.batch)
    if options.memory:
        memory(task, batches)
        return
    initial = task.make_model(0)
    steps = {name: step_of(name, copy.deepcopy(initial), task)[0] for name in options.only}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for block in range(options.warm_up + options.blocks):
        for name, step in steps.items():
            start = time.perf_counter()
            for _ in range(options.block):
                step(next(batches))
            if block >= options.warm_up:
                times[name].append((time.perf_counter() - start) / options.block)
    base = times[options.only[0]]
    print(f"| {task.name}, batch {options.batch} | ms/step | in steps of {options.only[0]} |\n| --- | --- | --- |")
    for name, values in times.items():
        ratios = [k / a for a, k in zip(base, values, strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {name} | {1e3 * statistics.median(values):.1f} | {spread} |")
    print(
        f"\n{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, precision of products {options.precision}"
    )
    if options.profile:
        profile = cProfile.Profile()
        with profile:
            for _ in range(BLOCK):
                steps["KFAC"](next(batches))
        pstats.Stats(profile).sort_stats("cumulative").print_stats("natgrad|run_backward|linear|cholesky", 30)


if __name__ == "__main__":
    main()
