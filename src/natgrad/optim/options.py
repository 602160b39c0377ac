"""Options of the optimizers that belong together."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, TypeVar


@dataclass(frozen=True)
class Damping:
    """The damping of an optimizer: the number `λ`, and how it changes.

    Args:
        value: `λ`, like the optimizer's option `damping`. None: calibrated on the first batch, then adapted.
        decay: like `damping_decay`.
        floor: like `damping_floor`.
        style: like `damping_style`.

    For fields that are None, the optimizer's defaults are used.

    Example:
        >>> import torch, natgrad
        >>> model = torch.nn.Linear(3, 2)
        >>> damping = natgrad.Damping(floor=0.1, style="exact")
        >>> opt = natgrad.KFAC(model, torch.nn.MSELoss(), damping=damping)
    """

    value: float | None = None
    decay: float | None = None
    floor: float | None = None
    style: str | None = None

    @classmethod
    def of(cls, damping: Any, **alone: Any) -> Damping:
        """`damping` (a number, None or a Damping), joined with the options that were passed by their own names.

        Raises:
            ValueError: if it is something else, or an option was given twice.
        """
        if isinstance(damping, Damping):
            return _joined("damping", damping, {name: ("damping_" + name, v) for name, v in alone.items()})
        if isinstance(damping, Intervals):
            raise ValueError(f"damping is {damping!r}; expected a number, natgrad.Damping(...) or None")
        return cls(damping, **alone)


@dataclass(frozen=True)
class Intervals:
    """Refresh intervals: the numbers of steps between updates of what is expensive to compute.

    Args:
        statistics: like `statistics_every`, for the factors.
        inverses: like `inverses_every`.
        bases: like `bases_every`, for the eigenbases of `structure="ekfac"`.
        adapt: like `adapt_every`, for the damping and the ratio of step size and momentum.

    For fields that are None, the optimizer's defaults are used.

    Example:
        >>> import torch, natgrad
        >>> model = torch.nn.Linear(3, 2)
        >>> opt = natgrad.KFAC(model, torch.nn.MSELoss(), intervals=natgrad.Intervals(statistics=5, inverses=50))
    """

    statistics: int | None = None
    inverses: int | None = None
    bases: int | None = None
    adapt: int | None = None

    @classmethod
    def of(cls, intervals: Any, **alone: int | None) -> Intervals:
        """`intervals` (None or Intervals), joined with the options that were passed by their own names.

        Raises:
            ValueError: if it is something else, or an option was given twice.
        """
        if intervals is None:
            return cls(**alone)
        if not isinstance(intervals, Intervals):
            raise ValueError(f"intervals is {intervals!r}; expected natgrad.Intervals(...) or None")
        return _joined("intervals", intervals, {name: (f"{name}_every", v) for name, v in alone.items()})


O = TypeVar("O", Damping, Intervals)


def _joined(argument: str, options: O, alone: dict[str, tuple[str, Any]]) -> O:
    found = {f.name: getattr(options, f.name) for f in fields(options)}
    for name, (keyword, value) in alone.items():
        if value is None:
            continue
        if found[name] is not None:
            raise ValueError(
                f"{argument}={type(options).__name__}({name}={found[name]!r}) and {keyword}={value!r} are the same "
                "option, given twice; leave one of them out"
            )
        found[name] = value
    return type(options)(**found)
