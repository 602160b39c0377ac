"""The optimizers: what each is called, how it is made, and the grid that it is tuned over."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import natgrad
from benchmarks.race.tasks import Task
from natgrad.optim import averaging

Step = Callable[[Tensor, Tensor], float]
Evaluation = Callable[[], contextlib.AbstractContextManager[None]]
Make = Callable[[nn.Module, Task, dict[str, Any]], tuple[Step, Evaluation]]
"""From a model, a task and a setting to a function that takes a step on a batch and returns its loss, and a context
within which the model is as it is to be evaluated. An `"average"` in the setting is a decay: iterates are averaged."""


@dataclass(frozen=True)
class Contestant:
    """`grid` has the settings tried on each task (`"*"`: on those not named); `batch` in one is the batch's size."""

    name: str
    make: Make
    grid: dict[str, Sequence[dict[str, Any]]] = field(default_factory=lambda: {"*": [{}]})

    def settings(self, task: str) -> Sequence[dict[str, Any]]:
        return self.grid.get(task, self.grid.get("*", []))


def plain(optimizers: Callable[[nn.Module, Task, dict[str, Any]], list[torch.optim.Optimizer]]) -> Make:
    """A step by one or several torch optimizers."""

    def make(model: nn.Module, task: Task, setting: dict[str, Any]) -> tuple[Step, Evaluation]:
        opts = optimizers(model, task, setting)
        states: dict[str, dict[str, Any]] = {n: {} for n, _ in model.named_parameters()}
        parameters = dict(model.named_parameters())

        def step(x: Tensor, y: Tensor) -> float:
            loss = task.loss(model(x), y) / task.share(x)
            for opt in opts:
                opt.zero_grad()
            loss.backward()
            for opt in opts:
                opt.step()
            if "average" in setting:
                with torch.no_grad():
                    averaging.take_in(parameters, states.__getitem__, setting["average"])
            return loss.item()

        return step, lambda: averaging.swapped(parameters, states.__getitem__)

    return make


def second_order(optimizer: Callable[[nn.Module, Task, dict[str, Any]], torch.optim.Optimizer]) -> Make:
    """A step by one of this library's."""

    def make(model: nn.Module, task: Task, setting: dict[str, Any]) -> tuple[Step, Evaluation]:
        opt: Any = optimizer(model, task, setting)

        def step(x: Tensor, y: Tensor) -> float:
            loss = opt.loss(model(x), y) / task.share(x)
            opt.zero_grad()
            loss.backward()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                opt.step()
            return loss.item()

        return step, opt.averaged if "average" in setting else contextlib.nullcontext

    return make


