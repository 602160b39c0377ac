"""Training on digits with any number of processes, and checkpoints that any other number of processes can resume from.

python examples/several_ranks.py
torchrun --nproc-per-node 2 examples/several_ranks.py
torchrun --nproc-per-node 2 --max-restarts 3 examples/several_ranks.py --shard --folder checkpoints

If you start it again with the same folder, it continues from the last checkpoint there. torchrun restarts it in this
way if a rank dies. With gloo, set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for such restarts: each start then has its own
store, and does not look for the processes of the last start.
"""

import argparse
import datetime
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import natgrad

BATCH = 400  # of all ranks together


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--shard", action="store_true", help="parameters, factors and state in shards")
    parser.add_argument("--folder", type=Path, help="for checkpoints, a folder that all ranks see; default: none")
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints")
    arguments = parser.parse_args()

    several = "WORLD_SIZE" in os.environ  # torchrun sets it
    device = torch.device("cpu")
    if several:
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            timeout=datetime.timedelta(seconds=30),  # so long is a rank waited for that has died
        )
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
    print(f"rank {rank} of {ranks}: process {os.getpid()}", flush=True)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 100), nn.Tanh(), nn.Linear(100, 100), nn.Tanh(), nn.Linear(100, 10)).to(device)
    if several and arguments.shard:
        for layer in model[::2]:
            fully_shard(layer)
        fully_shard(model)
    trained = DistributedDataParallel(model) if several and not arguments.shard else model
    loss_fn = nn.CrossEntropyLoss()
    opt = natgrad.KFAC(trained, loss_fn)

    first = resume(arguments.folder, model, opt) if arguments.folder else 0
    images, labels = (torch.as_tensor(a, device=device) for a in load_digits(return_X_y=True))
    for step in range(first, arguments.steps):
        whole = torch.randperm(len(images), generator=torch.Generator().manual_seed(step))[:BATCH]
        own = whole[rank::ranks].to(device)
        loss = opt.loss(trained(images[own].float() / 16), labels[own])
        opt.zero_grad()
        loss.backward()
        opt.step()
        if rank == 0:
            print(f"step {step}: loss {loss.item():.5f}", flush=True)
        if arguments.folder and (step + 1) % arguments.every == 0:
            save(arguments.folder / str(step + 1), model, opt)
    if several:
        dist.destroy_process_group()


def save(folder: Path, model: nn.Module, opt: natgrad.KFAC) -> None:
    """Torch writes `.metadata` last: a checkpoint that has it is whole."""
    state = {"model": model.state_dict(), "optimizer": opt.state_dict()}
    dcp.save(state, checkpoint_id=folder, no_dist=not dist.is_initialized())


def resume(folder: Path, model: nn.Module, opt: natgrad.KFAC) -> int:
    """The steps that have been taken by the last whole checkpoint, which is loaded."""
    steps = max((int(f.parent.name) for f in folder.glob("*/.metadata")), default=0)
    if steps:
        state = {"model": model.state_dict()}
        dcp.load(state, checkpoint_id=folder / str(steps), no_dist=not dist.is_initialized())
        model.load_state_dict(state["model"])
        natgrad.load_checkpoint(opt, folder / str(steps))
        print(f"resumed after {steps} steps", flush=True)
    return steps


if __name__ == "__main__":
    main()
