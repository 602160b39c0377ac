"""Hooks around a model's forward."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import nn


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
            _outside_compiled_code(function, args)


_held: list[Any] = []
"""The compiler's callback, as long as a forward runs eagerly that was called within compiled code."""


def _outside_compiled_code(function: Callable[..., None], args: tuple[Any, ...]) -> None:
    """Calls the function as it is, also where `torch.compile` has compiled the model with its hooks, which happens to a
    model that was compiled after the hooks came.

    If it asks for eager execution (`torch.compiler.set_stance("force_eager")`), that begins at once, in the middle of
    compiled code, and ends at the call that takes it back.
    """
    if "torch._dynamo" not in sys.modules:
        function(*args)
        return
    from torch._C._dynamo.eval_frame import set_eval_frame
    from torch._dynamo import eval_frame

    before = set_eval_frame(None)
    try:
        function(*args)
    finally:
        eager = eval_frame._stance.stance == "force_eager"
        if eager and before is not None:
            _held.append(before)
        elif not eager and _held:
            before = _held.pop()
        set_eval_frame(None if eager else before)


_outside_compiled_code._torchdynamo_disable = True  # type: ignore[attr-defined]
