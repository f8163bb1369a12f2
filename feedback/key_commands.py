"""Make, list and end API keys: ``python -m feedback keys create|list|revoke``."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.table import Column, Table

from feedback.embedded import connect_url
from feedback.errors import FeedbackError
from feedback.principals import ApiKey, KeyStore, Scope
from feedback.settings import FeedbackSettings, LoopSettings

Result = TypeVar("Result")

app = typer.Typer(no_args_is_help=True, help="Make, list and end API keys.")
State = Annotated[Path | None, typer.Option(help="State directory; default: the settings', else ./state.")]
RedisUrl = Annotated[str | None, typer.Option(help="A Redis of your own instead of the state directory's.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
PerMinute = Annotated[int | None, typer.Option(min=1, max=10**9, help="Default: as many as the server can take.")]


def _scopes(text: str) -> frozenset[Scope]:
    try:
        return frozenset(Scope(name.strip()) for name in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"the scopes are {', '.join(Scope)}; separate them by commas") from error


@app.command()
def create(
    principal: Annotated[str, typer.Option(help="Who will hold the key.")],
    scopes: Annotated[frozenset[Scope], typer.Option(parser=_scopes, help=f"Of {', '.join(Scope)}; by commas.")],
    requests_per_minute: PerMinute = None,
    tokens_per_minute: PerMinute = None,
    state: State = None,
    redis_url: RedisUrl = None,
    as_json: AsJson = False,
) -> None:
    """Make a key and print it, this once. All keys of one principal draw on one count."""
    text, key = _with_keys(
        state,
        redis_url,
        lambda keys: keys.create(
            principal, scopes, requests_per_minute=requests_per_minute, tokens_per_minute=tokens_per_minute
        ),
    )
    if as_json:
        typer.echo(json.dumps({"key": text} | _shown(key)))
        return
    typer.echo(text)
    typer.echo(f"key {key.id} of {key.principal}; it is shown this once, only its digest is kept", err=True)


@app.command("list")
def list_keys(state: State = None, redis_url: RedisUrl = None, as_json: AsJson = False) -> None:
    """List the keys ever made, oldest first, by their ids."""
    found = _with_keys(state, redis_url, lambda keys: keys.all())
    if as_json:
        typer.echo(json.dumps([_shown(key) for key in found]))
        return
    table = Table(
        Column("id", no_wrap=True), "principal", Column("scopes", no_wrap=True), "per minute", "created", "revoked"
    )
    for key in found:
        limits = {"requests": key.requests_per_minute, "tokens": key.tokens_per_minute}
        rates = [f"{limit} {what}" for what, limit in limits.items() if limit is not None]
        days = [_time(at)[:10] if at is not None else "" for at in (key.created, key.revoked)]
        table.add_row(key.id, key.principal, "\n".join(sorted(key.scopes)), "\n".join(rates), *days)
    Console().print(table)


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="The key's id, or four digits or more that begin it.")],
    state: State = None,
    redis_url: RedisUrl = None,
    as_json: AsJson = False,
) -> None:
    """End a key for good; running servers refuse it within seconds. Revoking the last one opens no server again."""
    key = _with_keys(state, redis_url, lambda keys: keys.revoke(key_id))
    typer.echo(json.dumps(_shown(key)) if as_json else f"key {key.id} of {key.principal} is revoked")


def _shown(key: ApiKey) -> dict[str, Any]:
    return {
        "id": key.id,
        "principal": key.principal,
        "scopes": sorted(key.scopes),
        "requests_per_minute": key.requests_per_minute,
        "tokens_per_minute": key.tokens_per_minute,
        "created": _time(key.created),
        "revoked": None if key.revoked is None else _time(key.revoked),
    }


def _time(unix_seconds: int) -> str:
    return datetime.fromtimestamp(unix_seconds, UTC).isoformat()


def _with_keys(state: Path | None, redis_url: str | None, act: Callable[[KeyStore], Awaitable[Result]]) -> Result:
    async def connected(url: str) -> Result:
        keys = KeyStore.connect(url, FeedbackSettings.load())
        try:
            return await act(keys)
        finally:
            await keys.close()

    try:
        with connect_url(LoopSettings.load(state=state, redis_url=redis_url)) as url:
            return asyncio.run(connected(url))
    except FeedbackError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error
