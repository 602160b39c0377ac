"""Records uses of weights within the derivatives that a model's forward takes itself, and within `torch.func`.

The derivative of `a = W h + b` in `h` is `v = Wᵀ g`: a use of the same weight, as its transpose, with the input `g`.
The derivative of that is a use of `W` again, and so is the tangent `W h'` of forward mode. No function mode sees them,
because torch computes them itself. So affine maps are replaced here by functions whose derivatives call this recorder.
Within `torch.func`, torch calls such a function once for each transform, from the innermost to the outermost, and then
with ordinary tensors, which have an axis for each `vmap`. This last call is recorded.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from natgrad.capture.layers import affine
from natgrad.capture.layers.affine import Affine
from natgrad.capture.layers.kind import Call
from natgrad.capture.recorder import EXACT, Recorder, is_wrapped

_ADDITIONS = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__}
_TIMES_VECTOR = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mv, Tensor.mv}


class DerivativeRecorder(Recorder):
    """A recorder for a forward that takes derivatives, of any order, by `torch.autograd.grad(..., create_graph=True)`,
    `torch.func` or forward mode.

    Affine maps of a parameter or its transpose are seen in derivatives. Other uses of parameters are seen in the
    forward, outside of `torch.func`, and `check` refuses their uses within derivatives.
    """

    def __init__(self, parameters: Mapping[str, Tensor]):
        super().__init__(parameters)
        self.is_open = True
        """Whether the forward is still running."""

    def __exit__(self, *error: Any) -> None:
        self.is_open = False
        super().__exit__(*error)

    def let_go(self) -> None:
        self.is_open = False
        super().let_go()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        call = self._call(func, args, kwargs or {}) if torch.is_grad_enabled() else None
        if call is None:
            return super().__torch_function__(func, types, args, kwargs)
        a = call.h
        self.takes_derivatives |= any(t is not None and is_wrapped(t) for t in (a, call.weight, call.bias))
        if call.weight is not None:
            assert isinstance(call.kind, Affine)
            a = self.multiply(a, call.weight, call.kind.transposed)
        return a if call.bias is None else self._add(a, call.bias)

    def _call(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Call | None:
        """The call, if it is an affine map of a parameter; or within `torch.func`, if it adds one."""
        if "out" in kwargs:
            return None
        pair = len(args) == 2 and not kwargs and all(isinstance(t, Tensor) for t in args)
        if func in _ADDITIONS and pair:
            a, b = reversed(args) if self._is_known(args[0]) else args
            fits = b.ndim == 1 and a.shape[-1:] == b.shape and self._is_known(b)
            return Call(Affine(), a, None, b) if fits and (is_wrapped(a) or is_wrapped(b)) else None
        if func in _TIMES_VECTOR and pair and args[1].ndim == 1 and is_wrapped(args[1]):  # W h, for a vector h
            call: Call | None = Call(Affine(), args[1], args[0])
        else:
            call = affine.PARSERS[func](*args, **kwargs) if func in affine.PARSERS else None
        if call is None or torch.is_autocast_enabled(call.h.device.type):
            return None
        W, b = call.weight, call.bias
        if W is None or W.ndim != 2 or W.dtype != call.h.dtype or self._is_known(call.h):
            return None
        if not self._is_known(W) and is_wrapped(call.h) and b is not None and b.ndim == 1 and self._is_known(b):
            assert isinstance(call.kind, Affine)
            return Call(Affine(), call.h @ (W if call.kind.transposed else W.mT), None, b)
        return call if self._is_known(W) else None

    def _is_known(self, t: Tensor | None) -> bool:
        """Whether a tensor is a parameter or its transpose, maybe within a transform that does not split it."""
        if not isinstance(t, Tensor):
            return False
        own = _plain(t)
        W = own._base
        its = id(own) in self._names or (W is not None and id(W) in self._names and _is_transpose(own, W))
        return its and own.ndim == t.ndim

    def multiply(self, h: Tensor, W: Tensor, transposed: bool) -> Tensor:
        """`W h`, or `Wᵀ h` if the weight is stored transposed, for every row of `h`; recorded as a use."""
        out: Tensor = _Product.apply(h, W, transposed, weakref.ref(self))
        return out

    def _add(self, a: Tensor, b: Tensor) -> Tensor:
        within = is_wrapped(a) or is_wrapped(b)
        if within and b.ndim == 1 and self._is_known(b):
            out: Tensor = _Shift.apply(a, b, weakref.ref(self))
            return out
        out = a + b
        if not within:
            self.note_shift(a, b, out)
        return out

    def note_product(self, h: Tensor, W: Tensor, transposed: bool, out: Tensor) -> None:
        """Records a product of ordinary tensors."""
        if W._base is not None and id(W) not in self._names:
            W, transposed = W._base, not transposed
        self._record(torch.matmul, Call(Affine(transposed=transposed), h, W), out)

    def note_shift(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        if id(b) in self._names:
            self._note(torch.add, (a, b), {}, out, [b])

    def _mend(self) -> str:
        if not self.takes_derivatives:
            return super()._mend()
        return f"Within torch.autograd.grad and torch.func, only uses in affine maps are seen: use {EXACT}"


def _plain(t: Tensor) -> Tensor:
    """The ordinary tensor within the wrappers of `torch.func`, with an axis for each `vmap` that splits it."""
    while is_wrapped(t):
        t = torch._C._functorch.get_unwrapped(t)
    return t


def _is_transpose(t: Tensor, W: Tensor) -> bool:
    """Whether a view of a matrix is its transpose."""
    same = t.storage_offset() == W.storage_offset() and W.ndim == 2
    return same and t.shape == W.shape[::-1] and t.stride() == W.stride()[::-1]


def _levels(t: Tensor) -> set[int]:
    """The `vmap` transforms that split a tensor."""
    found = set()
    while is_wrapped(t):
        if torch._C._functorch.is_batchedtensor(t):
            found.add(torch._C._functorch.maybe_get_level(t))
        t = torch._C._functorch.get_unwrapped(t)
    return found


def _alike(t: Tensor, h: Tensor) -> Tensor:
    """`t`, copied for the examples by which `vmap` splits `h`. So each example has its own use of the weight."""
    return t + torch.zeros_like(h[..., :1]) if _levels(h) - _levels(t) else t


class _Recorded(torch.autograd.Function):
    """A function that is recorded where it is called with ordinary tensors. Its last argument is the recorder."""

    @classmethod
    def apply(cls, *args: Any) -> Any:
        out = super().apply(*args)
        recorder = args[-1]()
        within = torch._C._functorch.peek_interpreter_stack() is not None
        if recorder is not None and recorder.is_open and not within and torch.is_grad_enabled():
            cls.note(recorder, [_plain(t) if isinstance(t, Tensor) else t for t in args[:-1]], out)
        return out

    @staticmethod
    def note(recorder: DerivativeRecorder, inputs: Sequence[Any], out: Tensor) -> None:
        raise NotImplementedError


class _Product(_Recorded):
    """`h Wᵀ`, or `h W` where the weight is stored `(d_in, d_out)`."""

    @staticmethod
    def note(recorder: DerivativeRecorder, inputs: Sequence[Any], out: Tensor) -> None:
        h, W, transposed = inputs
        recorder.note_product(h, W, transposed, out)

    @staticmethod
    def forward(h: Tensor, W: Tensor, transposed: bool, recorder: weakref.ref[DerivativeRecorder]) -> Tensor:
        return h @ (W if transposed else W.mT)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        h, ctx.weight, ctx.transposed, ctx.recorder = inputs
        ctx.save_for_backward(h)
        ctx.save_for_forward(h)
        ctx.set_materialize_grads(False)
        ctx.version = ctx.weight._version

    @staticmethod
    def _times(ctx: Any, t: Tensor, transposed: bool) -> Tensor:
        """The weight times a derivative `t`, which is another use if the forward takes it."""
        recorder = ctx.recorder()
        if torch.is_grad_enabled() and recorder is not None and recorder.is_open:
            if not torch._C._functorch.is_legacy_batchedtensor(t):
                return recorder.multiply(_alike(t, ctx.saved_tensors[0]), ctx.weight, transposed)
            rows = torch._remove_batch_dim(t, 1, 1, 0)  # those of is_grads_batched, which has a vmap of its own
            if not torch._C._functorch.is_legacy_batchedtensor(rows):
                return torch._add_batch_dim(recorder.multiply(rows, ctx.weight, transposed), 0, 1)
        return t @ (ctx.weight if transposed else ctx.weight.mT)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None]:
        (h,), W, transposed = ctx.saved_tensors, ctx.weight, ctx.transposed
        if W._version != ctx.version:
            raise RuntimeError(
                f"a weight of shape {tuple(W.shape)} was changed in place after the forward that used it; expected its "
                "derivatives to be taken first: change it after the backward pass"
            )
        if g is None:
            return None, None, None, None
        back = outer = None
        if ctx.needs_input_grad[0]:
            back = _Product._times(ctx, g, not transposed)
        if ctx.needs_input_grad[1]:
            left, right = (h, g) if transposed else (g, h)
            outer = left.reshape(-1, left.shape[-1]).mT @ right.reshape(-1, right.shape[-1])
        return back, outer, None, None

    @staticmethod
    def jvp(ctx: Any, of_h: Tensor | None, of_W: Tensor | None, *_: None) -> Tensor | None:
        (h,), transposed = ctx.saved_tensors, ctx.transposed
        tangent = None if of_h is None else _Product._times(ctx, of_h, transposed)
        if of_W is not None:
            more = h @ (of_W if transposed else of_W.mT)
            tangent = more if tangent is None else tangent + more
        return tangent

    @staticmethod
    def vmap(info: Any, in_dims: Any, h: Tensor, W: Tensor, *rest: Any) -> tuple[Tensor, int | None]:
        axis = in_dims[0]
        return _Product.apply(_first(h, axis), W, *rest), None if axis is None else 0


class _Shift(_Recorded):
    """`a + b`, with `b` one entry for each feature."""

    @staticmethod
    def note(recorder: DerivativeRecorder, inputs: Sequence[Any], out: Tensor) -> None:
        a, b = inputs
        recorder.note_shift(a, b, out)

    @staticmethod
    def forward(a: Tensor, b: Tensor, recorder: weakref.ref[DerivativeRecorder]) -> Tensor:
        return a + b

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.set_materialize_grads(False)
        ctx.shape = output.shape

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        summed = g.sum_to_size(g.shape[-1:]) if g is not None and ctx.needs_input_grad[1] else None
        return g, summed, None

    @staticmethod
    def jvp(ctx: Any, of_a: Tensor | None, of_b: Tensor | None, _: None) -> Tensor | None:
        if of_a is None or of_b is None:
            return of_a if of_b is None else of_b.expand(ctx.shape)
        return of_a + of_b

    @staticmethod
    def vmap(info: Any, in_dims: Any, a: Tensor, b: Tensor, recorder: Any) -> tuple[Tensor, int | None]:
        axis = in_dims[0]
        return _Shift.apply(_first(a, axis), b, recorder), None if axis is None else 0


def _first(t: Tensor, axis: int | None) -> Tensor:
    """The axis as the first one; the tensor itself if nothing is to be moved."""
    return t.movedim(axis, 0) if axis else t
