"""Moving averages of statistics, and the matrix that is made from them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from natgrad.capture.cases import Cases
from natgrad.capture.layer import Layer
from natgrad.curvature.bases import Eigenbasis, bases_of, squares_in, turned
from natgrad.curvature.blocks import affine_block, kfac_blocks
from natgrad.curvature.diagonal import diagonal_squares
from natgrad.curvature.groups import has_rival, tiled
from natgrad.curvature.input_scales import moments_of_data, relative_scales
from natgrad.curvature.moments import (
    AffineMoments,
    DiagonalMoments,
    Moments,
    input_moments,
    layer_moments,
    moments_of_state,
    state_of_moments,
)
from natgrad.distributed.world import World
from natgrad.linalg import CenteredKronecker, Diagonal, Homogeneous, Kronecker, Operator, Rows, factor
from natgrad.linalg.centered import CenteredInverse
from natgrad.optim.preconditioner.frozen import left_of, without
from natgrad.optim.preconditioner.sums import Statistics


class Running(ABC):
    """The moving averages of one structure, for the layers seen so far."""

    observes = True
    """Whether it needs statistics of batches at all."""
    reads_gradients = True
    """Whether the statistics include the gradients `g`, or only the layers' inputs. Only if they do, every parameter
    must belong to a layer."""
    squares_cases = False
    """Whether it sums squares of each case's gradient. They depend on which rows make up a case; K-FAC's factors do
    not, on average."""
    has_bases = False
    """Whether it has eigenbases, which `turn` updates."""
    damps_inputs = False
    """Whether the damping is in units of the inputs, so that the quadratic model has none."""
    can_be_elsewhere = True
    """Whether a rank can do without the averages of a layer."""

    def __init__(self, centered: bool, sharing: str, max_dim: int, input_scales: bool = False):
        self.centered, self.sharing, self.max_dim, self.input_scales = centered, sharing, max_dim, input_scales
        self.total = Statistics()

    @abstractmethod
    def observe(self, cases: Cases) -> Statistics:
        """The sums of one batch."""

    @abstractmethod
    def blocks(self, frozen: Collection[str] = ()) -> dict[Layer, Operator]:
        """The operator of every layer with all its rows, for the mean loss, over the parameters that are not frozen."""

    def inverse(self, operator: Operator, damping: float, style: str) -> Operator:
        """One layer's damped inverse."""
        return operator.inverse(damping, damping_style=style)

    def units(self) -> Mapping[tuple[str, ...], Tensor]:
        """The units in which the inputs of some layers are damped, by the names of the layers' parameters."""
        return {}

    def take_in(self, new: Iterable[Statistics], decay: float) -> bool:
        """Updates the averages. Returns whether there was anything new."""
        found = list(new)
        if not found:
            return False
        self.drop_spoiled()
        came = reduce(Statistics.__add__, found)
        self._drop_replaced(came.layers)
        self.total = self.total.decayed(decay, came)
        return True

    def _drop_replaced(self, new: Iterable[Layer]) -> None:
        """Forgets layers whose parameters now belong to other layers, for example because a weight was frozen."""
        known = {layer.names for layer in new}
        taken = {n for names in known for n in names}
        gone = {layer for layer in self.layers if layer.names not in known and not taken.isdisjoint(layer.names)}
        if gone:
            self.forget(gone)

    def forget(self, gone: Collection[Layer]) -> None:
        self.total = self.total.without(gone)

    def drop_spoiled(self) -> set[Layer]:
        """Forgets averages that are not finite. Returns their layers. Scales stay the same on all ranks."""
        spoiled = self.total.spoiled()
        if spoiled:
            scales = {layer: m for layer, m in self.total.scales.items() if bool(m.is_finite())}
            self.total = replace(self.total.without(spoiled), scales=scales)
        return spoiled

    def turn(self, world: World) -> None:  # noqa: B027
        """Updates the eigenbases, if it has any."""

    @property
    def layers(self) -> list[Layer]:
        return self.total.layers

    def state(self) -> dict[str, Any]:
        return {
            "moments": state_of_moments(self.total.moments),
            "squares": state_of_moments(self.total.squares),
            "scales": state_of_moments(self.total.scales),
            "layers": [layer.key() for layer in self.layers],
        }

    def load(self, state: dict[str, Any]) -> None:
        sums = [moments_of_state(state.get(kind, {})) for kind in ("moments", "squares", "scales")]
        layers = map(Layer.of_key, state["layers"])
        self.total = Statistics.of(sums, (layer for layer in layers if layer not in sums[0]))


