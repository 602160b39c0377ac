"""The forwards of a model between two steps."""

from __future__ import annotations

import contextlib
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode

from natgrad.capture.eager import EAGER
from natgrad.capture.recorder import Recorder
from natgrad.capture.tap import Tap
from natgrad.capture.tape import Tape
from natgrad.curvature.replay import Replay
from natgrad.optim.tracking.buffers import Buffers
from natgrad.optim.tracking.forward import Forward, RandomState
from natgrad.optim.tracking.returned import Returned


class Watch:
    """Keeps the forwards of `model` that run in training mode with gradients enabled. A forward is kept as long as what
    it returned is in use; the last forward is always kept.

    If `recording`, the uses of the parameters are kept too. A forward of the model within its own forward belongs to
    the outermost one. `replays`: what is needed to differentiate the forward again is kept too. If only this is needed
    (`observes` is false) and the last forward had it, uses are not recorded. A `wrapper` is a module whose forward
    calls the model's and may return the result in other tensors. `within` is a method that is called if a forward is
    part of the forward of a `DistributedDataParallel`. `finished` is a method that receives every completed forward;
    then none is kept. `also`: modules whose forwards count as the model's if they are called directly. `frozen`: uses
    of frozen parameters are recorded too. The hooks do not keep the optimizer alive, and a copy of the model is not
    watched.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, Tensor],
        *,
        wrapper: nn.Module | None = None,
        within: Callable[[DistributedDataParallel], None] | None = None,
        finished: Callable[[Forward], None] | None = None,
        also: Sequence[nn.Module] = (),
        frozen: bool = False,
    ):
        self.recording = True
        self.kind: type[Recorder] | None = None  # that the next forward is recorded by; None: the ordinary one
        self.replays = False
        self.observes = True
        self._replayed = False  # whether the last forward could be
        self._model, self._parameters = weakref.ref(model), dict(parameters)
        self.buffers = Buffers(model)
        self.forwards: list[Forward] = []
        self._here = _Here()
        self._within = None if within is None else weakref.WeakMethod(within)
        self._finished = None if finished is None else weakref.WeakMethod(finished)
        self._frozen = frozen
        self._watched = weakref.WeakSet((model, *also))
        self._told: weakref.WeakMethod[Callable[[Forward, Any], None]] | None = None
        me = weakref.ref(self)

        def before(module: nn.Module, args: Any, kwargs: Any, compiled: bool) -> None:
            watch = me()
            if watch is not None and module in watch._watched:
                watch._before(args, kwargs, compiled)

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any, compiled: bool) -> None:
            watch = me()
            if watch is not None and module in watch._watched:
                watch._after(output)

        handles = [handle for module in (model, *also) for handle in Tap(before, after).attach(module)]
        self._handles = [weakref.finalize(self, handle.remove) for handle in handles]
        if wrapper is not None:
            self.see_wrapper(wrapper)

    def see_wrapper(self, wrapper: nn.Module) -> None:
        """From now on, the returned value is that of `wrapper`, whose forward calls the model's."""
        me = weakref.ref(self)

        def wrapped(module: nn.Module, args: Any, output: Any) -> None:
            watch = me()
            if watch is not None and not watch._here.suspended and watch.forwards and output is not None:
                watch.forwards[-1].returned = Returned(output)

        self._handles.append(weakref.finalize(self, wrapper.register_forward_hook(wrapped).remove))

    def see_more(self, follow: Callable[[Callable[[dict[str, Tensor]], None]], list[Any]]) -> None:
        """Also records the uses of tensors that represent the parameters during a forward. `follow` attaches hooks that
        report these tensors."""
        me = weakref.ref(self)

        def seen(tensors: dict[str, Tensor]) -> None:
            watch = me()
            if watch is not None and isinstance(watch._here.recorder, Recorder):
                watch._here.recorder.know({n: t for n, t in tensors.items() if n in watch._parameters})

        self._handles += [weakref.finalize(self, handle.remove) for handle in follow(seen)]

    def tell(self, of: Callable[[Forward, Any], None]) -> None:
        """Calls a method after every forward, with what the forward returned."""
        self._told = weakref.WeakMethod(of)

    def detach(self) -> None:
        """Removes the hooks from the model."""
        for remove in self._handles:
            remove()

    def follow(self, parameters: Mapping[str, Tensor]) -> None:
        """Records the uses of these parameters, starting with the next forward."""
        self._parameters = dict(parameters)

    def end_step(self) -> None:
        """Keeps only the forwards whose returned tensors are in use, and deletes their records."""
        for forward in self.forwards:
            forward.recorder = forward.replay = None
        self.forwards = [f for f in self.forwards if f.returned is not None and f.returned.let_go()]

    def recorder(self, kind: type[Recorder] | None = None) -> Recorder:
        """A recorder of the parameters that are trainable now, or of all parameters."""
        return (kind or self.kind or Recorder)(
            {n: p for n, p in self._parameters.items() if p.requires_grad or self._frozen}
        )

    @property
    def running(self) -> bool:
        """Whether a forward has started and has not returned."""
        here = self._here
        return here.now is not None and here.outermost is not None and _running(here.outermost)

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Within the context, forwards of the model are ignored."""
        self._here.suspended = True
        try:
            with EAGER:
                yield
        finally:
            self._here.suspended = False

    def clear(self) -> None:
        """Ends the recording of a forward. One that was interrupted is ended by the next, or with the optimizer: torch
        runs no hook after a KeyboardInterrupt."""
        here = self._here
        here.depth, here.outermost, here.now, here.recorder = 0, None, None, None
        if here.end is not None:
            here.end()
            here.end = None

    def _before(self, args: Any, kwargs: Any, compiled: bool) -> None:
        here = self._here
        if here.suspended:
            return
        if here.outermost is not None and not _running(here.outermost):
            self.clear()
        here.depth += 1
        if here.depth > 1:
            return
        here.outermost = _calling_frame()
        model = self._model()
        if model is None or not model.training or not torch.is_grad_enabled():
            return
        self.forwards = [f for f in self.forwards if f.returned is not None and f.returned.let_go()]
        self.buffers.keep()
        # torch's own record of the module whose forward is running, for its compiler.
        around = DistributedDataParallel._active_ddp_module
        if around is not None and self._within is not None and (within := self._within()) is not None:
            within(around)
        if self._finished is not None and not self.recording:
            return  # nobody asks for this forward
        device = next(iter(self._parameters.values())).device
        lowered = torch.is_autocast_enabled(device.type)
        precision = torch.get_autocast_dtype(device.type) if lowered else None
        here.now = Forward(model, args, kwargs, RandomState(device), precision, compiled)
        if self.recording and not compiled:  # compiled code has no function modes
            tape = Tape() if self.replays else None
            if tape is not None and self._replayed and not self.observes:
                here.recorder = tape
            else:
                here.recorder = self.recorder()
                here.recorder.tape = tape
            EAGER.__enter__()
            here.recorder.__enter__()
            here.end = weakref.finalize(self, _end, here.recorder)

    def _after(self, output: Any) -> None:
        here = self._here
        if here.suspended:
            return
        here.depth -= 1
        if here.depth > 0:
            return
        recorder, forward = here.recorder, here.now
        self.clear()
        if forward is None or output is None:
            return  # a forward that raised returns nothing, so no loss can follow
        forward.returned = Returned(output)
        tape = recorder
        if isinstance(recorder, Recorder):
            forward.recorder, tape = recorder, recorder.tape
            recorder.let_go()
        if isinstance(tape, Tape):
            tape.end(output)
            forward.replay = Replay.of(tape)
            self._replayed = forward.replay is not None
        finished = None if self._finished is None else self._finished()
        if finished is None:
            self.forwards.append(forward)
        else:
            finished(forward)
        if self._told is not None and (told := self._told()) is not None:
            told(forward, output)


class _Here(threading.local):
    """What a thread is at: another one may run the same model, for example to evaluate it."""

    now: Forward | None = None
    recorder: Recorder | Tape | None = None
    end: Callable[[], object] | None = None  # of the recording
    depth = 0
    outermost: FrameType | None = None
    suspended = False


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


def _end(recorder: Recorder | Tape) -> None:
    """Removes the recorder from the stack of function modes, even if it is not on top; compiled code may run again."""
    above: list[Any] = []
    while recorder in _get_current_function_mode_stack():
        mode = _pop_mode()
        if mode is not recorder:
            above.append(mode)
    for mode in reversed(above):
        _push_mode(mode)
    EAGER.__exit__()
