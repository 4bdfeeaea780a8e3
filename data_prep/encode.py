"""Documents to tokens, in a pool of processes, in order: any number of workers gives the same result."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np

from data_prep.sources import Document
from mdseq.data.format import document_id, token_dtype
from mdseq.data.tokenizer import SpecialToken, Tokenizer
from mdseq.errors import UserError

CHUNK_CHARACTERS = 500_000
CHUNK_DOCUMENTS = 2000
CHUNKS_IN_FLIGHT_PER_WORKER = 3


@dataclass(frozen=True, slots=True)
class EncodedDocument:
    """A document in token form. tokens: [length], BOS text EOS or BOS source SEP target EOS."""

    tokens: np.ndarray
    target_start: int
    document_id: bytes
    source: str
    text_bytes: int


def encode_document(document: Document, tokenizer: Tokenizer) -> EncodedDocument:
    """Token form of a document; `target_start` is the index after BOS, or after SEP in a pair."""
    parts: list[np.ndarray | list[SpecialToken]] = [[SpecialToken.BOS], tokenizer.encode(document.text)]
    target_start = 1
    text_bytes = len(document.text.encode())
    if document.target is not None:
        parts += [[SpecialToken.SEP], tokenizer.encode(document.target)]
        target_start = len(parts[1]) + 2
        text_bytes += len(document.target.encode())
    tokens = np.concatenate([*parts, [SpecialToken.EOS]])
    assert tokens.max() < tokenizer.vocab_size
    return EncodedDocument(
        tokens=tokens.astype(token_dtype(tokenizer.vocab_size)),
        target_start=target_start,
        document_id=document_id(document.text, document.target),
        source=document.source,
        text_bytes=text_bytes,
    )


def chunked(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Group documents into work for one call of a worker."""
    chunk: list[Document] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += len(document.text) + len(document.target or "")
        if size >= CHUNK_CHARACTERS or len(chunk) == CHUNK_DOCUMENTS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def encode_in_order(
    documents: Iterable[Document], tokenizer_model: bytes, num_workers: int
) -> Generator[EncodedDocument]:
    """Encode documents in their own order, holding a few chunks a worker at a time.

    Raises UserError when a worker is killed.
    """
    if num_workers == 1:
        tokenizer = Tokenizer(tokenizer_model)
        for document in documents:
            yield encode_document(document, tokenizer)
        return
    pool = ProcessPoolExecutor(
        num_workers,
        multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(tokenizer_model,),
    )
    pending: deque[Future[list[EncodedDocument]]] = deque()
    try:
        for chunk in chunked(documents):
            pending.append(pool.submit(_encode_chunk, chunk))
            if len(pending) > CHUNKS_IN_FLIGHT_PER_WORKER * num_workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            f"one of {num_workers} worker processes was killed, most often for lack of memory; "
            "build again with fewer WORKERS"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker_tokenizer: Tokenizer


def _start_worker(tokenizer_model: bytes) -> None:
    global _worker_tokenizer
    _worker_tokenizer = Tokenizer(tokenizer_model)
    # Ctrl-C reaches the whole process group; the parent alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """A parent that is killed cannot close the pool, and the queues alone would keep its workers waiting."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_chunk(chunk: list[Document]) -> list[EncodedDocument]:
    return [encode_document(document, _worker_tokenizer) for document in chunk]
