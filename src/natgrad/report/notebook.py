"""Tables for notebooks: what `_repr_html_` gives, in colours that suit light and dark pages."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

MOST_ROWS = 40
LINE = "1px solid rgba(128, 128, 128, 0.35)"
BAR = "rgba(70, 150, 215, 0.35)"


def table(
    title: str,
    note: str,
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    words: Sequence[int] = (0,),
    bars: tuple[int, Sequence[float]] | None = None,
    last: Sequence[str] | None = None,
    wraps: bool = False,
) -> str:
    """A table under a title and a note. The text has the page's own colour, so that no style sheet is needed.

    Args:
        words: which columns are words, on the left; the others are numbers, on the right.
        bars: a column, and how much of each row's cell in it is shaded, between 0 and 1.
        last: a row of sums, set apart. Of more than 40 rows the first are shown and the others counted.
        wraps: whether words may take several lines.
    """
    shown = len(rows) if len(rows) <= MOST_ROWS else MOST_ROWS - 1
    column, shares = bars or (-1, ())
    head = "".join(_cell("th", h, i in words, "opacity: 0.7; font-weight: 600") for i, h in enumerate(headings))
    body = []
    for r, row in enumerate(rows[:shown]):
        cells = (_cell("td", v, i in words, _bar(shares[r]) if i == column else "") for i, v in enumerate(row))
        body.append(f"<tr style='background: none'>{''.join(cells)}</tr>")
    if shown < len(rows):
        left = f"and {len(rows) - shown:,} more"
        style = _style(True, "opacity: 0.7")
        body.append(f"<tr style='background: none'><td colspan='{len(headings)}' style='{style}'>{left}</td></tr>")
    if last is not None:
        cells = (_cell("td", v, i in words, f"border-top: {LINE}; font-weight: 600") for i, v in enumerate(last))
        body.append(f"<tr style='background: none'>{''.join(cells)}</tr>")
    return (
        "<div style='overflow-x: auto; color: inherit; font-size: 0.9em; line-height: 1.4'>"
        f"<div style='margin: 0.2em 0 0.4em'><b>{escape(title)}</b>"
        f"<span style='opacity: 0.7; margin-left: 0.8em'>{escape(note)}</span></div>"
        "<table style='border-collapse: collapse; margin: 0; border: 0; color: inherit; font-size: inherit; "
        f"font-variant-numeric: tabular-nums; white-space: {'normal' if wraps else 'nowrap'}'>"
        f"<thead><tr style='background: none; border-bottom: {LINE}'>{head}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _cell(tag: str, text: str, left: bool, more: str) -> str:
    return f"<{tag} style='{_style(left, more)}'>{escape(text)}</{tag}>"


def _style(left: bool, more: str) -> str:
    align = "left" if left else "right"
    return f"text-align: {align}; padding: 0.15em 0.8em 0.15em 0.3em; border: 0; max-width: 44em; {more}"


def _bar(share: float) -> str:
    if not share > 0:  # also NaN
        return ""
    percent = 100 * min(share, 1.0)
    return f"background: linear-gradient(to right, {BAR} {percent:.1f}%, transparent {percent:.1f}%)"
