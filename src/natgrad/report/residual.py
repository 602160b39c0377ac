"""What `natgrad.residual` gives back: figures of each layer, as a table, as JSON, as a picture."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from os import PathLike
from typing import Any

from natgrad.checks.values import unknown_layer
from natgrad.report.layer_residual import Condition as Condition
from natgrad.report.layer_residual import LayerResidual as LayerResidual
from natgrad.report.notebook import table

COLUMNS = ("layer", "‖R‖/‖G‖", "‖R‖", "bound", "HSIC", "CKA", "p", "cond A", "cond C")


class ResidualReport(Mapping[str, LayerResidual]):
    """The residuals of all layers, by the layers' names, in the order in which the model uses them.

    A mapping: `report["fc1"]`, `report.items()`. What `natgrad.residual` returns.

    Args:
        layers: a `LayerResidual` for each layer.

    Raises:
        KeyError: by `report[name]`, if no layer is called so; the error lists those that there are.

    Example:
        >>> import torch, natgrad
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> report = natgrad.residual(model, torch.nn.MSELoss(), (torch.randn(50, 3), torch.randn(50, 2)))
        >>> {name: r.cases for name, r in report.items()}
        {'0': 50, '2': 50}
        >>> report.table().split()[:4]
        ['layer', '‖R‖/‖G‖', '‖R‖', 'bound']
    """

    def __init__(self, layers: Mapping[str, LayerResidual]):
        self._layers = dict(layers)

    def __getitem__(self, name: str) -> LayerResidual:
        if name not in self._layers:
            raise unknown_layer(name, self)
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __repr__(self) -> str:
        return self.table()

    def _repr_html_(self) -> str:
        note = f"{len(self)} layers, shaded by ‖R‖/‖G‖"
        return table("R = G − A ⊗ B", note, self.columns(), self.rows(), bars=(1, [r.relative for r in self.values()]))

    def columns(self) -> tuple[str, ...]:
        """The heads of the table's columns; other structures' errors are the last ones."""
        return (*COLUMNS, *self._others())

    def rows(self) -> list[tuple[str, ...]]:
        """The table's rows, as words; a dash for what does not exist."""
        others = self._others()
        return [
            (
                name,
                *map(_number, (r.relative, r.norm, r.bound, r.hsic_unbiased, r.cka, r.p_value, *r.condition)),
                *(_number(r.others.get(other)) for other in others),
            )
            for name, r in self.items()
        ]

    def _others(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(other for r in self.values() for other in r.others))

    def table(self) -> str:
        """A line for each layer: `relative`, `norm`, `bound`, `hsic_unbiased`, `cka`, `p_value`, `condition`."""
        lines = [self.columns(), *self.rows()]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(word.rjust(width) if i else word.ljust(width) for i, (word, width) in enumerate(row))
            for row in (list(zip(line, widths, strict=True)) for line in lines)
        )

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """All figures, ready for JSON: an infinite condition number is the string "inf", what is undefined None."""
        return {name: _jsonable({**asdict(r), "condition": r.condition._asdict()}) for name, r in self.items()}

    def plot(self, path: str | PathLike[str]) -> None:
        """Draws relative residuals, relative spreads and condition numbers, each layer by layer, into an image file.

        The file's suffix says which kind of image. No window is needed, and pyplot's settings stay as they are.
        """
        from natgrad.report.residual_figures import PANELS, draw

        draw(self, PANELS.values(), path)


def _number(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "–"
    return f"{value:.3f}" if value == 0 or 0.001 <= abs(value) < 100 else f"{value:.1e}"


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _jsonable(v) for name, v in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value
