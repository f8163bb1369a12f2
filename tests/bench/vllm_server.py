"""vLLM's own server, with the very arguments and environment that ``serve`` gives its engines.

``python vllm_server.py MODEL_DIRECTORY PORT``. Its access log is off, as ours is, so that neither server pays for
what the other does not do; both keep vLLM's statistics.
"""

import sys
from pathlib import Path

from load import MODEL

from serve.__main__ import prepare_engine_environment
from serve.engine_arguments import engine_arguments
from serve.settings import ServeSettings


def main(model: str, port: str) -> None:
    """Serve until SIGTERM."""
    settings = ServeSettings.load()
    prepare_engine_environment(settings)
    # Imported here: vLLM reads its environment on import.
    from vllm.entrypoints.launchers.api_server import entry
    from vllm.platforms import current_platform

    quiet = ["--disable-uvicorn-access-log", "--uvicorn-log-level", "warning"]
    where = ["--host", "127.0.0.1", "--port", port]
    arguments = engine_arguments(Path(model), MODEL, settings, on_cpu=current_platform.is_cpu())
    for ours in ("--scheduler-cls", "--worker-extension-cls"):  # what they name is ours
        del arguments[arguments.index(ours) : arguments.index(ours) + 2]
    sys.argv = ["vllm", *arguments, *where, *quiet]
    entry.main()


if __name__ == "__main__":
    main(*sys.argv[1:])
