"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterable
from os import PathLike
from pathlib import Path


def write_whole(path: str | PathLike[str], pieces: Iterable[bytes | memoryview]) -> None:
    """Writes a file by way of another one beside it, which then takes its place: readers see the old or the new one.

    A symbolic link stays one, and what it points to is written. A device or a pipe is written to as it is.

    Raises:
        OSError: if it cannot be written, for want of space say; what was there before is there still.
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
            with contextlib.suppress(OSError):  # of a new file: there is no mode to keep
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
