"""Several runs at once: overrides that list values, such as `optimiser.learning_rate=1e-4,3e-4`."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mdseq.errors import UserError

MAX_RUNS = 1000  # Slurm's own limit of an array, unless a cluster has another


@dataclass(frozen=True)
class Variant:
    """One of the runs.

    Attributes:
        name: Of its folder, within that of all; empty where there is but one.
        overrides: In which it differs from the others.
    """

    name: str
    overrides: Sequence[str]


@dataclass(frozen=True)
class Sweep:
    """Runs that have some overrides in common."""

    common: Sequence[str]
    variants: Sequence[Variant]

    @classmethod
    def of(cls, overrides: Iterable[str]) -> Sweep:
        """All combinations of the values that the overrides list; the last one changes fastest.

        Commas within brackets, braces or quotes belong to a value: `attention.dilation=[1,2],[1,4]` lists two.

        Raises:
            UserError: A value is missing between commas, or there are too many combinations.
        """
        common, listed = [], []
        for override in overrides:
            key, equals, text = override.partition("=")
            values = [value.strip() for value in _split(text)]
            if len(values) == 1 or not equals:
                common.append(override)
            elif all(values):
                listed.append([f"{key}={value}" for value in values])
            else:
                raise UserError(f"{override!r} lists an empty value; give section.key=value, or section.key=a,b,c")
        combinations = list(itertools.product(*listed))
        if len(combinations) > MAX_RUNS:
            raise UserError(
                f"{len(combinations)} runs, all combinations of values, are more than {MAX_RUNS}; list fewer"
            )
        names = [",".join(map(_file_name, chosen)) for chosen in combinations]
        alike = {name for name in names if names.count(name) > 1}
        return cls(
            common,
            [
                Variant(f"{number}-{name}" if name in alike else name, list(chosen))
                for number, (name, chosen) in enumerate(zip(names, combinations, strict=True))
            ],
        )


def _split(text: str) -> list[str]:
    """At commas that stand outside of brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        else:
            depth += (character in "[{(") - (character in "]})")
        if character == "," and not quote and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _file_name(override: str) -> str:
    return re.sub(r"[^\w.,=+-]+", "-", override)[:80]
