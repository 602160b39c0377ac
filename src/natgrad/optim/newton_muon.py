"""NewtonMuon: hidden matrices take an orthogonalized step on whitened inputs, all else takes AdamW's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.checks.parameters import check_parameters, select_parameters
from natgrad.checks.values import (
    check_choice,
    check_count,
    check_flag,
    check_max_dim,
    check_number,
    check_within,
    did_you_mean,
)
from natgrad.checks.warning import warn
from natgrad.curvature.moments import MAX_DIM
from natgrad.distributed.placement import Whole, placed
from natgrad.optim import averaging, saved
from natgrad.optim.muon.adamw import adamw, decayed_
from natgrad.optim.muon.forwards import Forwards
from natgrad.optim.muon.matrices import Matrices
from natgrad.optim.muon.routing import Routing, Steps, chooser
from natgrad.optim.muon.whitening import InputSide
from natgrad.optim.parameter_groups import Groups, as_group, parameter_groups
from natgrad.optim.parameters import Parameters
from natgrad.optim.preconditioner.interval import Interval
from natgrad.optim.tracking.unchanged import Unchanged
from natgrad.optim.vectors import Vector, check_dense

SIDES = {
    "none": "orthogonalized alone, as Muon",
    "input": "whitened by the second moment of the inputs",
    "both": "and by that of the gradients on the output side",
}
REST = 0.15
"""The learning rate of AdamW's steps, in units of that of the matrices."""


