"""Following a model's forwards, so that the optimizer knows how each came about."""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode

from natgrad.capture.recorder import Recorder
from natgrad.capture.tap import Tap
from natgrad.optim.batch import Forward, RandomState
from natgrad.optim.buffers import Buffers
from natgrad.optim.output import Returned


class Watch:
    """Keeps the last forward of `model` in training mode with gradients enabled.

    While `recording`, the uses of the parameters in it are kept too. Forwards of the model inside of its own
    forward belong to the outermost. A forward in evaluation puts an end to what is kept, but where it is to be kept
    `beyond_evaluation`. A `wrapper` whose forward is the model's may return it in other tensors. `within`, a method, is
    called in a forward that is part of that of a `DistributedDataParallel`. `finished`, a method, is given every
    forward at its end, and nothing is kept for later. `also` are modules whose forwards count as the model's, where
    these are called by themselves. Nothing keeps the optimizer alive, and a copy of the model is not watched.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, Tensor],
        *,
        beyond_evaluation: bool = False,
        wrapper: nn.Module | None = None,
        within: Callable[[DistributedDataParallel], None] | None = None,
        finished: Callable[[Forward], None] | None = None,
        also: Sequence[nn.Module] = (),
    ):
        self.recording, self._beyond_evaluation = True, beyond_evaluation
        self._model, self._parameters = weakref.ref(model), dict(parameters)
        self.buffers = Buffers(model)
        self._forward: Forward | None = None
        self._recorder: Recorder | None = None
        self._depth = 0
        self._outermost: FrameType | None = None
        self._suspended = False
        self._within = None if within is None else weakref.WeakMethod(within)
        self._finished = None if finished is None else weakref.WeakMethod(finished)
        self._watched = weakref.WeakSet((model, *also))
        me = weakref.ref(self)

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            watch = me()
            if watch is not None and module in watch._watched:
                watch._before(args, kwargs)

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            watch = me()
            if watch is not None and module in watch._watched:
                watch._after(output)

        handles = [handle for module in (model, *also) for handle in Tap(before, after).attach(module)]
        self._handles = [weakref.finalize(self, handle.remove) for handle in handles]
        if wrapper is not None:
            self.see_wrapper(wrapper)

    def see_wrapper(self, wrapper: nn.Module) -> None:
        """Takes for what is returned what `wrapper`, whose forward is the model's, makes of it."""
        me = weakref.ref(self)

        def wrapped(module: nn.Module, args: Any, output: Any) -> None:
            watch = me()
            if watch is not None and not watch._suspended and watch._forward is not None and output is not None:
                watch._forward.returned = Returned(output)

        self._handles.append(weakref.finalize(self, wrapper.register_forward_hook(wrapped).remove))

    def see_more(self, follow: Callable[[Callable[[dict[str, Tensor]], None]], list[Any]]) -> None:
        """Records the uses of the tensors, too, that stand for the parameters during a forward: `follow` attaches
        hooks which say what they are."""
        me = weakref.ref(self)

        def seen(tensors: dict[str, Tensor]) -> None:
            watch = me()
            if watch is not None and watch._recorder is not None:
                watch._recorder.know({n: t for n, t in tensors.items() if n in watch._parameters})

        self._handles += [weakref.finalize(self, handle.remove) for handle in follow(seen)]

    def detach(self) -> None:
        """Takes the hooks off the model."""
        for remove in self._handles:
            remove()

    def follow(self, parameters: Mapping[str, Tensor]) -> None:
        """Records the uses of these from the next forward on."""
        self._parameters = dict(parameters)

    def take(self) -> Forward | None:
        """The last forward, once."""
        forward, self._forward = self._forward, None
        return forward

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Within, forwards of the model are not looked at."""
        self._suspended = True
        try:
            with torch.compiler.set_stance("force_eager"):
                yield
        finally:
            self._suspended = False

    def clear(self) -> None:
        """Ends the recording of a forward. One that was interrupted is ended by the next: torch runs no hook
        after a KeyboardInterrupt."""
        self._depth, self._outermost = 0, None
        recorder, self._recorder = self._recorder, None
        if recorder is not None:
            _leave(recorder)
            self._stance.__exit__(None, None, None)

    def _before(self, args: Any, kwargs: Any) -> None:
        if self._suspended:
            return
        if self._outermost is not None and not _running(self._outermost):
            self.clear()
        self._depth += 1
        if self._depth > 1:
            return
        self._outermost = _calling_frame()
        model = self._model()
        trains = model is not None and model.training and torch.is_grad_enabled()
        if trains or not self._beyond_evaluation:
            self._forward = None
        if not trains:
            return
        self.buffers.keep()
        # torch's own note of whose forward is running, for its compiler.
        around = DistributedDataParallel._active_ddp_module
        if around is not None and self._within is not None and (within := self._within()) is not None:
            within(around)
        device = next(iter(self._parameters.values())).device
        lowered = torch.is_autocast_enabled(device.type)
        precision = torch.get_autocast_dtype(device.type) if lowered else None
        self._forward = Forward(args, kwargs, RandomState(device), autocast=precision)
        if self.recording:
            self._recorder = Recorder(self._parameters)
            self._recorder.__enter__()
            self._stance = torch.compiler.set_stance("force_eager")  # compiled code has no function modes

    def _after(self, output: Any) -> None:
        if self._suspended:
            return
        self._depth -= 1
        if self._depth > 0:
            return
        recorder = self._recorder
        self.clear()
        if self._forward is not None and self._forward.returned is not None:
            return  # one before this, which was in evaluation
        # A forward that raised returns nothing, and cannot be followed by a loss.
        if self._forward is None or output is None:
            self._forward = None
            return
        self._forward.returned = Returned(output)
        self._forward.recorder = recorder
        if self._finished is not None and (finished := self._finished()) is not None:
            forward, self._forward = self._forward, None
            finished(forward)


def _calling_frame() -> FrameType | None:
    """The frame of torch's call of the module, from within a hook."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") != nn.Module.__module__:
        frame = frame.f_back
    return frame


def _running(frame: FrameType) -> bool:
    caller: FrameType | None = sys._getframe(1)
    while caller is not None and caller is not frame:
        caller = caller.f_back
    return caller is not None


def _leave(recorder: Recorder) -> None:
    """Takes the recorder off the stack of function modes, also from below others."""
    above: list[Any] = []
    while recorder in _get_current_function_mode_stack():
        mode = _pop_mode()
        if mode is not recorder:
            above.append(mode)
    for mode in reversed(above):
        _push_mode(mode)
