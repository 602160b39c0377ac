"""Laplace posteriors beside laplace-torch: the same trained classifier, its posterior and what it predicts.

    pip install -c constraints.txt laplace-torch scikit-learn
    python -m benchmarks.laplace_torch
    python -m benchmarks.laplace_torch --hidden 100 --skip full

The model is a multilayer perceptron on scikit-learn's digits, float64, trained with weight decay. laplace-torch holds
weights and biases of a layer in blocks of their own; natgrad's K-FAC couples them, and is asked for the two apart where
the two libraries are to agree. Times are taken in turns in one run.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import natgrad
from benchmarks.machine import machine

Vector = dict[str, Tensor]
Data = tuple[Tensor, Tensor]
LOSSES = {"classification": nn.CrossEntropyLoss(), "regression": nn.MSELoss()}
STRUCTURES = {"kron": "kfac", "diag": "diagonal", "full": "dense"}
SIGMA = 0.6
"""The noise that the regression is given."""


def digits(train: int, test: int) -> tuple[Data, Tensor]:
    from sklearn.datasets import load_digits

    x, y = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
    x = x / 16
    return (x[:train], y[:train]), x[train : train + test]


def trained(hidden: int, data: Data, prior: float, iterations: int = 200) -> nn.Sequential:
    """A classifier at (about) the maximum of its posterior, in float64."""
    torch.manual_seed(0)
    x, y = data
    model = nn.Sequential(nn.Linear(x.shape[1], hidden), nn.Tanh(), nn.Linear(hidden, 10)).double()
    opt = torch.optim.LBFGS(model.parameters(), max_iter=iterations, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        opt.zero_grad()
        decay = prior / 2 * torch.stack([p.square().sum() for p in model.parameters()]).sum()
        loss = nn.functional.cross_entropy(model(x), y) + decay / len(x)
        loss.backward()
        return loss

    opt.step(closure)
    return model.eval()


def posterior(
    model: nn.Module, data: Data, structure: str, prior: float, subset: str = "all", task: str = "classification"
) -> natgrad.LaplacePosterior:
    """The same matrix as laplace-torch's."""
    noise = SIGMA if task == "regression" else None
    return natgrad.laplace(
        model, LOSSES[task], data, STRUCTURES[structure], subset, prior_precision=prior, sigma_noise=noise,
        bias="apart" if structure == "kron" else "coupled",
    )  # fmt: skip


