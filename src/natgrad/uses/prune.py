"""Pruning by curvature: which weights to remove, and how the other weights compensate."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from natgrad.capture.entry import entry
from natgrad.checks.parameters import Selection, select_parameters
from natgrad.checks.values import check_count, check_number, check_within
from natgrad.linalg import Operator
from natgrad.linalg.krylov import conjugate_gradient
from natgrad.linalg.space import Parts
from natgrad.uses.weights import flat, parameters_of


@dataclass(frozen=True)
class Pruned:
    """What `natgrad.prune` returns.

    Args:
        masks: for every pruned parameter, by name: which of its weights are kept.
        increase: the increase of the objective that the quadratic model predicts, `½ δᵀ F δ`.

    Example:
        >>> import torch, natgrad
        >>> model, data = torch.nn.Linear(4, 1), (torch.randn(30, 4), torch.randn(30, 1))
        >>> pruned = natgrad.prune(model, natgrad.fisher(model, torch.nn.MSELoss(), data), sparsity=0.5)
        >>> pruned.masks["weight"].sum().item(), (model.weight != 0).sum().item()
        (2, 2)
    """

    masks: dict[str, Tensor]
    increase: float

    def apply(self, model: nn.Module) -> None:
        """Sets the pruned weights to zero again. Call it after each step of further training."""
        own = dict(model.named_parameters())
        with torch.no_grad():
            for n, mask in self.masks.items():
                own[n].mul_(mask)


@entry
def prune(
    model: nn.Module,
    F: Operator,
    sparsity: float = 0.5,
    *,
    damping: float = 1e-3,
    rounds: int = 4,
    params: Selection = None,
) -> Pruned:
    """Sets the least important weights of a trained model to zero, and moves the others to compensate.

    With `H = F + λ I`, removing weight `i` raises the loss by `θ_i² / (2 [H⁻¹]_ii)` if the other weights compensate
    (the optimal brain surgeon). Each round removes some of the weights for which this increase is smallest. After each
    round, the change `δ` of the weights is the solution of

        minimize ½ δᵀ H δ  over the kept weights,  with δ_i = −θ_i for the removed weights

    It is computed by conjugate gradients on products with `F`. The model is changed in place.

    Args:
        model: a trained model. Its gradient is assumed to be zero.
        F: its curvature on the training data, whose inverse has a diagonal: `"kfac"`, `"ekfac"`, `"block"`, `"dense"`
            or `"diagonal"`.
        sparsity: the share of the weights to set to zero, over all pruned parameters together.
        damping: `λ`. If it is small, the other weights move so far that the quadratic model does not hold.
        rounds: the number of rounds in which the sparsity is reached.
        params: names of the parameters to prune, or a predicate on names. None: those of `F` with at least two axes.

    Returns:
        The masks, and the predicted increase of the loss.

    Raises:
        TypeError: if `F` is not a matrix of named parameters, or if its inverse has no diagonal.
        ValueError: if `F` belongs to another model, or if a number is out of range.

    Example:
        >>> import torch, natgrad
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(100, 6)
        >>> x[:, 1] = x[:, 0] + 0.1 * torch.randn(100)  # two inputs that say the same
        >>> model = torch.nn.Linear(6, 1)
        >>> F = natgrad.fisher(model, torch.nn.MSELoss(), (x, model(x).detach()), "dense")
        >>> increase = natgrad.prune(model, F, sparsity=1 / 6).increase
        >>> (model.weight[0, :2] == 0).any().item(), increase < 0.01
        (True, True)

    Reference: Hassibi & Stork (1992), "Second order derivatives for network pruning: Optimal Brain Surgeon"; Singh &
    Alistarh (2020), arXiv:2004.14340.
    """
    check_within("sparsity", sparsity, "[0, 1]")
    check_number("damping", damping)
    check_count("rounds", rounds)
    own = parameters_of(model, F)
    chosen = _chosen(model, own, params)
    theta = flat(F, own)
    flags = tuple(torch.full(p.shape, n in chosen, device=p.device) for n, p in own.items())
    prunable = F.space.flatten(flags)
    variance = F.space.flatten(_inverse_diagonal(F, damping))
    total = round(sparsity * int(prunable.sum()))
    out = torch.zeros_like(prunable)
    new = theta
    for i in range(1, rounds + 1):
        saliency = new.square() / (2 * variance)
        saliency = torch.where(prunable, saliency, torch.inf).where(~out, -torch.inf)
        out = torch.zeros_like(out).index_fill(0, saliency.argsort(stable=True)[: round(total * i / rounds)], True)
        new = theta + _compensation(F, damping, theta, out)
        new[out] = 0.0
    change = new - theta
    with torch.no_grad():
        for p, value in zip(own.values(), F.space.unflatten(new), strict=True):
            p.copy_(value)
    masks = dict(zip(own, F.space.unflatten(~out), strict=True))
    return Pruned({n: masks[n] for n in chosen}, float(0.5 * (change @ (F @ change))))


def _inverse_diagonal(F: Operator, damping: float) -> Parts:
    inverse = F.inverse(damping)
    try:
        return inverse._diagonal()
    except TypeError as error:
        raise TypeError(
            f"the inverse of F ({F.describe()}) has no diagonal, which pruning needs; use "
            "structure='kfac', 'ekfac', 'block', 'diagonal' or 'dense'"
        ) from error


def _chosen(model: nn.Module, own: dict[str, nn.Parameter], params: Selection) -> list[str]:
    if params is None:
        chosen = [n for n, p in own.items() if p.ndim > 1]
    else:
        chosen = [n for n in select_parameters(model, params) if n in own]
    if not chosen:
        raise ValueError("no parameter is selected for pruning; expected params= to have names that are also in F")
    return chosen


def _compensation(F: Operator, damping: float, theta: Tensor, out: Tensor) -> Tensor:
    """`δ` of the smallest `½ δᵀ (F + λ I) δ` with `δ = −θ` where weights are taken out."""
    taken = torch.where(out, -theta, 0.0)

    def kept_product(v: Tensor) -> Tensor:
        return torch.where(out, 0.0, F @ v + damping * v)

    b = torch.where(out, 0.0, -(F @ taken))
    tol = torch.finfo(theta.dtype).eps ** 0.5
    return taken + conjugate_gradient(kept_product, b, tol=tol, max_iter=2000).x
