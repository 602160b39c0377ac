"""Docstrings as they are written here, made ready for griffe's Google style.

`Example:` is its section of examples, and one line may describe several arguments (`model, loss: as for ...`).
"""

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"^( *)Example:$", re.MULTILINE)
SEVERAL = re.compile(r"^( +)(\w+(?:, \w+)+): (.*(?:\n\1 +\S.*)*)", re.MULTILINE)


class House(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = rewritten(obj.docstring.value)


def rewritten(docstring: str) -> str:
    """
    >>> print(rewritten("Args:\\n    a, b: numbers.\\n\\nExample:\\n    f(1, 2)"))
    Args:
        a: numbers.
        b: numbers.
    <BLANKLINE>
    Examples:
        f(1, 2)
    """

    def apart(line: re.Match[str]) -> str:
        return "\n".join(f"{line[1]}{name}: {line[3]}" for name in line[2].split(", "))

    return SEVERAL.sub(apart, EXAMPLE.sub(r"\1Examples:", docstring))
