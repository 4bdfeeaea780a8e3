"""Every test is run: pytest passes over folders of some names, `dist` among them, unless it is told otherwise."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

TESTS = Path(__file__).parent


def test_no_folder_of_tests_is_passed_over(pytestconfig):
    passed_over = pytestconfig.getini("norecursedirs")
    folders = {path.parent for path in TESTS.rglob("test_*.py")}
    names = {name for folder in folders for name in folder.relative_to(TESTS).parts}
    assert "dist" in names
    assert not [name for name in names if any(fnmatch(name, pattern) for pattern in passed_over)]
