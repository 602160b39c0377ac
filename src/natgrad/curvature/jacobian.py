"""Products `J v`, by forward mode if it agrees with the backward pass, else by two backward passes.

The two modes differ if the forward pass treats something as constant for only one of them: inside `torch.no_grad()`,
for the padding of an embedding, or in a function with its own backward. Then the backward pass counts, because it gives
the gradients of the optimizer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from natgrad.capture.graph import refuse_reentrant
from natgrad.capture.layers.embedding import can_be_opened, embedding_bag
from natgrad.capture.one_at_a_time import ONE_AT_A_TIME
from natgrad.capture.settled import is_settled

SEED = 1729
"""Seed of the check's own random vectors. Torch's random state does not change."""
Vector = Mapping[str, Tensor]
Forward = Callable[[Vector], tuple[Tensor, Tensor]]


class Jacobian:
    """Checks each kind of batch once: whether `⟨u, J v⟩ = ⟨Jᵀ u, v⟩` for random vectors, with `J v` by forward mode.

    Batches that differ only in lengths are not checked any more after several of them gave the same answer.
    """

    def __init__(self) -> None:
        self._by_reverse: dict[Hashable, bool] = {}
        self._alike: dict[Hashable, list[bool]] = {}

    def tangent(
        self, key: Hashable, model: nn.Module, call: Callable[[Any], Tensor], direction: Vector, forward: Forward
    ) -> tuple[Tensor, Tensor]:
        """The output and `J d`.

        Args:
            key: what the result of the check may depend on: shapes, and which modules are in training mode.
            model: the module that owns the parameters.
            call: `call(model)` runs it on the batch and returns the output, with the same random numbers each time.
            direction: `d`, by parameter name.
            forward: computes both by forward mode.

        Raises:
            NotImplementedError: if the model has neither a forward mode nor a second backward pass.
        """
        if not self.by_reverse(key, model, call, direction, forward):
            return forward(direction)
        output, leaves = graph(model, call, direction)
        return output.detach(), through_graph(output, leaves, direction)

    def by_reverse(
        self, key: Hashable, model: nn.Module, call: Callable[[Any], Tensor], direction: Vector, forward: Forward
    ) -> bool:
        """Whether to use backward passes instead of forward mode."""
        if key in self._by_reverse:
            return self._by_reverse[key]
        seen = self._alike.setdefault(_but_for_lengths(key), [])
        if is_settled(seen):
            return seen[0]
        found = self._by_reverse[key] = _look(model, call, list(direction), forward)
        seen.append(found)
        return found


def _but_for_lengths(key: Hashable) -> Hashable:
    """A key without its numbers."""
    if isinstance(key, tuple):
        return tuple(map(_but_for_lengths, key))
    return None if isinstance(key, int) and not isinstance(key, bool) else key


def graph(model: nn.Module, call: Callable[[Any], Tensor], direction: Vector) -> tuple[Tensor, dict[str, Tensor]]:
    """The output with a graph that can be differentiated twice, and the parameters of the direction."""
    owned = dict(model.named_parameters())
    with torch.enable_grad(), twice_differentiable():
        output = call(model)
    refuse_reentrant(output)
    return output, {n: owned[n] for n in direction}


@contextlib.contextmanager
def twice_differentiable() -> Iterator[None]:
    """Within this context, functions with a backward that cannot be differentiated are replaced: fused attention,
    cuDNN's recurrent networks, embedding bags."""
    with ONE_AT_A_TIME, sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False), _Opened():
        yield


