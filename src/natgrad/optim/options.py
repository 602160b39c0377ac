"""Options of the optimizers that belong together."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, TypeVar


@dataclass(frozen=True)
class Damping:
    """How an optimizer is damped: the number `λ`, and how it moves.

    Args:
        value: `λ`, as the optimizer's `damping`. None: calibrated on the first batch, then adapted.
        decay: as `damping_decay`.
        floor: as `damping_floor`.
        style: as `damping_style`.

    Fields that are None are the optimizer's defaults.

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
        """`damping`, a number, None or a Damping, with what was given beside it by other names.

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
    """How many steps apart an optimizer renews what is expensive.

    Args:
        statistics: as `statistics_every`, the moments.
        inverses: as `inverses_every`.
        bases: as `bases_every`, the eigenbases of `structure="ekfac"`.
        adapt: as `adapt_every`, the damping and the ratio of step size and momentum.

    Fields that are None are the optimizer's defaults.

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
        """`intervals`, None or Intervals, with what was given beside it by other names.

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
