"""Laplace posteriors beside laplace-torch: the same trained classifier, its posterior and its predictive covariance.

    pip install -c constraints.txt laplace-torch scikit-learn
    python -m benchmarks.laplace_torch
    python -m benchmarks.laplace_torch --hidden 100 --skip full

The model is a multilayer perceptron on scikit-learn's digits, float64, trained with weight decay. Compared are the
covariances J P⁻¹ Jᵀ of the outputs at the test digits. laplace-torch holds weights and biases of a layer in blocks of
their own; natgrad's K-FAC couples them, and is asked for the two apart where the two libraries are to agree.
Times are taken in turns in one run.
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
from torch.func import functional_call, jacrev, vmap
from torch.utils.data import DataLoader, TensorDataset

import natgrad
from benchmarks.machine import machine

Vector = dict[str, Tensor]
Data = tuple[Tensor, Tensor]
LOSS = nn.CrossEntropyLoss()
STRUCTURES = {"kron": "kfac", "diag": "diagonal", "full": "dense"}


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
        loss = LOSS(model(x), y) + decay / len(x)
        loss.backward()
        return loss

    opt.step(closure)
    return model.eval()


def jacobian(model: nn.Module, x: Tensor) -> Vector:
    """Of every example's outputs: `(n, outputs, *shape)` for each parameter."""
    weights = {n: p.detach() for n, p in model.named_parameters()}
    return vmap(jacrev(lambda w, x: functional_call(model, w, x)), (None, 0))(weights, x)


def precision(model: nn.Module, data: Data, structure: str, **keywords: Any) -> natgrad.linalg.Operator:
    """Of the likelihood: the sum over the data."""
    return len(data[1]) * natgrad.gauss_newton(model, LOSS, data, structure, **keywords)


def covariance(P: natgrad.linalg.Operator, J: Vector, prior: float) -> Tensor:
    """`J (P + prior I)⁻¹ Jᵀ`, `(n, outputs, outputs)`, over the parameters that `P` has."""
    own = {n: J[n] for n in P.space.names or ()}
    solved = P.solve(own, prior)
    return torch.stack([own[n].flatten(2) @ solved[n].flatten(2).mT for n in own]).sum(0)


def apart(model: nn.Module, data: Data) -> list[natgrad.linalg.Operator]:
    """K-FAC of the weights and K-FAC of the biases, nothing between them: as laplace-torch holds them."""
    names = [n for n, _ in model.named_parameters()]
    weights = [n for n in names if n.endswith("weight")]
    return [precision(model, data, "kfac", params=own) for own in (weights, [n for n in names if n not in weights])]


def peer(model: nn.Module, data: Data, structure: str, prior: float) -> Any:
    from laplace import Laplace

    la = Laplace(model, "classification", "all", structure, prior_precision=prior)
    la.fit(DataLoader(TensorDataset(*data), batch_size=len(data[1])))
    return la


def peer_covariance(la: Any, x: Tensor) -> Tensor:
    return la._glm_predictive_distribution(x)[1].detach()


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest, relative to the largest entry."""
    return float((found - expected).abs().max() / expected.abs().max())


def agreement(model: nn.Module, data: Data, x: Tensor, prior: float, skip: list[str]) -> dict[str, tuple[float, float]]:
    """By structure: how far the predictive covariances are apart, and the posteriors' log-determinants."""
    J = jacobian(model, x)
    out = {}
    for theirs, ours in STRUCTURES.items():
        if theirs in skip:
            continue
        la = peer(model, data, theirs, prior)
        parts = apart(model, data) if theirs == "kron" else [precision(model, data, ours)]
        found = torch.stack([covariance(P, J, prior) for P in parts]).sum(0)
        logdet = torch.stack([P.logdet(prior) for P in parts]).sum()
        theirs_logdet = la.log_det_posterior_precision.detach()
        out[theirs] = difference(found, peer_covariance(la, x)), float((logdet / theirs_logdet - 1).abs())
    return out


