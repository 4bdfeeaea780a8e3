"""Looking at a dataset that exists: is it intact, what is in it, what does a document read like."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mdseq.data.corpus import Corpus
from mdseq.data.format import TOKENIZER_FILE, Manifest, Split, document_id
from mdseq.data.tokenizer import SpecialToken, Tokenizer
from mdseq.errors import UserError

ROUND_TRIP_DOCUMENTS = 200


def verify(data_dir: Path) -> int:
    """Check hashes, offsets, token ids, structure and, on a sample, that decoding gives back the hashed text.

    Returns the number of documents. Raises UserError naming the first fault.
    """
    manifest = Manifest.load(data_dir)
    tokenizer = Tokenizer.load(data_dir / TOKENIZER_FILE)
    if tokenizer.fingerprint != manifest.tokenizer_fingerprint:
        raise UserError(f"{data_dir / TOKENIZER_FILE} is not the tokenizer of the manifest; build the dataset again")
    num_documents = 0
    for split in splits_in_use(manifest):
        corpus = Corpus.open(data_dir, split, verify=True)
        num_documents += corpus.num_documents
        for document in range(corpus.num_documents):
            if not _is_well_formed(corpus, document, tokenizer.vocab_size):
                raise _fault(data_dir, split, document, "its tokens do not have the form of a document")
        step = -(-corpus.num_documents // ROUND_TRIP_DOCUMENTS)
        for document in range(0, corpus.num_documents, step):
            if document_id(*_decoded(corpus, document, tokenizer)) != corpus.document_id(document):
                raise _fault(data_dir, split, document, "its text is not the text that was hashed at the build")
    return num_documents


def show(data_dir: Path, split: Split, document: int) -> str:
    """One document as text, with its boundaries visible."""
    corpus = Corpus.open(data_dir, split)
    if not 0 <= document < corpus.num_documents:
        raise UserError(f"{data_dir} has no {split} document {document}; allowed: 0 to {corpus.num_documents - 1}")
    tokenizer = Tokenizer.load(data_dir / TOKENIZER_FILE)
    text, target = _decoded(corpus, document, tokenizer)
    header = (
        f"{split} document {document}: {corpus.length(document):,} tokens, target from "
        f"{corpus.target_starts[document]:,}, id {corpus.document_id(document).hex()}, "
        f"from {corpus.source(document)}"
    )
    body = text if target is None else f"{text}<SEP>{target}"
    return f"{header}\n<BOS>{body}<EOS>"


def length_quantiles(corpus: Corpus) -> dict[str, int]:
    """Tokens a document, from the shortest to the longest."""
    lengths = np.diff(corpus.offsets)
    levels = {"shortest": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "longest": 1.0}
    return {name: int(np.quantile(lengths, level)) for name, level in levels.items()}


def splits_in_use(manifest: Manifest) -> list[Split]:
    """Splits that have a document."""
    return [split for split, entry in manifest.splits.items() if entry.documents]


def _is_well_formed(corpus: Corpus, document: int, vocab_size: int) -> bool:
    tokens = corpus.tokens(document)
    target_start = int(corpus.target_starts[document])
    opener = SpecialToken.SEP if corpus.manifest.kind == "pair" else SpecialToken.BOS
    return bool(
        len(tokens) >= 2
        and tokens[0] == SpecialToken.BOS
        and tokens[-1] == SpecialToken.EOS
        and 1 <= target_start < len(tokens)
        and tokens[target_start - 1] == opener
        and tokens.max() < vocab_size
        and np.count_nonzero(tokens <= max(SpecialToken)) == (3 if corpus.manifest.kind == "pair" else 2)
    )


def _decoded(corpus: Corpus, document: int, tokenizer: Tokenizer) -> tuple[str, str | None]:
    tokens = corpus.tokens(document)
    if corpus.manifest.kind == "text":
        return tokenizer.decode(tokens), None
    target_start = int(corpus.target_starts[document])
    return tokenizer.decode(tokens[:target_start]), tokenizer.decode(tokens[target_start:])


def _fault(data_dir: Path, split: Split, document: int, finding: str) -> UserError:
    return UserError(f"{data_dir}: {split} document {document}: {finding}; build the dataset again")