def peer(
    model: nn.Module, data: Data, structure: str, prior: float, subset: str = "all", task: str = "classification"
) -> Any:
    from laplace import Laplace

    noise = SIGMA if task == "regression" else 1.0
    la = Laplace(model, task, subset, structure, prior_precision=prior, sigma_noise=noise)
    la.fit(DataLoader(TensorDataset(*data), batch_size=len(data[1])))
    return la


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest, relative to the largest entry."""
    return float((found - expected).abs().max() / expected.abs().max())


def agreement(
    model: nn.Module, data: Data, x: Tensor, prior: float, structure: str, subset: str, task: str
) -> dict[str, float]:
    """The largest relative difference of everything that both compute."""
    P, la = (make(model, data, structure, prior, subset, task) for make in (posterior, peer))
    covariance = la._glm_predictive_distribution(x)[1].detach()
    out = {
        "marginal likelihood": difference(P.log_marginal_likelihood(), la.log_marginal_likelihood().detach()),
        "covariance": difference(P.functional_variance(x), covariance),
    }
    if task == "regression":
        mean, _ = la(x, pred_type="glm")
        prediction = P.predict(x)
        out["mean"] = difference(prediction.mean, mean.detach())
        variance = covariance.diagonal(dim1=1, dim2=2) + SIGMA**2
        return out | {"variance": difference(prediction.variance, variance)}
    for link in ("probit", "bridge", "bridge_norm"):
        out[link] = difference(P.predict(x, link=link), la(x, pred_type="glm", link_approx=link).detach())
    return out


def nearness(model: nn.Module, data: Data, x: Tensor, prior: float) -> dict[str, float]:
    """How far each covariance is from that of the whole Fisher matrix: `‖· − Σ‖ / ‖Σ‖` over all test points."""
    ways: dict[str, dict[str, Any]] = {
        "laplace-torch's: K-FAC, weight and bias apart": {"structure": "kfac", "bias": "apart"},
        "K-FAC": {"structure": "kfac"},
        "EKFAC": {"structure": "ekfac"},
        "EKFAC, centered": {"structure": "ekfac", "centered": True},
        "block": {"structure": "block"},
        "diagonal": {"structure": "diagonal"},
    }
    loss = LOSSES["classification"]
    whole = natgrad.laplace(model, loss, data, "dense", prior_precision=prior).functional_variance(x)
    found = {
        name: natgrad.laplace(model, loss, data, prior_precision=prior, **how).functional_variance(x)
        for name, how in ways.items()
    }
    return {name: float((c - whole).norm() / whole.norm()) for name, c in found.items()}


def sampled(model: nn.Module, data: Data, x: Tensor, prior: float, draws: int) -> tuple[float, float]:
    """The largest difference of the mean class probabilities under `draws` networks of each side, in standard errors,
    and its root mean square."""
    la, P = (make(model, data, "kron", prior) for make in (peer, posterior))
    own = P.sample(x, draws, linearized=False, generator=torch.Generator().manual_seed(0))
    theirs = la.predictive_samples(x, "nn", draws, generator=torch.Generator().manual_seed(1)).detach()
    error = (own.var(0) / draws + theirs.var(0) / draws).sqrt()
    z = (own.mean(0) - theirs.mean(0)) / error
    return float(z.abs().max()), float(z.square().mean().sqrt())


def in_turns(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, one after the other, `rounds` times."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for compute in sides.values():
        compute()  # warms up
    for _ in range(rounds):
        for name, compute in sides.items():
            start = time.perf_counter()
            compute()
            times[name].append(time.perf_counter() - start)
    return times


def timed(
    model: nn.Module, data: Data, x: Tensor, prior: float, structure: str
) -> dict[str, dict[str, Callable[[], object]]]:
    """What is timed: the fit, the prior, the prediction, of both."""
    la, P = peer(model, data, structure, prior), posterior(model, data, structure, prior)
    kind = "diag" if structure == "diag" else "scalar"
    return {
        "fit": {
            "theirs": lambda: peer(model, data, structure, prior),
            "ours": lambda: posterior(model, data, structure, prior),
        },
        "prior (natgrad: with the fit)": {
            "theirs": lambda: la.optimize_prior_precision("glm", prior_structure=kind),
            "ours": lambda: posterior(model, data, structure, prior).fit_prior("entry" if kind == "diag" else "one"),
        },
        "predict": {"theirs": lambda: la(x, pred_type="glm"), "ours": lambda: P.predict(x)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=20)
    parser.add_argument("--train", type=int, default=1000)
    parser.add_argument("--test", type=int, default=100)
    parser.add_argument("--prior", type=float, default=1.0, help="the prior's precision")
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--skip", nargs="*", default=[], choices=list(STRUCTURES))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    data, x = digits(options.train, options.test)
    model = trained(options.hidden, data, options.prior)
    console = Console(width=120)
    console.print(f"64-{options.hidden}-10, {options.train} digits, {options.test} to predict; {machine()}")

    table = Table("laplace-torch", "weights", "task", "largest relative differences", title="the same figures")
    structures = [s for s in STRUCTURES if s not in options.skip]
    for structure in structures:
        for subset in ("all", "last_layer"):
            for task in LOSSES:
                target = data[1] if task == "classification" else nn.functional.one_hot(data[1], 10).double()
                found = agreement(model, (data[0], target), x, options.prior, structure, subset, task)
                table.add_row(structure, subset, task, ", ".join(f"{n} {v:.0e}" for n, v in found.items()))
    console.print(table)
    largest, rms = sampled(model, data, x, options.prior, options.draws)
    console.print(
        f"mean class probabilities of {options.draws} networks on each side: they differ by at most {largest:.1f} "
        f"standard errors, {rms:.2f} in root mean square"
    )
    if "full" not in options.skip:
        table = Table("", "relative distance", title="predictive covariance, from that of the whole matrix")
        for name, value in nearness(model, data, x, options.prior).items():
            table.add_row(name, f"{value:.3f}")
        console.print(table)

    title = f"medians of {options.rounds} rounds, in turns"
    table = Table("", "laplace-torch, ms", "natgrad, ms", "ratio", title=title)
    for structure in structures:
        for what, sides in timed(model, data, x, options.prior, structure).items():
            times = in_turns(sides, options.rounds)
            ratio = statistics.median(a / b for a, b in zip(times["theirs"], times["ours"], strict=True))
            medians = [f"{1e3 * statistics.median(t):.1f}" for t in times.values()]
            table.add_row(f"{structure}: {what}", *medians, f"{ratio:.2f}")
    console.print(table)


if __name__ == "__main__":
    main()
