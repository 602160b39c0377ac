"""Computing K-FAC's factors once: natgrad against a hand-written floor and its peers, in turns in one run.

    pip install curvlinops-for-pytorch nngeometry      # those not installed are left out, and named
    python benchmarks/factors.py
    python benchmarks/factors.py --model cnn

The model is the multilayer perceptron 784-1000-500-10, or a small convolutional network; the data are 1,000 random
examples of ten classes. The floor is what is done by hand: a forward, a backward to the layers' outputs alone, and the
products of the factors, those of convolutions with their patches written out. Peak memory is that of one computation
in a process of its own, above what the process had before.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import natgrad
from natgrad.study.networks import make_convolutional

CLASSES = 10
Timed = Callable[[], object]


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(784, 1000), nn.ReLU(), nn.Linear(1000, 500), nn.ReLU(), nn.Linear(500, CLASSES))


def cnn() -> nn.Sequential:
    return make_convolutional((32, 64), 128)


MODELS = {"mlp": (mlp, (784,)), "cnn": (cnn, (1, 28, 28))}


def pass_through(model: nn.Module, x: Tensor, y: Tensor) -> Timed:
    """One ordinary forward and backward."""

    def compute() -> None:
        nn.CrossEntropyLoss()(model(x), y).backward()
        model.zero_grad()

    return compute


def floor(model: nn.Sequential, x: Tensor, exact: bool) -> Timed:
    """Factors by hand, one column for a sample and ten for the exact `D`."""

    def compute() -> list[tuple[Tensor, Tensor]]:
        A, outputs, h = [], [], x
        for module in model:
            before, h = h, module(h)
            if isinstance(module, nn.Linear | nn.Conv2d):
                rows = patches(module, before.detach())
                A.append(rows.mT @ rows / len(rows))
                outputs.append(h)
        p = h.detach().softmax(1)
        if exact:
            columns = [p[:, c : c + 1].sqrt() * (torch.eye(CLASSES)[c] - p) for c in range(CLASSES)]
        else:
            columns = [p - F.one_hot(torch.multinomial(p, 1).squeeze(1), CLASSES)]
        B = [torch.zeros(a.shape[1], a.shape[1]) for a in outputs]
        for column in columns:
            for total, g in zip(B, torch.autograd.grad(h, outputs, column, retain_graph=True), strict=True):
                rows = g if g.ndim == 2 else g.flatten(2).mT.flatten(0, 1)
                total.addmm_(rows.mT, rows)
        return list(zip(A, B, strict=True))

    return compute


def patches(module: nn.Module, h: Tensor) -> Tensor:
    """What a layer's weight is multiplied with, `(cases, d_in)`."""
    if isinstance(module, nn.Linear):
        return h
    assert isinstance(module, nn.Conv2d)
    return F.unfold(h, module.kernel_size, module.dilation, module.padding, module.stride).mT.flatten(0, 1)


def ours(model: nn.Module, x: Tensor, y: Tensor, structure: str, estimator: str) -> Timed:
    return lambda: natgrad.fisher(model, nn.CrossEntropyLoss(), (x, y), structure, estimator=estimator)


def curvlinops(model: nn.Module, x: Tensor, y: Tensor, kind: str, fisher_type: str) -> Timed:
    import curvlinops

    operator = {"kfac": curvlinops.KFACLinearOperator, "ekfac": curvlinops.EKFACLinearOperator}[kind]
    parameters = list(model.parameters())

    def compute() -> object:
        K = operator(
            model,
            nn.CrossEntropyLoss(),
            parameters,
            [(x, y)],
            fisher_type=getattr(curvlinops.FisherType, fisher_type),
            check_deterministic=False,
            separate_weight_and_bias=False,
        )
        K @ [torch.zeros_like(p) for p in parameters]  # it is lazy
        return K

    return compute


