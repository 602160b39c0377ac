"""Runs in several processes at the same time. If one process dies, the others continue."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from natgrad.checks.errors import UserError
from natgrad.study.keeping import Results, key, pending
from natgrad.study.run import Result, perform
from natgrad.study.spec import Job, Spec
from natgrad.study.training import Moment

PACE = 0.2
"""Seconds between two messages of a run."""


@dataclass(frozen=True)
class Event:
    """News of a run: its progress, or its result."""

    job: Job
    worker: int
    step: int = 0
    share: float = 0.0
    figure: float = float("nan")
    result: Result | None = None


class Worker:
    """A process that performs one run after another."""

    def __init__(self, number: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.number = number
        self.connection, far = context.Pipe()
        self.process = context.Process(target=work, args=(far,), name=f"natgrad study, worker {number}")
        self.process.start()
        far.close()
        self.job: Job | None = None

    def start(self, job: Job) -> None:
        self.job = job
        with contextlib.suppress(BrokenPipeError):  # a dead process is noticed by its end
            self.connection.send(job)

    def end(self) -> None:
        self.process.terminate()
        self.process.join()
        self.connection.close()


def work(connection: Connection) -> None:
    """The worker's loop: performs the jobs that it receives, until the connection is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the study ends its workers itself
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            job, last = connection.recv(), 0.0

            def report(moment: Moment, figure: float) -> None:
                nonlocal last
                if time.monotonic() - last >= PACE:
                    last = time.monotonic()
                    connection.send(("moment", moment.step, moment.share, figure))

            try:
                connection.send(("result", perform(job, report)))
            except UserError as error:
                connection.send(("mistake", str(error)))


def run_study(
    spec: Spec, results: Results, processes: int, stopped: Callable[[], bool] = lambda: False
) -> Iterator[Event]:
    """Performs the pending runs, and adds them to `results`; when `stopped()`, active runs are abandoned.

    A worker that dies is replaced; its run has the status "died".

    Raises:
        UserError: if a task cannot be created.
    """
    workers: list[Worker] = []
    try:
        while not stopped():
            running = {key(w.job) for w in workers if w.job is not None}
            waiting = [job for job in pending(spec, results) if key(job) not in running]
            if not waiting and not running:
                return
            for job in waiting[: processes - len(running)]:
                worker = next((w for w in workers if w.job is None), None)
                if worker is None:
                    worker = Worker(len(workers))
                    workers.append(worker)
                worker.start(job)
                yield Event(job, worker.number)
            busy = [w for w in workers if w.job is not None]
            ready: list[Any] = wait([w.connection for w in busy], timeout=0.1)
            for worker in busy:
                if worker.connection in ready:
                    event = _receive(worker, workers)
                    if event.result is not None:
                        results[key(event.job)] = event.result
                    yield event
    finally:
        for worker in workers:
            worker.end()


def _receive(worker: Worker, workers: list[Worker]) -> Event:
    job = worker.job
    assert job is not None
    try:
        kind, *content = worker.connection.recv()
    except (EOFError, ConnectionResetError):
        worker.end()
        workers[worker.number] = Worker(worker.number)
        return Event(job, worker.number, result=dead(job, worker.process.exitcode))
    if kind == "mistake":
        raise UserError(content[0])
    if kind == "moment":
        return Event(job, worker.number, *content)
    worker.job = None
    return Event(job, worker.number, result=content[0])


def dead(job: Job, exitcode: int | None) -> Result:
    """The result for a run whose process died."""
    how = f"exit status {exitcode}"
    if exitcode is not None and exitcode < 0:
        with contextlib.suppress(ValueError):
            how = signal.Signals(-exitcode).name
    return {
        "task": job.task.name,
        "optimizer": job.optimizer,
        "setting": job.setting,
        "seed": job.seed,
        "status": "died",
        "error": f"its process died ({how})" + (", perhaps out of memory" if exitcode == -9 else ""),
        "figure": "",
        "rejected": 0,
        "curve": [],
        "measured": [],
        "what": job.what(),
        "machine": {},
    }
