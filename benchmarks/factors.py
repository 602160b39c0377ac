"""Computing K-FAC's factors once: natgrad against a hand-written floor and its peers, in turns in one run.

    pip install curvlinops-for-pytorch nngeometry      # those not installed are left out, and named
    python benchmarks/factors.py

The model is the multilayer perceptron 784-1000-500-10, the data 1,000 random examples of ten classes. The floor is
what any method must do: a forward, a backward to the layers' outputs alone, and the products of the factors.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import natgrad

CLASSES = 10
Timed = Callable[[], object]


def floor(model: nn.Sequential, x: Tensor, exact: bool) -> Timed:
    """Factors by hand, one column for a sample and ten for the exact `D`."""

    def compute() -> list[tuple[Tensor, Tensor]]:
        inputs, outputs, h = [], [], x
        for module in model:
            if isinstance(module, nn.Linear):
                inputs.append(h.detach())
                h = module(h)
                outputs.append(h)
            else:
                h = module(h)
        p = h.detach().softmax(1)
        if exact:
            columns = [p[:, c : c + 1].sqrt() * (torch.eye(CLASSES)[c] - p) for c in range(CLASSES)]
        else:
            columns = [p - nn.functional.one_hot(torch.multinomial(p, 1).squeeze(1), CLASSES)]
        A = [h.mT @ h / len(x) for h in inputs]
        B = [torch.zeros(a.shape[1], a.shape[1]) for a in outputs]
        for column in columns:
            for total, g in zip(B, torch.autograd.grad(h, outputs, column, retain_graph=True), strict=True):
                total.addmm_(g.mT, g)
        return list(zip(A, B, strict=True))

    return compute


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--examples", type=int, default=1000)
    options = parser.parse_args()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 1000), nn.ReLU(), nn.Linear(1000, 500), nn.ReLU(), nn.Linear(500, CLASSES))
    x, y = torch.randn(options.examples, 784), torch.randint(CLASSES, (options.examples,))
    candidates: dict[str, Callable[[], Timed]] = {
        "floor, one sample": lambda: floor(model, x, exact=False),
        "natgrad K-FAC, one sample": lambda: ours(model, x, y, "kfac", "mc"),
        "curvlinops K-FAC, one sample": lambda: curvlinops(model, x, y, "kfac", "MC"),
        "floor, exact": lambda: floor(model, x, exact=True),
        "natgrad K-FAC, exact": lambda: ours(model, x, y, "kfac", "exact"),
        "curvlinops K-FAC, exact": lambda: curvlinops(model, x, y, "kfac", "TYPE2"),
        "nngeometry K-FAC, exact": lambda: nngeometry(model, x, y),
        "natgrad EKFAC, one sample": lambda: ours(model, x, y, "ekfac", "mc"),
        "curvlinops EKFAC, one sample": lambda: curvlinops(model, x, y, "ekfac", "MC"),
    }
    console = Console()
    timed: dict[str, Timed] = {}
    for name, make in candidates.items():
        try:
            timed[name] = make()
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
    table = Table(title=f"MLP 784-1000-500-10, {options.examples} examples ({machine})")
    for column in ("", "ms (median)", "of the floor"):
        table.add_column(column, justify="right" if column else "left")
    for name, values in times.items():
        base = times["floor, exact" if "exact" in name else "floor, one sample"]
        ratio = statistics.median(v / b for v, b in zip(values, base, strict=True))
        table.add_row(name, f"{1e3 * statistics.median(values):.0f}", f"{ratio:.2f}")
    console.print(table)


if __name__ == "__main__":
    main()
