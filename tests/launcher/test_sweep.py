"""Overrides that list values make all their combinations, and nothing else that has a comma does."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.sweep import Sweep
from mdseq.errors import UserError


def test_all_combinations_each_with_a_folder_of_its_own() -> None:
    sweep = Sweep.of(["schedule.steps=10", "optimiser.learning_rate=1e-4,3e-4", "seed=0, 1"])
    assert sweep.common == ["schedule.steps=10"]
    assert [(variant.name, variant.overrides) for variant in sweep.variants] == [
        ("optimiser.learning_rate=1e-4,seed=0", ["optimiser.learning_rate=1e-4", "seed=0"]),
        ("optimiser.learning_rate=1e-4,seed=1", ["optimiser.learning_rate=1e-4", "seed=1"]),
        ("optimiser.learning_rate=3e-4,seed=0", ["optimiser.learning_rate=3e-4", "seed=0"]),
        ("optimiser.learning_rate=3e-4,seed=1", ["optimiser.learning_rate=3e-4", "seed=1"]),
    ]


@pytest.mark.parametrize(
    "override",
    [
        "attention.dilation=[1,2,4]",
        "attention.dilation=[1,[1,4]]",
        'data.path="a, b"',
        "data.path='a,b'",
        "seed=1",
        "x",
    ],
)
def test_commas_within_brackets_or_quotes_belong_to_the_value(override: str) -> None:
    sweep = Sweep.of([override])
    assert sweep.common == [override]
    assert [variant.name for variant in sweep.variants] == [""]


def test_lists_of_lists() -> None:
    sweep = Sweep.of(["attention.dilation=[1,2],[1,4]"])
    assert [variant.overrides for variant in sweep.variants] == [
        ["attention.dilation=[1,2]"],
        ["attention.dilation=[1,4]"],
    ]


@given(st.lists(st.text(alphabet="ab/$ (')\n", min_size=1).filter(str.strip), min_size=2, max_size=5, unique=True))
def test_folders_are_plain_and_differ(values: list[str]) -> None:
    quoted = [repr(value).replace("'", '"') if "'" not in value else f'"{value}"' for value in values]
    names = [variant.name for variant in Sweep.of([f"data.path={','.join(quoted)}"]).variants]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[\w.,=+-]+", name) for name in names)


@pytest.mark.parametrize("override", ["seed=1,,2", "seed=1,", "seed=,1"])
def test_an_empty_value(override: str) -> None:
    with pytest.raises(UserError, match="lists an empty value"):
        Sweep.of([override])


def test_more_than_an_array_holds() -> None:
    many = ",".join(map(str, range(40)))
    with pytest.raises(UserError, match=r"1600 runs.*more than 1000"):
        Sweep.of([f"seed={many}", f"schedule.steps={many}"])
