"""GPT-2 small and a ResNet-50, random weights and data, in bfloat16 on a GPU: what a step of each optimizer takes.

python -m benchmarks.gpu gpt2
python -m benchmarks.gpu resnet50 --batch 256
python -m benchmarks.gpu gpt2 --only KFAC --phases    # where the time of a step goes
python -m benchmarks.gpu gpt2 --only KFAC --kernels   # by kernel
python -m benchmarks.gpu gpt2 --device cpu --small    # whether the script runs

Each optimizer has the machine alone, one after the other; AdamW is first and last, so that drift shows. Peak memory is
that of the whole process: parameters, gradients, state, activations.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import natgrad
from natgrad.optim.objective import Objective
from natgrad.optim.parameters import Parameters
from natgrad.optim.preconditioner.layers import LayerBlocks
from natgrad.optim.recipe import Recipe
from natgrad.optim.rules.length import StepRule
from natgrad.optim.tracking.tracker import Tracker

Step = Callable[[], Tensor]
FIXED = {"lr": 1e-3, "momentum": 0.9, "damping": 1e-2, "statistics_every": 10, "inverses_every": 100}
ONE_SIDED = {"structure": "input", "orthogonalize": True, "lr": 1e-3, "momentum": 0.95}
STEADY = {"statistics_every": 10, "inverses_every": 20}  # what the defaults grow to over the first 200 steps
PHASES = {
    LayerBlocks: ("observe", "take_in", "refresh", "apply", "damped_gram"),
    StepRule: ("_minimum",),
    Recipe: ("_stage", "run"),
    Parameters: ("finite", "snapshot"),
    Objective: ("products", "evaluate"),
    Tracker: ("loss",),
}


class Task:
    """A model, one batch, and how the loss's input is made of what the model returns."""

    def __init__(self, name: str, batch: int, small: bool, device: str):
        from transformers import GPT2Config, GPT2LMHeadModel, ResNetConfig, ResNetForImageClassification

        self.device = device
        if name == "gpt2":
            length = 64 if small else 1024
            size = {"n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 500} if small else {}
            config = GPT2Config(use_cache=False, **size)
            self.make: Callable[[], nn.Module] = lambda: GPT2LMHeadModel(config)
            self.x = torch.randint(config.vocab_size, (batch, length), device=device)
            self.y = torch.roll(self.x, -1, 1).flatten()
            self.output: Callable[[Any], Tensor] = lambda returned: returned.logits.flatten(0, 1)
        else:
            size = {"embedding_size": 8, "hidden_sizes": [16, 32, 64, 64], "depths": [1, 1, 1, 1]} if small else {}
            labels = 10 if small else 1000
            resnet = ResNetConfig(num_labels=labels, **size)
            self.make = lambda: ResNetForImageClassification(resnet)
            side = 32 if small else 224
            self.x = torch.randn(batch, 3, side, side, device=device)
            self.y = torch.randint(labels, (batch,), device=device)
            self.output = lambda returned: returned.logits

    def forward(self, model: nn.Module) -> Any:
        with torch.autocast(self.device, torch.bfloat16):
            return model(self.x)


def plain(task: Task, model: nn.Module, *optimizers: Any, before: Callable[[], None] = lambda: None) -> Step:
    """A step by torch's conventions."""

    def step() -> Tensor:
        loss = nn.functional.cross_entropy(task.output(task.forward(model)).float(), task.y)
        for opt in optimizers:
            opt.zero_grad()
        loss.backward()
        before()
        for opt in optimizers:
            opt.step()
        return loss

    return step


def adamw(task: Task, model: nn.Module) -> Step:
    return plain(task, model, torch.optim.AdamW(model.parameters(), lr=1e-3))


def fused_adamw(task: Task, model: nn.Module) -> Step:
    return plain(task, model, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True))


