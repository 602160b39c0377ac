"""Why do Laplace posteriors lose to MAP in likelihood and calibration on easy sets? Each possible cause by itself.

    pip install -c constraints.txt scikit-learn mlxtend
    pip install --no-deps laplace-torch torchmetrics lightning-utilities    # for one row
    python -m benchmarks.uncertainty_causes --splits 5

The sets, splits, network and training are those of `benchmarks.uncertainty`, and so are the figures. The rows:

- link: the prediction from the same Gaussian over outputs by probit, by draws of the outputs (the integral itself), or
  by the Laplace bridge. If draws are as bad as probit, the link is not the cause.
- prior: that of the training, fitted afterwards, or fitted in turns with the weights ("in turns": four rounds of
  training and fitting), with MAP at the same prior beside it.
- matrix: the whole Fisher matrix in the place of K-FAC.
- temperature: the best of five on the fifth of the training half that also chose the prior.
- the posterior itself, by Hamiltonian Monte Carlo from MAP, with the prior of the training. What the Gaussian loses
  against it is the error of Laplace's approximation.
- laplace-torch, where it is installed: K-FAC with the prior of the training. "differs by" is the largest difference of
  its probabilities (means and variances) from natgrad's with `bias="apart"`.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call

import natgrad
from benchmarks.machine import machine
from benchmarks.uncertainty import Answer, Set, Split, auroc, averaged, chosen, scores, sets, shown, split, trained

TEMPERATURES = (1.0, 0.3, 0.1, 0.03, 0.01)
DRAWS = 1000
ROUNDS = 4


def posterior(s: Split, model: nn.Module, prior: float, noise: float, structure: str, **how: Any) -> Any:
    loss = nn.CrossEntropyLoss() if s.is_class else nn.MSELoss()
    sigma = {} if s.is_class else {"sigma_noise": noise}
    return natgrad.laplace(model, loss, (s.x, s.y), structure, prior_precision=prior, **sigma, **how)


def answer(P: Any, x: Tensor, **how: Any) -> Answer:
    found = P.predict(x, **how)
    return found if isinstance(found, Tensor) else (found.mean, found.variance)


def temperature(s: Split, seed: int, prior: float, noise: float) -> float:
    """The best on the fifth that `chosen` holds back."""
    fifth = len(s.x) // 5
    part = s._replace(x=s.x[fifth:], y=s.y[fifth:])
    held = s._replace(x_test=s.x[:fifth], y_test=s.y[:fifth])
    model = trained(part, seed, prior, noise)
    P, found = posterior(part, model, prior, noise, "kfac"), []
    for t in TEMPERATURES:
        P.temperature = t
        found.append((scores(answer(P, held.x_test), held)["NLL"], t))
    return min(found)[1]


def in_turns(s: Split, seed: int, prior: float, noise: float) -> tuple[nn.Module, float]:
    """Training and fitting the prior in turns (Immer et al. 2021, arXiv:2104.04975)."""
    for _ in range(ROUNDS):
        model = trained(s, seed, prior, noise)
        P = posterior(s, model, prior, noise, "kfac").fit_prior(noise=False)
        prior = float(next(iter(P.prior_precision.values())))
    return trained(s, seed, prior, noise), prior


def hamiltonian(s: Split, model: nn.Module, prior: float, noise: float, seed: int, draws: int = 250) -> Answer:
    """Predictions averaged over draws of the posterior: trajectories of a quarter of the prior's period. Their step
    size is adapted to 80% acceptance in the first 150 draws, which are left out (Neal 2011, arXiv:1206.1901)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {n: p.shape for n, p in model.named_parameters()}
    theta = torch.cat([p.detach().flatten() for p in model.parameters()])

    def outputs(theta: Tensor, x: Tensor) -> Tensor:
        parts = theta.split([shape.numel() for shape in shapes.values()])
        return functional_call(model, {n: t.view(shapes[n]) for n, t in zip(shapes, parts, strict=True)}, x)

    def energy(theta: Tensor) -> tuple[float, Tensor]:
        leaf = theta.requires_grad_()
        f = outputs(leaf, s.x)
        loss = (
            nn.functional.cross_entropy(f, s.y, reduction="sum")
            if s.is_class
            else (f - s.y).square().sum() / (2 * noise**2)
        )
        total = loss + prior / 2 * leaf.square().sum()
        (slope,) = torch.autograd.grad(total, leaf)
        return float(total), slope

    length, step, found, burn = 1.5 / prior**0.5, 0.02, [], 150
    value, slope = energy(theta)
    for i in range(burn + draws):
        p = torch.randn(len(theta), dtype=theta.dtype, generator=generator)
        start = value + 0.5 * float(p @ p)
        x, g, steps = theta, slope, min(200, max(5, round(length / step)))
        for _ in range(steps):
            p = p - step / 2 * g
            x = (x + step * p).detach()
            new, g = energy(x)
            p = p - step / 2 * g
        accept = min(1.0, float(torch.tensor(start - new - 0.5 * float(p @ p)).exp()))
        if torch.rand((), generator=generator) < accept:
            theta, value, slope = x.detach(), new, g
        if i < burn:
            step *= 1.1 if accept > 0.8 else 0.85
        else:
            with torch.no_grad():
                found.append(outputs(theta, s.x_test))
    return averaged(torch.stack(found), s, noise)


