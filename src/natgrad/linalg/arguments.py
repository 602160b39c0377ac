"""Checks of the arguments of operators, and the error of a singular matrix."""

from __future__ import annotations

import math
from numbers import Real

from torch import Tensor

from natgrad.checks.values import check_choice, check_number

DAMPING_STYLES = ("exact", "centered", "factored")


def check_damping(damping: float, style: str = "exact") -> None:
    """Raises ValueError unless damping is finite and not negative, and its style is known."""
    check_number("damping", damping.item() if isinstance(damping, Tensor) and damping.ndim == 0 else damping)
    check_choice("damping_style", style, DAMPING_STYLES)


def check_units(units: Tensor | None, style: str) -> None:
    """Raises ValueError if there are units of the inputs and the damping is not factored."""
    if units is not None and style != "factored":
        raise ValueError(f"units with damping_style={style!r} are not possible; expected 'factored'")


def check_plain(what: str, style: str, instead: str = "") -> None:
    """Raises TypeError for a damping style that a matrix does not support: it has no factors or centered coordinates.

    >>> check_plain("a sum", "factored")
    Traceback (most recent call last):
    TypeError: a sum has no factors to damp; use damping_style='exact'
    """
    if style != "exact":
        lacks = "factors" if style == "factored" else "centered coordinates"
        raise TypeError(f"{what} has no {lacks} to damp; use damping_style='exact'{instead}")


def check_exponent(exponent: float) -> None:
    """Raises ValueError unless it is a finite number."""
    if not (isinstance(exponent, Real) and math.isfinite(exponent)):
        raise ValueError(f"exponent={exponent!r} is not usable: expected a finite number, such as -0.5")


def singular(what: str, damping: float, smallest: float) -> ValueError:
    return ValueError(
        f"{what} with damping={damping:g} is singular or indefinite (smallest eigenvalue {smallest:.3g}); "
        f"pass a larger damping{'' if damping else ', say damping=1e-3'}"
    )
