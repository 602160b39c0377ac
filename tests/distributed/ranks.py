"""Processes that are ranks of torch.distributed over gloo, started once for many tests."""

from __future__ import annotations

import datetime
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _serve(rank: int, size: int, file: str, inbox: Any, outbox: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=size, timeout=datetime.timedelta(seconds=60)
    )
    groups = {n: dist.new_group(list(range(n))) for n in range(1, size + 1)}
    while True:
        task = inbox.get()
        if task is None:
            break
        n, function, args = task
        try:
            result = function(groups[n], *args) if rank < n else None
            outbox.put((rank, True, result))
        except Exception:
            outbox.put((rank, False, traceback.format_exc()))
    dist.destroy_process_group()


class Ranks:
    """`ranks(n, function, *args)` calls `function(group, *args)` on `n` of them, and returns what each returned."""

    def __init__(self, size: int, file: str):
        context = mp.get_context("spawn")
        self.size = size
        self._outbox = context.Queue()
        self._inboxes = [context.Queue() for _ in range(size)]
        self._processes = [
            context.Process(target=_serve, args=(r, size, file, self._inboxes[r], self._outbox), daemon=True)
            for r in range(size)
        ]
        for process in self._processes:
            process.start()

    def __call__(self, n: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        for inbox in self._inboxes:
            inbox.put((n, function, args))
        came = sorted((self._outbox.get(timeout=200) for _ in range(self.size)), key=lambda c: c[0])
        for rank, fine, result in came:
            if not fine:
                raise RuntimeError(f"rank {rank}:\n{result}")
        return [result for _, _, result in came][:n]

    def close(self) -> None:
        for inbox in self._inboxes:
            inbox.put(None)
        for process in self._processes:
            process.join(20)
            process.kill()