def matrices(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Hidden weights, which Muon is for, and all else: biases, scales, embeddings, kernels."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    hidden = [p for p in model.parameters() if p.ndim == 2 and id(p) not in embeddings]
    own = {id(p) for p in hidden}
    return hidden, [p for p in model.parameters() if id(p) not in own]


def adamw(model: nn.Module, task: Task, setting: dict[str, Any]) -> list[torch.optim.Optimizer]:
    # Adam with the objective's own weight decay: decoupled, the tasks' 1e-5 does nothing.
    return [torch.optim.Adam(model.parameters(), lr=setting["lr"], weight_decay=task.weight_decay)]


def muon(model: nn.Module, task: Task, setting: dict[str, Any]) -> list[torch.optim.Optimizer]:
    hidden, rest = matrices(model)
    rest_lr = setting.get("rest", 2e-3)
    return [
        torch.optim.Muon(hidden, lr=setting["lr"], weight_decay=0.0),
        torch.optim.AdamW(rest, lr=rest_lr, weight_decay=0.0),
    ]


def soap(model: nn.Module, task: Task, setting: dict[str, Any]) -> list[torch.optim.Optimizer]:
    import pytorch_optimizer

    decay = {"weight_decay": task.weight_decay}
    return [pytorch_optimizer.SOAP(model.parameters(), lr=setting["lr"], precondition_frequency=10, **decay)]


def shampoo(model: nn.Module, task: Task, setting: dict[str, Any]) -> list[torch.optim.Optimizer]:
    import pytorch_optimizer

    return [
        pytorch_optimizer.ScalableShampoo(
            model.parameters(),
            lr=setting["lr"],
            weight_decay=task.weight_decay,
            start_preconditioning_step=10,
            preconditioning_compute_steps=20,
            graft_type=4,  # RMSProp's length, normalized
            block_size=1024,
        )
    ]


def kfac(model: nn.Module, task: Task, setting: dict[str, Any]) -> torch.optim.Optimizer:
    own = {k: v for k, v in setting.items() if k != "batch"}
    return natgrad.KFAC(model, task.loss, weight_decay=task.weight_decay, **own)


def one_sided(model: nn.Module, task: Task, setting: dict[str, Any]) -> torch.optim.Optimizer:
    """The input factor alone, orthogonalized, with Adam's step for all that is not a matrix at a rate of its own."""
    own = {k: v for k, v in setting.items() if k not in ("batch", "rest")}
    hidden, rest = matrices(model)
    params = [{"params": hidden}, {"params": rest, "lr": setting["rest"]}] if "rest" in setting else None
    return natgrad.KFAC(model, task.loss, params=params, momentum=0.95, structure="input", orthogonalize=True, **own)


def natural_gradient(model: nn.Module, task: Task, setting: dict[str, Any]) -> torch.optim.Optimizer:
    return natgrad.NaturalGradient(model, task.loss)


def rates(*values: float, **more: Any) -> list[dict[str, Any]]:
    return [{"lr": lr, **more} for lr in values]


CONTESTANTS = [
    Contestant(
        "Adam",
        plain(adamw),
        {
            "curves": rates(1e-3, 2e-3, 4e-3, batch=250),
            "mnist": rates(1e-3, 2e-3, 4e-3, batch=250),
            "language": rates(5e-4, 1e-3, 2e-3),
            "*": rates(1e-3, 3e-3, 6e-3),
            "pinn": rates(1e-3, 3e-3, 1e-2),
        },
    ),
    Contestant(
        "Muon",
        plain(muon),
        {
            "curves": rates(0.01, 0.02, 0.04, batch=250),
            "mnist": rates(0.01, 0.02, 0.04, batch=250),
            "language": rates(0.005, 0.01, 0.02),
            "classifier": rates(0.005, 0.01, 0.02),
        },
    ),
    Contestant(
        "SOAP",
        plain(soap),
        {
            "curves": rates(1e-3, 3e-3, 6e-3, 1e-2, batch=250),
            "mnist": rates(1e-3, 3e-3, 6e-3, batch=250),
            "classifier": rates(1e-3, 3e-3),
            "language": rates(1e-3, 3e-3),
        },
    ),
    Contestant(
        "Shampoo",
        plain(shampoo),
        {
            "curves": rates(1e-3, 3e-3, batch=250),
            "mnist": rates(1e-3, 3e-3, batch=250),
        },
    ),
    Contestant("KFAC", second_order(kfac)),
    Contestant("KFAC, not centered", second_order(kfac), {"*": [{"centered": False}]}),
    Contestant(
        "one-sided",
        second_order(one_sided),
        {"language": [{"lr": lr, "rest": 2e-3} for lr in (0.002, 0.003, 0.005)]},
    ),
    Contestant(
        "one-sided, not centered",
        second_order(one_sided),
        {"language": [{"lr": lr, "rest": 2e-3, "centered": False} for lr in (0.002, 0.003, 0.005)]},
    ),
    Contestant("Adam, averaged", plain(adamw), {"language": rates(1e-3, 2e-3, average=0.97)}),
    Contestant("Muon, averaged", plain(muon), {"language": rates(0.01, 0.02, average=0.97)}),
    Contestant(
        "one-sided, not centered, averaged",
        second_order(one_sided),
        {"language": [{"lr": lr, "rest": 2e-3, "centered": False, "average": 0.97} for lr in (0.005, 0.01)]},
    ),
    Contestant(
        "KFAC, averaged", second_order(kfac), {t: [{"average": 0.98}] for t in ("curves", "mnist", "classifier")}
    ),
    Contestant("NaturalGradient", second_order(natural_gradient), {"pinn": [{}]}),
]
