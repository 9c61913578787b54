"""Files and folders that are there completely or not at all, and that show it when they have been damaged.

What is being written stands under another name and is renamed when it is done and durable: whatever moment the process dies
at, a name stands for a whole folder. A sealed folder holds a manifest with the size and SHA-256 of each file besides, because
no weights format notices a flipped bit; `verify_folder` does. What the operating system has to say is put in the words of
`performers.errors`. Nothing here knows what the files mean.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Generator
from pathlib import Path
from typing import Any

from performers.errors import CheckpointError, DiskFullError, OutputError

MANIFEST = "manifest.json"
_FORMAT = {"format": "performers-folder", "version": 1}
_TEMPORARY = ".writing-"
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


@contextlib.contextmanager
def writing(path: Path, num_bytes: int | None = None) -> Generator[None]:
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


@contextlib.contextmanager
def room_for(path: Path, needed: int | None = None) -> Generator[None]:
    """As `writing`, for weights files too; refuses at once if `needed` bytes are not free.

    Raises:
        DiskFullError: the disk (or a quota) is full; names `path` and, where known, how many bytes it needs.
        OutputError: `path` cannot be written for another reason, such as permissions.
    """
    if needed is not None:
        existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
        free = shutil.disk_usage(existing).free
        if free < needed:
            raise DiskFullError(
                f"There is no room to write {path}: {needed:,} bytes are needed, {free:,} are free on the disk."
            )
    with writing(path, needed):
        try:
            yield
        except Exception as error:
            # safetensors is no OSError and gives the system's number in the text alone.
            number = re.search(r"\(os error (\d+)\)", str(error))
            if isinstance(error, OSError) or number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def temporary_name(path: Path) -> Path:
    """The name under which `path` is written or removed; `remove_leftovers` knows it."""
    return path.with_name(f"{_TEMPORARY}{path.name}")


def write_file(path: Path, text: str) -> None:
    """Replaces the file at `path` by `text` in one step.

    Raises:
        DiskFullError, OutputError: as in `room_for`.
    """
    temporary = temporary_name(path)
    with room_for(path):
        temporary.write_text(text, encoding="utf-8")
        fsync(temporary)
        os.replace(temporary, path)
        fsync(path.parent)


@contextlib.contextmanager
def sealed_folder(path: Path, *, needed: int | None = None, replace: bool = False) -> Generator[Path]:
    """A temporary folder to fill, which becomes `path` at the end of the block; after an error nothing of it stays.

    Arguments:
        path: the name of the finished folder.
        needed: bytes that will be written, to refuse before anything is.
        replace: remove a folder that already bears the name.

    Raises:
        DiskFullError, OutputError: as in `room_for`.
    """
    temporary = temporary_name(path)
    with room_for(path, needed):
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            files = sorted(file for file in temporary.rglob("*") if file.is_file())
            entries = {
                file.relative_to(temporary).as_posix(): {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
                for file in files
            }
            (temporary / MANIFEST).write_text(json.dumps({**_FORMAT, "files": entries}, indent=1), encoding="utf-8")
            for file in files:
                shutil.copymode(temporary / MANIFEST, file)  # safetensors writes files that nobody else may read
            folders = sorted((folder for folder in temporary.rglob("*") if folder.is_dir()), reverse=True)
            for item in (*files, temporary / MANIFEST, *folders, temporary):
                fsync(item)
            if replace and path.exists():
                shutil.rmtree(path)
            os.rename(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        fsync(path.parent)


def remove_leftovers(folder: Path) -> None:
    """Removes what interrupted writes left in `folder`."""
    for leftover in folder.glob(f"{_TEMPORARY}*"):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def verify_folder(path: Path) -> None:
    """Compares every file of a sealed folder with the manifest.

    Raises:
        CheckpointError: names the file that is missing, has another size or another SHA-256, or says that the manifest itself
            is missing, damaged or of a version that this release does not read.
    """
    manifest = path / MANIFEST
    try:
        content: Any = json.loads(manifest.read_text(encoding="utf-8"))
        header = {key: content[key] for key in _FORMAT}
        files = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in content["files"].items()}
    except FileNotFoundError:
        raise CheckpointError(
            f"{manifest} is missing: {path} is incomplete or was not written by performers."
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{manifest} is damaged: expected the list of files with their SHA-256.") from None
    if header != _FORMAT:
        raise CheckpointError(f"{manifest} is of format {header}: this release reads {_FORMAT}.")
    for name, (size, digest) in files.items():
        file = path / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(f"{manifest} names {name!r}, which lies outside the folder.")
        if not file.is_file():
            raise CheckpointError(f"{file} is missing.")
        if file.stat().st_size != size:
            raise CheckpointError(f"{file} is damaged: {file.stat().st_size:,} bytes, expected {size:,}.")
        if sha256_of(file) != digest:
            raise CheckpointError(f"{file} is damaged: its SHA-256 is not the one in {MANIFEST}.")


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def claim_output(path: Path) -> None:
    """Makes an output folder, which has to be new or empty.

    Raises:
        OutputError: the folder holds files, is a file, or cannot be made.
        DiskFullError: there is no room for it.
    """
    if path.is_dir():
        remove_leftovers(path)
    check_unused(path)
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
