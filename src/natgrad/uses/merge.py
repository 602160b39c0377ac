"""Merging models that were trained separately, each weighted by what its own data determine."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from natgrad.capture.entry import entry
from natgrad.checks.values import check_number, described
from natgrad.linalg import Operator
from natgrad.linalg.krylov import IterativeInverse
from natgrad.uses.weights import flat, parameters_of


@entry
def merge(
    models: Sequence[nn.Module],
    matrices: Sequence[Operator],
    weights: Sequence[int | float] | None = None,
    damping: float = 1e-3,
) -> nn.Module:
    """Merges several models with the same parameters into one, each weighted by its Fisher information:

        θ = (Σ_k w_k (F_k + λ I))⁻¹ Σ_k w_k (F_k + λ I) θ_k

    It is the maximum of the product of the models' Laplace posteriors. For large `λ` it is the mean of the weights.
    Parameters that are not in the matrices are averaged. Buffers are taken from the first model.

    Args:
        models: two or more models. They should have the same starting point, such as the same pretrained model.
        matrices: the Fisher information of each on its own data, of any structure: `natgrad.fisher(model, loss, data)`.
        weights: `w`, one for each model. If the losses are means, use the numbers of examples. None: the same for all.
        damping: `λ`. In directions in which no model has curvature, the result is the mean of the weights.

    Returns:
        A new model.

    Raises:
        TypeError, ValueError: if the numbers of matrices and models differ, or if the matrices have other parameters.
        RuntimeError: if the conjugate gradients that solve for the weights do not converge. Then use a larger damping.

    Example:
        >>> import torch, natgrad
        >>> loss = torch.nn.MSELoss()
        >>> def trained(x, y):  # exactly, and what it was trained on
        ...     model = torch.nn.Linear(2, 1, bias=False)
        ...     model.weight.data = torch.linalg.lstsq(x, y).solution.mT
        ...     return model, natgrad.fisher(model, loss, (x, y), "dense")
        >>> x, y = torch.randn(60, 2), torch.randn(60, 1)
        >>> (a, F_a), (b, F_b) = trained(x[:30], y[:30]), trained(x[30:], y[30:])
        >>> merged = natgrad.merge([a, b], [F_a, F_b], damping=0.0)
        >>> torch.allclose(merged.weight.mT, torch.linalg.lstsq(x, y).solution, atol=1e-4)  # as if of all data
        True

    Reference: Matena & Raffel (2022), arXiv:2111.09832; Daheim et al. (2024), arXiv:2310.12808.
    """
    for name, given in (("models", models), ("matrices", matrices), ("weights", weights)):
        if not isinstance(given, (list, tuple)) and not (name == "weights" and given is None):
            raise TypeError(f"{name} is {described(given)}; expected a list with one for each model")
    models, matrices = list(models), list(matrices)
    check_number("damping", damping)
    if len(models) < 2 or len(models) != len(matrices):
        raise ValueError(
            f"there are {len(models)} models and {len(matrices)} matrices; expected at least two models, and a matrix "
            "for each"
        )
    w: list[float] = [1.0] * len(models) if weights is None else list(weights)
    if len(w) != len(models):
        raise ValueError(f"weights is {described(weights)}; expected one for each of {len(models)} models")
    for one in w:
        check_number("a weight", one, positive=True)
    w = [one / sum(w) for one in w]
    first = matrices[0]
    thetas = [
        flat(F, parameters_of(m, F, f"matrices[{i}]")) for i, (m, F) in enumerate(zip(models, matrices, strict=True))
    ]
    if any(F.space != first.space for F in matrices):
        raise ValueError("the matrices are of different parameters; expected the same params= for all")
    mean = sum(one * theta for one, theta in zip(w, thetas, strict=True))
    assert isinstance(mean, Tensor)
    total, pull = w[0] * first, torch.zeros_like(mean)
    for one, F in zip(w[1:], matrices[1:], strict=True):
        total = total + one * F
    for one, F, theta in zip(w, matrices, thetas, strict=True):
        pull += one * (F @ (theta - mean))
    merged = copy.deepcopy(models[0])
    own = dict(merged.named_parameters())
    theirs = [dict(m.named_parameters()) for m in models]
    solution = first.space.unflatten(mean + IterativeInverse(total, damping) @ pull)
    with torch.no_grad():
        for n, p in own.items():
            if p.is_floating_point() and n not in (first.space.names or ()):
                p.copy_(torch.stack([one * its[n].to(p) for one, its in zip(w, theirs, strict=True)]).sum(0))
        for n, value in zip(first.space.names or (), solution, strict=True):
            own[n].copy_(value)
    return merged
