"""What a command leaves behind: a folder with results.json, and report.html with its pictures inside."""

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
    """Make the folder if need be, and raise UserError if nothing can be written there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise UserError(
            f"--out was {str(out)!r}, which cannot be written ({error.strerror}); expected a folder "
            "that you may write to; give another one with --out."
        ) from error


@contextlib.contextmanager
def writing(out: Path) -> Iterator[None]:
    """While entered, what cannot be written, on a full disk say, is a UserError that names the folder."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"--out was {str(out)!r}, where nothing more can be written ({error.strerror or error}); expected a folder "
            "with space left, that you may write to; free some, or give another one with --out."
        ) from error


def check_seed(seed: int) -> None:
    """Raise UserError unless torch's generators take the seed."""
    if not (0 <= seed < 2**63):
        raise UserError(f"--seed was {seed}; expected 0 to 2^63 - 1; give, say, --seed 0.")


def finite(value: int | float) -> int | float | None:
    """The number itself, or None where JSON has none for it."""
    return value if math.isfinite(value) else None


def write_json(results: Mapping[str, Any], path: Path) -> None:
    """Write what was measured, and on what machine."""
    results = {**results, "machine": describe_machine()}
    write_whole(path, [json.dumps(results, indent=1, allow_nan=False).encode(), b"\n"])


def write_page(template: str, pictures: Mapping[str, Path], path: Path, **context: Any) -> None:
    """Write the report as one page that needs nothing from anywhere else."""
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
    """What stands in the page for a value: of text, its control characters as escapes."""
    return visible(value, lines=True) if type(value) is str else value
