"""Files appear whole or not at all, so that an interrupted run leaves no half-written artifact."""

import os
import tempfile
from pathlib import Path

from .config import UsageError


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` beside `path` and rename it into place; folders on the way are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def check_writable(folder: Path, flag: str) -> None:
    """Make the folder that `flag` names; a `UsageError` where nothing can be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"{flag} {folder} cannot be written ({error.strerror}): give a folder that can.") from error
