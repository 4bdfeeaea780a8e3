"""The prep spec: which text becomes a dataset, and how; validated once, in one place.

Read from a TOML file, or made of the command line's options, which are short names for its keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from data_prep.templates import RecordTemplate
from mdseq.errors import UserError
from mdseq.settings import Section, read_toml, resolve
from mdseq.spec import SlurmSpec

Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
SourceName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=64)]

SomeText = Annotated[str, Field(min_length=1)]

SourceSplit = Literal["hash", "name", "train", "valid", "test"]
SourceFormat = Literal["auto", "text", "lines", "jsonl", "csv", "parquet", "arrow", "code"]


class SourceSpec(Section):
    """Text of one kind, from one place."""

    name: SourceName = Field("", validate_default=False, description="default: the last part of the path")
    path: tuple[SomeText, ...] = Field(
        min_length=1, description="file, folder or glob, or a list of them; from the spec's folder"
    )
    format: SourceFormat = Field("auto", description="auto: by file name, records rather than the text beside them")
    exclude: tuple[str, ...] = Field((), description="names or paths to skip, with * and ?")
    weight: Annotated[float, Field(gt=0)] | None = Field(
        None, description="share of the rows that training takes from here; all sources have one, or none"
    )
    split: SourceSplit = Field(
        "hash", description="by document id; by the start of the file's name; or everything into one"
    )
    text: str = Field("", description="field of a record, or a template such as '{title}\\n\\n{body}'")
    source: str = Field("", description="field or template of a pair's source")
    target: str = Field("", description="field or template of a pair's target")
    turns: str = Field("", description="field that holds the turns of a dialogue")
    turn: str = Field("{0}: {1}\n", description="template of a turn: its items by number, or its fields by name")
    last_turn_is_target: bool = Field(False, description="a dialogue becomes a pair: the last turn, given the others")
    path_header: str = Field("# {path}\n", description="first line of each file of a source tree; empty for none")
    copies: Positive = Field(1, description="how many times each document of the training split is in the dataset")
    sampling: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="a number such as 0.3: sources of training pairs are cut into tokens at random, in each way with "
        "a probability ~ that of the unigram model to this power; 0: always in the likeliest way",
    )
    joined: Positive = Field(
        1, description="so many training pairs that follow each other become one, source to source and target to target"
    )
    joined_characters: Count = Field(
        0, description="fewer become one where they would have more characters than this; 0 for no limit"
    )

    @field_validator("path", mode="before")
    @classmethod
    def _one_path(cls, path: object) -> object:
        return (path,) if isinstance(path, str) else path

    @model_validator(mode="after")
    def _one_kind_of_document(self) -> Self:
        if bool(self.source) != bool(self.target):
            raise ValueError("a pair needs both source and target; give the other one as well")
        given = [key for key in ("text", "source", "turns") if getattr(self, key)]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other: a record is a text, a pair or a dialogue")
        if given:
            self.record_template()  # names what is malformed
        return self

    @model_validator(mode="after")
    def _joined_of_pairs(self) -> Self:
        if self.joined > 1 and self.turns:
            raise ValueError(f"joined = {self.joined} is for pairs of source and target, not for turns; leave it out")
        if self.joined_characters and self.joined == 1:
            raise ValueError(
                f"joined_characters = {self.joined_characters} limits what is joined, and joined = 1 joins nothing; "
                "set joined = 2, or leave joined_characters out"
            )
        return self

    def record_template(self) -> RecordTemplate:
        """How a record becomes a document, once one of text, source or turns is given."""
        return RecordTemplate.of(self.text, self.source, self.target, self.turns, self.turn, self.last_turn_is_target)


class VocabularySpec(Section):
    """The SentencePiece model."""

    size: Annotated[int, Field(ge=512)] = Field(16_384, description="tokens to train; 256 of them spell bytes")
    model: Literal["unigram", "bpe"] = Field("unigram", description="kind of model to train")
    tokenizer: str = Field("", description="take this model, or that of this dataset, and train none")


class CleaningSpec(Section):
    """What is changed in documents, and which are set aside. By default nothing is changed."""

    normalise: Literal["none", "NFC", "NFKC"] = Field("none", description="Unicode normal form")
    line_endings: Literal["keep", "unix"] = Field("keep", description="unix: CR LF and CR become LF")
    control_characters: Literal["keep", "remove", "reject"] = Field(
        "keep", description="what becomes of invisible ones (of categories Cc and Cf) but tab, line ends and joiners"
    )
    min_characters: Count = Field(0, description="set shorter documents aside")
    max_characters: Count = Field(0, description="set longer documents aside; 0 for no limit")
    max_repetition: Fraction = Field(1.0, description="largest share of word 10-grams seen before in the document")
    exact_duplicates: Literal["keep", "drop"] = Field("keep", description="drop: the first of equal documents stays")
    near_duplicates: Fraction = Field(
        0.0,
        description="drop documents whose word 5-grams overlap an earlier one's by this much (Jaccard), and equal ones;"
        " 0: none",
    )
    evaluation: tuple[str, ...] = Field((), description="files, folders or globs whose text must not be trained on")
    evaluation_ngram: Positive = Field(
        13, description="words in a row that count as contamination; a shorter text counts whole, from 8 words on"
    )
    max_faulty_fraction: Fraction = Field(0.1, description="stop when more records than this cannot be read")
    max_filtered_fraction: Fraction = Field(0.9, description="stop when the filters set more documents aside than this")


class SplitsSpec(Section):
    """Shares of the splits where a source is split by hash; stable when the data grows."""

    valid_fraction: Annotated[float, Field(ge=0, lt=1)] = Field(0.01, description="share held out for validation")
    test_fraction: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="share held out for tests")

    @model_validator(mode="after")
    def _some_is_left(self) -> Self:
        if self.valid_fraction + self.test_fraction >= 1:
            raise ValueError("splits.valid_fraction and splits.test_fraction leave nothing to train on; lower them")
        return self


class ShardsSpec(Section):
    """How the work and the output are cut."""

    text_mb: Annotated[float, Field(ge=0)] = Field(
        0.0, description="text in a shard, in 10^6 bytes; 0: a 32nd of all, 2 to 1,000"
    )
    max_record_mb: Annotated[float, Field(gt=0)] = Field(
        32.0, description="longest record of jsonl, csv, parquet or arrow; a worker needs up to ten times as much"
    )


class ClusterSpec(SlurmSpec):
    """What each task of a Slurm job array asks for; what is empty is the cluster's default."""

    time_minutes: Annotated[int, Field(ge=5)] = Field(
        240, description="time limit of a task; what is unfinished is taken up again"
    )
    memory_gb: Annotated[float, Field(gt=0)] = Field(2.0, description="memory of a task")


