"""`natgrad inspect`: the residual report of a user's own model."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parallel import DistributedDataParallel

from natgrad import fisher, residual
from natgrad.checks.errors import UserError
from natgrad.checks.values import did_you_mean
from natgrad.cli.device import check_device, on_device
from natgrad.cli.report import check_seed, check_writable, write_json, write_page, writing
from natgrad.curvature.problem import Forward
from natgrad.linalg.density import SpectralDensity
from natgrad.losses.base import ESTIMATORS
from natgrad.report.advice import LABELS, Advice, advice
from natgrad.report.residual import COLUMNS, ResidualReport
from natgrad.report.residual_figures import PANELS, draw
from natgrad.report.spectrum import spectrum_advice, spectrum_figures
from natgrad.report.words import visible
from natgrad.study.target import load_problem, words


def run_inspect(target: str, estimator: str, seed: int, permutations: int, out: Path, device: str | None) -> None:
    """Measure what K-FAC neglects for the model, loss and data of `MODULE:FUNCTION`, and write the report to `out`.

    `device` is the device that model, loss and each batch are moved to; None leaves them where they are.

    Under torchrun, the function is called on every rank and returns the rank's part of the data; rank 0 writes.
    """
    if estimator not in ESTIMATORS:
        raise UserError(
            f"--estimator was {estimator!r}; expected one of {', '.join(ESTIMATORS)}, or leave it out for exact"
            f"{did_you_mean(estimator, ESTIMATORS) or '.'}"
        )
    if permutations < 0:
        raise UserError(f"--permutations was {permutations}; expected 0 or more; leave it out for 200.")
    check_seed(seed)
    place = None if device is None else check_device(device)
    torch.manual_seed(seed)
    model, loss, data, forward = load_problem(target)
    if place is not None:
        model, loss, data = model.to(place), loss.to(place), on_device(data, place)
    with _ranks(model) as (model, rank):
        if rank == 0:
            check_writable(out)
        report = _residual(target, model, loss, data, forward, estimator, seed, permutations)
        density = _density(model, loss, data, forward, estimator, seed)
    if rank > 0:
        return
    console = Console()
    console.print(visible(report.table(), lines=True), markup=False, highlight=False, soft_wrap=True)
    remarks = [*advice(report), *spectrum_advice(density), *of_mode(model)]
    for remark in remarks:
        console.print(visible(str(remark)), markup=False, highlight=False, soft_wrap=True)
    settings = {"target": target, "estimator": estimator, "seed": seed, "permutations": permutations}
    with writing(out):
        page = write_all(report, density, remarks, settings, out)
    console.print(f"Report: {visible(str(page))}", soft_wrap=True, markup=False, highlight=False)


@contextlib.contextmanager
def _ranks(model: nn.Module) -> Iterator[tuple[nn.Module, int]]:
    """The model on the ranks that torchrun has started, and this process's rank; without torchrun, the model
    unchanged."""
    if "WORLD_SIZE" not in os.environ or isinstance(model, DistributedDataParallel):
        yield model, dist.get_rank() if dist.is_initialized() else 0
        return
    on_gpu = any(p.is_cuda for p in model.parameters())
    began = not dist.is_initialized()
    if began:
        dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield DistributedDataParallel(model), dist.get_rank()
    finally:
        if began:
            dist.destroy_process_group()


def of_mode(model: nn.Module) -> list[Advice]:
    """Advice for a model that is inspected in training mode."""
    if any(isinstance(m, _DropoutNd) and m.training and m.p > 0 for m in model.modules()):
        return [
            Advice("do", "the model is in training mode, and dropout was drawn: return model.eval() for a trained one.")
        ]
    return []


def write_all(
    report: ResidualReport, density: SpectralDensity, remarks: list[Advice], settings: dict[str, Any], out: Path
) -> Path:
    """Write results.json, the pictures and report.html to `out`; return the report's path."""
    said = [a._asdict() for a in remarks]
    spectrum = spectrum_figures(density)
    write_json({**settings, "advice": said, "spectrum": spectrum, "layers": report.to_dict()}, out / "results.json")
    pictures = {name: out / f"{name}.png" for name in PANELS}
    for name, picture in pictures.items():
        draw(report, [PANELS[name]], picture)
    pictures["spectrum"] = out / "spectrum.png"
    density.plot(pictures["spectrum"])
    page = out / "report.html"
    write_page(
        "inspect.html.jinja",
        pictures,
        page,
        **settings,
        remarks=remarks,
        labels=LABELS,
        headings=COLUMNS,
        rows=report.rows(),
        cases=sorted({layer.cases for layer in report.values()}),
        unbounded=any(layer.bound is None for layer in report.values()),
    )
    return page


def _density(
    model: nn.Module, loss: nn.Module, data: Any, forward: Forward | None, estimator: str, seed: int
) -> SpectralDensity:
    """The eigenvalues of K-FAC's matrix."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    generator = torch.Generator(device).manual_seed(seed)
    F = fisher(model, loss, data, "kfac", forward=forward, estimator=estimator, generator=generator)
    return F.spectral_density(generator=generator)


def _residual(
    target: str,
    model: nn.Module,
    loss: nn.Module,
    data: Any,
    forward: Forward | None,
    estimator: str,
    seed: int,
    permutations: int,
) -> ResidualReport:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    generator = torch.Generator(device).manual_seed(seed)
    try:
        return residual(
            model,
            loss,
            data,
            forward=forward,
            estimator=estimator,
            generator=generator,
            permutations=permutations,
            progress=True,
        )
    except (ValueError, TypeError, RuntimeError) as error:  # RuntimeError: from the model, on data of a wrong shape
        raise UserError(f"what {target} returned cannot be inspected: {words(error)}") from error
