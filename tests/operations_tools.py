"""The tools and documents of the tests of ``deploy``'s manifests, and what a ``python -m`` command line may say."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from deploy.__main__ import app as deploy_app
from feedback.__main__ import app as feedback_app
from serve.__main__ import app as serve_app
from train.__main__ import app as train_app

ROOT = Path(__file__).parent.parent
OPERATIONS = ROOT / ".venv" / "operations"
"""Where ``deploy/requirements/operations.sh`` puts the tools."""

_COMMANDS = {"deploy": deploy_app, "feedback": feedback_app, "serve": serve_app, "train": train_app}


def tool(name: str) -> Path:
    """The tool of that name; without it the test is skipped, and fails in CI."""
    found = shutil.which(name) or shutil.which(name, path=OPERATIONS / "bin")
    return Path(found) if found else _lacking(name)


def python_tools() -> dict[str, str]:
    """An environment in which Python finds the checkers that are Python packages."""
    place = OPERATIONS / "python"
    if not place.exists():
        _lacking(place.name)
    return os.environ | {"PYTHONPATH": str(place)}


def _lacking(name: str) -> Path:
    why = f"{name} is missing; deploy/requirements/operations.sh brings it"
    if os.environ.get("CI") == "true":
        pytest.fail(why)
    pytest.skip(why)


def checked(*command: str | Path, environment: dict[str, str] | None = None) -> str:
    """What a checker printed; where it objects, the test fails with its words."""
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def documents(text: str) -> list[dict[str, Any]]:
    """The YAML documents of a text, without empty ones."""
    return [document for document in yaml.safe_load_all(text) if document]


def assert_command_exists(words: Sequence[str]) -> None:
    """What stands after ``python -m`` is a command of ours with options that it has. It is asked for help, not run."""
    told = CliRunner().invoke(_COMMANDS[words[0]], [*words[1:], "--help"])
    assert told.exit_code == 0, told.output


def commands_in(text: str) -> Iterator[list[str]]:
    """Each ``python -m`` command line that a text names, as words without quotes."""
    for line in re.findall(r"python -m ((?:deploy|feedback|serve|train)\b[^`;\n]*)", text):
        yield [word.strip("'\".,)") for word in line.split(" #")[0].split()]