class PrepSpec(Section):
    """One dataset, whole."""

    sources: tuple[SourceSpec, ...] = Field(min_length=1, description="where the text is")
    vocabulary: VocabularySpec = VocabularySpec()
    cleaning: CleaningSpec = CleaningSpec()
    splits: SplitsSpec = SplitsSpec()
    shards: ShardsSpec = ShardsSpec()
    cluster: ClusterSpec = ClusterSpec()

    @field_validator("sources")
    @classmethod
    def _named(cls, sources: tuple[SourceSpec, ...]) -> tuple[SourceSpec, ...]:
        """Give each source a name of its own."""
        named: dict[str, SourceSpec] = {}
        for source in sources:
            name = source.name or default_name(source.path[0])
            if name in named:
                raise ValueError(f"two sources are called {name}; give each a name of its own")
            named[name] = source.model_copy(update={"name": name})
        return tuple(named.values())

    @model_validator(mode="after")
    def _all_or_no_weights(self) -> Self:
        without = [source.name for source in self.sources if source.weight is None]
        if without and len(without) < len(self.sources):
            raise ValueError(f"sources without a weight: {', '.join(without)}; give all sources one, or none")
        return self

    @model_validator(mode="after")
    def _sampling_needs_probabilities(self) -> Self:
        sampled = [source for source in self.sources if source.sampling]
        if sampled and self.vocabulary.model == "bpe" and not self.vocabulary.tokenizer:
            raise ValueError(
                f"sources.{sampled[0].name}.sampling = {sampled[0].sampling} needs probabilities, which a vocabulary "
                "of vocabulary.model = bpe has not; set model = unigram, or sampling = 0"
            )
        return self


def default_name(path: str) -> str:
    """Name of a source that was given none: the last part of its path that has no wildcard, made plain."""
    parts = [part for part in Path(path).absolute().parts if not set(part) & set("*?[")]
    last = parts[-1] if parts else ""
    stem = last if Path(path).is_dir() else last.partition(".")[0]
    plain = "".join(character if character.isascii() and character.isalnum() else "-" for character in stem)
    return plain.strip("-")[:64] or "text"


def load_prep_spec(
    data: Sequence[str], of_sources: dict[str, Any], weights: Mapping[str, str], overrides: Iterable[str] = ()
) -> PrepSpec:
    """A prep spec of what the command line says.

    Args:
        data: One TOML file; or files, folders and globs, each of which may be given a name, `NAME=PATH`.
        of_sources: Keys that all sources get.
        weights: Weight of each source, by its name.
        overrides: `section.key=value`, in TOML syntax.

    Raises:
        UserError: Naming every problem at once.
    """
    if any(path.endswith(".toml") for path in data):
        if len(data) > 1 or of_sources or weights:
            given = (
                ["another DATA"] * (len(data) > 1) + [f"--{key}" for key in of_sources] + ["--weight"] * bool(weights)
            )
            raise UserError(
                f"a prep spec says where all text is; {', '.join(given)} cannot be given beside it: put it into the "
                "file, or change a key of it with sources.0.key=value"
            )
        path = Path(data[0])
        values = read_toml(path)
        _from_folder(values, path.parent)
        return resolve(PrepSpec, "prep spec", path, values, overrides).spec
    sources = [_named_source(path) for path in data]
    names = [source["name"] for source in sources]
    for name in weights:
        if name not in names:
            raise UserError(f"--weight {name}={weights[name]}: no source has that name; allowed: {', '.join(names)}")
    described = [
        source | of_sources | ({"weight": weights[source["name"]]} if source["name"] in weights else {})
        for source in sources
    ]
    return resolve(PrepSpec, "prep spec", None, {"sources": described}, overrides).spec


def _named_source(path: str) -> dict[str, Any]:
    name, equals, rest = path.partition("=")
    if equals and not Path(path).exists():
        return {"name": name, "path": rest}
    return {"name": default_name(path), "path": path}


def _from_folder(values: dict[str, Any], folder: Path) -> None:
    """Make the paths of a spec file relative to its own folder; what is malformed is left for the validation."""

    def moved(path: Any) -> Any:
        if isinstance(path, list):
            return [moved(part) for part in path]
        return str(folder / path) if isinstance(path, str) and path else path

    places = [*(values.get("sources") or []), values.get("vocabulary"), values.get("cleaning")]
    for section in places:
        for key in {"path", "tokenizer", "evaluation"} & section.keys() if isinstance(section, dict) else ():
            section[key] = moved(section[key])
