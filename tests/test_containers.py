"""The recipes of containers install the same things, as the rest of the repository says, and copy what is there."""

from __future__ import annotations

import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parent.parent
DOCKER = (ROOT / "containers" / "Dockerfile").read_text(encoding="utf-8")
APPTAINER = (ROOT / "containers" / "mdseq.def").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def section(name: str) -> list[str]:
    """The lines of a section of Apptainer's recipe."""
    body = re.search(rf"^%{name}\n((?: .*\n|\n)*)", APPTAINER, re.MULTILINE)
    assert body is not None
    return [line.strip() for line in body[1].splitlines() if line.strip()]


def docker_arguments() -> dict[str, str]:
    return dict(re.findall(r"^ARG (\w+)=(\S+)$", DOCKER, re.MULTILINE))


def docker_copies() -> dict[str, str]:
    """Where each file or folder goes."""
    copies = {}
    for line in re.findall(r"^COPY (.+)$", DOCKER, re.MULTILINE):
        *sources, target = line.split()
        copies |= {source: target + source if target.endswith("/") else target for source in sources}
    return copies


def test_both_recipes_start_from_the_same_arguments() -> None:
    assert dict(line.split("=", 1) for line in section("arguments")) == docker_arguments()


def test_both_recipes_copy_the_same_files() -> None:
    assert dict(line.split() for line in section("files")) == docker_copies()


def test_both_recipes_run_the_same_steps() -> None:
    steps = [step for step in re.findall(r"^RUN (.+)$", DOCKER, re.MULTILINE) if not step.startswith("useradd")]
    assert section("post") == ['TORCH="{{ TORCH }}"', *steps]


def test_what_is_copied_is_there_and_not_ignored_and_all_that_is_needed() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    allowed = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    assert "*" in ignored
    assert docker_copies().keys() == allowed
    assert all((ROOT / name).exists() for name in allowed)
    project, packages = PROJECT["project"], PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {"pyproject.toml", "ds_configs", project["readme"], *project["license-files"]} <= allowed
    assert all(any(fnmatch(name, package) for name in allowed) for package in packages)


def test_torch_and_python_are_those_that_are_tested() -> None:
    arguments = docker_arguments()
    tested = re.search(r"^TORCH \?= (torch==\S+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert tested is not None
    assert arguments["TORCH"] == tested[1]
    (torch,) = [Requirement(text) for text in PROJECT["project"]["dependencies"] if Requirement(text).name == "torch"]
    assert arguments["TORCH"].partition("==")[2] in torch.specifier
    python = re.fullmatch(r"python:(\d+\.\d+)-.+", arguments["BASE"])
    assert python is not None
    assert python[1] in SpecifierSet(PROJECT["project"]["requires-python"])


@pytest.mark.parametrize("recipe", [DOCKER, APPTAINER], ids=["Dockerfile", "mdseq.def"])
def test_no_secret_and_no_proxy_stays_in_an_image(recipe: str) -> None:
    assert not re.search(r"^(ENV|\s*export) .*(PROXY|TOKEN|PASSWORD|KEY)", recipe, re.MULTILINE | re.IGNORECASE)
