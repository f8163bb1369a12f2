"""The machine a benchmark ran on."""

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any


def machine(*packages: str) -> dict[str, Any]:
    """Its processor and cores, and the versions of Python and of those of ``packages`` that are installed."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    installed = {distribution.name: distribution.version for distribution in importlib.metadata.distributions()}
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "packages": {name: installed[name] for name in packages if name in installed},
    }
