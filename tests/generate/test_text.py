"""Prompts become rows in the layout of the training data, and rows become text."""

from __future__ import annotations

import ast
import textwrap
from pathlib import Path

import pytest
import torch

from mdseq.data.corpus import Corpus
from mdseq.data.lengths import LengthTable
from mdseq.data.tokenizer import SpecialToken, Tokenizer
from mdseq.errors import UserError
from mdseq.generate import rows as rows_module
from mdseq.generate.documents import Blocks
from mdseq.generate.prompts import PREDICTED, Infill, Prompt, PromptEncoder, Quantile
from mdseq.generate.sampler import SamplerOptions, Samples
from mdseq.generate.template import Template
from mdseq.generate.text import LongRowWarning, TextGenerator
from mdseq.generate.tracing import TraceRecorder
from tests.generate.models import save_tiny_model, tiny_generator

OPTIONS = SamplerOptions(num_calls=3)
PROMPTS = [Prompt("the river", 12, 0), Prompt("", 30, 1), Prompt("seven grey cats watch silver fish", 5, 2)]
MANY = [*PROMPTS, *(Prompt("an old mill " * (i % 4), 3 + 7 * i, 10 + i) for i in range(8))]


def row_of(tokenizer: Tokenizer, prompt: Prompt | Infill, kind: str = "text", lengths: LengthTable | None = None):
    return PromptEncoder(tokenizer, kind, lengths).job(prompt, seed=0, min_length=0, blocks=None).row


class FakeSample:
    """Stands in for the sampler: writes the given tokens at the targets, one after the other."""

    def __init__(self, written: list[int]) -> None:
        self.written = written

    def __call__(self, model, tokens_bl, target_bl, documents, sample_b, options, observe) -> Samples:
        out = tokens_bl.clone()
        for b in range(len(out)):
            places = target_bl[b].nonzero().flatten()[: len(self.written)]
            out[b, places] = torch.tensor(self.written, dtype=torch.long)[: len(places)]
        return Samples(out, torch.zeros_like(sample_b))


@pytest.mark.parametrize("kind", ["text", "pair"])
def test_layout_of_the_rows(tokenizer: Tokenizer, kind: str) -> None:
    """`BOS source SEP target` for pairs, `BOS text` for texts: what `data_prep` writes."""
    for prompt in PROMPTS:
        source = [SpecialToken.BOS, *tokenizer.encode(prompt.source).tolist()]
        source += [SpecialToken.SEP] if kind == "pair" else []
        row = row_of(tokenizer, prompt, kind)
        assert row.tokens_l.tolist() == [*source, *[SpecialToken.PAD] * prompt.length]
        assert row.target_l.nonzero()[0].tolist() == list(range(len(source), len(row)))
        assert row.sample_id == prompt.sample_id


@pytest.mark.parametrize("kind", ["text", "pair"])
def test_the_layout_is_that_of_the_dataset(request: pytest.FixtureRequest, kind: str) -> None:
    """The leading tokens of a real document are those of a prompt with its source, and of a template."""
    folder = request.getfixturevalue(f"{kind}_dataset")
    corpus, vocabulary = Corpus.open(folder, "train"), Tokenizer.load(folder / "tokenizer.model")
    document = corpus.tokens(0).tolist()
    cut = document.index(SpecialToken.SEP) + 1 if kind == "pair" else 5
    source, target = vocabulary.decode(document[:cut]), vocabulary.decode(document[cut:])
    row = row_of(vocabulary, Prompt(source, 3, 0), kind)
    assert row.tokens_l[0] == document[0] == SpecialToken.BOS
    if kind == "pair":
        assert row.tokens_l[~row.target_l].tolist() == document[:cut]
        assert cut == corpus.target_start(0)
        filled = row_of(vocabulary, Infill(Template((5, target)), 0, source), kind)
        assert filled.tokens_l[~filled.target_l].tolist() == document


def test_templates_become_rows(tokenizer: Tokenizer) -> None:
    row = row_of(tokenizer, Infill(Template.parse("the river [[8]] and [[4]] mill"), 7))
    parts = [tokenizer.encode(text).tolist() for text in ("the river", " and", " mill")]
    pad = int(SpecialToken.PAD)
    assert row.tokens_l.tolist() == [SpecialToken.BOS, *parts[0], *[pad] * 8, *parts[1], *[pad] * 4, *parts[2]]
    assert row.target_l.sum() == 12
    assert row.sample_id == 7


