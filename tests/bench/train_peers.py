"""Peers to compare with, each in an environment of its own that shares the project's torch and transformers.

So both sides compute with the same kernels, and nothing is added to the project's own environment.
"""

import subprocess
import sys
import sysconfig
from pathlib import Path

REWARD_MODEL_PEER = "1.16.0"
PPO_PEER = "1.12.0"
"""TRL has removed its PPO trainer since."""
_INSTALL_SECONDS = 300.0


class PeerMissing(Exception):
    """A peer could not be had; says why."""


def peer_python(directory: Path, version: str) -> Path:
    """The Python of an environment with that version of TRL, made in ``directory`` with pip where it is not there yet.

    Raises:
        PeerMissing: It could not be installed, without a network for example.
    """
    home = directory / f"trl-{version}"
    python = home / "bin" / "python"
    if not (python.is_file() and _installed(python) == version):
        _run(sys.executable, "-m", "venv", "--clear", str(home))
        packages = home / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
        (packages / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
        _run(str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", f"trl=={version}")
    return python


def _installed(python: Path) -> str:
    asked = "import importlib.metadata; print(importlib.metadata.version('trl'))"
    return subprocess.run([python, "-c", asked], capture_output=True, text=True, check=False).stdout.strip()


def _run(*command: str) -> None:
    try:
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=_INSTALL_SECONDS)
    except subprocess.CalledProcessError as error:
        said = (error.stderr or error.stdout).strip().splitlines()
        raise PeerMissing(said[-1] if said else f"{command[0]} exited {error.returncode}") from error
    except subprocess.TimeoutExpired as error:
        raise PeerMissing(f"pip was not done after {_INSTALL_SECONDS:.0f} s") from error
