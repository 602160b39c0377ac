"""Writes files completely or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterable
from os import PathLike
from pathlib import Path


def write_whole(path: str | PathLike[str], pieces: Iterable[bytes | memoryview]) -> None:
    """Writes to a temporary file in the same folder, which then replaces the file: readers see the old or the new file.

    If the path is a symbolic link, its target is written. Devices and pipes are written to directly.

    Raises:
        OSError: if the file cannot be written, for example for lack of space. The old file is then unchanged.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(f"{path} is a folder; expected the name of a file in it")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written, as there is no folder {target.parent}; make it first")
    special = target.exists() and not target.is_file()
    part = target if special else target.parent / f".{secrets.token_hex(8)}.part"
    try:
        with open(part, "wb" if special else "xb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            if not special:
                os.fsync(file.fileno())
        if not special:
            with contextlib.suppress(OSError):  # a new file has no mode to keep
                os.chmod(part, stat.S_IMODE(target.stat().st_mode))
            os.replace(part, target)
    except BaseException as error:
        if not special:
            part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(
                error.errno, f"{path} cannot be written ({error.strerror}); free space there, or give another path"
            ) from error
        raise