def test_the_end_token_cuts_the_text(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    words, more = tokenizer.encode("cats watch").tolist(), tokenizer.encode(" fish").tolist()
    for written, min_length, expected in (
        ([*words, SpecialToken.EOS, *more], 0, "cats watch"),
        ([*words, SpecialToken.EOS, *more, SpecialToken.EOS], 0, "cats watch"),
        ([SpecialToken.EOS, *words], 0, ""),
        ([*words, *more], 0, "cats watch fish"),
        ([*words, SpecialToken.EOS, *more], 99, "cats watch fish"),
        ([SpecialToken.EOS, *words, SpecialToken.EOS, *more], 1, "cats watch"),
    ):
        monkeypatch.setattr(rows_module, "sample", FakeSample(written))
        prompt = Prompt("the", len(written), 0)
        assert tiny_generator(tokenizer).generate([prompt], OPTIONS, min_length=min_length) == [expected]


def test_gaps_are_filled_each_up_to_its_end(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    cats, fish = tokenizer.encode(" cats").tolist(), tokenizer.encode(" fish").tolist()
    written = [*cats, SpecialToken.EOS, *fish, *fish, SpecialToken.EOS]
    template = Template(("the ", len(cats) + 1 + len(fish), " and the ", len(fish) + 1, "."))
    monkeypatch.setattr(rows_module, "sample", FakeSample(written))
    assert tiny_generator(tokenizer).generate([Infill(template, 0)], OPTIONS) == ["the cats and the fish."]


@pytest.mark.parametrize("kind", ["text", "pair"])
def test_every_kept_part_is_in_the_text(tokenizer: Tokenizer, kind: str) -> None:
    kept = ("\u2581 the  ri", "\tver\r\n\u00e9\U0001f600 ", " <eos></s> ")
    template = Template((kept[0], 9, kept[1], 4, kept[2], 6))
    (text,) = tiny_generator(tokenizer, kind).generate([Infill(template, 3)], OPTIONS)
    assert text.startswith(kept[0])
    assert text.index(kept[1], len(kept[0])) < text.rindex(kept[2])


def test_the_python_in_the_documentation_runs(
    text_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "generation.md").read_text(encoding="utf-8")
    section = page.partition("## From Python")[2].partition("\n## ")[0]
    (tmp_path / "runs").mkdir()
    save_tiny_model(tmp_path / "runs" / "mine", text_dataset)
    monkeypatch.chdir(tmp_path)
    exec(textwrap.dedent(section), {})
    written = ast.literal_eval(capsys.readouterr().out)
    assert len(written) == 2
    assert written[1].startswith("The king")


def test_same_seed_same_text_other_seed_other_text(tokenizer: Tokenizer) -> None:
    generator = tiny_generator(tokenizer)
    first = generator.generate(PROMPTS, SamplerOptions(num_calls=4, seed=1))
    assert first == generator.generate(PROMPTS, SamplerOptions(num_calls=4, seed=1))
    assert first != generator.generate(PROMPTS, SamplerOptions(num_calls=4, seed=2))
    assert any(first)


@pytest.mark.parametrize("blocks", [None, Blocks(block=9, context=12, whole=0)])
def test_a_text_does_not_depend_on_the_other_prompts(tokenizer: Tokenizer, blocks: Blocks | None) -> None:
    generator = tiny_generator(tokenizer)
    expected = [generator.generate([prompt], OPTIONS, blocks=blocks)[0] for prompt in MANY]
    for batch_size in (1, 3, 8):
        assert generator.generate(MANY, OPTIONS, batch_size, blocks=blocks) == expected
        assert generator.generate(MANY[::-1], OPTIONS, batch_size, blocks=blocks) == expected[::-1]
    assert ["".join(generator.write(prompt, OPTIONS, blocks=blocks)) for prompt in MANY] == expected


def test_the_sample_id_tells_equal_prompts_apart(tokenizer: Tokenizer) -> None:
    texts = tiny_generator(tokenizer).generate([Prompt("the river", 30, i) for i in (5, 6, 5)], OPTIONS)
    assert texts[0] == texts[2] != texts[1]


def test_prompts_are_read_a_window_at_a_time(tokenizer: Tokenizer) -> None:
    read = []
    prompts = (read.append(i) or Prompt("", 2, i) for i in range(200))
    written = tiny_generator(tokenizer).stream(prompts, SamplerOptions(num_calls=1), batch_size=2)
    next(written)
    assert len(read) < 100
    assert sorted([0, *(index for index, _ in written)])[-1] == 199


def test_lengths_by_the_table(tokenizer: Tokenizer) -> None:
    table = LengthTable("pair", (1.0,) * tokenizer.vocab_size, (1.0, 6.0), ((10.0, 20.0, 40.0), (100.0, 200.0, 400.0)))

    def num_targets(source: str, length, sample_id: int = 0) -> int:
        return int(row_of(tokenizer, Prompt(source, length, sample_id), "pair", table).target_l.sum())

    assert num_targets("", PREDICTED) == 20
    assert num_targets("the river " * 99, PREDICTED) == 200
    assert num_targets("", Quantile(0.25)) == 15
    drawn = [num_targets("", "sampled", sample_id) for sample_id in range(40)]
    assert len(set(drawn)) > 10
    assert drawn == [num_targets("", "sampled", sample_id) for sample_id in range(40)]
    assert 10 <= min(drawn) < 20 < max(drawn) <= 40
    with pytest.raises(UserError, match="give a length"):
        row_of(tokenizer, Prompt("", PREDICTED, 0), "pair")


def test_long_texts_are_cut_by_the_row_length(tokenizer: Tokenizer) -> None:
    pieces = list(tiny_generator(tokenizer, row_length=16).write(Prompt("", 40, 0), OPTIONS))
    assert len([piece for piece in pieces if piece]) > 3
    assert len(list(tiny_generator(tokenizer, row_length=64).write(Prompt("", 40, 0), OPTIONS))) == 1


def test_a_row_longer_than_the_training_is_told_about(tokenizer: Tokenizer) -> None:
    generator = tiny_generator(tokenizer, "pair", row_length=16)
    with pytest.warns(LongRowWarning, match="longer than the 16 of the training"):
        generator.generate([Prompt("the river runs past " * 8, 4, 0)], OPTIONS)


def test_half_a_character_is_no_text(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="lone surrogate"):
        tiny_generator(tokenizer).generate([Prompt("a\ud800", 4, 0)], OPTIONS)


def test_a_saved_model_is_read_with_its_table(pair_dataset: Path, tmp_path: Path) -> None:
    generator = TextGenerator.load(save_tiny_model(tmp_path / "model", pair_dataset))
    assert (generator.kind, generator.row_length) == ("pair", 64)
    assert generator.lengths == LengthTable.of(Corpus.open(pair_dataset, "train"))
    with pytest.raises(UserError, match="no run folder at"):
        TextGenerator.load(tmp_path / "absent")
    with pytest.raises(UserError, match="has no whole checkpoint"):
        TextGenerator.load(tmp_path)


@pytest.mark.parametrize("blocks", [None, Blocks(block=9, context=12, whole=0)])
def test_a_trace_has_the_pieces_of_the_first_row(tokenizer: Tokenizer, blocks: Blocks | None) -> None:
    recorders = []

    def observe(row):
        recorders.append(TraceRecorder(tokenizer, row))
        return recorders[0]

    generator = tiny_generator(tokenizer, "pair")
    text = "".join(generator.write(Prompt("the river", 20, 0), OPTIONS, blocks=blocks, observe=observe))
    trace = recorders[0].trace("a title")
    num_source = 2 + len(tokenizer.encode("the river"))
    assert trace.given == (True,) * num_source + (False,) * (20 if blocks is None else 9)
    assert [frame.call for frame in trace.frames] == [0, 1, 2]
    assert [frame.timestep for frame in trace.frames] == sorted((f.timestep for f in trace.frames), reverse=True)
    for frame in trace.frames:
        assert "".join(frame.pieces[:num_source]) == "<bos>the river<sep>"
        assert frame.confidence[:num_source] == (1.0,) * num_source
    if blocks is None and "<eos>" not in trace.frames[-1].pieces and "\ufffd" not in text:
        assert "".join(trace.frames[-1].pieces[num_source:]) == text
