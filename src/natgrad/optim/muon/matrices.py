"""The matrices of a model and their directions: whitened, orthogonalized, on the rank that has what is needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from natgrad.capture.layer import Layer
from natgrad.capture.recorder import WITHOUT_GRADIENTS
from natgrad.checks.warning import warn
from natgrad.curvature.moments import AffineMoments, Moments, moments_of_state, state_of_moments
from natgrad.distributed.assignment import assign, cost
from natgrad.distributed.reduction import Keep, completed, reduced
from natgrad.optim.muon.forwards import Shown
from natgrad.optim.muon.output import OutputSide
from natgrad.optim.muon.routing import (
    ADAMW,
    NOT_SEEN,
    WHITENED,
    Route,
    multiplies,
    routes_of,
    unseen,
)
from natgrad.optim.muon.whitening import InputSide
from natgrad.optim.parameters import Parameters
from natgrad.optim.preconditioner.orthogonal import orthogonalized
from natgrad.optim.vectors import Vector

NO_FORWARD = (
    "step() came before any forward of the model in training mode with gradients enabled, and so it is not known what "
    "the parameters do. Expected loss = criterion(model(x), y); loss.backward(); opt.step(), with the model that the "
    "optimizer was made for, or one that has it as a part, and after model.train()"
)


class Matrices:
    """The routes of all parameters, and the directions of those that are matrices.

    Args:
        parameters: of the optimizer.
        chosen: the user's choice of a step by name, or None.
        inputs: the averages of the inputs' second moments.
        outputs: the averages of what the gradients span on the output side, if that is whitened, too.
        whiten: whether a hidden matrix is whitened unless the user says so.
    """

    def __init__(
        self,
        parameters: Parameters,
        chosen: Callable[[str], str | None],
        inputs: InputSide,
        outputs: OutputSide | None = None,
        *,
        whiten: bool = True,
    ):
        self._parameters, self._chosen, self._whiten = parameters, chosen, whiten
        self.inputs, self.outputs = inputs, outputs
        self.routes: dict[str, Route] = {}
        self._owners: dict[str, int] = {}  # the ranks that matrices are on, where parameters are sharded

    def __contains__(self, name: str) -> bool:
        return name in self.routes and bool(self.routes[name].units)

    # What forwards have shown --------------------------------------------------------------------------

    def is_settled(self, name: str) -> bool:
        """Whether a use of a parameter was seen."""
        return name in self.routes and self.routes[name].why != NOT_SEEN

    def looked_at(self) -> list[str]:
        """The parameters for which forwards are recorded: those whose use is not known, and those that are whitened."""
        return [n for n in self._parameters if not self.is_settled(n) or self.routes[n].step == WHITENED]

    def may_be_whitened(self, name: str) -> bool:
        """Whether a weight is whitened, or its use is not known yet and it may be."""
        if self.is_settled(name):
            return self.routes[name].step == WHITENED
        chosen = self._chosen(name)
        return self._whiten if chosen is None else chosen == WHITENED

    def settle(self, shown: Shown, gradients: Vector) -> list[str]:
        """Finds the routes of parameters that were seen, and of those that have a gradient and were not. Gives the
        names of those that have become matrices.

        Raises:
            RuntimeError: if nothing is known of any parameter.
            ValueError: if the user has chosen a step that a parameter cannot take.
        """
        missing = {n: self._parameters[n].shape for n in self._parameters if not self.is_settled(n)}
        if not missing:
            return []
        world, what = self._parameters.place.world, "what the parameters do"
        own = world.together({"routes": lambda: routes_of(list(shown.uses), missing, self._chosen)}, what)["routes"]
        others = {n: shown.others.get(n) for n in gradients if n in missing}
        every = world.gather((own, others, shown.forwards), what)
        found: dict[str, Route] = {}
        for routes, _, _ in reversed(every):  # the first rank that has seen it decides
            found |= routes
        if not (self.routes or any(forwards for *_, forwards in every)):
            raise RuntimeError(NO_FORWARD)
        unread = {n: f for _, its, _ in every for n, f in its.items() if n not in found and f is not None}
        for _, its, _ in every:
            for n, function in its.items():
                found.setdefault(n, unseen(n, self._chosen(n), function))
        if not self._whiten:
            found |= {n: route.unwhitened() for n, route in found.items() if self._chosen(n) is None}
        self._tell_of_products({n: f for n, f in unread.items() if found[n].step == ADAMW and not self._chosen(n)})
        self.routes.update(found)
        self._find_owners()
        return [n for n, route in found.items() if route.units]

    def _tell_of_products(self, unread: Mapping[str, str]) -> None:
        """Warns if matrices take AdamW's step because the functions that multiply by them are not read as layers."""
        large = [n for n, function in unread.items() if self._parameters[n].ndim > 1 and multiplies(function)]
        if not large:
            return
        function, mend = unread[large[0]], "choose other steps with steps="
        if WITHOUT_GRADIENTS in function:
            mend = f"use torch.utils.checkpoint with use_reentrant=False, or {mend}"
        names, more = ", ".join(map(repr, large[:3])), f" and {len(large) - 3} more" if len(large) > 3 else ""
        warn(f"AdamW steps for {names}{more}, used by {function}, which is not read as a layer; {mend}")

    def _find_owners(self) -> None:
        """Where parameters are sharded, the rank that each matrix's direction is computed on."""
        shards = self._parameters.place.shards
        if shards is not None:
            shapes = {n: self._parameters[n].shape for n in self.routes if n in self and n not in self._owners}
            self._owners.update(assign({n: prod(s) * float(max(s)) for n, s in shapes.items()}, shards.size))

    def take_in(self, sums: Mapping[Layer, AffineMoments]) -> tuple[bool, list[Layer]]:
        """Whether there was anything to take in; and the matrices whose inputs were not finite."""
        world = self._parameters.place.world
        whitened = {n: route for n, route in self.routes.items() if route.step == WHITENED}
        own: dict[Layer, AffineMoments] = {}
        for unit, m in sums.items():
            route = whitened.get(unit.weight or "")
            for matrix in () if route is None else route.sharing(unit, len(m.mean)):
                own[matrix] = own[matrix] + m if matrix in own else m
        every = completed(own, world)
        spoiled = self.inputs.take_in(self._reduced(every))
        return bool(every) or not whitened, spoiled

    def take_in_gradients(self, gradients: Vector) -> None:
        """For the output side, after the inputs were taken in."""
        if self.outputs is None:
            return
        own = {n: g for n, g in gradients.items() if n in self and self.routes[n].step == WHITENED}
        shards = self._parameters.place.shards
        if shards is not None and own:
            shapes = {n: self._parameters[n].shape for n in own}
            own = shards.gathered(own, {n: self._owners[n] for n in own}, shapes)
        matrices: dict[Layer, Tensor] = {}
        for n, g in own.items():
            matrices |= self._by_unit(n, g)
        self.outputs.take_in(matrices, self.inputs)

    def _reduced(self, sums: Mapping[Layer, Moments]) -> dict[Layer, AffineMoments]:
        """The moments of all ranks' inputs; where parameters are sharded, those that this rank is to have."""
        place = self._parameters.place
        if place.world.size > 1:
            owners: dict[tuple[str, ...], int] = {(n,): rank for n, rank in self._owners.items()}
            keep = None if place.shards is None else Keep(place.shards.world, owners, place.shards.copies)
            sums = reduced(sums, place.world, "the inputs' moments", keep)
        return {unit: m for unit, m in sums.items() if isinstance(m, AffineMoments)}

    # Directions ----------------------------------------------------------------------------------------

    def directions(self, v: Vector) -> Vector:
        """The whitened and orthogonalized `v`: of whole parameters, or from shards to shards."""
        shards = self._parameters.place.shards
        if shards is None or not v:
            return self._directions(v)
        owners, shapes = {n: self._owners[n] for n in v}, {n: self._parameters[n].shape for n in v}
        whole = self._directions(shards.gathered(v, owners, shapes))
        return shards.scattered(whole, owners, shapes, next(iter(v.values())))

    def _directions(self, v: Vector) -> Vector:
        matrices: dict[str, list[Tensor]] = {}
        for n, direction in v.items():
            route, its = self.routes[n], self._by_unit(n, direction)
            whole = [self._whitened(unit, M) if route.step == WHITENED else M for unit, M in its.items()]
            matrices[n] = [part for M in whole for part in M.chunk(route.gates)]
        found = iter(orthogonalized([M for its in matrices.values() for M in its]))
        out: Vector = {}
        for n, direction in v.items():
            parts = [next(found) for _ in matrices[n]]
            M, route = parts[0] if len(parts) == 1 else torch.cat(parts), self.routes[n]
            out[n] = route.units[0].layout.to_parameter(M, direction.shape, route.matrix(direction.shape))
        return out

    def _by_unit(self, name: str, value: Tensor) -> dict[Layer, Tensor]:
        """A parameter's value, gradient or direction, as its matrices."""
        found, route = {}, self.routes[name]
        for unit in route.units:
            M = unit.layout.to_operator(value, value.shape, route.matrix(value.shape))
            found[unit] = M[slice(*unit.rows)] if unit.rows else M
        return found

    def _whitened(self, unit: Layer, M: Tensor) -> Tensor:
        """In torch's own precision of products, as the gradients were computed. In a lower one, rounding errors would
        be enlarged where the inputs have few directions."""
        M = self.inputs.whitened(unit, M)
        return M if self.outputs is None else self.outputs.whitened(unit, M)

    # Saving --------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        return {
            "routes": {n: route.state() for n, route in self.routes.items()},
            "owners": dict(self._owners),
            "moments": state_of_moments(self._moments()),
        }

    def _moments(self) -> dict[Layer, AffineMoments]:
        """The inputs' moments, and with them what is known of the output side."""
        outputs = self.outputs.sums if self.outputs is not None else {}
        return {u: replace(m, output=outputs[u]) if u in outputs else m for u, m in self.inputs.moments.items()}

    def load(self, saved: Mapping[str, Any]) -> None:
        routes = {n: Route.of_state(its) for n, its in saved["routes"].items()}
        self.routes.clear()
        self.routes.update({n: route for n, route in routes.items() if route.is_as_chosen(self._chosen(n))})
        self._owners.clear()
        self._owners.update(saved["owners"])
        self._find_owners()
        moments = {u: m for u, m in moments_of_state(saved["moments"]).items() if isinstance(m, AffineMoments)}
        self.inputs.load({u: replace(m, output=m.output.new_zeros(0, 0)) for u, m in moments.items()})
        if self.outputs is not None:
            self.outputs.load({u: m.output for u, m in moments.items() if m.output.numel()})

    def check_state(self, saved: Mapping[str, Any]) -> None:
        """Raises ValueError if a state is of other parameters, or one rank's of several."""
        routes = {n: Route.of_state(its) for n, its in saved["routes"].items()}
        unknown = [n for n in routes if n not in self._parameters]
        if unknown:
            raise ValueError(
                f"the state has a step for {unknown[0]!r}, which is not a parameter here; load it for the model that "
                "it was saved of"
            )
        moments = moments_of_state(saved["moments"])
        for unit, m in moments.items():
            assert unit.weight is not None
            route, own = routes.get(unit.weight), self._parameters[unit.weight]
            if not isinstance(m, AffineMoments) or route is None or len(m.mean) != route.matrix(own.shape)[1]:
                raise ValueError(
                    f"the state has moments of another width for {unit.weight!r}; load it for a model of the same "
                    "widths"
                )
        whitened = {unit for route in routes.values() if route.step == WHITENED for unit in route.units}
        if whitened - moments.keys() and saved["owners"] and self._parameters.place.shards is None:
            raise ValueError(
                "the state is one rank's of several and has not all inputs' moments; save it with "
                "torch.distributed.checkpoint and load it with natgrad.load_checkpoint"
            )

    def adopt(self, sizes: Mapping[str, Sequence[torch.Size]]) -> tuple[Callable[[str], bool], dict[str, Any]]:
        """For a state with moments of these sizes, saved on any number of ranks: which matrices' are to be here, and
        what else is not as it was saved."""
        shards = self._parameters.place.shards
        costs: dict[str, float] = {}
        for key, its in sizes.items():
            name = Layer.of_key(key).names[0]
            costs[name] = costs.get(name, 0.0) + cost(its)
        owners = {} if shards is None else assign(costs, shards.size)
        return lambda key: shards is None or owners[Layer.of_key(key).names[0]] == shards.rank, {"owners": owners}
