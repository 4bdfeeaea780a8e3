"""Pairs are the code of a definition without its docstring, and the docstring; no file can stop the writing."""

import ast
import gzip
import json
import warnings
from pathlib import Path

import pytest

from data_prep import pairs as pairs_module
from data_prep.pairs import Pair, pairs_of, write_pairs
from mdseq.errors import UserError

MILL = '''"""Of the module, which is no definition."""


class Mill(Machine):
    """A mill.

        It stands by the river.
    """

    def grind(self, corn):  # slowly
        \'\'\'Turn corn into flour.\'\'\'  # noqa: D300

        return flour(corn)

    @property
    @cached(
        forever=True,
    )
    async def wheel(self):
        r"""The wh\\eel."""
        return """
        a string's own lines
"""

    def bare(self):
        return 1
'''


def only(source: str) -> Pair:
    (pair,) = pairs_of(source, "a.py")
    return pair


def test_pairs_of_classes_methods_and_functions() -> None:
    mill, grind, wheel = pairs_of(MILL, "mill.py")
    assert (mill.name, grind.name, wheel.name) == ("Mill", "Mill.grind", "Mill.wheel")
    assert {pair.path for pair in (mill, grind, wheel)} == {"mill.py"}
    assert mill.trg == "A mill.\n\nIt stands by the river."
    assert mill.src.startswith("class Mill(Machine):\n\n    def grind(self, corn):  # slowly\n        '''Turn")
    assert mill.src.endswith("    def bare(self):\n        return 1")
    assert grind.trg == "Turn corn into flour."
    assert grind.src == "def grind(self, corn):  # slowly\n      # noqa: D300\n\n    return flour(corn)"
    assert wheel.trg == "The wh\\eel."
    assert wheel.src == (
        "@property\n@cached(\n    forever=True,\n)\nasync def wheel(self):\n"
        '    return """\n    a string\'s own lines\n"""'
    )


@pytest.mark.parametrize(
    ("source", "src"),
    [
        ('def f(): "Doc."', "def f():"),
        ('def f(): "Doc."; return 1', "def f(): return 1"),
        ('def f():\n    "Doc."; return 1', "def f():\n    return 1"),
        ('def f():\n\t"Doc."\n\treturn 1\n', "def f():\n\treturn 1"),
        ('def é(é="é"): "é" "é"; return "é"', 'def é(é="é"): return "é"'),
        ('def f():\n    """Doc.\n\n    More."""\n    # why\n    return 1\n', "def f():\n    # why\n    return 1"),
        ('def f():\n    ("Do"\n     "c.")\n    return 1\n', "def f():\n    return 1"),
        ("def f():\n    'Doc.'\n    return '\\f\x0c\x1c'\n", "def f():\n    return '\\f\x0c\x1c'"),
    ],
)
def test_docstring_is_taken_out(source: str, src: str) -> None:
    assert only(source).src == src


def test_definitions_are_found_wherever_they_stand() -> None:
    source = """
if x:
    pass
else:
    try:
        def f():
            "f"
            for i in j:
                class C: "C"
    except E:
        def g(): "g"
match x:
    case 1:
        def h(): "h"
"""
    assert [pair.name for pair in pairs_of(source, "")] == ["f", "f.C", "g", "h"]


@pytest.mark.parametrize("docstring", ['""', '"  "', 'f"{x}"', 'b"bytes"', '"\\ud800"', "1"])
def test_what_is_no_text_is_no_docstring(docstring: str) -> None:
    assert not list(pairs_of(f"def f():\n    {docstring}\n", ""))


def test_long_elif_chains_and_odd_escapes_are_no_trouble() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        only("if x:\n  pass\n" + "elif x:\n  pass\n" * 500 + 'else:\n  def f(): "\\d"\n')


def write_tree(folder: Path) -> Path:
    folder.mkdir()
    (folder / "mill.py").write_text(MILL)
    (folder / "a").mkdir()
    (folder / "a" / "windows.py").write_bytes('def f():\r\n    "Doc."\r\n    return "é"\r\n'.encode())
    (folder / "a" / "latin.py").write_bytes('# coding: latin-1\ndef f():\n    "Für."\n'.encode("latin-1"))
    (folder / "notes.txt").write_text('def f(): "No Python file."')
    (folder / ".hidden.py").write_text('def f(): "Hidden."')
    (folder / "bad_syntax.py").write_text("def f(:")
    (folder / "bad_bytes.py").write_bytes(b'def f():\n    "\xff"\n')
    (folder / "bad_coding.py").write_bytes(b"# coding: nonsense\n")
    (folder / "bad_nul.py").write_bytes(b"x = 1\0")
    (folder / "bad_depth.py").write_text("x = " + "-" * 100_000 + "1")
    return folder


def test_write_pairs(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree")
    counts = write_pairs([tree], tmp_path / "pairs.jsonl")
    content = (tmp_path / "pairs.jsonl").read_bytes()
    pairs = [Pair(**json.loads(line)) for line in content.split(b"\n")[:-1]]
    assert b"\r" not in content
    assert [(pair.path, pair.name) for pair in pairs] == [
        ("a/latin.py", "f"),
        ("a/windows.py", "f"),
        ("mill.py", "Mill"),
        ("mill.py", "Mill.grind"),
        ("mill.py", "Mill.wheel"),
    ]
    assert pairs[0].trg == "Für."
    assert pairs[1].src == 'def f():\n    return "é"'
    assert (counts.files, counts.pairs) == (8, 5)
    assert list(counts.unreadable) == [f"bad_{what}.py" for what in ("bytes", "coding", "depth", "nul", "syntax")]
    write_pairs([tree], tmp_path / "pairs.jsonl.gz")
    assert gzip.decompress((tmp_path / "pairs.jsonl.gz").read_bytes()) == content
    write_pairs([tree], tmp_path / "again.jsonl.gz")
    packed = (tmp_path / "pairs.jsonl.gz").read_bytes()
    assert (tmp_path / "again.jsonl.gz").read_bytes() == packed
    assert packed[4:8] == bytes(4)  # no time in the header


def interrupt(source: str, path: str) -> None:
    raise KeyboardInterrupt


def test_nothing_is_overwritten_or_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = write_tree(tmp_path / "tree")
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(UserError, match=r"ends in \.jsonl"):
        write_pairs([tree], out / "pairs.txt")
    with pytest.raises(UserError, match="does not exist"):
        write_pairs([tmp_path / "absent"], out / "pairs.jsonl")
    with pytest.raises(UserError, match="no docstring in 1 Python files"):
        write_pairs([tree / "bad_syntax.py"], out / "pairs.jsonl")
    with pytest.raises(UserError, match="cannot write"):
        write_pairs([tree], out / "absent" / "pairs.jsonl")
    monkeypatch.setattr(pairs_module, "pairs_of", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_pairs([tree], out / "pairs.jsonl")
    assert list(out.iterdir()) == []
    (out / "pairs.jsonl").write_text("precious")
    with pytest.raises(UserError, match="never overwritten"):
        write_pairs([tree], out / "pairs.jsonl")
    assert (out / "pairs.jsonl").read_text() == "precious"


def test_own_source_gives_pairs_that_parse(tmp_path: Path) -> None:
    write_pairs([Path(pairs_module.__file__).parent], tmp_path / "pairs.jsonl")
    for line in (tmp_path / "pairs.jsonl").read_text().splitlines():
        pair = json.loads(line)
        (definition,) = ast.parse(pair["src"] + "\n    ...").body
        assert isinstance(definition, ast.FunctionDef | ast.ClassDef)
        assert ast.get_docstring(definition) is None
