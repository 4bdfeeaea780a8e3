"""What the Markdown files tell a reader to type, and where they send him, exists."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shlex
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path

import pytest

from data_prep.__main__ import parse as parse_data_prep
from launcher.preflight import _parse as parse_preflight
from launcher.preflight import read_minima
from launcher.run import _parse as parse_launcher
from mdseq.cli import parser as mdseq_parser
from mdseq.spec import load_spec

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md")), ROOT / "ds_configs" / "README.md"]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PROGRAMS = ("make ", "deepspeed ", "python launcher/", "python -m data_prep ", "mdseq ")


def commands(page: Path) -> list[tuple[str, bool]]:
    """What starts one of our programs: lines of code blocks, continuation lines joined, and code in running text.

    With each goes whether it may be a mention, such as `mdseq generate --trace`, and not the whole command.
    """
    text = re.sub(r" *\\\n\s+", " ", page.read_text(encoding="utf-8"))
    blocks = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    spans = [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]
    lines = [*((line, False) for line in blocks), *((line, True) for line in spans)]
    return [(line, mention) for line, mention in lines if line.startswith(PROGRAMS) and "..." not in line]


COMMANDS = [
    pytest.param(command, mention, id=f"{page.name}: {command}")
    for page in PAGES
    for command, mention in commands(page)
]


@pytest.mark.parametrize(("command", "mention"), COMMANDS)
def test_command_parses(command, mention, capsys):
    program, *arguments = shlex.split(command, comments=True)
    if program == "make":
        _check_make(arguments)
    elif program == "mdseq":
        _check_parses(mdseq_parser().parse_args, arguments, mention, capsys)
    elif "data_prep" in arguments[:2]:
        _check_parses(parse_data_prep, arguments[2:], mention, capsys)
    elif "launcher/preflight.py" in arguments:
        read_minima(parse_preflight(arguments[arguments.index("launcher/preflight.py") + 1 :]).minimum)
    else:
        _check_launch(arguments[arguments.index("launcher/run.py") + 1 :])


def _check_parses(
    parse: Callable[[list[str]], argparse.Namespace],
    arguments: list[str],
    mention: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = list(takewhile(lambda argument: not argument.startswith("-"), arguments))
    options = arguments[len(words) :]
    if not mention or not all(option.startswith("--") for option in options):
        parse(arguments)
        return
    with pytest.raises(SystemExit) as exit:
        parse([*words, "--help"])
    assert exit.value.code == 0
    assert set(options) <= set(re.findall(r"--\w+", capsys.readouterr().out))


def _check_make(arguments: list[str]) -> None:
    for argument in arguments:
        name, is_variable, value = argument.partition("=")
        if not is_variable:
            assert re.search(rf"^{name}:.*##", MAKEFILE, re.MULTILINE), f"no target {name}"
            continue
        assert re.search(rf"\$\$?[({{]?{name}\b", MAKEFILE), f"no variable {name}"
        if name == "ARGS" and "train" in arguments:
            load_spec(None, shlex.split(value))
        elif name == "ARGS" and "preflight" in arguments:
            read_minima(parse_preflight(shlex.split(value)).minimum)
        elif name == "SPEC":
            load_spec(Path(value))


def _check_launch(arguments: list[str]) -> None:
    options = parse_launcher(arguments)
    assert (ROOT / options.ds_config).is_file()
    spec = options.spec if options.spec is None or not options.spec.suffix else ROOT / options.spec
    load_spec(spec, options.overrides)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_named_exist(page):
    """Paths in code spans that begin with one of our folders."""
    spans = re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8"))
    tops = ("mdseq/", "data_prep/", "launcher/", "ds_configs/", "containers/", "docs/", "tests/")
    for path in (span for span in spans if span.startswith(tops) and " " not in span and "*" not in span):
        assert (ROOT / path).exists(), path


def test_pages_of_the_specs_are_up_to_date():
    location = importlib.util.spec_from_file_location("generate_specs", ROOT / "docs" / "generate_specs.py")
    generator = importlib.util.module_from_spec(location)
    location.loader.exec_module(generator)
    for path, page in generator.PAGES.items():
        assert path.read_text(encoding="utf-8") == page(), "run `make docs`"


def test_every_ds_config_is_in_the_table():
    page = (ROOT / "ds_configs" / "README.md").read_text(encoding="utf-8")
    for path in (ROOT / "ds_configs").glob("*.json"):
        json.loads(path.read_text(encoding="utf-8"))
        assert f"| `{path.name}` |" in page
