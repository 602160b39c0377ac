"""A spectrum in words: how far the curvature is concentrated, and what that means for a step and for a damping."""

from __future__ import annotations

from typing import Any

import torch

from natgrad.linalg.density import SpectralDensity
from natgrad.report.advice import Advice

MOST = 0.9
"""The share of the trace that is counted as most of the curvature."""
SPREAD, CONCENTRATED = 0.5, 0.1
"""With most of the curvature in more than the first share of all directions it is called spread, and with most of it in
less than the second it is called concentrated."""
SMALL = 1e-3
"""An eigenvalue below this share of the largest one is called small."""


def spectrum_figures(density: SpectralDensity) -> dict[str, Any]:
    """The largest eigenvalue, the mean, how many eigenvalues make up most of the trace, and the share of small ones.

    Example:
        >>> import torch
        >>> from natgrad.linalg import Dense
        >>> figures = spectrum_figures(Dense(torch.diag(torch.tensor([8.0, 1.0, 1.0, 0.0]))).spectral_density())
        >>> figures["most"], figures["small"], figures["mean"]
        (2, 0.25, 2.5)
    """
    e = density.nodes.double().flip(0).clamp_min(0)
    counts = density.weights.double().flip(0) * density.size
    reached = (e * counts).cumsum(0) >= MOST * (e * counts).sum()
    first = int(reached.to(torch.int8).argmax())
    return {
        "eigenvalues": density.size,
        "largest": float(e[0]),
        "mean": float((e * counts).sum() / density.size),
        "most": max(1, round(float(counts[: first + 1].sum()))),
        "small": float(counts[e < SMALL * e[0]].sum() / density.size),
    }


def spectrum_advice(density: SpectralDensity) -> list[Advice]:
    """Remarks on the spectrum of a semidefinite matrix, then what to do. None for a matrix of zeros."""
    f = spectrum_figures(density)
    if f["largest"] == 0:
        return []
    share = f["most"] / f["eigenvalues"]
    where = f"{MOST:.0%} of the curvature (the trace) is in {f['most']:,} of {f['eigenvalues']:,} directions"
    if share > SPREAD:
        return [Advice("good", f"{where}. A gradient step already treats most directions alike.")]
    remark = (
        f"{where}. The largest eigenvalue is {f['largest']:.3g}, and {f['small']:.0%} of all are below a thousandth of "
        f"it. Gradient descent on this quadratic diverges with a step size above {2 / f['largest']:.3g}, and with a "
        "smaller one it is slow in the other directions."
    )
    do = (
        "train with a preconditioner, such as natgrad.KFAC. For influence scores and solves, begin with a damping of "
        f"a tenth of the mean eigenvalue, {f['mean'] / 10:.2g}."
    )
    return [Advice("bad" if share <= CONCENTRATED else "fair", remark), Advice("do", do)]
