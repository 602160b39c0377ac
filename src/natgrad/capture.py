"""Which parameter was used, how, with what input and output: recorded from the torch functions themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from natgrad.layers.affine import PARSERS, AffineCall


@dataclass
class Use:
    """One affine use `a = W h + b` of trainable parameters, named; `None` where there is none.

    `edge` stands for `a` in the autograd graph: its gradient is that of the pre-activation even if an in-place
    function has since overwritten the tensor.
    """

    weight: str | None
    bias: str | None
    transposed: bool
    h: Tensor
    a: Tensor
    edge: GradientEdge
    versions: tuple[int, int]

    def check_input(self) -> None:
        """Raises RuntimeError if `h` was overwritten since the forward."""
        if self.h._version != self.versions[0]:
            raise RuntimeError(
                f"the input of {self.weight or self.bias!r} was changed in place after it was used; "
                "its statistics are lost. Replace the in-place operation by one that returns a new tensor"
            )

    @property
    def a_intact(self) -> bool:
        return self.a._version == self.versions[1]


class Recorder(TorchFunctionMode):
    """Records, while active, every use of the given parameters in a forward with gradients enabled.

    Uses of a kind that is not known are kept by name in `unsupported`; `check()` raises for them.
    """

    def __init__(self, parameters: Mapping[str, Tensor]):
        super().__init__()
        self.uses: list[Use] = []
        self.unsupported: dict[str, str] = {}
        self._names = {id(p): n for n, p in parameters.items()}
        # Transposed views of a parameter (`W.T`), kept alive so that their ids stay theirs.
        self._views: dict[int, tuple[Tensor, Tensor]] = {}
        # Outputs of uses that have no bias yet: `h @ W.T + b` adds it in a second call.
        self._open: dict[int, Use] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if isinstance(out, Tensor) and out.requires_grad and torch.is_grad_enabled():
            self._note(func, args, kwargs, out)
        return out

    def _note(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> None:
        tensors = [t for t in _flat((*args, *kwargs.values())) if isinstance(t, Tensor)]
        if not any(id(t) in self._names or id(t) in self._views for t in tensors):
            return
        call = PARSERS[func](*args, **kwargs) if func in PARSERS else None
        if call is not None and call.view_of is not None and id(call.view_of) in self._names:
            self._views[id(out)] = (out, call.view_of)
        elif call is None or not self._record(call, out):
            for t in tensors:
                t = self._views[id(t)][1] if id(t) in self._views else t
                if id(t) in self._names:
                    self.unsupported.setdefault(self._names[id(t)], _name(func))

    def _record(self, call: AffineCall, out: Tensor) -> bool:
        bias = self._names.get(id(call.bias))
        if call.weight is None:  # an addition: the bias of the use whose output it is added to
            use = self._open.pop(id(call.h), None)
            if use is None or bias is None or call.bias is None or call.bias.ndim != 1:
                return False
            use.bias, use.a, use.edge = bias, out, get_gradient_edge(out)
            use.versions = (use.versions[0], out._version)
            return use.h.shape[:-1] == out.shape[:-1]
        weight, transposed = call.weight, call.transposed
        if id(weight) in self._views:
            weight, transposed = self._views[id(weight)][1], not transposed
        name = self._names.get(id(weight))
        untouched = id(call.h) not in self._names and id(call.h) not in self._views
        if weight.ndim != 2 or not untouched or (name is None and bias is None):
            return False
        h = call.h.detach()
        use = Use(name, bias, transposed, h, out, get_gradient_edge(out), (call.h._version, out._version))
        self.uses.append(use)
        if call.bias is None:
            self._open[id(out)] = use
        return True

    def check(self) -> None:
        """Raises NotImplementedError naming the parameters whose use no layer kind covers."""
        if self.unsupported:
            named = ", ".join(f"{n!r} (used by {f})" for n, f in self.unsupported.items())
            raise NotImplementedError(
                f"no layer kind covers {named}; expected affine maps (linear, addmm, matmul). Freeze these "
                "parameters with requires_grad_(False), or leave them out with params="
            )


class Tap:
    """A forward pre-hook and hook of a model that keep a recorder active during its forward.

    A copied or pickled model does not carry it along: the copy's tap is inert.
    """

    def __init__(self, before: Callable[..., None] | None = None, after: Callable[..., None] | None = None):
        self._before, self._after = before, after

    def attach(self, model: nn.Module) -> list[Any]:
        return [
            model.register_forward_pre_hook(_Hook(self, "before"), with_kwargs=True),
            model.register_forward_hook(_Hook(self, "after"), with_kwargs=True, always_call=True),
        ]

    def __deepcopy__(self, memo: Any) -> Tap:
        return Tap()

    def __reduce__(self) -> Any:
        return Tap, ()


class _Hook:
    def __init__(self, tap: Tap, moment: str):
        self.tap, self.moment = tap, moment

    def __call__(self, *args: Any) -> None:
        function = self.tap._before if self.moment == "before" else self.tap._after
        if function is not None:
            function(*args)


def _flat(values: Any) -> Any:
    for v in values:
        if isinstance(v, (tuple, list)):
            yield from _flat(v)
        else:
            yield v


def _name(func: Any) -> str:
    return str(getattr(func, "__name__", func))