class RunningKfac(Running):
    """`A ⊗ B`, or, if centered, `C ⊗ B`."""

    def observe(self, cases: Cases) -> Statistics:
        scales = moments_of_data(cases) if self.input_scales else {}
        return Statistics(layer_moments(cases, self.sharing, self.max_dim), scales=scales)

    def units(self) -> Mapping[tuple[str, ...], Tensor]:
        return relative_scales(self.total.scales)

    def blocks(self, frozen: Collection[str] = ()) -> dict[Layer, Operator]:
        return kfac_blocks(left_of(self.total.moments, frozen), True, self.centered)


class RunningEkfac(RunningKfac):
    """K-FAC's eigenbases, updated rarely, with the second moments of the gradients in them, updated often.

    After an update of the bases, the second moments start from K-FAC's eigenvalues, with the weight of the factors.
    Every rank has the bases of all layers, because it computes the second moments of its own batch in them.
    """

    can_be_elsewhere = False
    squares_cases = True
    has_bases = True

    def __init__(self, centered: bool, sharing: str, max_dim: int, input_scales: bool = False):
        super().__init__(centered, sharing, max_dim, input_scales)
        self._bases: dict[Layer, Eigenbasis] = {}

    def observe(self, cases: Cases) -> Statistics:
        if not self._bases:
            return super().observe(cases)
        cases = cases.kept()
        squares = squares_in(self._bases, self.total.moments, cases.parted(self.total.moments))
        own: dict[Layer, Moments] = {layer: DiagonalMoments(v, cases.mass) for layer, v in squares.items()}
        return Statistics(super().observe(cases).moments, own)

    def turn(self, world: World) -> None:
        moments = self.total.moments
        self._bases = bases_of(moments, self.centered, turned, self._bases, world)
        squares: dict[Layer, Moments] = {}
        for layer, basis in self._bases.items():
            m = moments[layer]
            assert isinstance(m, AffineMoments)
            squares[layer] = DiagonalMoments(basis.kronecker_values(m), m.mass)
        self.total = replace(self.total, squares=squares)

    def forget(self, gone: Collection[Layer]) -> None:
        super().forget(gone)
        self._bases = {layer: basis for layer, basis in self._bases.items() if layer not in gone}

    def blocks(self, frozen: Collection[str] = ()) -> dict[Layer, Operator]:
        own: dict[Layer, Operator] = {}
        moments = self.total.moments
        for layer, basis in self._bases.items():
            if has_rival(layer, moments):  # as Wᵀ, in some batches only
                continue
            squares, m = self.total.squares.get(layer), moments.get(layer)
            if squares is not None and m is not None and without(layer, frozen) == layer:
                assert isinstance(squares, DiagonalMoments)
                assert isinstance(m, AffineMoments)
                own[layer] = basis.block(squares.means(), m)
        rest = {layer: m for layer, m in moments.items() if layer not in own}
        return tiled(own) | kfac_blocks(left_of(rest, frozen), True, self.centered)

    def state(self) -> dict[str, Any]:
        bases = {layer.key(): {"U_A": b.U_A, "U_B": b.U_B, "centered": b.centered} for layer, b in self._bases.items()}
        return super().state() | {"bases": bases}

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        bases = {Layer.of_key(key): basis for key, basis in state.get("bases", {}).items()}
        self._bases = {layer: Eigenbasis(layer, **basis) for layer, basis in bases.items()}


