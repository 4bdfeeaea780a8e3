"""What is generated is laid out exactly as what was trained on: tokens, documents, positions and global sources.

The rows of a prompt, of a template and of a first block are held to the batch that the loader makes of the same
document. Shapes: b rows, l slots of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mdseq.data.batch import Batch
from mdseq.data.corpus import Corpus
from mdseq.data.loader import Loader
from mdseq.data.order import RowOrder
from mdseq.data.packing import SplitPacking, WholePacking
from mdseq.data.tokenizer import SpecialToken, Tokenizer
from mdseq.diffusion.denoising import DiffusionModel, GivenRows
from mdseq.generate import rows as rows_module
from mdseq.generate.documents import Blocks
from mdseq.generate.prompts import Infill, Prompt, PromptEncoder
from mdseq.generate.rows import Row, fill
from mdseq.generate.sampler import SamplerOptions, Samples
from mdseq.generate.template import Template
from mdseq.model.denoiser import Denoiser
from mdseq.sparse import Documents
from tests.generate.models import tiny_model

ROWS, NUM_GLOBAL = 6, 3


def batch_of(corpus: Corpus, row_length: int) -> Batch:
    """Rows of the corpus as the loader lays them out: one document each, or the texts cut at the rows' ends."""
    pairs = corpus.manifest.kind == "pair"
    packing = WholePacking(corpus, row_length, 1) if pairs else SplitPacking(corpus, row_length)
    loader = Loader(corpus, packing, RowOrder(packing.num_rows, 0, 1000), row_length, ROWS, ROWS, 0, 1)
    try:
        (batch,) = loader.micro_batches(0)
    finally:
        loader.close()
    return batch


Laid = tuple[Tensor, Tensor, Documents]


@pytest.fixture
def lay(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[Row]], Laid]:
    """Tokens, targets and documents that the sampler gets for some rows."""

    def of(rows: list[Row]) -> Laid:
        seen: list[Laid] = []

        def fake(model, tokens_bl, target_bl, documents, sample_b, *_) -> Samples:
            seen.append((tokens_bl, target_bl, documents))
            return Samples(tokens_bl, torch.zeros_like(sample_b))

        monkeypatch.setattr(rows_module, "sample", fake)
        fill(tiny_model(30), rows, SamplerOptions())
        return seen[0]

    return of


def marking(tokenizer: Tokenizer) -> DiffusionModel:
    """A model whose leading source tokens are global."""
    model = tiny_model(tokenizer.vocab_size)
    denoiser = Denoiser(replace(model.denoiser.config, num_source_global=NUM_GLOBAL)).eval()
    return replace(model, denoiser=denoiser)


@pytest.fixture(scope="module")
def pairs(pair_dataset: Path) -> tuple[Tokenizer, Batch, list[tuple[list[int], list[int]]]]:
    """Vocabulary, batch, and the tokens of each row's source and target."""
    corpus = Corpus.open(pair_dataset, "train")
    batch = batch_of(corpus, row_length=200)
    documents = []
    for tokens_l, target_l, document_l in zip(batch.tokens_bl, batch.target_bl, batch.document_bl, strict=True):
        source_l = (document_l == 0) & ~target_l
        documents.append((tokens_l[source_l].tolist(), tokens_l[target_l].tolist()))
    assert len({len(source) for source, _ in documents}) > 2
    return Tokenizer.load(pair_dataset / "tokenizer.model"), batch, documents


def assert_same_layout(documents: Documents, batch: Batch) -> None:
    width = documents.document_bl.shape[1]
    assert torch.equal(documents.document_bl, batch.document_bl[:, :width])
    assert torch.equal(documents.position_bl, batch.position_bl[:, :width])
    assert not (batch.document_bl[:, width:] >= 0).any()


