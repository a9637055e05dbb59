"""Files: compressed models as safetensors, written atomically, read without unpickling anything."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


class CheckpointError(ValueError):
    """A file is truncated, altered, or of another kind or model; the message names it."""


def atomic_write(path: str | os.PathLike[str], data: bytes) -> None:
    """Replace ``path`` by ``data`` so that a crash at any moment leaves either the old file or the new one.

    Raises:
        OSError: the directory does not exist or cannot be written, or the disk is full; the old file is intact.
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(file.fileno(), 0o666 & ~_umask())  # mkstemp's 0600 would hide the file from the group
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the rename itself has to survive a crash
    finally:
        os.close(directory)


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