class RunningDiagonal(Running):
    """The diagonal of the exact matrix."""

    squares_cases = True

    def observe(self, cases: Cases) -> Statistics:
        return Statistics({layer: DiagonalMoments(v, cases.mass) for layer, v in diagonal_squares(cases).items()})

    def blocks(self, frozen: Collection[str] = ()) -> dict[Layer, Operator]:
        left = left_of(self.total.moments, frozen)
        means = {layer: m.means() for layer, m in left.items() if isinstance(m, DiagonalMoments)}
        return tiled({layer: Diagonal(values) for layer, values in means.items()})


class RunningInput(Running):
    """Only the input factor: `C ⊗ I`, and `I` for the mean pre-activation `b + W m`; or, without centering, `A ⊗ I`.

    Only layers whose inputs are rows or patches have an input factor.
    """

    reads_gradients = False
    damps_inputs = True

    def observe(self, cases: Cases) -> Statistics:
        own = [layer for layer in cases.h if self._has_factor(layer, cases)]
        return Statistics(input_moments(cases, own, self.sharing, self.max_dim))

    def _has_factor(self, layer: Layer, cases: Cases) -> bool:
        sparse = any(use.diagonal for use in cases.h[layer])
        return bool(layer.weight) and not (layer.scale or sparse or has_rival(layer, cases.h))

    def blocks(self, frozen: Collection[str] = ()) -> dict[Layer, Operator]:
        left = left_of(self.total.moments, frozen)
        return tiled({layer: self._block(layer, m) for layer, m in left.items() if layer.weight})

    def _block(self, layer: Layer, m: Moments) -> Operator:
        assert isinstance(m, AffineMoments)
        return affine_block(layer, m, torch.ones_like(m.output), self.centered)

    def inverse(self, operator: Operator, damping: float, style: str) -> Operator:
        """`(C + εI)⁻¹ ⊗ I` and `I`: only the input factor is damped. `ε` is `damping`; with the style `"relative"`, it
        is in units of the factor's mean eigenvalue."""
        if isinstance(operator, Rows):
            return Rows([self.inverse(op, damping, style) for op in operator.parts])
        if isinstance(operator, Homogeneous):
            return Homogeneous(self.inverse(operator.stacked, damping, style))
        if isinstance(operator, CenteredKronecker):
            weight = Kronecker(_damped_inverse(operator.C, damping, style, operator.m), operator.B)
            return CenteredInverse(weight, Diagonal((operator.B,)), operator.m)
        assert isinstance(operator, Kronecker)
        return Kronecker(_damped_inverse(operator.A, damping, style), operator.B)


def _damped_inverse(F: Tensor, damping: float, style: str, m: Tensor | None = None) -> Tensor:
    """`(F + εI)⁻¹`. With the style `"relative"` the result is zero if the factor has no scale: if it is zero, or if it
    is a covariance within the rounding errors of the mean `m`, because the inputs do not vary. The weights of such
    inputs only do what the bias can also do."""
    if style != "relative":
        return factor.inverse(factor.add_to_diagonal(F, damping), "the input factor", damping)
    scale = factor.diagonal(F).mean()
    rounding = 0.0 if m is None else torch.finfo(F.dtype).eps * m.square().mean()
    varies = scale > rounding
    epsilon = damping * torch.where(varies, scale, 1.0)
    return varies * factor.inverse(factor.add_to_diagonal(F, epsilon), "the input factor", damping)


class RunningIdentity(Running):
    """No averages: the matrix is the identity, and the step is that of gradient descent."""

    observes = False
    reads_gradients = False

    def observe(self, cases: Cases) -> Statistics:
        return Statistics()

    def blocks(self, frozen: Collection[str] = ()) -> dict[Layer, Operator]:
        return {}


RUNNING: dict[str, type[Running]] = {
    "kfac": RunningKfac,
    "ekfac": RunningEkfac,
    "input": RunningInput,
    "diagonal": RunningDiagonal,
    "identity": RunningIdentity,
}
