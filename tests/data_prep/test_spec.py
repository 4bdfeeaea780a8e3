"""A prep spec says where text is and what becomes of it; what is wrong with it is said at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.spec import PrepSpec, default_name, load_prep_spec
from mdseq.errors import UserError


@pytest.fixture
def spec_file(tmp_path: Path) -> Path:
    path = tmp_path / "specs" / "prep.toml"
    path.parent.mkdir()
    path.write_text(
        '[[sources]]\npath = "novels/*.txt"\nweight = 3\n\n'
        '[[sources]]\nname = "quiz"\npath = ["a.csv", "/data/b.csv"]\ntext = "{q}: {a}"\nweight = 1\n\n'
        '[vocabulary]\nsize = 600\n\n[cleaning]\nevaluation = ["held_out.jsonl"]\n'
    )
    return path


def complaint(data: list[str], *overrides: str, weights: dict[str, str] | None = None) -> str:
    with pytest.raises(UserError) as error:
        load_prep_spec(data, {}, weights or {}, overrides)
    return str(error.value)


def test_paths_of_a_file_are_relative_to_its_folder(spec_file: Path) -> None:
    spec = load_prep_spec([str(spec_file)], {}, {})
    folder = spec_file.parent
    assert [source.path for source in spec.sources] == [
        (str(folder / "novels/*.txt"),),
        (str(folder / "a.csv"), "/data/b.csv"),
    ]
    assert [source.name for source in spec.sources] == ["novels", "quiz"]
    assert spec.cleaning.evaluation == (str(folder / "held_out.jsonl"),)
    assert spec.vocabulary.size == 600


def test_what_is_written_reads_back(spec_file: Path, tmp_path: Path) -> None:
    spec = load_prep_spec([str(spec_file)], {}, {})
    (tmp_path / "again.toml").write_text(spec.to_toml())
    assert load_prep_spec([str(tmp_path / "again.toml")], {}, {}) == spec


def test_every_key_can_be_overridden(spec_file: Path) -> None:
    overrides = [
        "sources.1.weight=5",
        "vocabulary.model=bpe",
        "cleaning.near_duplicates=0.8",
        "sources.0.exclude=['x']",
    ]
    spec = load_prep_spec([str(spec_file)], {}, {}, overrides)
    assert (spec.sources[1].weight, spec.vocabulary.model, spec.cleaning.near_duplicates) == (5, "bpe", 0.8)
    assert spec.sources[0].exclude == ("x",)


def test_the_pairs_of_the_benchmarks_load_from_anywhere() -> None:
    path = Path(__file__).parent.parent.parent / "benchmarks" / "pairs.toml"
    paths = [f"sources.{number}.path=/tmp/{number}" for number in range(4)]
    spec = load_prep_spec([str(path)], {}, {}, paths)
    assert [source.path for source in spec.sources] == [("/tmp/0",), ("/tmp/1",), ("/tmp/2",), ("/tmp/3",)]
    kept = [(source.copies, source.sampling, source.joined) for source in spec.sources]
    assert kept == [(1, 0, 1), (2, 0.3, 1), (1, 0.3, 2), (2, 0.3, 1)]


def test_a_given_vocabulary_may_have_probabilities_whatever_would_be_trained() -> None:
    overrides = ["sources.0.sampling=0.3", "vocabulary.model=bpe"]
    assert "sources.a.sampling = 0.3 needs probabilities" in complaint(["a=pairs.jsonl"], *overrides)
    load_prep_spec(["a=pairs.jsonl"], {}, {}, [*overrides, "vocabulary.tokenizer=unigram.model"])


def test_sources_of_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "a=b.txt").touch()
    paths = ["novels=books/", str(tmp_path / "a=b.txt"), "more/*.jsonl.gz"]
    spec = load_prep_spec(paths, {"format": "text"}, {})
    assert [(source.name, source.path) for source in spec.sources] == [
        ("novels", ("books/",)),
        ("a-b", (str(tmp_path / "a=b.txt"),)),
        ("more", ("more/*.jsonl.gz",)),
    ]
    assert {source.format for source in spec.sources} == {"text"}


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("x/novels", "novels"),
        ("x/a.b.jsonl.gz", "a"),
        ("x/*.txt", "x"),
        ("x y/ä b.txt", "b"),
        ("*", "*"),
        ("/", "text"),
    ],
)
def test_default_names(path: str, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert default_name(path) == (name if name != "*" else tmp_path.name.replace("_", "-"))


def test_every_problem_is_said_at_once(spec_file: Path) -> None:
    message = complaint(
        [str(spec_file)], "sources.1.weight=-1", "sources.0.format=pdf", "cleaning.normalise=NFX", "vocabulary.sise=1"
    )
    assert message.startswith(f"4 problems in {spec_file}:")
    for problem in ("sources.1.weight = -1 (from command line)", "'pdf'", "'NFX'", "did you mean vocabulary.size?"):
        assert problem in message


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["sources.2.weight=1"], "2 is not an item of the list; allowed: 0 to 1"),
        (["sources.1.name=novels"], "two sources are called novels"),
        (["sources.1.source=q"], "a pair needs both source and target"),
        (["sources.1.turns=turns"], "text and turns exclude each other"),
        (["sources.1.text={q"], "is not a template"),
        (["splits.valid_fraction=0.5", "splits.test_fraction=0.5"], "leave nothing to train on"),
    ],
)
def test_contradictions(spec_file: Path, overrides: list[str], problem: str) -> None:
    assert problem in complaint([str(spec_file)], *overrides)


def test_a_spec_file_stands_alone(spec_file: Path) -> None:
    assert "another DATA, --weight cannot be given" in complaint([str(spec_file), "more"], weights={"novels": "2"})


def test_without_a_source() -> None:
    with pytest.raises(ValueError, match="sources"):
        PrepSpec.model_validate({})
