"""Errors of trace estimates on the four spectra of the experiments of Epperly, Tropp & Webber (2024), 1,000 rows.

    python -m benchmarks.traces
    python -m benchmarks.traces --trials 200

Flat: eigenvalues from 3 to 1 at equal distances. Powers: i⁻². Exponential: 0.7^i. Step: fifty ones, then 10⁻³. The
eigenvectors are random. Of each method and number of products: the root mean square of the relative error, and beside
Hutchinson's the one that its formula says, `√(2/m (‖M‖² − Σ M_ii²)) / tr M`.
"""

from __future__ import annotations

import argparse

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.machine import machine
from natgrad.linalg import Dense

N = 1000
METHODS = ("hutchinson", "hutch++", "xtrace")


def spectra() -> dict[str, Tensor]:
    i = torch.arange(N, dtype=torch.float64)
    return {
        "flat": 3 - 2 * i / (N - 1),
        "powers": (i + 1) ** -2,
        "exponential": 0.7**i,
        "step": torch.where(i < 50, 1.0, 1e-3).double(),
    }


def with_spectrum(e: Tensor) -> Dense:
    g = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(N, N, dtype=torch.float64, generator=g))[0]
    M = (Q * e) @ Q.mT
    return Dense((M + M.mT) / 2)


def error(M: Dense, method: str, products: int, trials: int) -> float:
    g = torch.Generator().manual_seed(1)
    found = torch.stack([M.estimate_trace(products, g, method).value for _ in range(trials)])
    return float((found / M.trace() - 1).square().mean().sqrt())


def by_formula(M: Dense, products: int) -> float:
    off = M.matrix.square().sum() - M.matrix.diagonal().square().sum()
    return float((2 / products * off).sqrt() / M.trace())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--products", type=int, nargs="*", default=[24, 60, 120, 240])
    options = parser.parse_args()
    console = Console(width=110)
    console.print(f"{options.trials} trials; {machine()}")
    for name, e in spectra().items():
        M = with_spectrum(e)
        table = Table("products", *METHODS, "hutchinson, by its formula", title=name)
        for m in options.products:
            errors = (error(M, method, m, options.trials) for method in METHODS)
            table.add_row(str(m), *(f"{x:.1e}" for x in errors), f"{by_formula(M, m):.1e}")
        console.print(table)


if __name__ == "__main__":
    main()
