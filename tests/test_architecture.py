"""Imports point downwards as docs/structure.md draws them, and nothing needs torch or a plotting library."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "taper"

# A room may import itself and rooms of a smaller number, and what SIDEWAYS names.
HEIGHT = {
    "errors": 0,
    "config": 0,
    "kernels": 1,
    "formats": 2,
    "layers": 2,
    "kvcache": 3,
    "models": 3,
    "precision": 3,
    "tokenizer": 3,
    "engine": 4,
    "quantize": 5,
    "evaluate": 5,
    "planner": 6,
    "tune": 6,
    "server": 7,
    "ray": 8,
    "cli": 9,
    "testing": 9,
}
SIDEWAYS = {("models", "kvcache"), ("models", "precision")}
NEVER = {"torch", "transformers", "matplotlib"}

SOURCES = sorted(PACKAGE.rglob("*.py"))


def imported_modules(source: str) -> set[str]:
    """Dotted names of every import, wherever it stands; `from a import b` gives both a and a.b."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            modules |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


def rooms(source: str) -> set[str]:
    """The rooms of taper that a module imports."""
    parts = [module.split(".") for module in imported_modules(source)]
    return {part[1] for part in parts if part[0] == "taper" and len(part) > 1 and part[1] in HEIGHT}


def upward(room: str, source: str) -> set[str]:
    """Imported rooms that `room` must not know."""
    return {
        other
        for other in rooms(source) - {room}
        if HEIGHT[other] >= HEIGHT[room] and (room, other) not in SIDEWAYS
    }


def room_of(path: Path) -> str:
    """The folder or module directly below taper; empty for the doors to all of them."""
    first = path.relative_to(PACKAGE).parts[0]
    return "" if first in ("__init__.py", "__main__.py") else first.removesuffix(".py")


def test_every_room_has_a_height() -> None:
    assert {room_of(path) for path in SOURCES} - {""} <= set(HEIGHT)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path: Path) -> None:
    room = room_of(path)
    assert not room or not upward(room, path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_imports_training_or_plotting_libraries(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    roots = {module.split(".")[0] for module in imported_modules(source)}
    assert roots & NEVER <= ({"matplotlib"} if room_of(path) == "evaluate" else set())
    # A plot may be asked for, but nothing is loaded with the module.
    top = "\n".join(line for line in source.splitlines() if not line.startswith((" ", "\t")))
    assert "matplotlib" not in top


def test_only_tests_and_benchmarks_use_the_testing_room() -> None:
    users = {room_of(path) for path in SOURCES if "testing" in rooms(path.read_text(encoding="utf-8"))}
    assert users <= {"testing"}


def test_an_upward_import_is_found_inside_a_function_too() -> None:
    assert upward("kernels", "def f():\n    from taper.engine.engine import Engine\n") == {"engine"}
    assert upward("kernels", "from taper import models\n") == {"models"}
    assert upward("kvcache", "import taper.models.decoder\n") == {"models"}
    assert not upward("models", "from taper.kvcache import KvCache\nimport taper.errors\n")
