"""What the commands of ``python -m deploy`` share: where everything is, options, refusals, JSON."""

import asyncio
import getpass
import json
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import typer

from deploy.errors import DeployError
from deploy.registry import Registry, ReleaseStore
from deploy.settings import DeploySettings
from deploy.signatures import Signatures
from feedback.embedded import connect_url
from feedback.errors import FeedbackError
from feedback.settings import FeedbackSettings, LoopSettings
from feedback.store import FeedbackStore

Result = TypeVar("Result")

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would happen; change nothing.")]
Reason = Annotated[str, typer.Option(help="Why; kept in the log.")]


@dataclass(frozen=True)
class Loop:
    """Where everything is, once the command line and the settings are read."""

    loop: LoopSettings
    settings: DeploySettings

    @property
    def registry(self) -> Registry:
        """The versions. Raises SigningKeyUnusable."""
        return Registry(self.loop.state, Signatures.of(self.settings.signing))


@dataclass(frozen=True)
class Stores:
    """The release and the feedback log, connected."""

    releases: ReleaseStore
    feedback: FeedbackStore


def with_stores(loop: Loop, act: Callable[[Stores], Awaitable[Result]]) -> Result:
    """Run ``act`` against this loop's Redis; a refusal ends the command with exit 1."""

    async def connected(url: str) -> Result:
        feedback = FeedbackStore.connect(url, FeedbackSettings.load())
        stores = Stores(ReleaseStore.connect(url, loop.loop.state), feedback)
        try:
            return await act(stores)
        finally:
            await stores.releases.close()
            await stores.feedback.close()

    with refusing(), connect_url(loop.loop) as url:
        return asyncio.run(connected(url))


@contextmanager
def refusing() -> Iterator[None]:
    """Inside, an error of ours, or of the disk's, is printed and ends the command with exit 1."""
    try:
        yield
    except (DeployError, FeedbackError, OSError) as error:
        typer.echo(f"refused: {error}", err=True)
        raise typer.Exit(1) from error


def print_json(value: Any) -> None:
    """Print a value for programs."""
    typer.echo(json.dumps(value, indent=2))


def operator() -> str:
    """Who is at the keyboard, for the log."""
    return f"{getpass.getuser()}@{socket.gethostname()}"
