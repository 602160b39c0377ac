"""One microbatch between its forward and the step: how to run it again, and what it contributes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from natgrad.capture.recorder import Recorder
from natgrad.capture.use import Use
from natgrad.curvature.jacobian import Jacobian, graph, through_graph
from natgrad.curvature.problem import buffers_kept
from natgrad.curvature.products import gauss_newton_product, tangent
from natgrad.distributed.placement import Whole
from natgrad.linalg.precision import matmul_precision
from natgrad.losses import OutputCurvature
from natgrad.optim.output import Returned, Way
from natgrad.optim.vectors import symmetric

LOSS_NOT_FINITE = "the loss is not finite: look for NaN or inf in the batch and in the parameters"


@dataclass
class Forward:
    """A forward of the model: its arguments, its random state, what it returned and what was recorded.

    `autocast` is the lower precision it ran in, if it did.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rng: RandomState
    recorder: Recorder | None = None
    returned: Returned | None = None
    autocast: torch.dtype | None = None


@dataclass(frozen=True)
class Sharing:
    """The ranks' statistics on their way to one another, while a backward runs: of which batches here, and what waits
    for the sum of all; None where a rank had none to give."""

    batches: list[Batch]
    result: Callable[[], Any] | None


@dataclass
class Batch:
    """A batch whose loss was asked for.

    `way` leads from what the model returns to the loss's input; None where no forward is to be run again. `statistics`
    is what the optimizer has taken for its curvature, `scale` the factor that the user's backward put on the loss,
    `weight` that by which the loss's gradient was multiplied, so that ranks count by their cases.
    """

    forward: Forward
    target: Tensor
    shape: torch.Size
    way: Way | None
    mass: Tensor
    loss: Tensor
    statistics: Any = None
    scale: Tensor | None = None
    fault: str | None = None
    uses: list[Use] = field(default_factory=list)
    weight: float = 1.0
    sharing: Sharing | None = None

    @property
    def is_empty(self) -> bool:
        """Whether there is no example in it, as there may be on one of several ranks."""
        return self.shape.numel() == 0

    def observe(self, gradient: Tensor) -> None:
        """A hook of the loss: the gradient that reaches it is the factor of this batch in the objective."""
        gradient = gradient.detach()
        self.scale = gradient if self.scale is None else self.scale + gradient

    def run(self, forward: Callable[..., Any]) -> Tensor:
        """The loss's input from `forward` on this batch, with the same random numbers and in the same precision."""
        assert self.way is not None
        precision = self.forward.autocast
        device = self.target.device.type
        # A model may turn autocast on within its forward, as Accelerate has it; what that keeps of the parameters would
        # outlast the steps that are tried here.
        torch.clear_autocast_cache()
        with (
            self.forward.rng.restored(),
            torch.autocast(device, precision, enabled=precision is not None, cache_enabled=False),
        ):
            output = self.way(forward(*self.forward.args, **self.forward.kwargs))
        return full_precision(output)


def full_precision(output: Tensor) -> Tensor:
    """The output as the loss takes it: not in half the precision."""
    return output.float() if output.dtype in (torch.bfloat16, torch.float16) else output


