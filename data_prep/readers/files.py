"""The bytes and the text of a file, plain or compressed; what is wrong with it is said with its name."""

from __future__ import annotations

import codecs
import io
import lzma
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import pyarrow as pa
from isal import igzip
from isal.isal_zlib import IsalError

from data_prep.readers.base import BLOCK_BYTES
from data_prep.sources import compression_of, plain_suffix
from mdseq.errors import UserError

_ARROW_CODECS = {".bz2": "bz2", ".zst": "zstd"}


class FileText:
    """Text of a file, piece by piece, as often as it is walked. Raises UnicodeDecodeError where it is not UTF-8."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __iter__(self) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")()
        with named(self._path), opened(self._path) as file:
            while block := file.read(BLOCK_BYTES):
                yield decoder.decode(block)
            yield decoder.decode(b"", final=True)


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed."""
    compression = compression_of(path)
    if compression in (".gz", ".xz"):
        with igzip.open(path, "rb") if compression == ".gz" else lzma.open(path, "rb") as unpacked:
            yield cast(BinaryIO, unpacked)
    elif compression:
        # Arrow's streams notice a file that ends too early; zstandard's own do not.
        stream = pa.CompressedInputStream(pa.OSFile(str(path), "rb"), _ARROW_CODECS[compression])
        with io.BufferedReader(stream, BLOCK_BYTES) as buffered:
            yield cast(BinaryIO, buffered)
    else:
        with path.open("rb", buffering=BLOCK_BYTES) as file:
            yield file


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Name the file in whatever goes wrong while it is read."""
    try:
        yield
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, IsalError, lzma.LZMAError, EOFError) as error:  # type: ignore[misc]
        raise damaged(path, error) from None
    except OSError as error:
        if error.errno is None or error.strerror is None:  # Arrow's decompressors
            raise damaged(path, error) from None
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def damaged(path: Path, error: Exception) -> UserError:
    kind = (compression_of(path) or plain_suffix(path)).removeprefix(".")
    finding = " ".join(str(error).split())[:200]
    return UserError(f"{path} is not a whole {kind} file ({finding}); fetch it again, or exclude it")
