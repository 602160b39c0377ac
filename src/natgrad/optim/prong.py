"""Natural Neural Networks: gradient descent on weights that act on whitened inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from natgrad.capture.eager import not_compiled
from natgrad.capture.layer import Layer, layers_of
from natgrad.capture.reading import read_inputs
from natgrad.capture.recorder import Recorder
from natgrad.checks.parameters import select_parameters
from natgrad.checks.values import check_count, check_flag, check_max_dim, check_number, check_within
from natgrad.checks.warning import warn
from natgrad.curvature.moments import MAX_DIM, AffineMoments, moments_of_state, state_of_moments
from natgrad.distributed.placement import placed, refuse_ranks
from natgrad.linalg import factor
from natgrad.linalg.eigen import semidefinite
from natgrad.optim.saved import check_parameters, copied, named, state_of
from natgrad.optim.tracking.watch import Watch
from natgrad.optim.vectors import check_dense, finite


@dataclass(frozen=True)
class Whitening:
    """`U = (C + εI)^{-1/2}` of a layer's inputs, its inverse, and their mean `m`, which is zero without centering.

    The coordinates are those of `a = V U (h − m) + c`: `W = V U` and `b = c − W m`.
    """

    U: Float[Tensor, "*inputs"]
    U_inv: Float[Tensor, "*inputs"]
    m: Float[Tensor, " i"]

    @classmethod
    def of(cls, moments: AffineMoments, centered: bool, epsilon: float) -> Whitening:
        second = moments.C if centered else moments.A
        e, Q = factor.eigen(second, "the covariance of a layer's inputs")
        root = (semidefinite(e, "the covariance of a layer's inputs") + epsilon).sqrt()
        m = moments.mean if centered else torch.zeros_like(moments.mean)
        if Q is None:
            return cls(1 / root, root, m)
        return cls((Q / root) @ Q.mT, (Q * root) @ Q.mT, m)


class PRONG(torch.optim.Optimizer):
    """Projected natural gradient descent: plain descent, with momentum and weight decay, in whitened coordinates.

    Every layer `a = W h + b` is treated as `a = V U (h − m) + c` with `U = (C + εI)^{-1/2}`, `m = E[h]`, `C = cov(h)`.
    Gradient descent acts on `(V, c)`:

        V ← V − α (∇_W − ∇_b mᵀ) U        c ← c − α ∇_b

    This moves `W` by `−α (∇_W − ∇_b mᵀ)(C + εI)⁻¹` and the mean pre-activation `b + W m` by `−α ∇_b`: it is the
    centered K-FAC step with `B = I`. The model keeps its own `W` and `b`, and the change is mapped back to them.
    Therefore the forward pass costs nothing extra, and the state dict keeps its form. An update of the statistics
    changes neither weights nor outputs. The momentum buffers belong to `V` and `c`, as in a reparametrized model.

    A layer without a bias has no centering: `U = (E[h hᵀ] + εI)^{-1/2}`. Parameters of other kinds (scales, shifts, a
    weight that is used as `W` and as `Wᵀ`) get plain gradient steps; `diagnostics["plain"]` names them.

    Args:
        model: the module to train.
        lr: the step size `α`. Torch's schedulers work.
        momentum: as in `torch.optim.SGD`, without dampening.
        weight_decay: `η`, adds `η (V, c)` to the gradient.
        epsilon: `ε`, in units of the inputs' variance.
        every: steps between updates of the statistics. They come from the last forward pass in training mode before the
            step.
        decay: the weight of the past in the moving average of the statistics.
        centered: treat weight and bias separately. If False, `U` is computed from `E[h hᵀ]`, and `m` is zero.
        max_dim: if a layer has more inputs than this, each input is whitened separately.

    Raises:
        ValueError: if an option is out of range.

    Example:
        >>> import torch, natgrad
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        >>> opt = natgrad.PRONG(model, lr=0.5, momentum=0.5)
        >>> x = 10 + torch.randn(64, 4) * torch.tensor([1.0, 5.0, 0.1, 1.0]); y = (x[:, 2] > 10).long()
        >>> for _ in range(50):
        ...     loss = torch.nn.functional.cross_entropy(model(x), y)
        ...     opt.zero_grad(); loss.backward(); opt.step()
        >>> loss.item() < 0.1
        True
        >>> opt.remove()

    Reference: Desjardins, Simonyan, Pascanu & Kavukcuoglu (2015), "Natural Neural Networks", arXiv:1507.00210.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        *,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        epsilon: float = 1e-3,
        every: int = 20,
        decay: float = 0.9,
        centered: bool = True,
        max_dim: int = MAX_DIM,
    ):
        for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay)):
            check_number(name, value)
        check_number("epsilon", epsilon, positive=True)  # a covariance may be singular
        check_count("every", every, "steps")
        check_within("decay", decay, "[0, 1)")
        check_flag("centered", centered)
        check_max_dim(max_dim)
        refuse_ranks(type(self).__name__, placed(model))
        self._parameters = select_parameters(model)
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__([{"params": list(self._parameters.values())}], defaults)
        self.epsilon, self.every, self.decay, self.centered, self.max_dim = epsilon, every, decay, centered, max_dim
        self.diagnostics: dict[str, Any] = {}
        self._steps = 0
        self._moments: dict[Layer, AffineMoments] = {}
        self._whitenings: dict[Layer, Whitening] = {}
        self._watch: Watch | None = Watch(model, self._parameters, within=self._refuse_ranks)

    def _refuse_ranks(self, around: DistributedDataParallel) -> None:
        refuse_ranks(type(self).__name__, placed(around))

    def remove(self) -> None:
        """Removes the optimizer's hooks from the model. Afterwards `step` raises RuntimeError.

        The weights of the model do not change.
        """
        if self._watch is not None:
            self._watch.detach()
        self._watch = None

    @not_compiled
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of the parameters from their gradients. `diagnostics` describes it.

        If a gradient is not finite, the parameters do not change, and a warning is given.

        Raises:
            RuntimeError: if new statistics are due and no forward pass in training mode came before, or after `remove`.
        """
        if self._watch is None:
            raise RuntimeError("this optimizer was removed from its model; make a new one to train on")
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        forward = self._watch.forwards[-1] if self._watch.forwards else None
        self._watch.forwards.clear()
        self.diagnostics = {"step": self._steps, "accepted": True, "refreshed": False}
        gradients = {n: p.grad for n, p in self._parameters.items() if p.grad is not None}
        check_dense(gradients)
        if gradients and not finite(gradients):
            self.diagnostics["accepted"] = False
            warn(f"PRONG rejected step {self._steps}: the gradient is not finite")
        else:
            with torch.autocast(next(iter(self._parameters.values())).device.type, enabled=False):
                if self._steps % self.every == 0 or not self._whitenings:
                    if forward is None or forward.recorder is None:
                        raise RuntimeError(
                            "step() came before any forward of the model in training mode with gradients enabled; "
                            "expected loss = criterion(model(x), y); loss.backward(); opt.step()"
                        )
                    self._refresh(forward.recorder)
                self._descend(gradients)
            torch.clear_autocast_cache()  # which keeps cast parameters, if the training loop is within autocast
        self._watch.buffers.end_step(accepted=self.diagnostics["accepted"])
        self._steps += 1
        self._arm()
        return value

    def _arm(self) -> None:
        if self._watch is not None:
            self._watch.recording = self._steps % self.every == 0 or not self._whitenings

    def _refresh(self, recorder: Recorder) -> None:
        """Updates the statistics, and with them the coordinates. The parameters do not change."""
        self.diagnostics["refreshed"] = True
        like = next(iter(self._parameters.values()))
        for layer, uses in layers_of(recorder.uses).items():
            if not layer.weight or layer.scale:
                continue
            inputs = read_inputs(layer, uses, like.dtype)
            d_in = inputs[0].shape[2]
            diagonal = d_in > self.max_dim or any(i.diagonal for i in inputs)
            new = AffineMoments.empty(d_in, 0, like.new_zeros(()), diagonal=(diagonal, False))
            for its in inputs:
                new.add_inputs(its)
            past = self._moments.get(layer)
            self._moments[layer] = new if past is None else self.decay * past + new
        self._whiten()

    def _whiten(self) -> None:
        self._whitenings = {
            layer: Whitening.of(m, self.centered and layer.bias is not None, self.epsilon)
            for layer, m in self._moments.items()
            if not any(other.weight == layer.weight and other.layout != layer.layout for other in self._moments)
        }

    def _descend(self, gradients: Mapping[str, Tensor]) -> None:
        """`(V, c) ← (V, c) − α (momentum of their gradients)`, mapped back to `(W, b)`."""
        group = self.param_groups[0]
        covered = {n for layer in self._whitenings for n in layer.names if layer.weight in gradients}
        self.diagnostics["plain"] = [n for n in gradients if n not in covered]
        change = {n: torch.zeros_like(self._parameters[n]) for n in gradients}
        for layer, whitening in self._whitenings.items():
            if layer.weight in gradients:
                self._add_layer(layer, whitening, gradients, change, group)
        for n in self.diagnostics["plain"]:
            change[n] = self._momentum(
                n, gradients[n] + group["weight_decay"] * self._parameters[n], group, slice(None)
            )
        for n, d in change.items():
            self._parameters[n].add_(d, alpha=-group["lr"])

    def _add_layer(
        self,
        layer: Layer,
        whitening: Whitening,
        gradients: Mapping[str, Tensor],
        change: dict[str, Tensor],
        group: dict[str, Any],
    ) -> None:
        assert layer.weight is not None
        U, m, eta = whitening.U, whitening.m, group["weight_decay"]
        rows = slice(*layer.rows) if layer.rows else slice(None)
        bias = layer.bias if layer.bias in gradients else None
        grad_W, W = self._matrix(layer, gradients[layer.weight]), self._matrix(layer, self._parameters[layer.weight])
        grad_V = grad_W[rows]
        if bias is not None:
            grad_V = grad_V - torch.outer(gradients[bias][rows], m)
        grad_V = factor.from_right(grad_V, U)
        if eta:
            grad_V = grad_V + eta * factor.from_right(W[rows], whitening.U_inv)
        dV = self._momentum(layer.weight, grad_V, group, rows, shape=W.shape)
        dW = factor.from_right(dV, U)
        whole = torch.zeros_like(W)
        whole[rows] = dW
        change[layer.weight] += layer.layout.to_parameter(whole, gradients[layer.weight].shape, W.shape)
        if bias is not None:
            grad_c = gradients[bias][rows]
            if eta:
                grad_c = grad_c + eta * (self._parameters[bias][rows] + W[rows] @ m)
            change[bias][rows] += self._momentum(bias, grad_c, group, rows) - dW @ m

    def _matrix(self, layer: Layer, t: Tensor) -> Tensor:
        """A weight as the layer's matrix."""
        d_in = self._moments[layer].mean.shape[0]
        return layer.layout.to_operator(t, tuple(t.shape), (t.numel() // d_in, d_in))

    def _momentum(
        self, name: str, gradient: Tensor, group: dict[str, Any], rows: slice, shape: torch.Size | None = None
    ) -> Tensor:
        """The momentum buffer of some rows, updated with their gradient; without momentum, the gradient itself."""
        if group["momentum"] == 0:
            return gradient
        state = self.state[self._parameters[name]]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = gradient.new_zeros(shape or self._parameters[name].shape)
        buffer: Tensor = state["momentum_buffer"][rows]
        buffer.mul_(group["momentum"]).add_(gradient)
        return buffer.clone()

    # Saving --------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next steps depend on, apart from the parameters. Training resumes bit for bit."""
        own = {"steps": self._steps, "centered": self.centered, **named(self._parameters)}
        own["moments"] = state_of_moments(self._moments)
        return super().state_dict() | {"prong": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resumes from the result of `state_dict`, for a model with the same parameters.

        Raises:
            ValueError: if it is from another kind of optimizer, or has other parameters.
        """
        saved = state_of(state_dict, "prong", type(self).__name__)
        for key in ("steps", "centered", "names", "dtypes", "moments"):
            if key not in saved:
                raise ValueError(
                    f"the state has no {key!r} under 'prong'; expected what state_dict() of this version gives"
                )
        check_parameters(self, self._parameters, saved, state_dict)
        if saved["centered"] != self.centered:
            raise ValueError(
                f"the state is of centered={saved['centered']}, and this optimizer has {self.centered}; make it with "
                "the same"
            )
        moments = moments_of_state(copied(saved["moments"], next(iter(self._parameters.values())).device))
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "prong"})
        self._steps = saved["steps"]
        self._moments = {layer: m for layer, m in moments.items() if isinstance(m, AffineMoments)}
        self._whiten()
        self._arm()

    def __getstate__(self) -> dict[str, Any]:
        """Raises TypeError: a copy would not be attached to any model."""
        raise TypeError(
            "a PRONG optimizer cannot be copied or pickled; make one for the new model and load state_dict()"
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raises NotImplementedError: the parameters are those of the model, in one group."""
        if self.param_groups:
            raise NotImplementedError(
                "PRONG trains the parameters of its model in one group; make a new optimizer for a model that has grown"
            )
        super().add_param_group(param_group)
