"""Every structure with real models, losses and batches, and its matrix formed by hand."""

from dataclasses import dataclass
from functools import lru_cache

import pytest
import torch
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

import natgrad
from cases_by_hand import CLASSES, MODELS, SEQUENTIAL, ByHand
from oracles import dense_curvature, f64, randn

TOL = 1e-8
WEIGHT = torch.tensor([0.5, 2.0, 1.3], dtype=f64)


@dataclass(frozen=True)
class Kind:
    """A structure with its options, and what it cannot do: operations by name."""

    structure: str
    hessian: bool = False
    centered: bool = True
    sharing: str = "expand"
    lacks: tuple[str, ...] = ()
    rank: int = 10

    def matrix(self, of, problem, data=None, **options):
        data = problem.batches if data is None else data
        if self.hessian:
            return natgrad.hessian(problem.model, problem.loss, data, self.structure, **options)
        options = {"centered": self.centered, "sharing": self.sharing, "rank": self.rank} | options
        return getattr(natgrad, of)(problem.model, problem.loss, data, self.structure, **options)


PRODUCTS_ONLY = ("trace", "norm", "logdet", "diagonal", "power", "sample", "save")
KINDS = {
    "implicit": Kind("implicit", lacks=PRODUCTS_ONLY),
    "dense": Kind("dense"),
    "block": Kind("block"),
    "kfac": Kind("kfac"),
    "kfac, homogeneous": Kind("kfac", centered=False),
    "kfac, reduce": Kind("kfac", sharing="reduce"),
    "ekfac": Kind("ekfac"),
    "ekfac, homogeneous": Kind("ekfac", centered=False),
    "ekfac, reduce": Kind("ekfac", sharing="reduce"),
    "low_rank, 1": Kind("low_rank", rank=1),
    "low_rank, 4": Kind("low_rank", rank=4),
    "diagonal": Kind("diagonal"),
    "hessian, implicit": Kind("implicit", hessian=True, lacks=PRODUCTS_ONLY),
    "hessian, dense": Kind("dense", hessian=True),
    "hessian, block": Kind("block", hessian=True),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def kinds(operation):
    """The structures that have an operation."""
    return pytest.mark.parametrize("kind", [n for n, k in KINDS.items() if operation not in k.lacks])


def indices(shape, seed):
    """Class indices; any two examples in succession differ."""
    n, _, *positions = shape
    index = torch.arange(n).view(n, *[1] * len(positions)) + seed
    return (index + torch.arange(positions[0]) if positions else index) % CLASSES


def ignored(shape, seed):
    y = indices(shape, seed)
    y.view(-1)[-1] = -100
    return y


def probabilities(shape, seed):
    return randn(*shape, seed=seed).softmax(1)


def reals(shape, seed):
    return randn(*shape, seed=seed)


def bits(shape, seed):
    return (randn(*shape, seed=seed) > 0).to(f64)


def per_class(shape):
    """A weight for each class, which `BCEWithLogitsLoss` broadcasts from the last axis."""
    return WEIGHT if len(shape) == 2 else WEIGHT.unsqueeze(1)


# Each loss, made for outputs of a shape, with its targets.
LOSSES = {
    "cross-entropy": (lambda shape: nn.CrossEntropyLoss(), indices),
    "weight": (lambda shape: nn.CrossEntropyLoss(weight=WEIGHT), indices),
    "ignore_index": (lambda shape: nn.CrossEntropyLoss(weight=WEIGHT, ignore_index=1), indices),
    "ignore -100": (lambda shape: nn.CrossEntropyLoss(), ignored),
    "smoothing": (lambda shape: nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.2), indices),
    "probabilities": (lambda shape: nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.1), probabilities),
    "mse": (lambda shape: nn.MSELoss(), reals),
    "bce": (lambda shape: nn.BCEWithLogitsLoss(), probabilities),
    "bce weight": (lambda shape: nn.BCEWithLogitsLoss(weight=per_class(shape)), probabilities),
    "pos_weight": (lambda shape: nn.BCEWithLogitsLoss(pos_weight=per_class(shape)), bits),
}


@dataclass(frozen=True)
class Setup:
    """What makes a problem: hypothesis draws and prints it."""

    model: str = "mlp"
    loss: str = "cross-entropy"
    reduction: str = "mean"
    bias: bool = True
    several: bool = True
    d_in: int = 3
    hidden: int = 4
    seed: int = 0


