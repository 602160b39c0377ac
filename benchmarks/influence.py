"""Influence scores beside kronfluence: the same classifier, ∇ℓ_testᵀ (G + λI)⁻¹ ∇ℓ_train for every pair.

    pip install -c constraints.txt kronfluence scikit-learn
    python -m benchmarks.influence
    python -m benchmarks.influence --hidden 200 --rounds 5

The model is a multilayer perceptron on scikit-learn's digits, float64. kronfluence's factors are those of `[h; 1]`,
so natgrad's are not centered. Its Fisher matrix is sampled or empirical. It becomes exact where it is given every
example once with each class c, with the loss weighted by √(K p_c) of K classes; then both compute the same matrix.
Times are those of one sampled label for each example on both sides, taken in turns in one run.
"""

from __future__ import annotations

import argparse
import copy
import logging
import statistics
import tempfile
import warnings
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.data import TensorDataset

import natgrad
from benchmarks.laplace_torch import Data, Vector, difference, digits, in_turns, trained
from benchmarks.machine import machine

LOSS = nn.CrossEntropyLoss()
CLASSES = 10
DENSE = 5000  # parameters up to which the whole matrix is formed


def gradients(model: nn.Module, x: Tensor, y: Tensor) -> Vector:
    """Of every example's loss, `(n, *shape)` for each parameter."""
    weights = {n: p.detach() for n, p in model.named_parameters()}
    return vmap(grad(lambda w, x, y: LOSS(functional_call(model, w, x), y)), (None, 0, 0))(weights, x, y)


def scores(
    model: nn.Module, data: Data, queries: Data, structure: str, estimator: str, damping: float, centered: bool = False
) -> Tensor:
    """`(queries, examples)`."""
    F = natgrad.fisher(model, LOSS, data, structure, estimator=estimator, centered=centered)
    solved = F.solve(gradients(model, *queries), damping)
    each = gradients(model, *data)
    return torch.stack([solved[n].flatten(1) @ each[n].flatten(1).mT for n in each]).sum(0)


def peer_scores(model: nn.Module, data: Data, queries: Data, strategy: str, estimator: str, damping: float) -> Tensor:
    """kronfluence's, with everything in float64. It writes to a folder, which is removed."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments

    task = task_of(estimator)
    fitted = data
    if estimator == "exact":
        fitted = data[0].repeat_interleave(CLASSES, 0), torch.arange(CLASSES).repeat(len(data[0]))
    factors = FactorArguments(
        strategy=strategy,
        use_empirical_fisher=estimator == "empirical",
        activation_covariance_dtype=torch.float64,
        gradient_covariance_dtype=torch.float64,
        per_sample_gradient_dtype=torch.float64,
        lambda_dtype=torch.float64,
    )
    args = ScoreArguments(
        damping_factor=damping,
        per_sample_gradient_dtype=torch.float64,
        precondition_dtype=torch.float64,
        score_dtype=torch.float64,
    )
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer(
            "digits",
            prepare_model(copy.deepcopy(model), task),
            task,
            cpu=True,
            log_level=logging.ERROR,
            disable_tqdm=True,
            output_dir=folder,
        )
        size = len(fitted[0])
        analyzer.fit_all_factors("factors", TensorDataset(*fitted), per_device_batch_size=size, factor_args=factors)
        analyzer.compute_pairwise_scores(
            "scores",
            "factors",
            query_dataset=TensorDataset(*queries),
            train_dataset=TensorDataset(*data),
            per_device_query_batch_size=len(queries[0]),
            per_device_train_batch_size=len(data[0]),
            score_args=args,
        )
        return analyzer.load_pairwise_scores("scores")["all_modules"]


def task_of(estimator: str) -> Any:
    from kronfluence.task import Task

    class Digits(Task):
        def compute_train_loss(self, batch: Data, model: nn.Module, sample: bool = False) -> Tensor:
            x, y = batch
            logits = model(x)
            if not sample:
                return nn.functional.cross_entropy(logits, y, reduction="sum")
            p = logits.detach().softmax(1)
            if estimator == "mc":
                return nn.functional.cross_entropy(logits, p.multinomial(1).squeeze(1), reduction="sum")
            weight = (CLASSES * p.gather(1, y[:, None]).squeeze(1)).sqrt()
            return weight @ nn.functional.cross_entropy(logits, y, reduction="none")

        def compute_measurement(self, batch: Data, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

    return Digits()


def agreement(model: nn.Module, data: Data, queries: Data, damping: float) -> dict[tuple[str, str], float]:
    """By structure and estimator: the largest difference of the scores, relative to the largest score."""
    return {
        (structure, estimator): difference(
            scores(model, data, queries, structure, estimator, damping),
            peer_scores(model, data, queries, structure, estimator, damping),
        )
        for structure in ("kfac", "ekfac", "diagonal")
        for estimator in ("exact", "empirical")
    }


def nearness(model: nn.Module, data: Data, queries: Data, damping: float) -> dict[str, float]:
    """The correlation of the scores with those of the whole Gauss-Newton matrix, the mean over the queries."""
    whole = scores(model, data, queries, "dense", "exact", damping)
    ways: dict[str, tuple[str, str, bool]] = {
        "K-FAC, one sampled label": ("kfac", "mc", False),
        "EKFAC, one sampled label": ("ekfac", "mc", False),
        "K-FAC, exact": ("kfac", "exact", False),
        "EKFAC, exact": ("ekfac", "exact", False),
        "EKFAC, exact, centered": ("ekfac", "exact", True),
        "diagonal, exact": ("diagonal", "exact", False),
    }
    out = {}
    for name, (structure, estimator, centered) in ways.items():
        found = scores(model, data, queries, structure, estimator, damping, centered)
        pairs = [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(found, whole, strict=True)]
        out[name] = float(torch.stack(pairs).mean())
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=20)
    parser.add_argument("--train", type=int, default=500)
    parser.add_argument("--test", type=int, default=50)
    parser.add_argument("--damping", type=float, default=1e-3)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    data, x = digits(options.train, options.test)
    model = trained(options.hidden, data, prior=options.damping * options.train)
    queries = x, model(x).argmax(1)
    console = Console()
    console.print(
        f"64-{options.hidden}-10, {options.train} digits, {options.test} queries, damping {options.damping}; "
        f"{machine()}"
    )

    table = Table("structure", "Fisher matrix", "largest relative difference", title="scores, natgrad and kronfluence")
    for (structure, estimator), value in agreement(model, data, queries, options.damping).items():
        table.add_row(structure, estimator, f"{value:.1e}")
    console.print(table)
    if sum(p.numel() for p in model.parameters()) <= DENSE:
        table = Table("", "correlation", title="natgrad's scores, with those of the whole Gauss-Newton matrix")
        for name, value in nearness(model, data, queries, options.damping).items():
            table.add_row(name, f"{value:.3f}")
        console.print(table)

    table = Table("", "kronfluence, ms", "natgrad, ms", "ratio", title=f"medians of {options.rounds} rounds, in turns")
    for structure in ("kfac", "ekfac"):
        arguments = (model, data, queries, structure, "mc", options.damping)
        sides = {"theirs": lambda a=arguments: peer_scores(*a), "ours": lambda a=arguments: scores(*a)}
        times = in_turns(sides, options.rounds)
        ratio = statistics.median(a / b for a, b in zip(times["theirs"], times["ours"], strict=True))
        table.add_row(structure, *(f"{1e3 * statistics.median(t):.1f}" for t in times.values()), f"{ratio:.2f}")
    console.print(table)


if __name__ == "__main__":
    main()
