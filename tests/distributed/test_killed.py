"""Ranks that die: torchrun starts them again, and the run ends with the weights of an undisturbed one; or all end."""

import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

import rank_errors

ROOT = Path(__file__).parents[2]
STEPS, EVERY = 24, 4
SLOW = pytest.mark.slow


def trained(folder, *options, kill_at=None, ranks=2):
    """The weights of the last checkpoint of the example, and what was said. At a step, a rank is killed."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)),
        *("--max-restarts", "2", str(ROOT / "examples" / "several_ranks.py")),
        *("--steps", str(STEPS), "--every", str(EVERY), "--folder", str(folder), *options),
    ]
    here = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    here |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # the addresses in it are those of processes that have ended
    said, processes, killed = [], {}, None
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=here, cwd=folder.parent
    ) as run:
        for line in run.stdout:
            said.append(line)
            for rank, process in re.findall(r"rank (\d+) of \d+: process (\d+)", line):  # lines may run together
                processes[int(rank)] = int(process)
            if kill_at is not None and killed is None and f"step {kill_at[0]}:" in line:
                killed = processes[kill_at[1]]
                os.kill(killed, signal.SIGKILL)
    text = "".join(said)
    assert run.returncode == 0, text
    assert (kill_at is None) == (killed is None)
    if killed is not None:
        # The one that was killed, or the other where that ended first, of having lost it.
        assert re.search(r"exitcode: -?\d+\) local_rank: \d \(pid: \d+\)", text), text
    model = torch.nn.Sequential(*[torch.nn.Linear(*s) for s in ((64, 100), (100, 100), (100, 10))])
    weights = {f"{2 * i}.{n}": p.detach() for i, layer in enumerate(model) for n, p in layer.named_parameters()}
    dcp.load({"model": weights}, checkpoint_id=folder / str(STEPS), no_dist=True)
    return weights


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    known = {}

    def of(*options):
        if options not in known:
            known[options] = trained(tmp_path_factory.mktemp("undisturbed") / "checkpoints", *options)
        return known[options]

    return of


def kills(count, seed):
    chance = random.Random(seed)
    return [(chance.randrange(1, STEPS - 1), chance.randrange(2)) for _ in range(count)]


@pytest.mark.parametrize(
    ("options", "kill_at"),
    [
        pytest.param(options, kill_at, marks=[SLOW if i else pytest.mark.long])
        for options, seed in (((), 0), (("--shard",), 1))
        for i, kill_at in enumerate(kills(10, seed))
    ],
    ids=str,
)
def test_a_killed_rank_is_started_again_and_nothing_is_lost(undisturbed, tmp_path, options, kill_at):
    weights = trained(tmp_path / "checkpoints", *options, kill_at=kill_at)
    for n, p in undisturbed(*options).items():
        assert torch.equal(weights[n], p), n


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_the_others_end_with_an_error_that_names_what_they_waited_for(tmp_path, how):
    context = multiprocessing.get_context("spawn")
    outbox = context.Queue()
    others = [
        context.Process(target=rank_errors.left_alone, args=(r, str(tmp_path / "store"), how, outbox), daemon=True)
        for r in range(2)
    ]
    for process in others:
        process.start()
    said = outbox.get(timeout=60)
    for process in others:
        process.kill()
    assert re.match(
        r"rank 0 of 2 did not get .+ from the others: .+ Another rank has ended, or runs different code", said
    )
