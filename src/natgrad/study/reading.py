"""Reading a table of a TOML file key by key, with errors that name the file and the key."""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from natgrad.checks.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def parse(text: str, file: str) -> dict[str, Any]:
    """The file's tables.

    Raises:
        UserError: if the text is not TOML.
    """
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        hint = " (strings need quotes; write true and false in lower case)" if "Invalid value" in str(error) else ""
        raise UserError(f"{file} is not TOML: {str(error).rstrip('.')}; correct it{hint}.") from error


def read_text(path: Path) -> str:
    """The file's text.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text; expected a TOML file; save it as UTF-8.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); expected a TOML file; check the path.") from error


def near(name: str, known: Iterable[str]) -> str:
    """The known names that were probably meant, or else all of them, as the end of a sentence."""
    known = list(known)
    by_lower = {k.lower(): k for k in known}
    found = [by_lower[k] for k in difflib.get_close_matches(name.lower(), by_lower, n=2)]
    return f"did you mean {' or '.join(map(repr, found))}?" if found else f"take one of {', '.join(known)}."


class Table:
    """The keys under one heading. Each key is taken once; `finish` raises an error for keys that were not taken."""

    def __init__(self, file: str, where: str, values: Mapping[str, Any]):
        self.file, self.where = file, where
        self._values = dict(values)
        self._known: list[str] = []

    def fail(self, key: str, came: str, expected: str, mend: str) -> UserError:
        """The error to raise."""
        place = f"{self.where}.{key}" if self.where and key else self.where or key
        return UserError(f"{self.file}: {place} is {came}; expected {expected}; {mend}")

    def names_left(self) -> list[str]:
        """The keys that were not taken yet."""
        return list(self._values)

    def take(self, key: str, default: Any = None) -> Any:
        """The value, unchecked."""
        self._known.append(key)
        return self._values.pop(key, default)

    def text(self, key: str, default: str) -> str:
        value = self.take(key, default)
        if not isinstance(value, str) or not value:
            raise self.fail(key, shown(value), "text in quotes", f'write, say, {key} = "{default or "words"}".')
        return value

    def truth(self, key: str, default: bool) -> bool:
        value = self.take(key, default)
        if not isinstance(value, bool):
            raise self.fail(key, shown(value), "true or false", f"write {key} = true.")
        return value

    def whole(self, key: str, default: Any, least: int = 1) -> Any:
        value = self.take(key, default)
        if value is not default and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise self.fail(
                key,
                shown(value),
                f"a whole number of at least {least}",
                f"write {key} = {default or 100}, for example.",
            )
        return value

    def number(self, key: str, default: Any) -> Any:
        value = self.take(key, default)
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
        if value is not default and not good:
            raise self.fail(key, shown(value), "a number above 0", f"write {key} = {default or 20}, for example.")
        return value

    def table(self, key: str) -> Table:
        """The table under this key; empty if there is none."""
        value = self.take(key, {})
        if not isinstance(value, dict):
            raise self.fail(key, shown(value), f"a table, [{key}]", "put its keys under that heading.")
        return Table(self.file, f"{self.where}.{key}" if self.where else key, value)

    def names(self, key: str, expected: str, mend: str) -> dict[str, Table]:
        """A list of names, or a table of tables; returns tables by name."""
        value = self.take(key, [])
        if value == []:
            self.check_spelling(key)
        if isinstance(value, list) and all(isinstance(v, str) and v for v in value):
            if len(set(value)) < len(value):
                twice = next(v for v in value if value.count(v) > 1)
                raise self.fail(key, f"a list with {twice!r} twice", "every name once", "leave one of them out.")
            value = {name: {} for name in value}
        if not value or not isinstance(value, dict):
            raise self.fail(key, "empty" if value in ([], {}) else shown(value), expected, mend)
        for name, its in value.items():
            if not isinstance(its, dict):
                raise self.fail(f"{key}.{name}", shown(its), f"a table, [{key}.{name}]", "put its keys under that.")
        place = f"{self.where}.{key}" if self.where else key
        return {name: Table(self.file, f"{place}.{name}", its) for name, its in value.items()}

    def rest(self) -> dict[str, Any]:
        """Takes and returns all keys that were not taken."""
        values, self._values = self._values, {}
        return values

    def finish(self) -> None:
        """Raises UserError for a key that was not taken."""
        for key in self._values:
            raise self._unknown(key, self._known)

    def check_spelling(self, *wanted: str) -> None:
        """Raises UserError if none of these keys exists, but a similar one does."""
        for key in self._values:
            if difflib.get_close_matches(key.lower(), wanted, n=1):
                raise self._unknown(key, wanted)

    def _unknown(self, key: str, known: Iterable[str]) -> UserError:
        place = f" in [{self.where}]" if self.where else ""
        return UserError(f"{self.file}: there is no key {key!r}{place}; {near(key, dict.fromkeys(known))}")


def shown(value: Any) -> str:
    """A value of a TOML file, shortened, in TOML notation."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a table"
    words = repr(value) if not isinstance(value, str) else f'"{value}"'
    return words if len(words) < 60 else f"a {type(value).__name__}"
