"""A build gives the same bytes however it is run, loses nothing silently, and appears whole or not at all."""

import errno
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import audit, encode, run, shards
from data_prep.run import BuildOptions, build
from data_prep.vocabulary import WindowSample
from mdseq.data.corpus import Corpus
from mdseq.data.format import Manifest, document_id
from mdseq.data.tokenizer import SpecialToken, Tokenizer
from mdseq.errors import UserError


def write_jsonl(path: Path, records: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def texts(count: int) -> list[dict[str, str]]:
    return [{"text": f"def mill_{number}(river):\n" + "    river += 1\n" * (number % 9)} for number in range(count)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def decoded(folder: Path) -> list[tuple[str, str | None]]:
    tokenizer = Tokenizer.load(folder / "tokenizer.model")
    pairs: list[tuple[str, str | None]] = []
    for split in audit.splits_in_use(Manifest.load(folder)):
        corpus = Corpus.open(folder, split)
        for document in range(corpus.num_documents):
            tokens, start = corpus.tokens(document), corpus.target_starts[document]
            if corpus.manifest.kind == "text":
                pairs.append((tokenizer.decode(tokens), None))
            else:
                pairs.append((tokenizer.decode(tokens[:start]), tokenizer.decode(tokens[start:])))
    return pairs


def test_same_bytes_from_any_number_of_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "CHUNK_DOCUMENTS", 7)
    data = write_jsonl(tmp_path / "texts.jsonl", texts(200))
    for workers in (1, 2):
        build(BuildOptions(data, tmp_path / f"out{workers}", vocab=512, max_shard_tokens=3000, workers=workers))
    assert contents(tmp_path / "out1") == contents(tmp_path / "out2")
    assert len(contents(tmp_path / "out1")) > 4


def test_plain_text_form(tmp_path: Path, tokenizer_path: Path) -> None:
    (tmp_path / "a.txt").write_text("past the mill\n")
    manifest = build(BuildOptions(tmp_path / "a.txt", tmp_path / "out", tokenizer=tokenizer_path, workers=1))
    corpus = Corpus.open(tmp_path / "out", "train")
    body = Tokenizer.load(tokenizer_path).encode("past the mill\n")
    assert corpus.tokens(0).tolist() == [SpecialToken.BOS, *body, SpecialToken.EOS]
    assert corpus.target_starts.tolist() == [1]
    assert corpus.document_id(0) == document_id("past the mill\n", None)
    assert manifest == corpus.manifest
    assert manifest.splits["train"].text_bytes == len("past the mill\n")


def test_pair_form(tmp_path: Path, tokenizer_path: Path) -> None:
    data = write_jsonl(tmp_path / "pairs.jsonl", [{"src": "old mill", "trg": "river"}])
    build(BuildOptions(data, tmp_path / "out", tokenizer=tokenizer_path, workers=1))
    corpus = Corpus.open(tmp_path / "out", "train")
    tokenizer = Tokenizer.load(tokenizer_path)
    source, target = tokenizer.encode("old mill"), tokenizer.encode("river")
    form = [SpecialToken.BOS, *source, SpecialToken.SEP, *target, SpecialToken.EOS]
    assert corpus.tokens(0).tolist() == form
    assert corpus.target_starts.tolist() == [len(source) + 2]
    assert corpus.manifest.kind == "pair"
    assert "<BOS>old mill<SEP>river<EOS>" in audit.show(tmp_path / "out", "train", 0)


@settings(max_examples=25)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=12))
def test_documents_in_are_documents_out_and_rejections(
    tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path, written: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("any")
    data = write_jsonl(folder / "texts.jsonl", [{"text": text} for text in [*written, "mill"]])
    options = BuildOptions(data, folder / "out", tokenizer=tokenizer_path, max_rejected_fraction=1, workers=1)
    manifest = build(options)
    kept = [text for text in [*written, "mill"] if text.strip()]
    assert sorted(text for text, _ in decoded(folder / "out")) == sorted(kept)
    assert sum(manifest.rejected.values()) == len(written) + 1 - len(kept)
    assert audit.verify(folder / "out") == len(kept)


def test_bad_lines_are_counted_and_kept_aside(tmp_path: Path, tokenizer_path: Path) -> None:
    data = tmp_path / "texts.jsonl"
    lines = [json.dumps(record) for record in texts(30)]
    lines[4:4] = ["{broken", '{"body": "x"}']
    data.write_text("\n".join(lines))
    manifest = build(BuildOptions(data, tmp_path / "out", tokenizer=tokenizer_path, workers=1))
    assert manifest.rejected == {"missing_field": 1, "not_json": 1}
    kept = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert kept == [
        {"source": "texts.jsonl", "line": 5, "reason": "not_json", "excerpt": "{broken"},
        {"source": "texts.jsonl", "line": 6, "reason": "missing_field", "excerpt": '{"body": "x"}'},
    ]
    assert len(decoded(tmp_path / "out")) == 30


def test_too_many_bad_lines_stop_the_build(tmp_path: Path, tokenizer_path: Path) -> None:
    data = tmp_path / "texts.jsonl"
    data.write_text('{"text": "a"}\n' * 8 + "{broken\n" * 2)
    with pytest.raises(UserError, match=r"2 of 10 records .* 10%.*\n  texts.jsonl:9: not_json: {broken"):
        build(BuildOptions(data, tmp_path / "out", tokenizer=tokenizer_path, workers=1))
    assert [path.name for path in tmp_path.iterdir()] == ["texts.jsonl"]


def test_texts_and_pairs_do_not_mix(tmp_path: Path, tokenizer_path: Path) -> None:
    data = write_jsonl(tmp_path / "mixed.jsonl", [{"text": "a"}, {"src": "a", "trg": "b"}])
    with pytest.raises(UserError, match=r"mixed.jsonl:1 is a text, mixed.jsonl:2 is a pair"):
        build(BuildOptions(data, tmp_path / "out", tokenizer=tokenizer_path, workers=1))


@pytest.mark.parametrize(("fraction", "num_valid"), [(0.0, 0), (0.01, 1), (0.3, 1)])
def test_two_documents_are_one_for_each_split(
    tmp_path: Path, tokenizer_path: Path, fraction: float, num_valid: int
) -> None:
    data = write_jsonl(tmp_path / "texts.jsonl", texts(2))
    options = BuildOptions(data, tmp_path / "out", tokenizer=tokenizer_path, valid_fraction=fraction, workers=1)
    assert build(options).splits["valid"].documents == num_valid


def test_split_is_stable_when_data_grows(tmp_path: Path, tokenizer_path: Path) -> None:
    held_out = []
    for count in (300, 400):
        data = write_jsonl(tmp_path / "texts.jsonl", texts(count))
        out = tmp_path / f"out{count}"
        build(BuildOptions(data, out, tokenizer=tokenizer_path, valid_fraction=0.2, workers=1))
        corpus = Corpus.open(out, "valid")
        held_out.append({corpus.document_id(document) for document in range(corpus.num_documents)})
    assert 40 < len(held_out[0]) < 80
    assert held_out[0] <= held_out[1]


def test_fingerprint_follows_content_and_options(tmp_path: Path, tokenizer_path: Path) -> None:
    def fingerprint(name: str, count: int, valid_fraction: float = 0.01) -> str:
        data = write_jsonl(tmp_path / "texts.jsonl", texts(count))
        out = tmp_path / name
        return build(
            BuildOptions(data, out, tokenizer=tokenizer_path, valid_fraction=valid_fraction, workers=1)
        ).fingerprint

    first = fingerprint("first", 20)
    assert fingerprint("again", 20) == first
    assert fingerprint("more", 21) != first
    assert fingerprint("other", 20, valid_fraction=0.02) != first


def test_existing_output_is_refused(tmp_path: Path, tokenizer_path: Path) -> None:
    data = write_jsonl(tmp_path / "texts.jsonl", texts(5))
    options = BuildOptions(data, tmp_path / "out", tokenizer=tokenizer_path, workers=1)
    build(options)
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match=r"exists and is never overwritten; remove it"):
        build(options)
    assert contents(tmp_path / "out") == before


