"""Fractional powers of a positive number, or matrix, as a sum of damped inverses."""

from __future__ import annotations

import cmath
import math
from typing import NamedTuple

STRIP = 0.95
"""The share that is used of the strip in which the integrand is analytic."""


class Term(NamedTuple):
    """`weight / (a x + b)`, with `a` and `b` at most about one in units of `x`."""

    weight: float
    a: float
    b: float


def negative_power(s: float, low: float, high: float, eps: float) -> list[Term]:
    """Terms whose sum is `x^-s` for `low ≤ x ≤ high`, with a relative error of about `eps`.

    From `x^-s = sin(πs)/π ∫ e^((1−s)u) / (e^u + x) du` over the real line, by the trapezoidal rule after the
    substitution `u = ½ log(low high) + (π/2) sinh v`. The integrand then decays doubly exponentially, and the error
    exponentially with the number of terms.

    Args:
        s: between 0 and 1, both excluded.
        low: above zero.
        high: at least `low`.
        eps: the target relative error.

    >>> sum(w / (a * 3.0 + b) for w, a, b in negative_power(0.5, 1e-3, 1e3, 1e-12)) - 3.0**-0.5 < 1e-12
    True

    Reference: Takahasi & Mori (1974), "Double exponential formulas for numerical integration"; Hale, Higham &
    Trefethen (2008), "Computing A^α, log(A), and related matrix functions by contour integrals", for the idea.
    """
    center, half = (math.log(low) + math.log(high)) / 2, (math.log(high) - math.log(low)) / 2
    digits = -math.log(eps)
    first = math.asinh(-(half + digits / (1 - s)) * 2 / math.pi)
    last = math.asinh((half + digits / s) * 2 / math.pi)
    # The poles nearest to the real line, u = log x ± iπ at the ends of the interval, in terms of v.
    strip = STRIP * abs(cmath.asinh(complex(half, math.pi) * 2 / math.pi).imag)
    count = math.ceil((last - first) * digits / (2 * math.pi * strip))
    step = (last - first) / count
    terms = []
    for i in range(count + 1):
        v = first + i * step
        u, slope = math.pi / 2 * math.sinh(v), math.pi / 2 * math.cosh(v)
        # Numerator and denominator are divided by e^center and, for u > 0, by e^u: nothing overflows.
        tail = -s * u if u > 0 else (1 - s) * u
        weight = math.sin(math.pi * min(s, 1 - s)) / math.pi * step * slope * math.exp(tail - s * center)
        terms.append(Term(weight, math.exp(-center - max(u, 0.0)), math.exp(min(u, 0.0))))
    return terms