class Problem:
    """A model, a loss and data, with the matrices of autograd and of every example."""

    def __init__(self, setup):
        with torch.random.fork_rng():
            torch.manual_seed(setup.seed)
            self.model = MODELS[setup.model](setup.d_in, setup.hidden, setup.bias)
        make, target = LOSSES[setup.loss]
        self.batches = []
        for i, n in enumerate((4, 6) if setup.several else (9,)):  # with a third ignored, more than inputs
            positions = (2 + i,) if setup.model in SEQUENTIAL else ()  # batches of different lengths
            x = randn(n, *positions, setup.d_in, seed=setup.seed + i) + 0.7
            shape = self.model(x).shape
            self.batches.append((x, target(shape, setup.seed + 10 * i)))
        self.loss = make(shape)
        self.loss.reduction = setup.reduction
        self.by_hand = ByHand.of(self.model, self.loss, self.batches)
        self.space = [p.shape for p in self.model.parameters()]
        self._dense = {}

    def dense(self, kind):
        """The matrix of a structure, `(size, size)` in torch order."""
        key = (kind.structure, kind.hessian, kind.centered, kind.sharing, kind.rank)
        if key not in self._dense:
            self._dense[key] = self._form(kind)
        return self._dense[key]

    def _form(self, kind):
        whole = self._hessian() if kind.hessian else dense_curvature(self.model, self.loss, self.batches)
        return BY_HAND[kind.structure](self, kind, whole)

    def _hessian(self):
        names = [n for n, _ in self.model.named_parameters()]
        sizes = [s.numel() for s in self.space]

        def objective(flat):
            pieces = (p.view(s) for p, s in zip(flat.split(sizes), self.space, strict=True))
            values = dict(zip(names, pieces, strict=True))
            total, mass = 0.0, 0.0
            for x, y in self.batches:
                output = functional_call(self.model, values, (x,))
                loss, weight = self.loss(output, y), 1.0
                if self.loss.reduction == "mean":
                    self.loss.reduction = "sum"
                    weight = (self.loss(output, y) / loss).detach()
                    self.loss.reduction = "mean"
                total, mass = total + loss * weight, mass + weight
            return total / mass if self.loss.reduction == "mean" else total

        flat = torch.cat([p.detach().flatten() for p in self.model.parameters()])
        return torch.autograd.functional.hessian(objective, flat)

    def metric(self, kind):
        """What centered damping multiplies: `TᵀT` where weight and bias are held apart, else the identity."""
        hand = self.by_hand

        def of_layer(layer):
            T = hand.coordinates(layer, kind.sharing, kind.centered and kind.structure in ("kfac", "ekfac"))
            return T.mT @ T

        return hand.assemble(of_layer)

    def named(self, flat):
        pieces = flat.split([s.numel() for s in self.space])
        names = [n for n, _ in self.model.named_parameters()]
        return {n: p.view(s) for n, p, s in zip(names, pieces, self.space, strict=True)}


def in_blocks(problem, kind, whole):
    if not kind.hessian:
        return problem.by_hand.part_in_blocks(whole)
    groups = [n.rpartition(".")[0] or n for n, _ in problem.model.named_parameters()]
    of = [g for g, s in zip(groups, problem.space, strict=True) for _ in range(s.numel())]
    return whole * torch.tensor([[a == b for a in of] for b in of])


def low_rank_by_hand(problem, kind, whole):
    """Of each block the largest eigenvalues, and a diagonal with which it has the block's own."""
    dense = torch.zeros_like(whole)
    for index in problem.by_hand.blocks().values():
        block = whole[index[:, None], index]
        e, U = torch.linalg.eigh(block)
        kept = (e >= e[-min(kind.rank, len(e))] - 1e-8 * e[-1]) & (e > 1e-13 * e[-1])  # equal ones together
        top = (U[:, kept] * e[kept]) @ U[:, kept].mT
        dense[index[:, None], index] = top + (block - top).diagonal().diag()
    return dense


def kfac_by_hand(problem, kind, whole):
    hand = problem.by_hand
    return hand.assemble(lambda layer: hand.kfac(layer, kind.sharing))


def ekfac_by_hand(problem, kind, whole):
    hand = problem.by_hand
    return hand.assemble(lambda layer: hand.ekfac(layer, kind.sharing, kind.centered))


# What each structure is, from the problem, the kind and the whole matrix, which is autograd's.
BY_HAND = {
    "implicit": lambda problem, kind, whole: whole,
    "dense": lambda problem, kind, whole: whole,
    "block": in_blocks,
    "kfac": kfac_by_hand,
    "ekfac": ekfac_by_hand,
    "low_rank": low_rank_by_hand,
    "diagonal": lambda problem, kind, whole: torch.diag(whole.diagonal()),
}


@lru_cache(maxsize=256)
def problem_of(setup):
    return Problem(setup)


setups = st.builds(
    Setup,
    model=st.sampled_from(sorted(MODELS)),
    loss=st.sampled_from(sorted(LOSSES)),
    reduction=st.sampled_from(["mean", "sum"]),
    bias=st.booleans(),
    several=st.booleans(),
    d_in=st.integers(2, 4),
    hidden=st.integers(2, 5),
    seed=st.integers(0, 100),
)
dampings = st.sampled_from([1e-3, 0.3, 20.0])
functions = st.sampled_from(["fisher", "gauss_newton"])
