"""Prompts become rows in the layout of the training data, and rows become text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mdseq.data.tokenizer import SpecialToken, Tokenizer
from mdseq.diffusion.schedule import NoiseSchedule
from mdseq.generate import text as text_module
from mdseq.generate.sampler import SamplerOptions
from mdseq.generate.text import Prompt, TextGenerator
from mdseq.model.denoiser import Denoiser, DenoiserConfig
from mdseq.spec import load_spec

OPTIONS = SamplerOptions(num_steps=4)


@pytest.fixture(scope="module")
def tokenizer(text_dataset: Path) -> Tokenizer:
    return Tokenizer.load(text_dataset / "tokenizer.model")


def generator_of(tokenizer: Tokenizer, kind: str = "text") -> TextGenerator:
    """A model of random weights."""
    overrides = [
        "model.embedding_dim=8", "model.hidden_dim=16", "model.num_layers=2", "model.num_heads=2",
        "attention.window=3", "attention.num_global=2", "experts.num_experts=4", "experts.feedforward_dim=8",
    ]  # fmt: skip
    torch.manual_seed(0)
    denoiser = Denoiser(DenoiserConfig.of(load_spec(None, overrides).spec, tokenizer.vocab_size)).eval()
    return TextGenerator(denoiser, torch.full((8,), 0.5), NoiseSchedule(30), tokenizer, kind)


PROMPTS = [Prompt("the river", 12, 0), Prompt("", 30, 1), Prompt("seven grey cats watch silver fish", 5, 2)]


class FakeSample:
    """Stands in for the sampler: keeps its arguments, and writes the given tokens at every target."""

    def __init__(self, written: list[int]) -> None:
        self.written = written

    def __call__(self, denoiser, m_z, schedule, tokens_bl, target_bl, documents, sample_b, options) -> Tensor:
        self.tokens, self.target, self.documents, self.ids = tokens_bl, target_bl, documents, sample_b
        out = tokens_bl.clone()
        for b in range(len(out)):
            places = target_bl[b].nonzero().flatten()[: len(self.written)]
            out[b, places] = torch.tensor(self.written, dtype=torch.long)[: len(places)]
        return out


@pytest.mark.parametrize("kind", ["text", "pair"])
def test_layout_of_the_rows(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """`BOS source SEP target` for pairs, `BOS text` for texts: what `data_prep` writes."""
    fake = FakeSample([])
    monkeypatch.setattr(text_module, "sample", fake)
    generator_of(tokenizer, kind).generate(PROMPTS, OPTIONS)
    assert fake.ids.tolist() == [0, 1, 2]
    for b, prompt in enumerate(PROMPTS):
        source = [SpecialToken.BOS, *tokenizer.encode(prompt.source).tolist()]
        source += [SpecialToken.SEP] if kind == "pair" else []
        end = len(source) + prompt.length
        assert fake.tokens[b, : len(source)].tolist() == source
        assert (fake.tokens[b, len(source) :] == SpecialToken.PAD).all()
        assert fake.target[b].nonzero().flatten().tolist() == list(range(len(source), end))
        assert fake.documents.real_bl[b].nonzero().flatten().tolist() == list(range(end))
        assert fake.documents.position_bl[b, :end].tolist() == list(range(end))


@pytest.mark.parametrize("kind", ["text", "pair"])
def test_the_layout_is_that_of_the_dataset(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The leading tokens of a real document are those of a prompt with its source."""
    from mdseq.data.corpus import Corpus

    folder = request.getfixturevalue(f"{kind}_dataset")
    corpus, vocabulary = Corpus.open(folder, "train"), Tokenizer.load(folder / "tokenizer.model")
    document = corpus.tokens(0).tolist()
    cut = document.index(SpecialToken.SEP) + 1 if kind == "pair" else 5
    assert kind == "text" or cut == corpus.target_start(0)
    fake = FakeSample([])
    monkeypatch.setattr(text_module, "sample", fake)
    generator_of(vocabulary, kind).generate([Prompt(vocabulary.decode(document[:cut]), 3, 0)], OPTIONS)
    if kind == "pair":
        assert fake.tokens[0, :cut].tolist() == document[:cut]
        assert fake.target[0].nonzero()[0] == cut
    else:
        assert fake.tokens[0, 0] == document[0] == SpecialToken.BOS


def test_the_end_token_cuts_the_text(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    words, more = tokenizer.encode("cats watch").tolist(), tokenizer.encode(" fish").tolist()
    for written, expected in (
        ([*words, SpecialToken.EOS, *more], "cats watch"),
        ([*words, SpecialToken.EOS, *more, SpecialToken.EOS], "cats watch"),
        ([SpecialToken.EOS, *words], ""),
        ([*words, *more], "cats watch fish"),
    ):
        monkeypatch.setattr(text_module, "sample", FakeSample(written))
        assert generator_of(tokenizer).generate([Prompt("the", len(written), 0)], OPTIONS) == [expected]


def test_the_source_is_not_repeated_and_padding_is_not_read(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = tokenizer.encode("dream").tolist()
    monkeypatch.setattr(text_module, "sample", FakeSample(written))
    prompts = [Prompt("the river", len(written), 0), Prompt("seven grey cats", len(written), 1)]
    assert generator_of(tokenizer).generate(prompts, OPTIONS) == ["dream", "dream"]


def test_same_seed_same_text_other_seed_other_text(tokenizer: Tokenizer) -> None:
    generator = generator_of(tokenizer)
    first = generator.generate(PROMPTS, SamplerOptions(num_steps=4, seed=1))
    assert first == generator.generate(PROMPTS, SamplerOptions(num_steps=4, seed=1))
    assert first != generator.generate(PROMPTS, SamplerOptions(num_steps=4, seed=2))
    assert any(first)


def test_a_text_does_not_depend_on_the_other_prompts(tokenizer: Tokenizer) -> None:
    generator = generator_of(tokenizer)
    together = generator.generate(PROMPTS, OPTIONS)
    assert [generator.generate([prompt], OPTIONS)[0] for prompt in PROMPTS] == together
    assert generator.generate(PROMPTS[::-1], OPTIONS) == together[::-1]


def test_the_sample_id_tells_equal_prompts_apart(tokenizer: Tokenizer) -> None:
    texts = generator_of(tokenizer).generate([Prompt("the river", 30, i) for i in (5, 6, 5)], OPTIONS)
    assert texts[0] == texts[2] != texts[1]
