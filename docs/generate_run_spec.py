"""Writes docs/run_spec.md from the models of mdseq/spec.py: `make docs`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mdseq.settings import Section
from mdseq.spec import RunSpec

PAGE = Path(__file__).parent / "run_spec.md"

HEAD = """\
# The run spec

<!-- Written by docs/generate_run_spec.py from mdseq/spec.py; change it there, then run `make docs`. -->

Everything that decides what a run computes. A spec is a TOML file with one table per section below; what it leaves out
has the default. `launcher/specs/` holds those that ship with mdseq, which can be named without path and suffix:
`--spec moe_diffuseq`. Any value can be changed on the command line, in TOML's syntax, after all options:

    deepspeed launcher/run.py --ds_config ds_configs/zero3.json --spec moe_diffuseq --data data/novels \\
        data.row_length=8192 attention.dilation=[1,2,4]

Add `--dry_run` to see every value with where it came from (default, file, command line), and what the run would cost.
All mistakes are reported at once. Sharding, offload and communication are not here but in the ds_config:
[`ds_configs/README.md`](../ds_configs/README.md).

A run that continues from a checkpoint may change `data.path` (to a copy of the same dataset), `data.micro_batch_size`,
`attention.engine`, and everything in `optimiser`, `schedule`, `checkpoint` and `report`; the rest must stay as it was.
"""


def page() -> str:
    """The whole reference, Markdown."""
    parts = [HEAD]
    loose = [name for name, field in RunSpec.model_fields.items() if not _is_section(field.annotation)]
    parts.append("## Top level\n\n" + _table(RunSpec, loose, ""))
    for name, field in RunSpec.model_fields.items():
        if _is_section(field.annotation):
            purpose = " ".join((field.annotation.__doc__ or "").split())
            keys = list(field.annotation.model_fields)
            parts.append(f"## `[{name}]`\n\n{purpose}\n\n" + _table(field.annotation, keys, f"{name}."))
    return "\n".join(parts)


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _table(section: type[Section], keys: list[str], prefix: str) -> str:
    schemas = section.model_json_schema()["properties"]
    lines = ["| key | allowed | default | |", "|---|---|---|---|"]
    for key in keys:
        field = section.model_fields[key]
        default = json.dumps(field.get_default())
        description = (field.description or "").replace("|", "\\|")
        lines.append(f"| `{prefix}{key}` | {_allowed(schemas[key])} | `{default}` | {description} |")
    return "\n".join(lines) + "\n"


def _allowed(schema: dict[str, Any]) -> str:
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{json.dumps(value)}`" for value in schema.get("enum", [schema.get("const")]))
    if schema["type"] == "array":
        if "prefixItems" in schema:
            return f"{len(schema['prefixItems'])} times {_allowed(schema['prefixItems'][0])}"
        return f"{schema['minItems']} or more times {_allowed(schema['items'])}"
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
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
