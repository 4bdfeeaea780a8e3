"""Writes docs/run_spec.md and docs/prep_spec.md from the models of mdseq/spec.py and data_prep/spec.py: `make docs`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_prep.spec import PrepSpec
from mdseq.settings import Section, section_in
from mdseq.spec import RunSpec

FOLDER = Path(__file__).parent

RUN_HEAD = """\
# The run spec

<!-- Written by docs/generate_specs.py from mdseq/spec.py; change it there, then run `make docs`. -->

Everything that decides what a run computes. A spec is a TOML file with one table per section below; what it leaves out
has the default. `launcher/specs/` holds those that ship with mdseq, which can be named without path and suffix:
`--spec moe_diffuseq`. Any value can be changed on the command line, in TOML's syntax, after all options:

    deepspeed launcher/run.py --ds_config ds_configs/zero3.json --spec moe_diffuseq --data data/novels \\
        data.row_length=8192 attention.dilation=[1,2,4]

Add `--dry_run` to see every value with where it came from (default, file, command line), and what the run would cost.
All mistakes are reported at once. Sharding, offload and communication are not here but in the ds_config:
[`ds_configs/README.md`](../ds_configs/README.md).

A run that continues from a checkpoint may change `data.path` (to a copy of the same dataset), `data.micro_batch_size`,
`attention.engine`, `model.activation_checkpointing`, and everything in `optimiser`, `schedule`, `checkpoint`, `guard`,
`report` and `cluster`; the rest must stay as it was.
"""

PREP_HEAD = """\
# The prep spec

<!-- Written by docs/generate_specs.py from data_prep/spec.py; change it there, then run `make docs`. -->

Everything that decides what is in a dataset, as a TOML file; paths in it are relative to its own folder:

    [[sources]]
    name = "novels"
    path = "novels/*.jsonl.gz"
    weight = 3

    [[sources]]
    name = "questions"
    path = ["quiz/train.parquet", "quiz/more.parquet"]
    text = "{question}\\n\\n{context.0}"
    weight = 1

    [vocabulary]
    size = 32000

    [cleaning]
    near_duplicates = 0.8

It is given in the place of DATA. Without a file, the options of `python -m data_prep build` make one source of each
DATA: `--vocab`, `--format`, `--text` and the like are short names of the keys below, and every key can be changed in
TOML's syntax:

    make prep DATA=prep.toml OUT=data/mine
    python -m data_prep build prep.toml --out data/mine vocabulary.size=8192 sources.0.weight=2
    python -m data_prep build novels=books/ code=src/ --out data/mine --weight novels=3 --weight code=1

All mistakes are reported at once. What is in the dataset depends on these keys and on the content of the files; not on
`cluster`, nor on the two limits of `cleaning`, which may be changed to go on with a build that they have stopped.

## More data from few pairs

A model that sees few pairs often learns them by heart. Subword regularisation (Kudo, arXiv 1804.10959) shows it each in
many ways: `copies` puts a training document into the dataset several times, and `sampling` cuts the source of each copy
into tokens at random, the more freely the lower it is; 0 turns it off. Targets, and all that is held out, are cut in
the likeliest way as ever. `joined` makes one pair of several that follow each other, source to source and target to
target with a space between (data augmentation by concatenation, arXiv 2105.01691): as long as they have no more than
`joined_characters`, and with other neighbours in each of as many copies. The other direction is a task of its own,
which a mark in front of its sources tells apart:

    [[sources]]
    name = "pairs"
    path = "pairs"                  # train.jsonl.gz, valid.jsonl.gz, test.jsonl.gz
    split = "name"

    [[sources]]
    name = "sampled"
    path = "pairs/train.jsonl.gz"
    split = "train"
    copies = 2
    sampling = 0.3

    [[sources]]
    name = "joined"
    path = "pairs/train.jsonl.gz"
    split = "train"
    sampling = 0.3
    joined = 2
    joined_characters = 800

    [[sources]]
    name = "reversed"
    path = "pairs/train.jsonl.gz"
    split = "train"
    copies = 2
    sampling = 0.3
    source = "<< {trg}"
    target = "{src}"

Give such sources a file of training pairs only: by `hash`, a pair and its reverse may fall into different splits. Leave
`exact_duplicates` and `near_duplicates` as they are, for these sources repeat each other. Random cuts have more tokens,
and so have joined pairs, which `joined_characters` bounds in characters: `python -m data_prep stats` shows the longest
in tokens, which must fit into `data.row_length`. In training, `data.mixture` weighs the sources, and
`data.lengths_of=["pairs"]` keeps generation from predicting the lengths of the reversed and the joined. A document that
is cut at random takes about twice as long to build.
"""


def run_page() -> str:
    """The whole reference of the run spec, Markdown."""
    return "\n".join([RUN_HEAD, *_sections(RunSpec)])


def prep_page() -> str:
    """The whole reference of the prep spec, Markdown."""
    return "\n".join([PREP_HEAD, *_sections(PrepSpec)])


PAGES = {FOLDER / "run_spec.md": run_page, FOLDER / "prep_spec.md": prep_page}


def _sections(kind: type[Section]) -> list[str]:
    sections = {name: section_in(field.annotation) for name, field in kind.model_fields.items()}
    parts = []
    if loose := [name for name, section in sections.items() if section is None]:
        parts.append("## Top level\n\n" + _table(kind, loose, ""))
    for name, section in sections.items():
        if section is not None:
            purpose = " ".join((section.__doc__ or "").split())
            is_list = kind.model_fields[name].annotation is not section
            title, prefix = (f"[[{name}]]", "") if is_list else (f"[{name}]", f"{name}.")
            parts.append(f"## `{title}`\n\n{purpose}\n\n" + _table(section, list(section.model_fields), prefix))
    return parts


def _table(section: type[Section], keys: list[str], prefix: str) -> str:
    schemas = section.model_json_schema()["properties"]
    lines = ["| key | allowed | default | |", "|---|---|---|---|"]
    for key in keys:
        field = section.model_fields[key]
        default = "" if field.is_required() else f"`{json.dumps(field.get_default())}`"
        description = (field.description or "").replace("|", "\\|")
        lines.append(f"| `{prefix}{key}` | {_allowed(schemas[key])} | {default} | {description} |")
    return "\n".join(lines) + "\n"


def _allowed(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_allowed(choice) for choice in schema["anyOf"] if choice.get("type") != "null")
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{json.dumps(value)}`" for value in schema.get("enum", [schema.get("const")]))
    if schema["type"] == "array":
        if "prefixItems" in schema:
            return f"{len(schema['prefixItems'])} times {_allowed(schema['prefixItems'][0])}"
        items = _allowed(schema["items"])
        if choices := schema["items"].get("anyOf"):
            items = f"({'; or '.join(map(_allowed, choices))})"
        return f"{schema.get('minItems', 0)} or more times {items}"
    if schema["type"] == "object":
        return f"table of {_allowed(schema['additionalProperties'])}"
    if schema["type"] == "string":
        return "text"
    if schema["type"] == "boolean":
        return "`true`, `false`"
    bounds = {
        "minimum": "at least",
        "exclusiveMinimum": "above",
        "maximum": "at most",
        "exclusiveMaximum": "below",
    }
    limits = [f"{words} {schema[bound]}" for bound, words in bounds.items() if bound in schema]
    return ", ".join([schema["type"], *limits])


if __name__ == "__main__":
    for path, page in PAGES.items():
        path.write_text(page(), encoding="utf-8")
        print(f"wrote {path}")