def test_unwritable_output(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "texts.jsonl", texts(5))
    with pytest.raises(UserError, match="cannot write OUT"):
        build(BuildOptions(data, data / "out", workers=1))


@pytest.mark.parametrize(
    ("raised", "seen"),
    [(OSError(errno.ENOSPC, "No space left"), UserError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_a_failed_build_leaves_nothing(
    tmp_path: Path,
    tokenizer_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    raised: BaseException,
    seen: type[BaseException],
) -> None:
    def fail(*_: object) -> None:
        raise raised

    data = write_jsonl(tmp_path / "texts.jsonl", texts(50))
    monkeypatch.setattr(shards.SplitWriter, "close", fail)
    with pytest.raises(seen, match="no space left for OUT" if seen is UserError else None):
        build(BuildOptions(data, tmp_path / "out", tokenizer=tokenizer_path, workers=2))
    assert [path.name for path in tmp_path.iterdir()] == ["texts.jsonl"]


def test_full_disk_in_the_middle_of_a_shard(
    tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(self: object, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    data = write_jsonl(tmp_path / "texts.jsonl", texts(50))
    monkeypatch.setattr(shards._HashedFile, "write", write)
    with pytest.raises(UserError, match="no space left for OUT"):
        build(BuildOptions(data, tmp_path / "out", tokenizer=tokenizer_path, workers=1))
    assert [path.name for path in tmp_path.iterdir()] == ["texts.jsonl"]


def test_input_that_changes_meanwhile(tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_jsonl(tmp_path / "texts.jsonl", texts(20))

    def shortened(*arguments: object) -> Iterator[object]:
        write_jsonl(data, texts(10))
        return real(*arguments)  # type: ignore[arg-type]

    real = run.read_all
    monkeypatch.setattr(run, "read_all", shortened)
    with pytest.raises(UserError, match="changed while it was read"):
        build(BuildOptions(data, tmp_path / "out", tokenizer=tokenizer_path, workers=1))


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"format": "parquet"}, "FORMAT=parquet is unknown; allowed: auto, text, jsonl, code"),
        ({"workers": 0}, "WORKERS=0"),
        ({"vocab": 100}, "VOCAB=100 is too small"),
        ({"valid_fraction": 1.0}, "valid_fraction=1.0"),
        ({"max_rejected_fraction": 1.5}, "max_rejected_fraction=1.5"),
    ],
)
def test_wrong_options(tmp_path: Path, wrong: dict[str, object], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        build(BuildOptions(tmp_path, tmp_path / "out", **wrong))  # type: ignore[arg-type]


@given(st.permutations([f"window {number} " * (1 + number * 7 % 40) for number in range(30)]))
def test_sample_does_not_depend_on_order_and_stays_small(windows: list[str]) -> None:
    samples = []
    for order in (windows, sorted(windows)):
        sample = WindowSample(num_characters=1000)
        for text in order:
            sample.add(text)
        samples.append(list(sample.lines()))
    assert samples[0] == samples[1]
    assert 1000 <= sum(map(len, samples[0])) < 1000 + max(map(len, windows))
