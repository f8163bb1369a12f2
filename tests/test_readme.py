"""The README's commands and code run as they stand."""

import contextlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from running_server import RunningServer

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line for block in blocks("console") for line in block.splitlines() if line.startswith("$ ")]
    return [shlex.split(line.removeprefix("$ "), comments=True) for line in lines]


@pytest.mark.engine
def test_the_python_code_runs_against_a_server(server: RunningServer) -> None:
    code = "\n".join(blocks("python")).replace("http://127.0.0.1:8000", server.url)
    assert server.url in code
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    assert len(re.findall(r"^\d policy-v1 ", printed.getvalue(), flags=re.MULTILINE)) == 4
    assert printed.getvalue().splitlines()[-1] == "201 5 pairs"


@pytest.mark.engine
@pytest.mark.parametrize("command", [c for c in commands() if c[0] == "python"], ids=" ".join)
def test_the_commands_run(server: RunningServer, redis_url: str, command: list[str]) -> None:
    environment = server.environment
    if "keys" in command:  # a key would close the server to the other tests
        environment = environment | {"INSTRUCTLOOP_REDIS_URL": redis_url}
    ran = subprocess.run(
        [sys.executable, *command[1:]], env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout


@pytest.mark.parametrize("command", [c for c in commands() if c[0] == "make"], ids=" ".join)
def test_the_make_targets_exist(command: list[str]) -> None:
    ran = subprocess.run(["make", "-n", *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_every_file_it_names_exists() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert len(links) > 10
    assert [link for link in links if not (ROOT / link).exists()] == []
