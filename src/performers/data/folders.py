"""Output folders that appear complete or not at all.

What is being written stands in a sibling folder and is renamed when it is done and durable; these are the few steps that every
such writer shares, and what the operating system may say to them in the words of `performers.errors`.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from performers.errors import DiskFullError, OutputError

# No space, no quota left, or the process's own limit on the size of a file.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def building_folder(folder: Path) -> Path:
    """Where `folder` is written before it gets its name."""
    path = folder.absolute()
    return path.parent / f".{path.name}.building"


def check_unused(folder: Path, expected: str = "a new or empty folder") -> None:
    """Refuse a folder that holds something.

    Raises:
        OutputError: it exists and is not an empty folder.
    """
    with writing(folder):
        unused = not any(folder.iterdir()) if folder.is_dir() else not folder.exists()
    if not unused:
        raise OutputError(f"{folder} is already in use; expected {expected}.")


@contextmanager
def writing(path: Path, num_bytes: int | None = None) -> Iterator[None]:
    """Turn an OSError about `path` into an error that users see.

    Raises:
        DiskFullError: there is no room; names the path, and the bytes if they are known.
        OutputError: anything else that the operating system refuses.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise OutputError(f"{path} cannot be written: {error.strerror}.") from error
        what = str(path) if num_bytes is None else f"{num_bytes:,} bytes to {path}"
        free = shutil.disk_usage(path.parent).free
        raise DiskFullError(
            f"There is no room to write {what}: {error.strerror}; {free:,} bytes are free on the disk."
        ) from error


def fsync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(building: Path, folder: Path) -> None:
    """Give a complete folder, whose files are durable, its final name."""
    with writing(folder):
        fsync(building)
        building.rename(folder)
        fsync(folder.parent)
