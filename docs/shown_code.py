"""Copies examples' code into the pages that show it, where GitHub shows it, too: `python docs/shown_code.py`.

A page names a script by a link, and the code block after the link is the script's text.
"""

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHOWN = re.compile(r"(?<=\]\()(\.\./)?(examples/[\w/]+\.py)\)\n\n(```+)[^\n]*\n(.*?)^\3\n", re.DOTALL | re.MULTILINE)


def pages() -> list[Path]:
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def shown(text: str) -> Iterator[tuple[str, str]]:
    """The scripts that a page shows, each with the code that it shows of it."""
    return ((match[2], match[4]) for match in SHOWN.finditer(text))


def renewed(text: str) -> str:
    """The page with the scripts' present code."""

    def block(match: re.Match[str]) -> str:
        code = (ROOT / match[2]).read_text(encoding="utf-8")
        return f"{match[1] or ''}{match[2]})\n\n```python\n{code}```\n"

    return SHOWN.sub(block, text)


if __name__ == "__main__":
    for page in pages():
        before = page.read_text(encoding="utf-8")
        after = renewed(before)
        if after != before:
            page.write_text(after, encoding="utf-8")
            print(f"{page.relative_to(ROOT)} has the scripts' present code")
