"""Files that are whole or absent, whatever interrupts their writing."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def temporary_name(path: Path) -> Path:
    """Where this process writes a file before it is whole; no other that writes the same file gets in its way."""
    return path.with_name(f".{path.name}.{platform.node()}-{os.getpid()}.tmp")


def nearest_existing(path: Path) -> Path:
    """The path, or the closest folder above it that exists: where it would be made."""
    return next(parent for parent in (path, *path.parents) if parent.exists())


def write_whole(path: Path, content: bytes) -> None:
    """Write a file and put it in its place when it is on the disk."""
    temporary = temporary_name(path)
    with temporary.open("wb") as file:
        file.write(content)
    put_in_place(temporary, path)


def put_in_place(temporary: Path, path: Path) -> None:
    """Give a file that is fully written its name, once it is on the disk."""
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def remove_temporaries(folder: Path) -> None:
    """Remove what a writer that was killed has left in a folder."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make names in a folder last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