def nngeometry(model: nn.Module, x: Tensor, y: Tensor) -> Timed:
    from nngeometry.metrics import FIM
    from nngeometry.object import PMatKFAC

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=len(x))
    return lambda: FIM(model=model, loader=loader, representation=PMatKFAC, variant="classif_logits", device="cpu")


CANDIDATES: dict[str, Callable[[nn.Sequential, Tensor, Tensor], Timed]] = {
    "forward and backward": pass_through,
    "floor, one sample": lambda model, x, y: floor(model, x, exact=False),
    "natgrad K-FAC, one sample": lambda model, x, y: ours(model, x, y, "kfac", "mc"),
    "curvlinops K-FAC, one sample": lambda model, x, y: curvlinops(model, x, y, "kfac", "MC"),
    "floor, exact": lambda model, x, y: floor(model, x, exact=True),
    "natgrad K-FAC, exact": lambda model, x, y: ours(model, x, y, "kfac", "exact"),
    "curvlinops K-FAC, exact": lambda model, x, y: curvlinops(model, x, y, "kfac", "TYPE2"),
    "nngeometry K-FAC, exact": lambda model, x, y: nngeometry(model, x, y),
    "natgrad EKFAC, one sample": lambda model, x, y: ours(model, x, y, "ekfac", "mc"),
    "curvlinops EKFAC, one sample": lambda model, x, y: curvlinops(model, x, y, "ekfac", "MC"),
}


def problem(options: argparse.Namespace) -> tuple[nn.Sequential, Tensor, Tensor]:
    make, shape = MODELS[options.model]
    torch.manual_seed(0)
    return make(), torch.randn(options.examples, *shape), torch.randint(CLASSES, (options.examples,))


def peak(options: argparse.Namespace, name: str) -> float:
    """The peak of one computation in a process of its own, MiB above what the process had before."""
    command = [sys.executable, __file__, "--model", options.model, "--examples", str(options.examples)]
    run = subprocess.run([*command, "--peak-of", name], capture_output=True, text=True, check=True)
    return float(run.stdout.split()[-1])


def print_peak(options: argparse.Namespace) -> None:
    model, x, y = problem(options)
    compute = CANDIDATES[options.peak_of](model, x[:2], y[:2])
    compute()  # imports and threads
    compute = CANDIDATES[options.peak_of](model, x, y)
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that of now
    compute()
    print((memory("VmHWM") - before) / 1024)


def memory(what: str) -> int:
    """KiB, from Linux's account of the process."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{what}:")[2].split()[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="mlp")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--skip", nargs="*", default=[], help="words; candidates whose name has one are left out")
    parser.add_argument("--peak-of", choices=list(CANDIDATES), help="print the peak memory of one alone")
    options = parser.parse_args()
    if options.peak_of:
        print_peak(options)
        return

    model, x, y = problem(options)
    console = Console()
    timed: dict[str, Timed] = {}
    for name, make in CANDIDATES.items():
        if any(word in name for word in options.skip):
            continue
        try:
            timed[name] = make(model, x, y)
            timed[name]()  # warms up
        except Exception as error:
            console.print(f"left out: {name}: {type(error).__name__}: {error}", highlight=False)
            timed.pop(name, None)
    times: dict[str, list[float]] = {name: [] for name in timed}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(options.rounds):
            for name, compute in timed.items():
                start = time.perf_counter()
                compute()
                times[name].append(time.perf_counter() - start)

    machine = (
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    table = Table(title=f"{options.model}, {options.examples} examples ({machine})")
    for column in ("", "ms (median)", "of the floor", "peak, MiB"):
        table.add_column(column, justify="right" if column else "left")
    for name, values in times.items():
        base = times["floor, exact" if "exact" in name else "floor, one sample"]
        ratio = statistics.median(v / b for v, b in zip(values, base, strict=True))
        memory = f"{peak(options, name):.0f}"
        table.add_row(name, f"{1e3 * statistics.median(values):.0f}", f"{ratio:.2f}", memory)
    console.print(table)


if __name__ == "__main__":
    main()