class RandomState:
    """The state of the generators that a forward may draw from."""

    def __init__(self, device: torch.device):
        self._device = device
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Within, random numbers are those of the recorded forward; afterwards, the generators are as before."""
        devices = [self._device] if self._cuda is not None else []
        with torch.random.fork_rng(devices):
            torch.set_rng_state(self._cpu)
            if self._cuda is not None:
                torch.cuda.set_rng_state(self._cuda, self._device)
            yield


class Objective:
    """The mean over the pending batches, weighted as the user's backward weighted them.

    Every quantity is per unit of the loss's own mean, so that nothing depends on the reduction, the batch
    size or the number of microbatches. `scale` is the user's gradient over this objective's gradient, `idle` how many
    ranks have no examples.
    """

    def __init__(
        self,
        place: Whole,
        curvature: OutputCurvature,
        batches: list[Batch],
        precision: str | None = None,
        jacobian: Jacobian | None = None,
    ):
        self._place, self._curvature, self.batches, self._precision = place, curvature, batches, precision
        self._model, self._world, self._jacobian = place.model, place.world, jacobian or Jacobian()
        by_hand = 1.0 / max(1, len(batches)) if curvature.is_mean else 1.0  # of gradients that were set by hand
        scales = [b.loss.new_tensor(by_hand) if b.scale is None else b.scale for b in batches]
        numbers = [torch.stack([scale, b.mass, b.loss]) for scale, b in zip(scales, batches, strict=True)]
        rows: list[list[float]] = torch.stack(numbers).tolist() if numbers else []  # a GPU is waited for once
        factors, self._masses, losses = ([row[i] for row in rows] for i in range(3))
        for b, its_loss in zip(batches, losses, strict=True):
            if not math.isfinite(its_loss):
                b.fault = b.fault or LOSS_NOT_FINITE
        factors = [0.0 if b.is_empty else f for f, b in zip(factors, batches, strict=True)]
        if curvature.is_mean:
            factors = [f * b.weight for f, b in zip(factors, batches, strict=True)]
        total = sum(f * (1.0 if curvature.is_mean else m) for f, m in zip(factors, self._masses, strict=True))
        loss = sum(f * its_loss for f, its_loss in zip(factors, losses, strict=True))
        idle = all(b.is_empty for b in batches)
        total, loss, self.idle, *faults = self._world.numbers([total, loss, float(idle), *self._faults()], "the loss")
        self.scale = total / self._world.size  # gradients are averaged over the ranks
        self.loss = loss / total if total else loss
        self.fault = self._fault(faults)
        self._weights = [f / total if total else 0.0 for f in factors]

    def _faults(self) -> list[float]:
        """Whether this rank's batches have a fault, in its own place of a list of all ranks."""
        here = self._world.rank if any(b.fault for b in self.batches) else None
        return [float(rank == here) for rank in range(self._world.size)]

    def _fault(self, faults: list[float]) -> str | None:
        """What is wrong with a batch, here or on another rank."""
        own = next((b.fault for b in self.batches if b.fault), None)
        others = [str(rank) for rank, faulty in enumerate(faults) if faulty and rank != self._world.rank]
        return own or (f"a batch has a fault on rank {', '.join(others)}" if others else None)

    @property
    def shares(self) -> list[float]:
        """The factor of each batch's sum over cases."""
        if not self._curvature.is_mean:
            return self._weights
        each = zip(self._weights, self._masses, self.batches, strict=True)
        return [0.0 if b.is_empty else w / mass for w, mass, b in each]

    @property
    def runs_again(self) -> bool:
        """Whether the way from the model to the loss is known for all batches."""
        return all(batch.way is not None for batch in self.batches)

    def evaluate(self) -> float:
        """The loss at the parameters as they are now; buffers and random generators stay as they were."""
        buffers = {n: b.clone() for n, b in self._model.named_buffers()}
        total = 0.0
        with torch.no_grad():
            for weight, batch in zip(self._weights, self.batches, strict=True):
                output = batch.run(self._model)
                if not batch.is_empty:
                    total += weight * float(self._curvature.loss(output, batch.target))
            for n, b in self._model.named_buffers():
                b.copy_(buffers[n])
        self._place.settle()
        return self._world.numbers([total], "the loss after a step")[0]

    def products(self, directions: list[dict[str, Tensor]]) -> Tensor:
        """The matrix of `d_iᵀ F d_j`, in float64, by forward mode on the batches."""
        n = len(directions)
        lower = [0.0] * (n * (n + 1) // 2)
        for share, batch in zip(self.shares, self.batches, strict=True):
            by_reverse = bool(directions) and self._by_reverse(batch, directions[0])
            with matmul_precision(self._precision):
                pushed = [self._pushed(batch, d, by_reverse) for d in directions]
            if batch.is_empty:
                continue
            curved = [self._curvature.product(output, batch.target, Jd) for output, Jd in pushed]
            pairs = ((DJd, pushed[j][1]) for i, DJd in enumerate(curved) for j in range(i + 1))
            own = torch.stack([torch.dot(u.flatten(), v.flatten()) for u, v in pairs]).tolist()
            lower = [total + share * value for total, value in zip(lower, own, strict=True)]
        return symmetric(self._world.numbers(lower, "the quadratic model"), n)

    def _forward_mode(self, batch: Batch, d: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return tangent(self._model, batch.run, d, batch.uses, self._place.duals)

    def _by_reverse(self, batch: Batch, d: Mapping[str, Tensor]) -> bool:
        """Whether `J d` takes two backward passes, as forward mode is not what the backward is."""
        if self._place.shards is not None or batch.is_empty:
            return False
        key = batch.shape, tuple(module.training for module in self._model.modules())
        run = partial(self._run, batch)
        return self._jacobian.by_reverse(key, self._model, run, d, partial(self._forward_mode, batch))

    def _run(self, batch: Batch, model: Any) -> Tensor:
        """The loss's input; what the model writes to its buffers is not kept."""
        with buffers_kept(self._model):
            return batch.run(model)

    def _pushed(self, batch: Batch, d: Mapping[str, Tensor], by_reverse: bool) -> tuple[Tensor, Tensor]:
        """The output and `J d`."""
        if not by_reverse:
            return self._forward_mode(batch, d)
        output, leaves = graph(self._model, partial(self._run, batch), d)
        return output.detach(), through_graph(output, leaves, d)

    def _product_by_reverse(self, batch: Batch, d: Mapping[str, Tensor]) -> dict[str, Tensor]:
        def curve(output: Tensor, v: Tensor) -> Tensor:
            return self._curvature.product(output, batch.target, v)

        return gauss_newton_product(self._model, partial(self._run, batch), d, curve, by_reverse=True)

    def product(self, names: Sequence[str]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
        """The map `d ↦ F d` on the named parameters, at their values now: the graph of one forward is kept, and each
        product takes a forward-mode and a reverse-mode pass."""
        # Copies: a trial step writes to the parameters themselves, and the graph would be lost.
        values = {n: p.detach().clone().requires_grad_(n in names) for n, p in self._model.named_parameters()}
        values |= {n: b.clone() for n, b in self._model.named_buffers()}
        leaves = [values[n] for n in names]

        def forward(*args: Any, **kwargs: Any) -> Any:
            return functional_call(self._model, values, args, kwargs)

        own = {n: values[n].detach() for n in names}
        by_reverse = [self._by_reverse(batch, own) for batch in self.batches]
        outputs: list[Tensor | None] = []
        for batch, reverse in zip(self.batches, by_reverse, strict=True):
            with torch.enable_grad():
                outputs.append(None if reverse else batch.run(forward))

        def product(d: dict[str, Tensor]) -> dict[str, Tensor]:
            total = {n: torch.zeros_like(d[n]) for n in names}
            for share, batch, output in zip(self.shares, self.batches, outputs, strict=True):
                if output is None:  # a graph of its own for each product
                    for n, g in self._product_by_reverse(batch, d).items():
                        total[n] += share * g
                    continue
                _, Jd = tangent(self._model, batch.run, d, batch.uses)
                DJd = share * self._curvature.product(output.detach(), batch.target, Jd)
                gradients = torch.autograd.grad(output, leaves, DJd, retain_graph=True, allow_unused=True)
                for n, g in zip(names, gradients, strict=True):
                    if g is not None:
                        total[n] += g
            for n in names:
                self._world.sum(total[n], "a product with the curvature")
            return total

        return product
