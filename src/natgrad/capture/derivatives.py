"""Records uses of weights within the derivatives that a model's forward takes itself.

The derivative of `a = W h + b` in `h` is `v = Wᵀ g`: a use of the same weight, as its transpose, with the input `g`.
The derivative of that is a use of `W` again. Torch computes both in its backward passes, where no function mode sees
them. So affine maps are replaced here by a function whose backward calls this recorder.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from natgrad.capture.layers import affine
from natgrad.capture.layers.affine import Affine
from natgrad.capture.layers.kind import Call
from natgrad.capture.recorder import EXACT, Recorder


class DerivativeRecorder(Recorder):
    """A recorder for a forward that calls `torch.autograd.grad(..., create_graph=True)`, of any order.

    Affine maps of a parameter or its transpose are seen in derivatives. Other uses of parameters are seen in the
    forward, and `check` refuses their uses within derivatives.
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
        call = self._affine_call(func, args, kwargs or {})
        if call is None:
            return super().__torch_function__(func, types, args, kwargs)
        assert call.weight is not None
        assert isinstance(call.kind, Affine)
        a = self.multiply(call.h, call.weight, call.kind.transposed)
        if call.bias is None:
            return a
        whole = a + call.bias
        if id(call.bias) in self._names:
            self._note(torch.add, (a, call.bias), {}, whole, [call.bias])
        return whole

    def _affine_call(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Call | None:
        """An affine map of a parameter, with gradients and outside of `torch.func`."""
        if func not in affine.PARSERS or not torch.is_grad_enabled() or "out" in kwargs:
            return None
        call = affine.PARSERS[func](*args, **kwargs)
        if call is None or call.weight is None or id(call.h) in self._names:
            return None
        lowered = torch.is_autocast_enabled(call.h.device.type) or call.h.dtype != call.weight.dtype
        wrapped = torch._C._functorch.peek_interpreter_stack() is not None
        if lowered or wrapped or call.weight.ndim != 2:
            return None
        W = call.weight._base
        if W is not None and id(W) in self._names and _is_transpose(call.weight, W):
            assert isinstance(call.kind, Affine)
            return replace(call, weight=W, kind=call.kind.oriented(True))
        return call if id(call.weight) in self._names else None

    def multiply(self, h: Tensor, W: Tensor, transposed: bool) -> Tensor:
        """`W h`, or `Wᵀ h` if the weight is stored transposed, for every row of `h`; recorded as a use."""
        out: Tensor = _Product.apply(h, W, transposed, weakref.ref(self))
        self._record(torch.matmul, Call(Affine(transposed=transposed), h, W), out)
        return out

    def _mend(self) -> str:
        if self._is_transformed or not self.takes_derivatives:
            return super()._mend()
        return f"Within torch.autograd.grad, only uses in affine maps are seen: use {EXACT}"


def _is_transpose(t: Tensor, W: Tensor) -> bool:
    """Whether a view of a matrix is its transpose."""
    same = t.storage_offset() == W.storage_offset() and W.ndim == 2
    return same and t.shape == W.shape[::-1] and t.stride() == W.stride()[::-1]


class _Product(torch.autograd.Function):
    """`h Wᵀ`, or `h W` where the weight is stored `(d_in, d_out)`."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, W: Tensor, transposed: bool, recorder: weakref.ref[DerivativeRecorder]) -> Tensor:
        ctx.save_for_backward(h)
        ctx.weight, ctx.transposed, ctx.recorder = W, transposed, recorder
        ctx.version = W._version
        return h @ (W if transposed else W.mT)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (h,), W, transposed = ctx.saved_tensors, ctx.weight, ctx.transposed
        if W._version != ctx.version:
            raise RuntimeError(
                f"a weight of shape {tuple(W.shape)} was changed in place after the forward that used it; expected its "
                "derivatives to be taken first: change it after the backward pass"
            )
        recorder, back = ctx.recorder(), None
        if ctx.needs_input_grad[0]:
            if torch.is_grad_enabled() and recorder is not None and recorder.is_open:
                back = recorder.multiply(g, W, not transposed)
            else:
                back = g @ (W.mT if transposed else W)
        left, right = (h, g) if transposed else (g, h)
        outer = left.reshape(-1, left.shape[-1]).mT @ right.reshape(-1, right.shape[-1])
        return back, outer if ctx.needs_input_grad[1] else None, None, None
