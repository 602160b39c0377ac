"""The output of a command: a folder with results.json, and report.html with its pictures embedded."""

import base64
import contextlib
import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from natgrad.checks.errors import UserError
from natgrad.checks.files import write_whole
from natgrad.report.machine import describe_machine
from natgrad.report.words import visible


def check_writable(out: Path) -> None:
    """Make the folder if needed, and raise UserError if it is not writable."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise UserError(
            f"--out was {str(out)!r}, which cannot be written ({error.strerror}); choose another folder with --out, "
            "one that you may write to."
        ) from error


@contextlib.contextmanager
def writing(out: Path) -> Iterator[None]:
    """Within the context, a failed write (as on a full disk) becomes a UserError that names the folder."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"--out was {str(out)!r}, but writing failed ({error.strerror or error}); free some space, or choose "
            "another folder with --out, one that you may write to."
        ) from error


def check_seed(seed: int) -> None:
    """Raise UserError unless torch's generators accept the seed."""
    if not (0 <= seed < 2**63):
        raise UserError(f"--seed was {seed}; expected 0 to 2^63 - 1, such as --seed 0.")


def finite(value: int | float) -> int | float | None:
    """The number, or None if JSON cannot represent it."""
    return value if math.isfinite(value) else None


def write_json(results: Mapping[str, Any], path: Path) -> None:
    """Write the measurements, and the machine they are from."""
    results = {**results, "machine": describe_machine()}
    write_whole(path, [json.dumps(results, indent=1, allow_nan=False).encode(), b"\n"])


def write_page(template: str, pictures: Mapping[str, Path], path: Path, **context: Any) -> None:
    """Write the report as one self-contained page."""
    environment = Environment(
        loader=PackageLoader("natgrad.cli", "."), autoescape=True, undefined=StrictUndefined, finalize=_shown
    )
    page = environment.get_template(template).render(
        machine=describe_machine(),
        pictures={name: base64.b64encode(picture.read_bytes()).decode() for name, picture in pictures.items()},
        **context,
    )
    write_whole(path, [page.encode()])


def _shown(value: Any) -> Any:
    """A value as the page shows it: control characters of strings are escaped."""
    return visible(value, lines=True) if type(value) is str else value
