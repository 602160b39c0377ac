"""One forward of the model, and how to run it again in the same way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from natgrad.capture.recorder import Recorder
from natgrad.curvature.replay import Replay
from natgrad.optim.tracking.returned import Returned, Way


@dataclass(eq=False)
class Forward:
    """A forward of the model: its arguments, random state, modes of the modules, returned value, and recorded uses.

    `replay` can differentiate it again. `autocast` is the low precision that it ran in, if any. `compiled`: it ran in
    compiled code, where uses cannot be seen.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rng: RandomState
    autocast: torch.dtype | None = None
    compiled: bool = False
    recorder: Recorder | None = None
    replay: Replay | None = None
    returned: Returned | None = None
    modes: list[tuple[nn.Module, bool]] = field(init=False)
    inputs: list[tuple[Tensor, int]] = field(init=False)

    def __post_init__(self) -> None:
        self.modes = [(m, m.training) for m in self.model.modules()]
        is_plain = not self.kwargs and all(isinstance(a, Tensor) for a in self.args)
        trees = self.args if is_plain else ((self.args, self.kwargs),)
        self.inputs = [noted for tree in trees for noted in with_versions(tree)]

    def again(self, forward: Callable[..., Any], way: Way) -> Tensor:
        """The loss's input from `forward` on the same arguments: with the same random numbers, the same precision, and
        the same modes of training or evaluation.

        Raises:
            RuntimeError: if an argument has been changed in place since.
        """
        (output,) = self.again_for(forward, [way])
        return output

    def again_for(self, forward: Callable[..., Any], ways: Sequence[Way]) -> list[Tensor]:
        """Like `again`, for the inputs of several losses of this forward.

        Raises:
            RuntimeError: if an argument has been changed in place since.
        """
        self.check_inputs()
        try:
            return self._run(forward, ways)
        except RuntimeError as error:
            if torch.is_grad_enabled() or "does not require grad" not in str(error):
                raise
            with torch.enable_grad():  # the model takes derivatives itself
                return [output.detach() for output in self._run(forward, ways)]

    def _run(self, forward: Callable[..., Any], ways: Sequence[Way]) -> list[Tensor]:
        device = self.rng.device.type
        # A model may turn autocast on within its forward, as Accelerate does. Autocast's cache of cast parameters would
        # then outlast the parameters' change by a trial step.
        torch.clear_autocast_cache()
        with (
            self.rng.restored(),
            self._in_its_modes(),
            torch.autocast(device, self.autocast, enabled=self.autocast is not None, cache_enabled=False),
        ):
            returned = forward(*self.args, **self.kwargs)
            outputs = [way(returned) for way in ways]
        return [full_precision(output) for output in outputs]

    def check_inputs(self) -> None:
        """Raises RuntimeError if an argument has been changed in place since."""
        if (t := changed_in_place(self.inputs)) is not None:
            raise RuntimeError(
                f"an input of the model, of shape {tuple(t.shape)}, was changed in place after the forward, and "
                "the step runs the model on it again; give the model a copy (x.clone()), or change it after the "
                "step"
            )

    @property
    def unchanged(self) -> bool:
        """Whether the arguments are unchanged."""
        return changed_in_place(self.inputs) is None

    @property
    def mode(self) -> tuple[bool, ...]:
        """Which modules were in training mode."""
        return tuple(training for _, training in self.modes)

    @contextlib.contextmanager
    def _in_its_modes(self) -> Iterator[None]:
        changed = [(m, m.training) for m, training in self.modes if m.training != training]
        for m, training in changed:
            m.training = not training
        try:
            yield
        finally:
            for m, training in changed:
                m.training = training


def full_precision(output: Tensor) -> Tensor:
    """The output in the precision of the loss: at least float32."""
    return output.float() if output.dtype in (torch.bfloat16, torch.float16) else output


def with_versions(tree: Any) -> list[tuple[Tensor, int]]:
    """The tensors in a tree of tuples, lists and dictionaries, each with its version (torch's count of writes)."""
    leaves = [tree] if isinstance(tree, Tensor) else tree_leaves(tree)
    return [(t, _version(t)) for t in leaves if isinstance(t, Tensor)]


def changed_in_place(noted: list[tuple[Tensor, int]]) -> Tensor | None:
    """The first tensor that was written to since `with_versions` noted it."""
    return next((t for t, version in noted if _version(t) != version), None)


def _version(t: Tensor) -> int:
    return -1 if t.is_inference() else t._version


class RandomState:
    """The state of the random generators that a forward may draw from."""

    def __init__(self, device: torch.device):
        self.device = device
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Within the context, random numbers are those of the recorded forward. Afterwards, the generators are as
        before."""
        devices = [self.device] if self._cuda is not None else []
        with torch.random.fork_rng(devices):
            torch.set_rng_state(self._cpu)
            if self._cuda is not None:
                torch.cuda.set_rng_state(self._cuda, self.device)
            yield
