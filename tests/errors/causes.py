"""Causes the errors of the tables beside this file, in a Python without the test run's type checker, as a user would.

`python tests/errors/causes.py` prints what every one of them says, to be read.
"""

import importlib
import json
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

TABLES = ("of_data_and_losses", "of_models", "of_vectors", "of_optimizers", "of_files", "of_structures", "of_uses")


class Cause(NamedTuple):
    """Something that a user does, and the essential parts of what is said then, in their order."""

    action: str
    do: Callable[[], Any]
    kind: type[Exception]
    says: tuple[str, ...]


class Said(NamedTuple):
    """What was raised, and whether by this library."""

    kind: str
    message: str
    own: bool


def causes() -> list[Cause]:
    """The rows of all tables."""
    torch.manual_seed(0)
    return [Cause(*row[:3], row[3:]) for table in TABLES for row in importlib.import_module(table).ROWS]


def caused(do: Callable[[], Any]) -> Said:
    """What an action raises; nothing, if it goes well."""
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            do()
    except Exception as error:
        raised_by = traceback.extract_tb(error.__traceback__)[-1]
        message = error.args[0] if isinstance(error, KeyError) else str(error)
        return Said(type(error).__name__, str(message), "natgrad" in raised_by.filename)
    return Said("", "", False)


if __name__ == "__main__":
    said = {cause.action: caused(cause.do) for cause in causes()}
    if sys.argv[1:] == ["--json"]:
        print(json.dumps(said))
    else:
        for action, error in said.items():
            print(f"{action}\n    {error.kind}: {error.message}\n")
