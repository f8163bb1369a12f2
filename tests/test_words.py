"""The project's words: what is one thing has one name."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    path for package in ("serve", "feedback", "train", "deploy") for path in (ROOT / package).rglob("*.py")
)
BANNED = ("rollout", "actor", "critic", "battle")


def identifiers(path: Path) -> Iterator[str]:
    """Every name a module defines."""
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name):
                yield name


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_banned_words_name_nothing(path: Path) -> None:
    used = {name for name in identifiers(path) for part in name.lower().split("_") if part in BANNED}
    assert used == set()
    assert "rollout" not in path.read_text().lower()
