"""The house has floors (docs/architecture.md): a module imports from its own room or from lower floors only."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Rooms and their floors. Rooms of one floor do not know each other; the ground is open to all.
FLOORS = {
    "mdseq.errors": -1,
    "mdseq.files": -1,
    "mdseq.__version__": -1,
    "mdseq.settings": 0,
    "mdseq.slurm": 0,
    "mdseq.kernels": 0,
    "mdseq.spec": 1,
    "mdseq.noise": 1,
    "mdseq.sparse": 1,
    "mdseq.report": 2,
    "mdseq.data": 2,
    "mdseq.model": 2,
    "mdseq.diffusion": 3,
    "data_prep": 3,
    "mdseq.engine": 3,
    "mdseq.generate": 4,
    "mdseq.evaluate": 5,
    "mdseq.train": 6,
    "mdseq.cli": 6,
    "launcher": 7,
    "mdseq.__main__": 7,
}
SOURCES = sorted(path for package in ("mdseq", "data_prep", "launcher") for path in (ROOT / package).rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room_of(module: str) -> str | None:
    """The room that a module is in; None outside the house, and for the bare package `mdseq`."""
    rooms = [room for room in FLOORS if module == room or module.startswith(f"{room}.")]
    return max(rooms, key=len, default=None)


def imported_modules(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in the file, type checking included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the floor"
            assert node.module
            # `from mdseq import spec` names a module, `from mdseq.spec import RunSpec` does not
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_a_module_imports_from_its_own_room_or_lower_floors(path: Path) -> None:
    here = room_of(module_name(path))
    if here is None:
        assert module_name(path) == "mdseq", f"{module_name(path)} is in no room; give it one in FLOORS"
        return
    for imported in imported_modules(path):
        there = room_of(imported)
        if imported.partition(".")[0] in ("mdseq", "data_prep", "launcher"):
            assert there is not None, f"{imported} is in no room; give it one in FLOORS"
        if there is not None and there != here:
            assert FLOORS[there] < FLOORS[here], f"{here} (floor {FLOORS[here]}) imports {imported}"


def test_only_the_engine_imports_deepspeed() -> None:
    importers = [
        module_name(path)
        for path in SOURCES
        if any(name.partition(".")[0] == "deepspeed" for name in imported_modules(path))
    ]
    assert importers
    assert {room_of(module) for module in importers} == {"mdseq.engine"}


@pytest.mark.parametrize(
    "module",
    [
        "mdseq",
        "mdseq.spec",
        "mdseq.engine.config",
        "mdseq.data.format",
        "mdseq.cli",
        "launcher.run",
        "launcher.preflight",
    ],
)
def test_light_modules_load_neither_torch_nor_deepspeed(module: str) -> None:
    """A message about a wrong spec must not wait for them."""
    code = f"import sys, {module}; print(*sorted({{'torch', 'deepspeed'}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_nothing_loads_deepspeed_when_imported() -> None:
    """Only building an engine does: a plain `mdseq generate` must not pay for it."""
    kernels = [path for path in SOURCES if path.name.startswith("fused_") or path.parent.name == "kernels"]
    absent = [] if find_spec("triton") else kernels  # triton comes with torch for GPUs only
    modules = [module_name(path) for path in SOURCES if not path.name.startswith("__main__") and path not in absent]
    code = f"import sys, {', '.join(modules)}; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
