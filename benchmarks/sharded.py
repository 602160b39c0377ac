"""K-FAC on 1, 2 and 4 processes of this machine over gloo, replicated and sharded, beside what `natgrad plan` predicts.

python benchmarks/sharded.py
python benchmarks/sharded.py --width 768 --layers 8 --ranks 1 2 4

Held: parameters, their gradients, the optimizer's state, moments and inverses, on the rank that has most. Peak: of the
process, which has torch and one batch's layer outputs besides. Sent: what a rank gives in a step, on average over ranks
and steps, of moments, inverses and directions, without what torch sends. The constants are measured by the same
processes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import resource
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import natgrad
from constants import constants
from natgrad.distributed.plan import Machine, Settings, predict
from natgrad.distributed.sizes import Size

MIB = 2**20
COUNTED = ("the moments", "the inverses", "the shards of directions")
CLASSES = 10
EVERY = {"statistics_every": 10, "inverses_every": 20}
"""The defaults, from the first step on."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768, help="of every layer")
    parser.add_argument("--layers", type=int, default=8, help="hidden layers")
    parser.add_argument("--batch", type=int, default=512, help="examples of a batch, on all ranks together")
    parser.add_argument("--steps", type=int, default=40, help="that are measured, after as many; a multiple of 20")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    arguments = parser.parse_args()
    print(f"{platform.machine()}, one thread a process, torch {torch.__version__}; {vars(arguments)}", flush=True)
    columns = ["ranks", "scheme", "held, MiB", "predicted", "peak, MiB", "sent, MiB a step", "predicted", "ms a step"]
    print(f"| {' | '.join([*columns, 'predicted'])} |\n{'| --- ' * 9}|")
    for n in arguments.ranks:
        for scheme in ("replicated", "sharded"):
            came = measured(n, scheme, arguments)
            print(row(n, scheme, came, arguments), flush=True)


def row(n: int, scheme: str, came: list[dict[str, Any]], arguments: argparse.Namespace) -> str:
    """One line of the table, from what the ranks measured."""
    machine = Machine(**came[0]["constants"])
    # A batch of 250 examples or fewer is not thinned.
    share = 1 / min(max(1, arguments.batch // n // 250), 4)
    settings = Settings(batch=arguments.batch // n, statistics_share=share)
    p = predict(sizes(arguments.width, arguments.layers), n, scheme, machine, settings)
    own = sizes(arguments.width, arguments.layers)
    moments = sum(s.moments_sent(4) for s in own) / settings.statistics_every
    if scheme == "replicated":
        sent = moments + sum(s.inverse_sent(4) for s in own) / settings.inverses_every / n
    else:
        passes = 1 + 1 / settings.adapt_every  # directions that are brought into centered coordinates
        sent = (moments + (2 + passes) * 4 * sum(s.parameters for s in own) / n) * (n - 1) / n
    sent *= n > 1
    held, peak, taken = (max(c[key] for c in came) for key in ("held", "peak", "seconds"))
    given = sum(c["sent"] for c in came) / n
    return (
        f"| {n} | {scheme} | {held / MIB:.1f} | {p.held / MIB:.1f} | {peak / MIB:.0f} | {given / MIB:.2f} | "
        f"{sent / MIB:.2f} | {1e3 * taken:.0f} | {1e3 * p.time:.0f} |"
    )


def sizes(width: int, layers: int) -> list[Size]:
    last = Size.affine("last", width, CLASSES)
    return [*(Size.affine(str(k), width, width) for k in range(layers)), last]


def measured(n: int, scheme: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(rank_of, (n, scheme, arguments, folder), n)
        return [json.loads(Path(folder, f"{r}.json").read_text()) for r in range(n)]


def rank_of(rank: int, n: int, scheme: str, arguments: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=n, timeout=datetime.timedelta(seconds=300))
    found = constants(arguments.width, torch.device("cpu"))
    model = network(arguments.width, arguments.layers)
    model = replicated(model) if scheme == "replicated" else sharded(model)
    warnings.simplefilter("ignore", RuntimeWarning)  # labels at random: some steps are rejected
    opt = natgrad.KFAC(model, nn.CrossEntropyLoss(), **EVERY)
    generator = torch.Generator().manual_seed(rank)
    for step in range(2 * arguments.steps):
        if step == arguments.steps:
            dist.barrier()
            before, start = opt.parameters.place.world.sent.copy(), time.perf_counter()
            also = opt.parameters.place.shards.world.sent.copy() if opt.parameters.place.shards else {}
        x = torch.randn(arguments.batch // n, arguments.width, generator=generator)
        y = torch.randint(CLASSES, (len(x),), generator=generator)
        opt.zero_grad()
        opt.loss(model(x), y).backward()
        opt.step()
    dist.barrier()
    seconds = (time.perf_counter() - start) / arguments.steps
    sent = sum(opt.parameters.place.world.sent[what] - before[what] for what in COUNTED)
    if opt.parameters.place.shards and opt.parameters.place.shards.world is not opt.parameters.place.world:
        sent += sum(opt.parameters.place.shards.world.sent[what] - also[what] for what in COUNTED)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
    held = sum(
        t.nbytes
        for t in distinct(
            tensors(
                [
                    list(model.parameters()),
                    opt.state,
                    opt.recipe.preconditioner.running,
                    opt.recipe.preconditioner.inverse,
                ]
            )
        )
    )
    held += sum(local(p.grad).nbytes for p in model.parameters() if p.grad is not None)
    own = {"constants": found, "held": held, "peak": peak, "sent": sent / arguments.steps, "seconds": seconds}
    Path(folder, f"{rank}.json").write_text(json.dumps(own))
    dist.destroy_process_group()


def network(width: int, layers: int) -> nn.Sequential:
    torch.manual_seed(0)
    hidden = [m for _ in range(layers) for m in (nn.Linear(width, width), nn.Tanh())]
    return nn.Sequential(*hidden, nn.Linear(width, CLASSES))


def replicated(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def sharded(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in list(model.children()):
        if list(part.parameters()):
            fully_shard(part, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def local(t: Tensor) -> Tensor:
    return t.to_local() if isinstance(t, DTensor) else t


def tensors(value: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """All in nested containers and objects."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield local(value).detach()
    elif isinstance(value, dict):
        for v in value.values():
            yield from tensors(v, seen)
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from tensors(v, seen)
    elif hasattr(value, "__dict__"):
        yield from tensors(vars(value), seen)


def distinct(found: Iterator[Tensor]) -> list[Tensor]:
    """Of tensors on the same storage, the first."""
    return list({t.untyped_storage().data_ptr(): t for t in found}.values())


if __name__ == "__main__":
    main()