def laplace_torch(s: Split, model: nn.Module, prior: float, noise: float) -> tuple[Answer, float]:
    """Its prediction, and the largest difference from natgrad's."""
    from laplace import Laplace

    from benchmarks.laplace_torch import DataLoader, TensorDataset

    task = "classification" if s.is_class else "regression"
    la = Laplace(model, task, "all", "kron", prior_precision=prior, sigma_noise=1.0 if s.is_class else noise)
    la.fit(DataLoader(TensorDataset(s.x, s.y), batch_size=len(s.y)))
    own = answer(posterior(s, model, prior, noise, "kfac", bias="apart"), s.x_test)
    if isinstance(own, Tensor):
        theirs = la(s.x_test, pred_type="glm", link_approx="probit").detach()
        return theirs, float((theirs - own).abs().max())
    mean, covariance = la._glm_predictive_distribution(s.x_test)
    theirs = mean.detach(), covariance.detach().diagonal(dim1=1, dim2=2) + noise**2
    return theirs, max(float((a - b).abs().max()) for a, b in zip(theirs, own, strict=True))


def answers(s: Split, seed: int, exact: bool, peer: bool, links_alone: bool = False) -> dict[str, Answer]:
    prior, noise = chosen(s, seed)
    model = trained(s, seed, prior, noise)
    x = s.x_test
    found: dict[str, Answer] = {}
    P = posterior(s, model, prior, noise, "kfac")
    with torch.no_grad():
        found["MAP"] = averaged(model(x)[None], s, noise)
    links = ("probit", "mc", "bridge") if s.is_class else (None,)
    for link in links:
        found[f"K-FAC, {link or 'prior of the training'}"] = answer(P, x, link=link, samples=DRAWS)
    P.fit_prior(noise=False)
    for link in links[:1] + links[2:]:
        found[f"K-FAC, fitted prior, {link}" if link else "K-FAC, fitted prior"] = answer(P, x, link=link)
    if links_alone:
        return found
    P = posterior(s, model, prior, noise, "kfac")
    P.temperature = temperature(s, seed, prior, noise)
    found["K-FAC, temperature by validation"] = answer(P, x)
    again, delta = in_turns(s, seed, prior, noise)
    with torch.no_grad():
        found["MAP, prior in turns"] = averaged(again(x)[None], s, noise)
    found["K-FAC, prior in turns"] = answer(posterior(s, again, delta, noise, "kfac"), x)
    if sum(p.numel() for p in model.parameters()) <= 4000:
        D = posterior(s, model, prior, noise, "dense")
        found["whole matrix, draws" if s.is_class else "whole matrix"] = answer(
            D, x, link="mc" if s.is_class else None, samples=DRAWS
        )
    if exact:
        found["the posterior itself"] = hamiltonian(s, model, prior, noise, seed)
    if peer:
        found["laplace-torch"], difference = laplace_torch(s, model, prior, noise)
        found["differs by"] = torch.tensor(difference)
    return found


def measured(data: Set, splits: int, exact: bool, peer: bool) -> dict[str, dict[str, list[float]]]:
    """By row and figure: one value for each split."""
    found: dict[str, dict[str, list[float]]] = {}
    classes = int(data.y.max()) + 1 if data.is_class else 0
    for seed in range(splits):
        s = split(data, seed)
        for row, its in answers(s, seed, exact, peer).items():
            values = {"NLL": float(its)} if isinstance(its, Tensor) and its.ndim == 0 else scores(its, s)
            for figure, value in values.items():
                found.setdefault(row, {}).setdefault(figure, []).append(value)
        if classes > 2:
            s = split(data, seed, without=seed % classes)
            for row, its in answers(s, seed, False, False, links_alone=True).items():
                assert isinstance(its, Tensor)
                value = auroc(its, s.y_test == seed % classes)
                found[row].setdefault("AUROC, unknown class", []).append(value)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument(
        "--sets", nargs="*", default=["iris", "wine", "breast_cancer", "digits", "diabetes", "auto mpg"]
    )
    parser.add_argument("--exact", nargs="*", default=["iris", "wine", "breast_cancer", "diabetes", "auto mpg"])
    parser.add_argument("--beside", action="store_true", help="compare with laplace-torch alone")
    parser.add_argument("--results", type=Path, help="a JSON file for the values of all splits")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    try:
        import laplace  # noqa: F401

        peer = True
    except ImportError:
        peer = False
    console = Console(width=120)
    console.print(f"{options.splits} splits; {machine()}")
    results: dict[str, Any] = {}
    own = sets()
    for name in options.sets if options.beside else []:
        largest = 0.0
        for seed in range(options.splits):
            s = split(own[name], seed)
            prior, noise = chosen(s, seed)
            largest = max(largest, laplace_torch(s, trained(s, seed, prior, noise), prior, noise)[1])
        console.print(f"{name}: laplace-torch's predictions differ from natgrad's by at most {largest:.0e}")
    for name in [] if options.beside else options.sets:
        found = measured(own[name], options.splits, name in options.exact, peer)
        largest = max(found.pop("differs by", {"NLL": [0.0]})["NLL"])
        figures = list(found["MAP"])
        table = Table("", *figures, title=name)
        for row, values in found.items():
            table.add_row(row, *(shown(values[f], found["MAP"][f]) if f in values else "" for f in figures))
        console.print(table)
        if peer:
            console.print(f"laplace-torch's predictions differ from natgrad's by at most {largest:.0e}")
        results[name] = found | {"differs by": largest}
        if options.results:
            options.results.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
