"""The forms in which functions are given a parameter: itself, a transpose, some rows, any view of it, `exp(w)`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from natgrad.capture.layers import CASTS, ELEMENTWISE, MULTIPLES, OFFSETS, SELECTIONS, VIEWS, Scale, View


@dataclass(frozen=True)
class Form:
    """A parameter in the form in which a function received it: all of it or some rows, possibly transposed; or, if it
    is not a `matrix`, its entries in any other order, or a function of each entry. `select` gives the entries' indices
    in the parameter, which has `shape`."""

    name: str
    select: Callable[[], Int[Tensor, ...]]
    shape: tuple[int, ...]
    rows: tuple[int, int] | None = None
    transposed: bool = False
    matrix: bool = True
    whole: bool = True
    """Whether it has the entries of the parameter in their order."""
    slope: Tensor | None = None
    """The derivative of each entry in that of the parameter. None: 1. It is the same for all entries of a matrix."""


class Forms:
    """The forms that occurred in a forward pass. Their tensors are kept alive, so that their ids are not reused."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Tensor, Form]] = {}

    def know(self, parameters: Mapping[str, Tensor]) -> None:
        for n, p in parameters.items():
            self._known[id(p)] = p, Form(n, partial(_numbers, p), tuple(p.shape))

    def __contains__(self, t: object) -> bool:
        return id(t) in self._known

    def of(self, t: Tensor | None) -> Form | None:
        held = None if t is None else self._known.get(id(t))
        return None if held is None else held[1]

    def look_at(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> bool:
        """Stores the forms that a call returns, if it is a view of a parameter, or a function of each entry."""
        if func not in VIEWS and func not in SELECTIONS and func not in ELEMENTWISE:
            return False
        source = args[0] if args else kwargs.get("input", kwargs.get("self"))
        alone = sum(isinstance(v, Tensor) for v in (*args, *kwargs.values())) == 1
        if (func in OFFSETS or func in ELEMENTWISE) and not alone:
            return False
        form = self.of(source)
        outs = list(out) if isinstance(out, (tuple, list)) else [out]
        if form is None or any(not isinstance(t, Tensor) for t in outs):
            return False
        if func in CASTS or func in OFFSETS:
            self._known[id(out)] = out, form
            return True
        slope: Tensor | None
        if func in ELEMENTWISE:
            slope = _slope(func, args, kwargs)
            slope = slope if form.slope is None else slope * form.slope
            own = form if func in MULTIPLES else replace(form, matrix=False, rows=None, transposed=False)
            self._known[id(out)] = out, replace(own, slope=slope)
            return True
        view = VIEWS[func](*args, **kwargs) if func in VIEWS else None
        keeps_order = view is not None and not view.transposed
        for i, (t, found) in enumerate(zip(outs, _forms(form, view, len(outs)), strict=True)):
            which = None if t is out else i
            select = partial(_select, func, form, args, kwargs, which)
            slope = None if form.slope is None else _selected(func, form.slope, args, kwargs, which)
            whole = form.whole and keeps_order and t.numel() == prod(form.shape)
            self._known[id(t)] = t, replace(found, select=select, whole=whole, slope=slope)
        return True


def placed(kind: Scale, weight: Form | None, bias: Form | None) -> Scale:
    """The kind, with the positions of its coordinates in the parameters, and their derivatives in them."""
    entries, sizes, slopes = [], [], []
    for form in (weight, bias):
        chosen = None if form is None or form.whole else form.select().flatten()
        entries.append(chosen)
        sizes.append(0 if form is None else prod(form.shape))
        slopes.append(None if form is None or form.slope is None else form.slope.flatten())
    is_one = weight is not None and bias is not None and weight.name == bias.name
    return replace(
        kind, entries=(entries[0], entries[1]), sizes=(sizes[0], sizes[1]), slopes=(slopes[0], slopes[1]), is_one=is_one
    )


def _forms(form: Form, view: View | None, count: int) -> list[Form]:
    """The form of each of the tensors that a view of a form returned."""
    if not form.matrix or view is None or (form.transposed and (view.rows or not view.transposed)):
        return [replace(form, matrix=False, rows=None, transposed=False)] * count
    if not view.rows:
        return [replace(form, transposed=form.transposed != view.transposed)] * count
    first = form.rows[0] if form.rows else 0
    return [replace(form, rows=(first + a, first + b)) for a, b in view.rows]


def _numbers(p: Tensor) -> Int[Tensor, ...]:
    return torch.arange(p.numel(), device=p.device).view(p.shape)


def _select(
    func: Any, form: Form, args: Sequence[Any], kwargs: Mapping[str, Any], which: int | None
) -> Int[Tensor, ...]:
    """The indices of the entries of a form that a call selected."""
    return _selected(func, form.select(), args, kwargs, which)


def _selected(func: Any, t: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any], which: int | None) -> Tensor:
    """What a call selects from another tensor of the same shape."""
    others = {k: v for k, v in kwargs.items() if k not in ("input", "self")}
    entries: Tensor = func(t, *args[1:], **others)
    return entries if which is None else entries[which]


def _slope(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The derivative of an elementwise function at each entry of its tensor."""
    with torch.enable_grad():
        args = [_leaf(v) for v in args]
        kwargs = {k: _leaf(v) for k, v in kwargs.items()}
        (w,) = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
        return torch.autograd.grad(func(*args, **kwargs).sum(), w)[0]


def _leaf(v: Any) -> Any:
    return v.detach().requires_grad_() if isinstance(v, Tensor) else v