def muon(task: Task, model: nn.Module) -> Step:
    """Hidden matrices, and kernels as matrices, by Muon, all else by AdamW."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    hidden = [p for p in model.parameters() if p.ndim >= 2 and id(p) not in embeddings]
    own = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in own]
    flat = [nn.Parameter(p.detach().view(len(p), -1)) for p in hidden]

    def hand_over() -> None:
        for p, view in zip(hidden, flat, strict=True):
            view.grad = p.grad.view(len(p), -1)

    opts = torch.optim.Muon(flat, lr=0.02, weight_decay=0.0), torch.optim.AdamW(rest, lr=1e-3)
    step = plain(task, model, *opts, before=hand_over)

    def whole() -> Tensor:
        for p in hidden:
            p.grad = None
        return step()

    return whole


def soap(task: Task, model: nn.Module) -> Step:
    from pytorch_optimizer import SOAP

    return plain(task, model, SOAP(model.parameters(), lr=1e-3))


def kfac(task: Task, model: nn.Module, **options: Any) -> Step:
    opt = natgrad.KFAC(model, nn.CrossEntropyLoss(), output=task.output, **options)

    def step() -> Tensor:
        loss = opt.loss(task.forward(model), task.y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        return loss

    return step


WAYS: dict[str, Callable[[Task, nn.Module], Step]] = {
    "AdamW": adamw,
    "AdamW, fused": fused_adamw,
    "Muon": muon,
    "SOAP": soap,
    "KFAC": functools.partial(kfac, **STEADY),
    "KFAC, fixed step size": functools.partial(kfac, **FIXED),
    "KFAC, one-sided and orthogonalized": functools.partial(kfac, **ONE_SIDED),
    "AdamW, again": adamw,
}


def synchronized(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(task: Task, name: str, warm: int, steps: int) -> tuple[float, float, float]:
    """Seconds a step, peak GiB, and the last loss."""
    torch.manual_seed(0)
    model = task.make().to(task.device).train()
    step = WAYS[name](task, model)
    if task.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(warm):
        loss = step()
    start = synchronized(task.device)
    for _ in range(steps):
        loss = step()
    seconds = (synchronized(task.device) - start) / steps
    peak = torch.cuda.max_memory_allocated() / 2**30 if task.device == "cuda" else float("nan")
    return seconds, peak, loss.item()


@contextlib.contextmanager
def timed_phases(device: str) -> Iterator[dict[str, list[float]]]:
    """Seconds of every call of the methods in `PHASES`, with the device waited for before and after."""
    times: dict[str, list[float]] = {}
    wanted = [(kind, name) for kind, names in PHASES.items() for name in names]
    before = {(kind, name): kind.__dict__[name] for kind, name in wanted}

    def timed(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = synchronized(device)
            try:
                return method(*args, **kwargs)
            finally:
                times.setdefault(name, []).append(synchronized(device) - start)

        return call

    for (kind, name), method in before.items():
        setattr(kind, name, timed(name, method))
    try:
        yield times
    finally:
        for (kind, name), method in before.items():
            setattr(kind, name, method)


def phases(task: Task, name: str, warm: int, steps: int) -> None:
    torch.manual_seed(0)
    model = task.make().to(task.device).train()
    with timed_phases(task.device) as times:
        step = WAYS[name](task, model)
        for _ in range(warm):
            step()
        times.clear()
        start = synchronized(task.device)
        for _ in range(steps):
            step()
        whole = synchronized(task.device) - start
    print(f"\n{name}: {1e3 * whole / steps:.1f} ms a step; each phase waited for, ms a step, calls a step")
    for phase, values in sorted(times.items(), key=lambda item: -sum(item[1])):
        print(f"  {phase:16} {1e3 * sum(values) / steps:8.2f} {len(values) / steps:6.2f}")


def synchronizations(task: Task, name: str, warm: int) -> None:
    """Where the host waits for the GPU, in one ordinary step."""
    torch.manual_seed(0)
    step = WAYS[name](task, task.make().to(task.device).train())
    for _ in range(warm):
        step()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        step()
        torch.cuda.set_sync_debug_mode("default")
    places = Counter(f"{w.filename.rpartition('/')[2]}:{w.lineno}" for w in caught)
    print(f"\n{name}: {sum(places.values())} synchronizations in a step: {dict(places)}")


def kernels(task: Task, name: str, warm: int, steps: int) -> None:
    torch.manual_seed(0)
    step = WAYS[name](task, task.make().to(task.device).train())
    for _ in range(warm):
        step()
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if task.device == "cuda" else activity.CPU]) as profile:
        for _ in range(steps):
            step()
        synchronized(task.device)
    spent = [(e.self_device_time_total / 1e3 / steps, e.count / steps, e.key) for e in profile.key_averages()]
    print(f"\n{name}: ms a step, launches a step, kernel")
    for ms, count, key in sorted(spent, reverse=True)[:25]:
        print(f"  {ms:8.2f} {count:7.1f}  {key[:110]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["gpt2", "resnet50"])
    parser.add_argument("--batch", type=int, help="sequences of 1024 tokens, or images of 224 x 224; default 8, 128")
    parser.add_argument("--only", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--warm", type=int, default=20, help="steps before the clock starts")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny models, to try the script")
    parser.add_argument("--phases", action="store_true")
    parser.add_argument("--kernels", action="store_true")
    parser.add_argument("--syncs", action="store_true")
    options = parser.parse_args()

    torch.manual_seed(0)
    batch = options.batch or (8 if options.model == "gpt2" else 128)
    task = Task(options.model, batch, options.small, options.device)
    chip = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    count = sum(p.numel() for p in task.make().parameters())
    print(
        f"{options.model}, {count / 1e6:.1f}M parameters, batch {batch}, {chip}, torch {torch.__version__}", flush=True
    )
    if not (options.phases or options.kernels or options.syncs):
        print("| | ms/step | in steps of AdamW | peak memory, GiB |\n| --- | --- | --- | --- |")
    base = None
    for name in options.only:
        try:
            if options.phases:
                phases(task, name, options.warm, options.steps)
            elif options.kernels:
                kernels(task, name, options.warm, options.steps)
            elif options.syncs:
                synchronizations(task, name, options.warm)
            else:
                seconds, peak, loss = measure(task, name, options.warm, options.steps)
                base = base or seconds
                ratio = f"{seconds / base:.2f}"
                print(f"| {name} | {1e3 * seconds:.1f} | {ratio} | {peak:.1f} | <!-- loss {loss:.3f} -->", flush=True)
        except Exception as error:  # another optimizer may still fit
            print(f"| {name} | {type(error).__name__}: {' '.join(str(error).split())[:300]} | | |", flush=True)
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
