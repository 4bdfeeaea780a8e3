"""A node's own copy of a dataset, on its own disk."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from mdseq.data.format import MANIFEST_FILE, Manifest
from mdseq.data.shard import check_size
from mdseq.errors import UserError


def stage(data: Path, scratch: Path) -> Path:
    """The copy, made unless it is there; whole or absent, whatever interrupts this.

    Args:
        data: A dataset.
        scratch: A folder of this node; made if need be. Copies of one dataset have one name, whoever makes them.

    Raises:
        UserError: No dataset, or the copy cannot be made.
    """
    manifest = Manifest.load(data)
    copy = scratch / f"mdseq-{os.getuid()}" / manifest.fingerprint[:16]
    if not (copy / MANIFEST_FILE).is_file():
        _make(data, copy)
    for shard in (
        shard for split in manifest.splits.values() for part in split.sources.values() for shard in part.shards
    ):
        check_size(copy / shard.file, shard)
    return copy


def _make(data: Path, copy: Path) -> None:
    files = [
        path for path in sorted(data.iterdir()) if path.is_file()
    ]  # not the folder that a build leaves its work in
    needed = sum(path.stat().st_size for path in files)
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(copy.parent).free
        if needed > free:
            raise UserError(
                f"no room for {data} in {copy.parent} (cluster.scratch): it takes {needed / 1e9:.2f} GB, and "
                f"{free / 1e9:.2f} are free; give another folder, or none"
            )
        partial = Path(tempfile.mkdtemp(dir=copy.parent, prefix=".copying-"))
        try:
            for path in files:
                shutil.copyfile(path, partial / path.name)
            partial.rename(copy)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        if not (copy / MANIFEST_FILE).is_file():  # nor has another job of this node been faster
            raise UserError(f"cannot copy {data} to {copy.parent} (cluster.scratch): {error.strerror}") from None