def test_the_target_of_a_pair(pairs, lay) -> None:
    """In full, of which its first block is the start: nothing but the tokens of the target is another."""
    tokenizer, batch, documents = pairs
    encoder = PromptEncoder(tokenizer, "pair", None)
    prompts = [Prompt(tokenizer.decode(source), len(target), i) for i, (source, target) in enumerate(documents)]
    tokens_bl, target_bl, laid = lay([encoder.job(prompt, 0, 0, None).row for prompt in prompts])
    width = tokens_bl.shape[1]
    assert_same_layout(laid, batch)
    assert torch.equal(target_bl, batch.target_bl[:, :width])
    assert torch.equal(tokens_bl, torch.where(target_bl, SpecialToken.PAD, batch.tokens_bl[:, :width]))
    given = GivenRows.of(marking(tokenizer), tokens_bl, target_bl, laid)
    assert torch.equal(given.documents.global_bl, batch.documents(NUM_GLOBAL).global_bl[:, :width])
    assert (laid.position_bl[target_bl] > 0).all()
    assert laid.position_bl.max() < width - 2  # the target's do not go on where the source's ended

    blocks = Blocks(block=4, context=8, whole=0)
    first_bl, is_target_bl, block = lay([encoder.job(prompt, 0, 0, blocks).row for prompt in prompts])
    for b, (source, _) in enumerate(documents):
        end = len(source) + 4
        assert torch.equal(block.position_bl[b, :end], batch.position_bl[b, :end])
        assert torch.equal(first_bl[b, : len(source)], batch.tokens_bl[b, : len(source)])
        assert is_target_bl[b].nonzero().flatten().tolist() == list(range(len(source), end))


def test_gaps_in_the_target_of_a_pair(pairs, lay) -> None:
    """What is kept of the target has the positions of a target, though it is given."""
    tokenizer, batch, documents = pairs
    encoder = PromptEncoder(tokenizer, "pair", None)
    rows = []
    for i, (source, target) in enumerate(documents):
        before, after = tokenizer.decode(target[:1]), tokenizer.decode(target[4:])
        kept = len(tokenizer.encode(before)) + len(tokenizer.encode(after)) + 1  # the text by itself has other tokens
        template = Template((before, len(target) - kept, after))
        rows.append(encoder.job(Infill(template, i, tokenizer.decode(source)), 0, 0, None).row)
    _, target_bl, laid = lay(rows)
    assert_same_layout(laid, batch)
    assert target_bl.any(dim=1).all()
    assert not target_bl[laid.position_bl <= 1].any()


def test_a_text(text_dataset: Path, lay) -> None:
    """Its positions run on from what is given to what is written."""
    corpus, tokenizer = Corpus.open(text_dataset, "train"), Tokenizer.load(text_dataset / "tokenizer.model")
    batch = batch_of(corpus, row_length=64)
    encoder = PromptEncoder(tokenizer, "text", None)
    _, _, laid = lay([encoder.job(Prompt("the river runs", 60, 0), 0, 0, None).row])
    position_l = laid.position_bl[0]
    for b in range(ROWS):
        trained_l = batch.position_bl[b][batch.document_bl[b] == 0]
        assert torch.equal(trained_l, position_l[: len(trained_l)])


def test_later_blocks_of_a_pair_stay_its_target(tokenizer: Tokenizer, lay) -> None:
    """The window on what was written slides, and its positions follow the source as a target's do."""
    encoder = PromptEncoder(tokenizer, "pair", None)
    job = encoder.job(Prompt("the river runs", 60, 0), 0, 0, Blocks(block=5, context=10, whole=0))
    assert job.draft is not None
    row = job.draft.row(np.arange(20) + 10, num_drawn=20)
    _, target_bl, laid = lay([row])
    num_source = len(job.draft.front_l)
    num_target = len(row) - num_source
    assert num_target > 5
    assert laid.position_bl[0].tolist() == [*range(num_source), *range(1, num_target + 1)]
    assert target_bl[0].nonzero().flatten().tolist() == list(range(len(row) - 5, len(row)))
