"""``python -m serve``: read the settings, listen, serve the release."""

import asyncio
import contextlib
import importlib.metadata
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer
import uvicorn
from pythonjsonlogger.json import JsonFormatter

from deploy.errors import DeployError
from deploy.registry import Registry, ReleaseStore
from deploy.release import first
from deploy.settings import DeploySettings
from deploy.signatures import Signatures
from deploy.versions import Draft, VersionKind
from feedback.embedded import connect_url
from feedback.errors import FeedbackError
from feedback.principals import KeyStore
from feedback.settings import FeedbackSettings, LoopSettings
from serve.auth import require_keys
from serve.errors import ServeError
from serve.listening import listeners
from serve.settings import ServeSettings

_NEVER = ("VLLM_SERVER_DEV_MODE", "VLLM_ALLOW_INSECURE_SERIALIZATION", "VLLM_ALLOW_RUNTIME_LORA_UPDATING")
"""Switches of vLLM that let a client run code or load files; taken out of the environment."""

app = typer.Typer(add_completion=False)


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on; beyond loopback only with API keys.")] = None,
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
        with connect_url(loop) as redis_url:
            asyncio.run(_require_keys(settings.host, redis_url))
            if policy is not None:
                asyncio.run(_release_first(loop.state, redis_url, policy))
            _run(settings, loop.state, redis_url)
    except (ServeError, DeployError, FeedbackError) as error:
        typer.echo(f"serve: {error}", err=True)
        raise typer.Exit(1) from error


def _run(settings: ServeSettings, state: Path, redis_url: str) -> None:
    _log_as_json()
    logging.getLogger("serve.access").setLevel(logging.INFO if settings.access_log else logging.WARNING)
    prepare_engine_environment(settings)
    # Imported here: vLLM reads its environment on import, and takes ten seconds for it.
    from serve.app import create_app

    # uvicorn drains, then raises the signal again; unhandled it would end this process before Redis is let go.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    server = create_app(settings, FeedbackSettings.load(), DeploySettings.load(), state, redis_url)
    config = uvicorn.Config(
        server,
        host=settings.host,
        port=settings.port,
        log_level="warning",
        access_log=False,
        proxy_headers=False,  # a client could name any address as its own
        server_header=False,
        timeout_graceful_shutdown=int(settings.drain_seconds),
    )
    with contextlib.suppress(KeyboardInterrupt):  # raised again when uvicorn has drained
        uvicorn.Server(config).run(listeners(config))


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
    logging.getLogger("vllm").setLevel(logging.ERROR)


def prepare_engine_environment(settings: ServeSettings) -> None:
    """Set what vLLM reads from the environment when it is imported; what is set already stays."""
    defaults = {
        "OMP_NUM_THREADS": str(settings.engine_threads),
        "VLLM_CPU_KVCACHE_SPACE": str(settings.kv_cache_gib),
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_CONFIGURE_LOGGING": "0",  # its lines become JSON like ours
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_MAX_STOP_STRINGS": str(settings.max_stops),
        "HF_HUB_OFFLINE": "1",
    }
    if any(importlib.metadata.distributions(name="vllm-cpu")):
        # An eager CPU engine still compiles a few kernels on its first request: 22 s, and no faster afterwards.
        defaults["TORCH_COMPILE_DISABLE"] = "1"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    for name in _NEVER:
        os.environ.pop(name, None)


async def _require_keys(host: str, redis_url: str) -> None:
    keys = KeyStore.connect(redis_url, FeedbackSettings.load())
    try:
        await require_keys(host, keys)
    finally:
        await keys.close()


async def _release_first(state: Path, redis_url: str, policy: str) -> None:
    registry = Registry(state, Signatures.of(DeploySettings.load().signing))
    releases = ReleaseStore.connect(redis_url, state)
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
