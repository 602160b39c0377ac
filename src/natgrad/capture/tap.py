"""Hooks around a model's forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

NOT_WHOLE = "natgrad's optimizer sees the model's forwards by hooks; compile without fullgraph=True"


class Tap:
    """A forward pre-hook and hook of a model: `before(module, args, kwargs, compiled)` and
    `after(module, args, kwargs, output, compiled)`. `compiled` says whether `torch.compile` has compiled the forward.

    A copy of the model, or a pickled model, has a tap that does nothing.
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
        self._apart = torch.compiler.disable(self._run, reason=NOT_WHOLE)

    def __call__(self, *args: Any) -> None:
        # This is a constant while the compiler traces this line. The next call is not compiled.
        self._apart(args, torch.compiler.is_dynamo_compiling())

    def _run(self, args: tuple[Any, ...], compiled: bool) -> None:
        function = self.tap._before if self.moment == "before" else self.tap._after
        if function is not None:
            function(*args, compiled)

    def __reduce__(self) -> Any:
        return _Hook, (Tap(), self.moment)
