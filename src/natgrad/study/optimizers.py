"""The optimizers of the studies: their names, how they are created, and how they take a step."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import natgrad
from natgrad.checks.errors import UserError
from natgrad.optim import averaging
from natgrad.study.peers import NorMuon, SOAPMuon
from natgrad.study.task import Batch, Task

Setting = Mapping[str, Any]
COMMON = ("batch", "weight_decay", "average", "length", "cooldown")
"""Options of every optimizer: the batch size, the weight decay of the objective (default: the task's), the decay of the
weight average used for evaluation, its share of the task's budget, and the share of its own budget at the end over
which its learning rates fall to zero (default: the study's)."""


@dataclass
class Stepper:
    """`step((x, y))` updates the model; within `averaged()` the model has the weights for evaluation."""

    step: Callable[[Batch], None]
    averaged: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
    optimizers: list[Any] = field(default_factory=list)
    rejected: int = 0
    """The number of steps that the optimizer took back."""


@dataclass(frozen=True)
class Kind:
    """`load()` returns the class; a study may set its keywords. `rest`: whether it has a separate learning rate for
    parameters other than hidden matrices."""

    load: Callable[[], type[Any]]
    follows_loss: bool = False
    """Whether it is one of this library's optimizers that need the loss: `opt.loss(model(x), y)`."""
    whole_model: bool = False
    """Whether it takes the model instead of its parameters."""
    rest: bool = False
    defaults: Setting = field(default_factory=dict)
    decays: bool = True
    """Whether it gets the task's weight decay: not if it would decouple the decay from the gradient."""

    def options(self) -> list[str]:
        """The options' names."""
        own = inspect.signature(self.load()).parameters.values()
        names = [p.name for p in own if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
        own_ways = ("params", "model", "loss", "generator", "output", "rest_lr", "steps")
        kept = [n for n in names if n not in (*own_ways, *COMMON)]
        rest = ["rest"] if self.rest else []
        return [*COMMON, *kept, *rest, *(["rest_betas"] if self._has_adamw_beside else [])]

    @property
    def _has_adamw_beside(self) -> bool:
        """Whether torch's AdamW trains the parameters that are not hidden matrices."""
        return self.rest and not (self.follows_loss or self.whole_model)

    def types(self, option: str) -> tuple[type, ...]:
        """The allowed types of the option, from its annotation; empty: any type."""
        known = {"bool": (bool,), "int": (int,), "float": (int, float), "str": (str,), "None": ()}
        parameter = inspect.signature(self.load()).parameters.get(option)
        words = str(parameter.annotation).replace("<class '", "").replace("'>", "") if parameter else "Any"
        if option in ("average", "weight_decay", "rest", "length", "cooldown"):
            words = "float"
        parts = [part.strip() for part in words.split("|")]
        return tuple(t for part in parts for t in known[part]) if all(part in known for part in parts) else ()

    def make(self, model: nn.Module, task: Task, setting: Setting) -> Stepper:
        """Creates the stepper, from a model, a task and options."""
        own = {**self.defaults, **setting}
        for name in ("batch", "length", "cooldown"):
            own.pop(name, None)
        if self.decays:
            own.setdefault("weight_decay", task.weight_decay)
        own = {k: tuple(v) if isinstance(v, list) else v for k, v in own.items()}
        rest, rest_betas = own.pop("rest", None), own.pop("rest_betas", (0.9, 0.999))
        if self.follows_loss:
            if rest is not None:
                hidden, others = matrices(model)
                own["params"] = [{"params": hidden}, {"params": others, "lr": rest}]
            return _following(self.load()(model, task.loss, **own), model, task, own.get("average"))
        average = own.pop("average", None)
        if self.whole_model:
            own |= {} if rest is None else {"rest_lr": rest}
            return _plain([self.load()(model, **own)], model, task, average)
        if rest is None:
            return _plain([self.load()(model.parameters(), **own)], model, task, average)
        hidden, others = matrices(model)
        opts = [self.load()(hidden, **own)] if hidden else []
        beside = torch.optim.AdamW(others, lr=rest, betas=rest_betas, weight_decay=0.0)
        return _plain([*opts, beside], model, task, average)


def _plain(opts: list[Any], model: nn.Module, task: Task, average: float | None) -> Stepper:
    """A step by one or several torch optimizers."""
    parameters = dict(model.named_parameters())
    states: dict[str, dict[str, Any]] = {n: {} for n in parameters}

    def step(batch: Batch) -> None:
        x, y = batch
        loss = task.objective(task.loss, model, x, y) / task.share(x)
        for opt in opts:
            opt.zero_grad()
        loss.backward()
        for opt in opts:
            opt.step()
        if average is not None:
            with torch.no_grad():
                averaging.take_in(parameters, states.__getitem__, average)

    return Stepper(step, lambda: averaging.swapped(parameters, states.__getitem__), opts)


def _following(opt: Any, model: nn.Module, task: Task, average: float | None) -> Stepper:
    """A step by one of this library's optimizers that need the loss."""

    def step(batch: Batch) -> None:
        x, y = batch
        loss = task.objective(opt.loss, model, x, y) / task.share(x)
        opt.zero_grad()
        loss.backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # from a rejected step, which is counted instead
            opt.step()
        stepper.rejected += not opt.diagnostics["accepted"]

    stepper = Stepper(step, contextlib.nullcontext if average is None else opt.averaged, [opt])
    return stepper


def matrices(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Hidden weights, for Muon, and all other parameters: biases, scales, embeddings, kernels, an output layer
    `head`."""
    apart = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    apart |= {id(p) for n, p in model.named_parameters() if n.startswith("head.")}
    hidden = [p for p in model.parameters() if p.ndim == 2 and id(p) not in apart]
    own = {id(p) for p in hidden}
    return hidden, [p for p in model.parameters() if id(p) not in own]


def _peer(name: str) -> Callable[[], type[Any]]:
    """A class from pytorch_optimizer."""

    def load() -> type[Any]:
        try:
            import pytorch_optimizer
        except ImportError as error:
            raise UserError(
                "SOAP and Shampoo come from pytorch_optimizer, which is not installed; "
                "run `pip install pytorch_optimizer`, or leave them out."
            ) from error
        return getattr(pytorch_optimizer, name)

    return load


OPTIMIZERS: dict[str, Kind] = {
    # Adam with the weight decay in the objective: decoupled, the tasks' 1e-5 would have no effect.
    "Adam": Kind(lambda: torch.optim.Adam),
    "AdamW": Kind(lambda: torch.optim.AdamW, decays=False),
    "SGD": Kind(lambda: torch.optim.SGD),
    "Muon": Kind(
        lambda: torch.optim.Muon, rest=True, defaults={"rest": 2e-3, "lr": 0.02, "weight_decay": 0.0}, decays=False
    ),
    "NorMuon": Kind(lambda: NorMuon, rest=True, defaults={"rest": 2e-3, "weight_decay": 0.0}, decays=False),
    "SOAPMuon": Kind(lambda: SOAPMuon, rest=True, defaults={"rest": 2e-3, "weight_decay": 0.0}, decays=False),
    "NewtonMuon": Kind(lambda: natgrad.NewtonMuon, whole_model=True, rest=True, decays=False),
    "SOAP": Kind(_peer("SOAP")),
    "Shampoo": Kind(
        _peer("ScalableShampoo"),
        defaults={
            "start_preconditioning_step": 10,
            "preconditioning_compute_steps": 20,
            "graft_type": 4,  # RMSProp's length, normalized
            "block_size": 1024,
        },
    ),
    "KFAC": Kind(lambda: natgrad.KFAC, follows_loss=True, rest=True),
    "NaturalGradient": Kind(lambda: natgrad.NaturalGradient, follows_loss=True),
    "PRONG": Kind(lambda: natgrad.PRONG, whole_model=True),
}


def check(use: str, setting: Setting) -> Stepper:
    """Creates the optimizer for a model of two layers.

    Raises:
        ValueError, TypeError: the optimizer's own errors about its options.
    """
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
    x = torch.zeros(2, 2)
    task = Task("", "", 2, nn.MSELoss(), lambda _: model, lambda *_: iter(()), lambda _: {}, lambda _: (x, x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return OPTIMIZERS[use].make(model, task, setting)
