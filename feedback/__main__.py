"""Look at the feedback that was given, take it out, and manage keys: ``python -m feedback stats|export|keys``."""

import asyncio
import json
import os
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NoReturn, TextIO, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from feedback import key_commands
from feedback.embedded import connect_url
from feedback.errors import FeedbackError
from feedback.export import Format, rows
from feedback.records import Comparison
from feedback.settings import FeedbackSettings, LoopSettings
from feedback.store import FeedbackStore, LogEntry

Result = TypeVar("Result")

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
app.add_typer(key_commands.app, name="keys")
State = Annotated[Path | None, typer.Option(help="State directory; default: the settings', else ./state.")]
RedisUrl = Annotated[str | None, typer.Option(help="A Redis of your own instead of the state directory's.")]


@dataclass
class Stats:
    """What the log holds. Pairs are those of the comparisons in force; superseded ones were replaced by later ones."""

    kinds: Counter[str] = field(default_factory=Counter)
    labelers: Counter[str] = field(default_factory=Counter)
    versions: Counter[str] = field(default_factory=Counter)
    pairs: int = 0
    superseded: int = 0
    quarantined: int = 0
    head: str = "0-0"


@app.command()
def stats(
    state: State = None,
    redis_url: RedisUrl = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Count the log's records by kind, labeler and policy version."""
    found = _with_store(state, redis_url, _count)
    if as_json:
        typer.echo(json.dumps(vars(found)))
        return
    table = Table("what", "which", "records")
    for what, counts in {"kind": found.kinds, "labeler": found.labelers, "version": found.versions}.items():
        for name, count in sorted(counts.items()):
            table.add_row(what, name, str(count))
    for name in ("pairs", "superseded", "quarantined", "head"):
        table.add_row(name, "", str(getattr(found, name)))
    Console().print(table)


@app.command()
def export(
    state: State = None,
    redis_url: RedisUrl = None,
    form: Annotated[Format, typer.Option("--format", help="native: every record; trl, openai: preference pairs.")] = (
        Format.NATIVE
    ),
    output: Annotated[Path | None, typer.Option(help="File to write; default: standard output.")] = None,
) -> None:
    """Write feedback as JSON lines. The pair formats leave out superseded comparisons."""
    if output is None:
        lines, left_out = _with_store(state, redis_url, lambda store: _export(store, form, sys.stdout))
    else:
        unfinished = output.with_name(f".{output.name}.{os.getpid()}")
        try:
            with unfinished.open("w", encoding="utf-8") as file:
                lines, left_out = _with_store(state, redis_url, lambda store: _export(store, form, file))
            unfinished.replace(output)
        except OSError as error:
            _refuse(f"{output} cannot be written: {error}")
        finally:
            unfinished.unlink(missing_ok=True)
    left_out_note = f", {left_out} records left out (damaged, or a prompt of token ids only)" if left_out else ""
    typer.echo(f"{lines} lines{left_out_note}", err=True)


async def _count(store: FeedbackStore) -> Stats:
    found = Stats()
    async for batch in store.batches():
        superseded = await _superseded(store, batch)
        for entry in batch:
            record = entry.record
            found.head = entry.stream_id
            found.kinds[record.kind] += 1
            found.labelers[record.labeler] += 1
            candidates = record.candidates if isinstance(record, Comparison) else [record.corrects]
            found.versions.update({str(c.policy_version) for c in candidates if c and c.policy_version is not None})
            if entry.stream_id in superseded:
                found.superseded += 1
            elif isinstance(record, Comparison):
                found.pairs += len(list(record.pairs()))
    found.quarantined = store.quarantined
    return found


async def _export(store: FeedbackStore, form: Format, file: TextIO) -> tuple[int, int]:
    lines = left_out = 0
    async for batch in store.batches():
        superseded = await _superseded(store, batch) if form is not Format.NATIVE else set()
        for entry in batch:
            if entry.stream_id in superseded:
                continue
            try:
                for row in rows(entry, form):
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                    lines += 1
            except ValueError:
                left_out += 1
    file.flush()
    return lines, left_out + store.quarantined


async def _superseded(store: FeedbackStore, batch: list[LogEntry]) -> set[str]:
    compared = [(entry.stream_id, entry.record) for entry in batch if isinstance(entry.record, Comparison)]
    in_force = await store.in_force([record for _, record in compared])
    return {stream_id for (stream_id, _), holds in zip(compared, in_force, strict=True) if not holds}


def _with_store(state: Path | None, redis_url: str | None, act: Callable[[FeedbackStore], Awaitable[Result]]) -> Result:
    async def connected(url: str) -> Result:
        store = FeedbackStore.connect(url, FeedbackSettings.load())
        try:
            return await act(store)
        finally:
            await store.close()

    try:
        with connect_url(LoopSettings.load(state=state, redis_url=redis_url)) as url:
            return asyncio.run(connected(url))
    except FeedbackError as error:
        _refuse(str(error))


def _refuse(reason: str) -> NoReturn:
    typer.echo(reason, err=True)
    raise typer.Exit(1)


if __name__ == "__main__":
    app()
