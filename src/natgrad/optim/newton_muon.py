"""NewtonMuon: hidden matrices take an orthogonalized step on whitened inputs, all else takes AdamW's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from natgrad.capture.cases import Layer
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
from natgrad.curvature.moments import MAX_DIM, AffineMoments, Moments, moments_of_state
from natgrad.distributed.assignment import assign, cost
from natgrad.distributed.placement import placed, placed_within
from natgrad.distributed.reduction import Keep, completed, reduced
from natgrad.optim import averaging
from natgrad.optim.adamw import adamw, decayed_
from natgrad.optim.batch import Forward
from natgrad.optim.interval import Interval
from natgrad.optim.orthogonal import orthogonalized
from natgrad.optim.parameter_groups import Groups, as_group, parameter_groups
from natgrad.optim.routing import (
    NOT_SEEN,
    WHITENED,
    Route,
    Routing,
    Seen,
    Steps,
    chooser,
    matrix_shape,
    routes_of,
    seen_in,
    unseen,
)
from natgrad.optim.saved import state_of
from natgrad.optim.unchanged import Unchanged
from natgrad.optim.vectors import Vector, check_dense, copied, finite
from natgrad.optim.watch import Watch
from natgrad.optim.whitening import InputSide, added, input_sums

SIDES = {"input": "the second moment of a layer's inputs", "both": "that, and the gradients' on the output side"}
REST = 0.15
"""The learning rate of AdamW's steps, in units of that of the matrices."""
NO_FORWARD = (
    "step() came before any forward of the model in training mode with gradients enabled, and so it is not known what "
    "the parameters do. Expected loss = criterion(model(x), y); loss.backward(); opt.step(), with the model that the "
    "optimizer was made for, or one that has it as a part, and after model.train()"
)


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
        self._place = placed(model)
        self.model, self._world = self._place.model, self._place.world
        self.sides, self.average, self.refresh_every, self.max_dim = sides, average, refresh_every, max_dim
        self._parameters: dict[str, Tensor] = {}
        self._watch: Watch | None = None
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
        shapes = {n: p.shape for n, p in self.model.named_parameters()}
        self._chosen = chooser(steps, shapes)
        self.diagnostics: dict[str, Any] = {}
        self._steps = 0
        self._refreshed: int | None = None  # at which step
        self._interval = Interval(refresh_every, growing=True)
        self._routes: dict[str, Route] = {}
        self._owners: dict[str, int] = {}  # of matrices, where parameters are sharded
        self._seen: list[Seen] = []
        self._others: dict[str, str] = {}  # functions by which parameters were used otherwise
        self._sums: dict[Layer, AffineMoments] = {}
        self._inputs = InputSide(ridge, decay)
        self._unchanged = Unchanged(None)
        # A module of Lightning's is not called itself: its training_step calls its parts.
        also = [m for m in self.model.children() if hasattr(self.model, "training_step") and any(m.parameters())]
        self._watch = Watch(
            self.model,
            self._parameters,
            beyond_evaluation=True,
            within=self._see_ranks,
            finished=self._see,
            also=also,
        )
        self._watch.see_more(self._place.follow)
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
        own = {id(p) for group in self.param_groups for p in group["params"]}
        self._parameters.clear()
        self._parameters.update((n, p) for n, p in self.model.named_parameters() if id(p) in own)
        if self._watch is not None:
            self._watch.follow(self._parameters)
            self._refreshed = None
            self._arm()

    def _by_group(self, names: Iterable[str]) -> list[tuple[dict[str, Any], list[str]]]:
        """Every group with those of its parameters that are named."""
        group_of = {id(p): i for i, group in enumerate(self.param_groups) for p in group["params"]}
        found: list[list[str]] = [[] for _ in self.param_groups]
        for n in names:
            found[group_of[id(self._parameters[n])]].append(n)
        return [(group, own) for group, own in zip(self.param_groups, found, strict=True) if own]

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
        shapes = {n: p.shape for n, p in self._parameters.items()}
        return Routing({n: self._routes.get(n) for n in self._parameters}, shapes)

    # Forwards ------------------------------------------------------------------------------------------

    def _see_ranks(self, around: DistributedDataParallel) -> None:
        """Joins the ranks of a `DistributedDataParallel` that was made after the optimizer."""
        if self._world.size > 1 or self._place.shards is not None:
            return
        self._place = placed_within(around, self.model)
        self._world = self._place.world

    def _due(self) -> bool:
        """Whether the next step takes in what a forward has shown."""
        return self._refreshed is None or self._steps - self._refreshed >= self._interval.steps(self._steps)

    def _arm(self) -> None:
        if self._watch is not None:
            self._watch.recording = self._due()

    def _see(self, forward: Forward) -> None:
        """The end of a forward in training mode."""
        if forward.recorder is None:
            return
        uses = [use for use in forward.recorder.uses if use.weight in self._parameters or use.bias in self._parameters]
        with torch.no_grad(), torch.autocast(self._device.type, enabled=False):
            self._sums = added(self._sums, input_sums(uses, self.max_dim), 1.0)
        if self._unsettled():
            self._seen += seen_in(uses)
            self._others |= forward.recorder.others

    @property
    def _device(self) -> torch.device:
        return next(iter(self._parameters.values())).device

    # The step ------------------------------------------------------------------------------------------

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
        gradients = {n: self._place.local(p.grad) for n, p in self._parameters.items() if p.grad is not None}
        check_dense(gradients)
        self.diagnostics = {"step": self._steps, "accepted": True, "reason": "", "refreshed": False}
        with torch.autocast(self._device.type, enabled=False):
            if self._place.any(bool(gradients) and not finite(gradients)):
                self._reject("the gradient is not finite")
            else:
                if self._due():
                    self._refresh(gradients)
                self._move(gradients)
        self._place.settle()
        assert self._watch is not None
        self._watch.buffers.end_step(accepted=self.diagnostics["accepted"])
        self._steps += 1
        self._arm()
        return value

    def _reject(self, reason: str) -> None:
        self.diagnostics |= {"accepted": False, "reason": reason}
        self._sums.clear()
        self._seen.clear()
        warn(f"{type(self).__name__} rejected step {self._steps}: {reason}")

    def _refresh(self, gradients: Vector) -> None:
        """Takes in what the last forwards have shown: routes of parameters that had none, and the inputs' moments."""
        if self._place.shards is None:
            self._unchanged.check(self.model, self._parameters)
        self._find_routes(gradients)
        own, self._sums = self._sums, {}
        whitened = {unit for route in self._routes.values() if route.step == WHITENED for unit in route.units}
        sums = completed({unit: m for unit, m in own.items() if unit in whitened}, self._world)
        if whitened and not sums:
            return  # no forward in training mode since the last step
        self.diagnostics["refreshed"] = True
        self._refreshed = self._steps
        spoiled = self._inputs.take_in(self._reduced(sums))
        if spoiled:
            names = ", ".join(dict.fromkeys(repr(unit.weight) for unit in spoiled))
            warn(f"the inputs of {names} were not finite at step {self._steps}; their earlier averages are kept")

    def _find_routes(self, gradients: Vector) -> None:
        """Settles the routes of parameters that were seen, and of those that have a gradient and were not."""
        seen, self._seen = self._seen, []
        missing = {n: self._parameters[n].shape for n in self._unsettled()}
        if not missing:
            return

        def find() -> dict[str, Route]:
            return routes_of(seen, missing, self._chosen)

        own = self._world.together({"routes": find}, "what the parameters do")["routes"]
        others = {n: self._others.get(n) for n in gradients if n in missing}
        every = self._world.gather((own, others), "what the parameters do")
        found: dict[str, Route] = {}
        for routes, _ in reversed(every):  # the first rank that has seen it decides
            found |= routes
        if not (found or self._routes):
            raise RuntimeError(NO_FORWARD)
        for _, its in every:
            for n, function in its.items():
                found.setdefault(n, unseen(n, self._chosen(n), function))
        self._routes.update(found)
        for n, route in found.items():
            if route.units and "exp_avg" in self.state[self._parameters[n]]:
                for key in ("step", "exp_avg", "exp_avg_sq"):
                    del self.state[self._parameters[n]][key]
        self._find_owners()

    def _find_owners(self) -> None:
        """Where parameters are sharded, the rank that each matrix's direction is computed on."""
        if self._place.shards is None:
            return
        shapes = {n: self._parameters[n].shape for n, route in self._routes.items() if route.units}
        costs = {n: prod(shape) * float(max(shape)) for n, shape in shapes.items() if n not in self._owners}
        self._owners.update(assign(costs, self._place.shards.size))

    def _unsettled(self) -> list[str]:
        """The parameters of which no use was seen yet."""
        return [n for n in self._parameters if n not in self._routes or self._routes[n].why == NOT_SEEN]

    def _reduced(self, sums: Mapping[Layer, Moments]) -> dict[Layer, AffineMoments]:
        """The moments of all ranks' inputs; where parameters are sharded, those that this rank is to have."""
        if self._world.size > 1:
            shards = self._place.shards
            owners: dict[tuple[str, ...], int] = {(n,): rank for n, rank in self._owners.items()}
            keep = None if shards is None else Keep(shards.world, owners, shards.copies)
            sums = reduced(sums, self._world, "the inputs' moments", keep)
        return {unit: m for unit, m in sums.items() if isinstance(m, AffineMoments)}

    def _move(self, gradients: Vector) -> None:
        values = {n: self._place.local(self._parameters[n]) for n in gradients}
        g = {n: t.to(torch.promote_types(t.dtype, torch.float32)) for n, t in gradients.items()}
        matrices = {n for n in g if n in self._routes and self._routes[n].units}
        states = {n: self.state[self._parameters[n]] for n in g}
        directions = self._orthogonal(self._momentum({n: g[n] for n in g if n in matrices}, states))
        for group, names in self._by_group(n for n in g if n not in matrices):
            directions |= adamw({n: g[n] for n in names}, states, group["betas"], group["eps"])
        for group, names in self._by_group(g):
            for own, rate in (
                ([n for n in names if n in matrices], group["lr"]),
                ([n for n in names if n not in matrices], group["lr"] * group["rest"]),
            ):
                if own:
                    p, d = [values[n] for n in own], [directions[n].to(values[n].dtype) for n in own]
                    decayed_(p, d, rate * group["weight_decay"], group["cautious"])
                    torch._foreach_add_(p, d, alpha=-rate)
        if self.average is not None:
            averaging.take_in(values, states.__getitem__, self.average)

    def _momentum(self, g: Vector, states: Mapping[str, dict[str, Any]]) -> Vector:
        """The averages of the gradients after they have taken in the new ones; with Nesterov's, one average further."""
        out: Vector = {}
        for group, names in self._by_group(g):
            mu, new = group["momentum"], [g[n] for n in names]
            for n in names:
                if "momentum_buffer" not in states[n]:
                    states[n]["momentum_buffer"] = torch.zeros_like(g[n])
            buffers = [states[n]["momentum_buffer"] for n in names]
            torch._foreach_lerp_(buffers, new, 1 - mu)
            ahead = torch._foreach_lerp(new, buffers, mu) if group["nesterov"] else buffers
            out |= dict(zip(names, ahead, strict=True))
        return out

    def _orthogonal(self, v: Vector) -> Vector:
        """The whitened and orthogonalized directions: of whole parameters, or from shards to shards."""
        shards = self._place.shards
        if not v:
            return {}
        if shards is None:
            return self._orthogonalized(v)
        owners = {n: self._owners[n] for n in v}
        shapes = {n: self._parameters[n].shape for n in v}
        whole = shards.gathered(v, owners, shapes)
        return shards.scattered(self._orthogonalized(whole), owners, shapes, next(iter(v.values())))

    def _orthogonalized(self, v: Vector) -> Vector:
        matrices: dict[Layer, Tensor] = {}
        for n, direction in v.items():
            for unit in self._routes[n].units:
                M = unit.layout.to_operator(direction, direction.shape, matrix_shape(unit.layout, direction.shape))
                M = M[slice(*unit.rows)] if unit.rows else M
                matrices[unit] = self._inputs.whitened(unit, M) if self._routes[n].step == WHITENED else M
        found = dict(zip(matrices, orthogonalized(list(matrices.values())), strict=True))
        out: Vector = {}
        for n, direction in v.items():
            units = self._routes[n].units
            M = found[units[0]] if len(units) == 1 else torch.cat([found[unit] for unit in units])
            shape = matrix_shape(units[0].layout, direction.shape)
            out[n] = units[0].layout.to_parameter(M, direction.shape, shape)
        return out

    # Averages ------------------------------------------------------------------------------------------

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
        values = {n: self._place.local(p) for n, p in self._parameters.items()}
        with averaging.swapped(values, lambda n: self.state[self._parameters[n]]):
            yield

    # Saving --------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next steps depend on beside the parameters: they resume bit for bit.

        As in torch, tensors are not copied.
        """
        own = {
            "steps": self._steps,
            "refreshed": self._refreshed,
            "routes": {n: route.state() for n, route in self._routes.items()},
            "owners": dict(self._owners),
            "moments": self._inputs.state(),
        }
        whole, params = super().state_dict(), self._by_index()
        state = {
            i: {k: self._place.stored(params[i], v) if isinstance(v, Tensor) else v for k, v in its.items()}
            for i, its in whole["state"].items()
        }
        return whole | {"state": state, self._key: own}

    def _by_index(self) -> list[Tensor]:
        """The parameters as `state_dict` counts them."""
        return [p for group in self.param_groups for p in group["params"]]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resumes from what `state_dict` gave, for a model of the same parameters. Nothing is changed where an error is
        raised.

        Raises:
            TypeError: if it is no dictionary.
            ValueError: if it is not of such an optimizer, or of other parameters.
        """
        saved = state_of(state_dict, self._key, type(self).__name__)
        routes = {n: Route.of_state(its) for n, its in saved["routes"].items()}
        self._check(state_dict, saved, routes)
        params = self._by_index()
        # torch casts to the parameter's precision, which may be less than that of the state.
        state = {
            i: {k: self._place.local(v).to(self._device) if isinstance(v, Tensor) else v for k, v in its.items()}
            for i, its in copied(state_dict["state"], self._device).items()
        }
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        self.state.update({params[i]: its for i, its in state.items()})
        saved = copied(saved, self._device)
        self._steps, self._refreshed = saved["steps"], saved["refreshed"]
        for own, its in ((self._routes, routes), (self._owners, saved["owners"])):
            own.clear()
            own.update(its)
        self._find_owners()
        self._inputs.load(saved["moments"])
        self._sums.clear()
        self._seen.clear()
        self._arm()

    def _adopt(self, sizes: Mapping[str, Sequence[torch.Size]]) -> tuple[Callable[[str], bool], dict[str, Any]]:
        """For a state with moments of these sizes, saved on any number of ranks: which layers' are to be here, and what
        else is not as it was saved."""
        shards = self._place.shards
        costs: dict[str, float] = {}
        for key, its in sizes.items():
            name = Layer.of_key(key).names[0]
            costs[name] = costs.get(name, 0.0) + cost(its)
        owners = {} if shards is None else assign(costs, shards.size)
        return lambda key: shards is None or owners[Layer.of_key(key).names[0]] == shards.rank, {"owners": owners}

    def _check(self, state_dict: Mapping[str, Any], saved: Mapping[str, Any], routes: Mapping[str, Route]) -> None:
        """Raises ValueError if it is of other parameters, or one rank's of several."""
        missing = [k for k in ("steps", "refreshed", "owners", "moments") if k not in saved]
        if missing:
            raise ValueError(
                f"the state has no {missing[0]!r} under {self._key!r}; expected what state_dict() of this version gives"
            )
        sizes = [len(group["params"]) for group in state_dict["param_groups"]]
        own = [len(group["params"]) for group in self.param_groups]
        if sizes != own:
            raise ValueError(
                f"the state has groups of {sizes} parameters, and this optimizer of {own}; make it with the same groups"
            )
        unknown = [n for n in routes if n not in self._parameters]
        if unknown:
            raise ValueError(
                f"the state has a step for {unknown[0]!r}, which is not a parameter here; load it for the model that "
                "it was saved of"
            )
        names = {id(p): n for n, p in self._parameters.items()}
        params = self._by_index()
        for i, its in state_dict["state"].items():
            for key, t in its.items():
                if isinstance(t, Tensor) and t.ndim and t.shape != params[i].shape:
                    raise ValueError(
                        f"the state has {key!r} of shape {tuple(t.shape)} for {names[id(params[i])]!r}, which has "
                        f"shape {tuple(params[i].shape)} here; load it for a model of the same widths"
                    )
        for unit, m in moments_of_state(saved["moments"]).items():
            assert unit.weight is not None
            columns = matrix_shape(unit.layout, self._parameters[unit.weight].shape)[1]
            if not isinstance(m, AffineMoments) or len(m.mean) != columns:
                raise ValueError(
                    f"the state has moments of another width for {unit.weight!r}; load it for a model of the same "
                    "widths"
                )
        whitened = {unit for route in routes.values() if route.step == WHITENED for unit in route.units}
        if whitened - set(map(Layer.of_key, saved["moments"])) and saved["owners"] and self._place.shards is None:
            raise ValueError(
                "the state is one rank's of several and has not all inputs' moments; save it with "
                "torch.distributed.checkpoint and load it with natgrad.load_checkpoint"
            )

    def __getstate__(self) -> dict[str, Any]:
        """Raises TypeError: a copy would not be attached to any model."""
        raise TypeError(
            f"a {type(self).__name__} optimizer cannot be copied or pickled; make one for the new model and load "
            "state_dict()"
        )