class _Opened(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.embedding_bag and can_be_opened(*args, **kwargs):
            return embedding_bag(*args, **kwargs)
        return func(*args, **kwargs)


def through_graph(output: Tensor, leaves: Vector, direction: Vector) -> Tensor:
    """`J d` as the derivative in `u` of `⟨Jᵀ u, d⟩`; the graph is kept."""
    with torch.enable_grad():
        u = torch.zeros_like(output, requires_grad=True)
        gradients = torch.autograd.grad(output, list(leaves.values()), u, create_graph=True, allow_unused=True)
        pairs = [(g, direction[n]) for n, g in zip(leaves, gradients, strict=True) if g is not None and g.requires_grad]
        if not pairs:
            return torch.zeros_like(output)
        products = [(g * w.to(g.dtype)).sum() for g, w in pairs]
        (Jd,) = torch.autograd.grad(sum(products[1:], products[0]), u, allow_unused=True, retain_graph=True)
    return torch.zeros_like(output) if Jd is None else Jd.detach()


def _look(model: nn.Module, call: Callable[[Any], Tensor], names: list[str], forward: Forward) -> bool:
    """Whether forward mode is not to be used."""
    owned = dict(model.named_parameters())
    first = owned[names[0]]
    generator = torch.Generator(first.device).manual_seed(SEED)
    v = {n: _size(owned[n]) * _random(owned[n], generator) for n in names}
    fault: Exception | None = None
    with same_numbers(first.device) as again:
        Jv = first.detach()
        for _ in range(2):  # an error that occurs only once has another cause
            try:
                _, Jv = forward(v)
                fault = None
                break
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, NotImplementedError, TypeError, AttributeError) as error:
                fault = error
            finally:
                again()
        eps = [torch.finfo(owned[n].dtype).eps for n in names if owned[n].is_floating_point()]
        with torch.enable_grad(), _Precision(eps):
            output = call(model)
        if not output.requires_grad:
            return fault is not None
        if not torch.isfinite(output).all():
            return False  # the product itself will raise this error
        refuse_reentrant(output)
        u = _random(output, generator)
        gradients = torch.autograd.grad(output, [owned[n] for n in names], u, allow_unused=True)
        terms = [(g.double() * v[n].double()).flatten() for n, g in zip(names, gradients, strict=True) if g is not None]
        # Of a derivative that is zero, there is rounding: relative to the output, as `v` is relative to the parameters.
        zero = 4 * max(eps) * float(u.double().norm() * output.detach().double().norm())
        del output, gradients
        if fault is None and _agree(u, Jv, terms, max(eps), zero):
            return False
        again()
        try:
            output, leaves = graph(model, call, v)
            if _agree(u, through_graph(output, leaves, v), terms, max(eps), zero):
                return True
            why = "its backward is not linear in the incoming gradient"
        except (RuntimeError, TypeError) as error:
            why = str(error).strip().split("\n")[0].rstrip(".")
    if fault is not None and "; use " in str(fault):  # it says what to do
        raise fault
    raise NotImplementedError(
        "a product with this model's Jacobian needs forward mode, which does not exist or disagrees with its backward "
        f"pass, or a second backward pass, which fails: {why}. Use structure='dense' or 'block', which need only one "
        "backward pass; in an optimizer give lr, momentum and damping as numbers"
    ) from fault


class _Precision(TorchFunctionMode):
    """Records the precision of all computations, which autocast may have lowered."""

    def __init__(self, eps: list[float]):
        super().__init__()
        self.eps = eps

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype in (torch.float16, torch.bfloat16):
            self.eps.append(torch.finfo(out.dtype).eps)
        return out


def _agree(u: Tensor, Jv: Tensor, terms: list[Tensor], eps: float, zero: float) -> bool:
    """Whether `⟨u, J v⟩` equals `⟨Jᵀ u, v⟩`, the sum of the terms, up to rounding errors of relative size `eps`;
    the two may be `zero` apart where both are zero but for rounding."""
    if not (Jv.shape == u.shape and torch.isfinite(Jv).all()):
        return False
    forward, reverse = (u.double() * Jv.double()).flatten(), torch.cat(terms) if terms else u.new_zeros(1).double()
    eps = max(eps, torch.finfo(Jv.dtype).eps)
    tolerance = 1e-3 if eps == torch.finfo(torch.float32).eps else min(max(eps**0.5, 1e-8), 0.1)
    return bool((forward.sum() - reverse.sum()).abs() <= tolerance * (forward.norm() + reverse.norm()) + zero)


def _random(like: Tensor, generator: torch.Generator) -> Tensor:
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.randn(like.shape, dtype=dtype, device=like.device, generator=generator).to(like.dtype)


def _size(p: Tensor) -> float:
    """The root mean square of a parameter's entries, or 1 if they are all zero."""
    return float(p.detach().double().square().mean().sqrt()) or 1.0


@contextlib.contextmanager
def same_numbers(device: torch.device) -> Iterator[Callable[[], None]]:
    """Within this context, the returned function rewinds torch's random numbers. Afterwards they are restored."""
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(cuda):
        own = torch.get_rng_state(), [torch.cuda.get_rng_state(d) for d in cuda]

        def again() -> None:
            torch.set_rng_state(own[0])
            for d, state in zip(cuda, own[1], strict=True):
                torch.cuda.set_rng_state(state, d)

        yield again