def nearness(model: nn.Module, data: Data, x: Tensor, prior: float) -> dict[str, float]:
    """How far each covariance is from that of the whole Gauss-Newton matrix: `‖· − Σ‖ / ‖Σ‖` over all test points."""
    J = jacobian(model, x)
    whole = covariance(precision(model, data, "dense"), J, prior)
    found = {
        "laplace-torch, kron": peer_covariance(peer(model, data, "kron", prior), x),
        "natgrad, kfac": covariance(precision(model, data, "kfac"), J, prior),
        "natgrad, ekfac, not centered": covariance(precision(model, data, "ekfac", centered=False), J, prior),
        "natgrad, ekfac, centered": covariance(precision(model, data, "ekfac"), J, prior),
        "natgrad, block": covariance(precision(model, data, "block"), J, prior),
        "natgrad, diagonal": covariance(precision(model, data, "diagonal"), J, prior),
    }
    return {name: float((c - whole).norm() / whole.norm()) for name, c in found.items()}


def sampled(model: nn.Module, data: Data, x: Tensor, prior: float, draws: int) -> tuple[float, float]:
    """The largest difference of the mean class probabilities under `draws` weights of each side, in standard errors,
    and its root mean square."""
    la = peer(model, data, "kron", prior)
    space = natgrad.linalg.Space(tuple(p.shape for p in model.parameters()))
    weights = {n: p.detach() for n, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    moves = apart(model, data)
    own = {n: weights[n] + d for P in moves for n, d in P.sample(draws, prior, generator).items()}
    flat = la.sample(draws, generator=torch.Generator().manual_seed(1))
    theirs = dict(zip(weights, space.unflatten(flat), strict=True))
    probabilities = [
        vmap(lambda w: functional_call(model, w, x).softmax(-1))({n: p.detach() for n, p in side.items()})
        for side in (own, theirs)
    ]
    means = [p.mean(0) for p in probabilities]
    error = torch.stack([p.var(0) / draws for p in probabilities]).sum(0).sqrt()
    z = (means[0] - means[1]) / error
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
    console = Console()
    console.print(f"64-{options.hidden}-10, {options.train} digits, {options.test} to predict; {machine()}")

    table = Table("laplace-torch", "natgrad", "covariance", "log-determinant", title="largest relative difference")
    for structure, (covariances, logdets) in agreement(model, data, x, options.prior, options.skip).items():
        table.add_row(structure, STRUCTURES[structure], f"{covariances:.1e}", f"{logdets:.1e}")
    console.print(table)
    largest, rms = sampled(model, data, x, options.prior, options.draws)
    console.print(
        f"mean class probabilities of {options.draws} draws on each side: they differ by at most {largest:.1f} "
        f"standard errors, {rms:.2f} in root mean square"
    )
    if "full" not in options.skip:
        table = Table("", "relative distance", title="predictive covariance, from that of the whole matrix")
        for name, value in nearness(model, data, x, options.prior).items():
            table.add_row(name, f"{value:.3f}")
        console.print(table)

    table = Table(
        "", "laplace-torch, ms", "natgrad, ms", "ratio", title=f"medians of {options.rounds} rounds, in turns"
    )
    for theirs, ours in STRUCTURES.items():
        if theirs in options.skip:
            continue
        la, P = peer(model, data, theirs, options.prior), precision(model, data, ours)
        for what, sides in {
            "fit": (
                lambda s=theirs: peer(model, data, s, options.prior),
                lambda s=ours: precision(model, data, s).inverse(options.prior),
            ),
            "predict": (
                lambda la=la: peer_covariance(la, x),
                lambda P=P: covariance(P, jacobian(model, x), options.prior),
            ),
        }.items():
            times = in_turns(dict(zip(("theirs", "ours"), sides, strict=True)), options.rounds)
            ratio = statistics.median(a / b for a, b in zip(times["theirs"], times["ours"], strict=True))
            medians = [f"{1e3 * statistics.median(t):.1f}" for t in times.values()]
            table.add_row(f"{theirs}: {what}", *medians, f"{ratio:.2f}")
    console.print(table)


if __name__ == "__main__":
    main()
