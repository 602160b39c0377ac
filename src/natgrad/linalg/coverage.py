"""How a matrix represents each parameter: how it is used, by which structure, in how much memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from natgrad.linalg.block_diagonal import Block, BlockDiagonal
from natgrad.linalg.later import later
from natgrad.linalg.operator import Operator
from natgrad.linalg.state import nbytes
from natgrad.report.notebook import table as table_html

HEADINGS = ("parameter", "shape", "use", "structure", "memory")


@dataclass(frozen=True)
class CoverageRow:
    """One parameter. `bytes` is the size of its block, which it shares with the other parameters of its layer
    (`layer`)."""

    parameter: str
    shape: tuple[int, ...]
    layer: str
    use: str
    structure: str
    bytes: int


class Coverage:
    """The result of `coverage()`: a `CoverageRow` for each parameter, in the model's order. It prints as a table.

    Args:
        rows: with `parameter`, `shape`, `layer`, `use`, `structure`, and the `bytes` of the layer's block.
        notes: more facts about the matrix, one sentence each, printed below the table.

    Example:
        >>> import torch, natgrad
        >>> model, data = torch.nn.Linear(3, 2), (torch.randn(5, 3), torch.randn(5, 2))
        >>> [row.parameter for row in natgrad.fisher(model, torch.nn.MSELoss(), data).coverage()]
        ['weight', 'bias']
    """

    def __init__(self, rows: list[CoverageRow], notes: tuple[str, ...] = ()):
        self.rows, self.notes = rows, notes

    def __iter__(self) -> Iterator[CoverageRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def to_dict(self) -> list[dict[str, Any]]:
        """The rows, ready for JSON."""
        return [asdict(row) for row in self.rows]

    def table(self) -> str:
        """One line for each parameter. A block's memory is in the line of its first parameter, the sum in the last
        line."""
        lines = [HEADINGS, *self._lines(), ("all", "", "", "", _size(self._total()))]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        rows = ["  ".join(word.ljust(n) for word, n in zip(line, widths, strict=True)).rstrip() for line in lines]
        return "\n".join([*rows, *(f"note: {note}" for note in self.notes)])

    def _lines(self) -> list[tuple[str, ...]]:
        lines: list[tuple[str, ...]] = []
        seen = set[str]()
        for row in self.rows:
            memory = "" if row.layer in seen else _size(row.bytes)
            seen.add(row.layer)
            shape = " x ".join(map(str, row.shape)) or "scalar"
            lines.append((row.parameter, shape, row.use, row.structure, memory))
        return lines

    def _total(self) -> int:
        return sum({row.layer: row.bytes for row in self.rows}.values())

    __repr__ = table

    def _repr_html_(self) -> str:
        note = f"{len(self.rows):,} parameters in {len({row.layer for row in self.rows}):,} blocks"
        note = "; ".join([note, *self.notes])
        last = ("all", "", "", "", _size(self._total()))
        return table_html("Coverage", note, HEADINGS, self._lines(), words=(0, 1, 2, 3), last=last)


@later
def operator_html(operator: Operator) -> str:
    """A matrix for notebooks: a table of its blocks, or else one line."""
    note = f"{operator.space.size:,} rows, {str(operator.dtype).removeprefix('torch.')}, on {operator.device}"
    if not isinstance(operator, BlockDiagonal):
        held = nbytes(operator)
        row = (operator.describe(), ", ".join(operator.space.names or ()) or "–", _size(held) if held else "–")
        return table_html(operator._label(), note, ("structure", "parameters", "memory"), [row], words=(0, 1))
    sizes = [nbytes(block.operator) for block in operator.layers.values()]
    rows = [
        (name, block.function, f"{block.operator.space.size:,}", block.operator.describe(), _size(size))
        for (name, block), size in zip(operator.layers.items(), sizes, strict=True)
    ]
    headings = ("layer", "use", "rows", "structure", "memory")
    last = ("all", "", f"{operator.space.size:,}", "", _size(sum(sizes)))
    bars = 4, [size / max(1, *sizes) for size in sizes]
    return table_html(operator._label(), note, headings, rows, words=(0, 1, 3), bars=bars, last=last)


@later
def coverage_of(operator: Operator) -> Coverage:
    """The coverage of a matrix over named parameters."""
    names, shapes = operator.space.names or (), operator.space.shapes
    if isinstance(operator, BlockDiagonal):
        layers = {n: (name, block) for name, block in operator.layers.items() for n in block.names}
        rows = [_row(n, shape, *layers[n]) for n, shape in zip(names, shapes, strict=True)]
    else:
        whole = nbytes(operator)
        rows = [
            CoverageRow(n, shape, "all", "any", operator.describe(), whole)
            for n, shape in zip(names, shapes, strict=True)
        ]
    return Coverage(rows, operator.notes)


def _row(name: str, shape: tuple[int, ...], layer: str, block: Block) -> CoverageRow:
    return CoverageRow(name, shape, layer, block.function, block.operator.describe(), nbytes(block.operator))


def _size(count: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024  # type: ignore[assignment]
    return f"{count:.1f} GiB"
