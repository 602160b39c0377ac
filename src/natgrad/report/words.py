"""Names and messages of users as text to show: on a terminal, in a picture, in a file's name."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable

JOINERS = "\u200c\u200d"
"""Format characters that scripts and emoji are written with."""


def visible(text: str, lines: bool = False) -> str:
    r"""The text with its control characters written as escapes, so that a terminal shows them and does not obey them.

    `lines`: whether line ends and tabs stay as they are.

    >>> visible("\x1b[2Jclear\n")
    '\\x1b[2Jclear\\n'
    """
    if text.isprintable():
        return text
    kept = JOINERS + "\n\t" * lines
    return "".join(c if c in kept or unicodedata.category(c) not in HIDDEN else _escaped(c) for c in text)


HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")


def _escaped(c: str) -> str:
    return c.encode("unicode_escape").decode()


def shortened(text: str, most: int = 60) -> str:
    """The text with its middle left out if it is longer than `most` characters.

    >>> shortened("abcdefghij", 5)
    'ab…ij'
    """
    if len(text) <= most:
        return text
    end = (most - 1) // 2
    return f"{text[: most - 1 - end]}…{text[len(text) - end :]}"


def in_picture(text: str, most: int = 40) -> str:
    r"""The text as a label of matplotlib's, which takes `$...$` as a formula and drops labels that begin with `_`.

    >>> in_picture(r"$\foo$"), in_picture("_a")
    ('\\$\\foo\\$', ' _a')
    """
    words = shortened(visible(text), most).replace("$", r"\$")
    return f" {words}" if words.startswith("_") else words


def file_names(names: Iterable[str], most: int = 60) -> dict[str, str]:
    """A part of a file's name for each of these names, different ones even where "A" and "a" name one file.

    Letters, digits, `_`, `.` and `-` stay. A name that would be another's, or is too long, gets a digest.

    >>> file_names(["curves", "a b"])
    {'curves': 'curves', 'a b': 'a-b'}
    >>> file_names(["a b", "a-b"])
    {'a b': 'a-b-c8687a08', 'a-b': 'a-b-d44362d6'}
    """
    plain = {name: re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII) for name in names}
    folded = [words.casefold() for words in plain.values()]
    return {
        name: words if len(words) <= most and folded.count(words.casefold()) == 1 else f"{words[:most]}-{_digest(name)}"
        for name, words in plain.items()
    }


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
