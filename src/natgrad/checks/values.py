"""Checks of strings and numbers that users pass, with suggestions for misspelt names."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor


def described(value: Any) -> str:
    """A value in a few words, for a message: its type, and its size if it has one.

    >>> described((1, 2)), described(None), described(torch.zeros(2, 3)), described(torch.nn.ReLU)
    ('a tuple of 2', 'None', 'a Tensor of shape (2, 3)', 'the class ReLU')
    """
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    kind = type(value).__name__
    said = "a NumPy array" if kind == "ndarray" else f"{'an' if kind[0].lower() in 'aeio' else 'a'} {kind}"
    if isinstance(value, Tensor):
        return f"{said} of shape {tuple(value.shape)}"
    return f"{said} of {len(value)}" if isinstance(value, (tuple, list)) else said


def did_you_mean(value: Any, known: Iterable[str], alike: float = 0.6) -> str:
    """The end of a message: the known name that is most similar to a misspelt one, or nothing if none is similar.

    >>> did_you_mean("Kfca", ["dense", "kfac"]), did_you_mean("x", ["dense"])
    ("; did you mean 'kfac'?", '')
    """
    lowered = {k.lower(): k for k in known}
    near = get_close_matches(str(value).lower(), lowered, n=1, cutoff=alike)
    return f"; did you mean {lowered[near[0]]!r}?" if near else ""


def check_choice(
    name: str, value: Any, known: Iterable[str], *, meanings: Mapping[str, str] | None = None, optional: bool = False
) -> None:
    """Raises ValueError unless `value` is one of those known, or None where it is optional."""
    known = list(known)
    if (isinstance(value, str) and value in known) or (optional and value is None):
        return
    known_kind = value is None or isinstance(value, str)
    came = f"{name}={value!r} is unknown" if known_kind else f"{name} is {described(value)}"
    said = [f"{k!r} ({meanings[k]})" if meanings else repr(k) for k in known]
    raise ValueError(
        f"{came}: expected one of {', '.join(said)}{', or None' if optional else ''}{did_you_mean(value, known)}"
    )


def unknown_layer(name: Any, known: Iterable[str]) -> KeyError:
    """The error for an unknown layer."""
    known = list(known)
    return KeyError(
        f"no layer is called {name!r}; expected one of {', '.join(map(repr, known))}{did_you_mean(name, known)}"
    )


class ByLayer(dict[str, Any]):
    """A dictionary with layer names as keys. The error for an unknown name lists the known ones."""

    def __missing__(self, name: str) -> Any:
        raise unknown_layer(name, self)


def check_number(name: str, value: Any, *, optional: bool = False, positive: bool = False) -> None:
    """Raises ValueError unless it is a finite number `>= 0`, or `> 0`; None only where it is optional."""
    if value is None and optional:
        return
    if not (_is_real(value) and math.isfinite(value) and value >= 0 and (value > 0 or not positive)):
        expected = f"a number {'>' if positive else '>='} 0{', or None' if optional else ''}"
        raise ValueError(f"{_came(name, value)}: expected {expected}")


def check_within(name: str, value: Any, interval: str, *, optional: bool = False) -> None:
    """Raises ValueError unless it is a number in an interval such as `"[0, 1)"`; None only where it is optional."""
    if value is None and optional:
        return
    low, high = (float(end) for end in interval[1:-1].split(","))
    ends = {low: interval[0] == "[", high: interval[-1] == "]"}
    if not (_is_real(value) and low <= value <= high and ends.get(value, True)):
        expected = f"a number in {interval}{', or None' if optional else ''}"
        raise ValueError(f"{_came(name, value)}: expected {expected}")


def check_count(name: str, value: Any, of: str = "", least: int = 1) -> None:
    """Raises ValueError unless it is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{_came(name, value)}: expected a whole number{of and f' of {of}'}, at least {least}")


def check_max_dim(max_dim: Any) -> None:
    """Raises ValueError unless it is a number of rows."""
    check_count("max_dim", max_dim, "rows")


def check_flag(name: str, value: Any) -> None:
    """Raises ValueError unless it is True or False: a string such as "no" would count as True."""
    if not isinstance(value, bool):
        raise ValueError(f"{_came(name, value)}: expected True or False")


def check_function(name: str, value: Any, expected: str) -> None:
    """Raises TypeError unless it can be called, or is None."""
    if value is not None and not callable(value):
        raise TypeError(f"{name} is {described(value)}; expected a function {expected}")


def check_dtype(dtype: Any) -> None:
    """Raises TypeError unless it is a floating dtype of torch's, or None."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype={dtype!r} is not usable: expected a floating torch.dtype, such as torch.float64")


def check_generator(generator: Any, device: torch.device) -> None:
    """Raises TypeError unless it is a generator or None, ValueError if it is on another kind of device."""
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator is {described(generator)}; expected a torch.Generator, such as torch.Generator().manual_seed(0)"
        )
    if generator.device.type != device.type:
        raise ValueError(
            f"generator is on {generator.device} and the model on {device}; expected one device: "
            f"torch.Generator({str(device)!r})"
        )


def _is_real(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _came(name: str, value: Any) -> str:
    if value is None or isinstance(value, (str, Real)):
        return f"{name}={value!r} is not usable"
    return f"{name} is {described(value)}, which is not usable"