def _check_group(group: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raises ValueError if a setting is out of range, or misspelt."""
    for name in ("lr", "rest", "weight_decay", "eps"):
        check_number(name, group[name])
    check_within("momentum", group["momentum"], "[0, 1)")
    for name in ("cautious", "nesterov"):
        check_flag(name, group[name])
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas={betas!r} is not usable: expected two numbers in [0, 1)")
    for beta in betas:
        check_within("betas", beta, "[0, 1)")
    for key in group.keys() - {"params", *defaults}:
        near = did_you_mean(key, defaults)
        if near and key != "initial_lr":  # other keys are the user's own, as in torch
            raise ValueError(f"a group has {key!r}; expected settings among {', '.join(defaults)}{near}")


def _share(rest_lr: Any, lr: Any) -> float:
    """The rate of AdamW's steps in units of the matrices' `lr`, so that schedulers change both."""
    check_number("rest_lr", rest_lr)
    check_number("lr", lr)
    if lr == 0 and rest_lr != 0:
        raise ValueError(
            f"rest_lr={rest_lr!r} is not usable beside lr=0, of which it is kept as a share; expected lr > 0"
        )
    return float(rest_lr / lr) if rest_lr else 0.0


class NewtonMuon(torch.optim.Optimizer):
    """Needs no loss and no change to the loop. TODO docstring."""

    _key = "newton_muon"

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.02,
        *,
        params: Groups = None,
        rest_lr: float | None = None,
        weight_decay: float = 0.1,
        cautious: bool = False,
        momentum: float = 0.95,
        nesterov: bool = True,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        sides: str = "input",
        ridge: float = 0.2,
        refresh_every: int = 8,
        decay: float = 0.8,
        average: float | None = None,
        steps: Steps = None,
        max_dim: int = MAX_DIM,
    ):
        check_choice("sides", sides, SIDES, meanings=SIDES)
        check_number("ridge", ridge, positive=True)
        check_count("refresh_every", refresh_every, "steps")
        check_within("decay", decay, "[0, 1)")
        check_within("average", average, "[0, 1)", optional=True)
        check_max_dim(max_dim)
        place = placed(model)
        self.model, self.sides, self.average = place.model, sides, average
        defaults = {
            "lr": lr,
            "rest": REST if rest_lr is None else _share(rest_lr, lr),
            "weight_decay": weight_decay,
            "cautious": cautious,
            "momentum": momentum,
            "nesterov": nesterov,
            "betas": tuple(betas),
            "eps": eps,
        }
        super().__init__(self._groups(params), defaults)
        self.parameters = Parameters(self, place)
        self.diagnostics: dict[str, Any] = {}
        self._steps = 0
        self._refreshed: int | None = None  # at which step
        self._interval = Interval(refresh_every, growing=True)
        chosen = chooser(steps, {n: p.shape for n, p in self.parameters.items()})
        self._matrices = Matrices(self.parameters, chosen, InputSide(ridge, decay), whiten=sides != "none")
        self._unchanged = Unchanged(self.model, None)
        self._forwards = Forwards(self.parameters, max_dim)
        self._arm()

    # Groups --------------------------------------------------------------------------------------------

    def _groups(self, params: Groups) -> list[dict[str, Any]]:
        """All parameters if none are named, frozen ones too: they may be trained later."""
        if params is not None:
            return parameter_groups(self.model, params)
        select_parameters(self.model)  # there is something to train
        own = {n: p for n, p in self.model.named_parameters() if p.requires_grad or p.is_floating_point()}
        check_parameters(own)
        return [{"params": list(own.values())}]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of the model's parameters.

        Raises:
            ValueError: if one is not the model's, is in a group already, or a setting is out of range.
        """
        group = as_group(self.model, param_group)
        if "rest_lr" in group:
            group["rest"] = _share(group.pop("rest_lr"), group.get("lr", self.defaults["lr"]))
        super().add_param_group(group)
        try:
            _check_group(self.param_groups[-1], self.defaults)
        except ValueError:
            self.param_groups.pop()
            raise
        if hasattr(self, "parameters"):
            self.parameters.refresh()
            self._forwards.watch.follow(self.parameters)
            self._refreshed = None
            self._arm()

    def routing(self) -> Routing:
        """Which step each parameter takes, and why: a mapping of names to routes, which prints as a table. It is known
        after the first step.

        Example:
            >>> import torch, natgrad
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
            >>> opt = natgrad.NewtonMuon(model)
            >>> model(torch.randn(16, 4)).sum().backward(); opt.step()
            >>> opt.routing()["0.weight"].step
            'whitened'
        """
        return Routing(self._matrices.routes, self.parameters)

    # The step ------------------------------------------------------------------------------------------

    def _due(self) -> bool:
        """Whether the next step takes in what a forward has shown."""
        return self._refreshed is None or self._steps - self._refreshed >= self._interval.steps(self._steps)

    def _arm(self) -> None:
        self._forwards.watch.recording = self._due()
        self._forwards.settling = bool(self._matrices.unsettled())

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of the parameters that have a gradient. What was done is in `diagnostics`.

        A gradient that is not finite leaves the parameters as they are, and warns.

        Raises:
            RuntimeError: if no forward in training mode has come before.
            ValueError: if a gradient is sparse.
        """
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        gradients = self.parameters.gradients()
        check_dense(gradients)
        self.diagnostics = {"step": self._steps, "accepted": True, "reason": "", "refreshed": False}
        with torch.autocast(self.parameters.device.type, enabled=False):
            if not gradients or self.parameters.finite(gradients):
                if self._due():
                    self._refresh(gradients)
                self._move(gradients)
            else:
                self._reject("the gradient is not finite")
        self.parameters.place.settle()
        self._forwards.watch.buffers.end_step(accepted=self.diagnostics["accepted"])
        self._steps += 1
        self._arm()
        return value

    def _reject(self, reason: str) -> None:
        self.diagnostics |= {"accepted": False, "reason": reason}
        self._forwards.take()
        warn(f"{type(self).__name__} rejected step {self._steps}: {reason}")

    def _refresh(self, gradients: Vector) -> None:
        """Takes in what the last forwards have shown: routes of parameters that had none, and the inputs' moments."""
        if self.parameters.place.shards is None:
            self._unchanged.check(self.model, self.parameters)
        shown = self._forwards.take()
        for n in self._matrices.settle(shown, gradients):
            for key in ("step", "exp_avg", "exp_avg_sq"):
                self.parameters.state_of(n).pop(key, None)
        taken, spoiled = self._matrices.take_in(shown.sums)
        if taken:
            self.diagnostics["refreshed"], self._refreshed = True, self._steps
        if spoiled:
            names = ", ".join(dict.fromkeys(repr(unit.weight) for unit in spoiled))
            warn(f"the inputs of {names} were not finite at step {self._steps}; their earlier averages are kept")

    def _move(self, gradients: Vector) -> None:
        values, matrices = self.parameters.local(), self._matrices
        g = {n: t.to(torch.promote_types(t.dtype, torch.float32)) for n, t in gradients.items()}
        directions = matrices.directions(self._momentum({n: t for n, t in g.items() if n in matrices}))
        for group, names in self.parameters.by_group(n for n in g if n not in matrices):
            states = {n: self.parameters.state_of(n) for n in names}
            directions |= adamw({n: g[n] for n in names}, states, group["betas"], group["eps"])
        for group, names in self.parameters.by_group(g):
            for own, rate in (
                ([n for n in names if n in matrices], group["lr"]),
                ([n for n in names if n not in matrices], group["lr"] * group["rest"]),
            ):
                if own:
                    p, d = [values[n] for n in own], [directions[n].to(values[n].dtype) for n in own]
                    decayed_(p, d, rate * group["weight_decay"], group["cautious"])
                    torch._foreach_add_(p, d, alpha=-rate)
        if self.average is not None:
            averaging.take_in({n: values[n] for n in g}, self.parameters.state_of, self.average)

    def _momentum(self, g: Vector) -> Vector:
        """The averages of the gradients after they have taken in the new ones; with Nesterov's, one average further."""
        out: Vector = {}
        for group, names in self.parameters.by_group(g):
            mu, new, states = group["momentum"], [g[n] for n in names], [self.parameters.state_of(n) for n in names]
            for n, state in zip(names, states, strict=True):
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(g[n])
            buffers = [state["momentum_buffer"] for state in states]
            torch._foreach_lerp_(buffers, new, 1 - mu)
            ahead = torch._foreach_lerp(new, buffers, mu) if group["nesterov"] else buffers
            out |= dict(zip(names, ahead, strict=True))
        return out

    # As torch's optimizers -----------------------------------------------------------------------------

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Within, the parameters are their averages over the steps, for evaluation; afterwards what they were.

        Raises:
            RuntimeError: if the optimizer was made without `average`.
        """
        if self.average is None:
            raise RuntimeError(
                f"there are no averages; make the optimizer with {type(self).__name__}(..., average=0.98)"
            )
        place = self.parameters.place
        try:
            with averaging.swapped(self.parameters.local(), self.parameters.state_of):
                place.settle()
                yield
        finally:
            place.settle()

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next steps depend on beside the parameters: they resume bit for bit.

        As in torch, tensors are not copied.
        """
        own = {"steps": self._steps, "refreshed": self._refreshed, **self._matrices.state()}
        return saved.joined(self, super().state_dict(), own | saved.named(self.parameters))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resumes from what `state_dict` gave, for a model of the same parameters. Nothing is changed where an error is
        raised.

        Raises:
            TypeError: if it is no dictionary.
            ValueError: if it is not of such an optimizer, or of other parameters.
        """
        own, whole = saved.state_of(state_dict, self._key, type(self).__name__), saved.torchs_own(state_dict, self._key)
        missing = [k for k in ("steps", "refreshed", "routes", "owners", "moments", "names", "dtypes") if k not in own]
        if missing:
            raise ValueError(
                f"the state has no {missing[0]!r} under {self._key!r}; expected what state_dict() of this version gives"
            )
        saved.check_parameters(self, self.parameters, own, whole)
        self._matrices.check_state(own)
        place, device, params = self.parameters.place, self.parameters.device, saved.by_index(self)
        # torch casts to the parameter's precision, which may be less than that of the state.
        state = saved.copied({i: _local(place, its) for i, its in whole["state"].items()}, device)
        super().load_state_dict({"state": {}, "param_groups": whole["param_groups"]})
        index = [i for group in whole["param_groups"] for i in group["params"]]
        self.state.update({p: state[i] for i, p in zip(index, params, strict=True) if i in state})
        self.parameters.refresh()
        own = saved.copied(own, device)
        self._steps, self._refreshed = own["steps"], own["refreshed"]
        self._matrices.load(own)
        self._forwards.take()
        self._arm()

    def adopt(self, sizes: Mapping[str, Sequence[torch.Size]]) -> tuple[Callable[[str], bool], dict[str, Any]]:
        """For a state saved on any number of ranks: which matrices' moments are to be here, and what else differs."""
        return self._matrices.adopt(sizes)

    def __getstate__(self) -> dict[str, Any]:
        """Raises TypeError: a copy would not be attached to any model."""
        raise TypeError(
            f"a {type(self).__name__} optimizer cannot be copied or pickled; make one for the new model and load "
            "state_dict()"
        )


def _local(place: Whole, state: Mapping[str, Any]) -> dict[str, Any]:
    return {k: place.local(v) if isinstance(v, Tensor) else v for k, v in state.items()}
