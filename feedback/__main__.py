"""Look at the feedback that was given, take it out and in, erase, and manage keys."""

import asyncio
import gc
import json
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, NoReturn, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from feedback import archive as archives
from feedback import erasure, importing, key_commands
from feedback.embedded import connect_url
from feedback.errors import FeedbackError
from feedback.export import Format, PairFile, PairLines, PairParquet, UnsayablePrompt, pairs
from feedback.log_files import ParquetLog, json_line, publish, unfinished_file
from feedback.records import Comparison, Rating, owners
from feedback.removal import RawEntry
from feedback.settings import FeedbackSettings, LoopSettings
from feedback.store import FeedbackStore, LogEntry
from feedback.summary import Interval, Summary, Tally

SOCKET_TIMEOUT_SECONDS = 30.0
"""Least that a command waits for Redis: nobody is kept waiting but who typed it."""
OBJECTS_PER_COLLECTION = 20_000
"""New objects after which Python looks for cycles: records have none, and by default that is a fifth of ``stats``."""

Result = TypeVar("Result")
Advance = Callable[[int], None]

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
app.add_typer(key_commands.app, name="keys")
State = Annotated[Path | None, typer.Option(help="State directory; default: the settings', else ./state.")]
RedisUrl = Annotated[str | None, typer.Option(help="A Redis of your own instead of the state directory's.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


class Stats(Summary):
    """The summary that the server gives, and what only a look at every record tells."""

    pairs: int
    """Of the comparisons in force."""
    superseded: int
    """Comparisons and ratings that a later one of the same labeler replaced, or that repeat an earlier one."""
    quarantined: int
    """Damaged records."""
    unfinished_erasures: int
    """Erasures that were killed: run them again."""


@app.command()
def stats(state: State = None, redis_url: RedisUrl = None, as_json: AsJson = False) -> None:
    """Count the log's records by kind, day, version and labeler; say how far labelers agree and what they prefer."""

    async def count(store: FeedbackStore, _: Path) -> Stats:
        with _progress("reading", await store.length()) as advance:
            return await _count(store, advance)

    found = _with_store(state, redis_url, count)
    if as_json:
        typer.echo(found.model_dump_json())
        return
    table = Table("what", "which", "records")
    for name in ("comparisons", "demonstrations", "ratings", "erasures"):
        table.add_row(name, "", str(getattr(found, name)))
    for day in found.days:
        table.add_row("day", day.day, str(day.comparisons + day.demonstrations + day.ratings))
    for version in found.versions:
        overall = "" if version.overall is None else f", rated {version.overall:.2f} overall"
        judged = version.comparisons + version.corrections + version.ratings
        table.add_row("version", str(version.version), f"{judged}{overall}")
    for labeler in found.labelers:
        weight = "" if labeler.weight is None else f", weight {labeler.weight:.2f}"
        table.add_row("labeler", labeler.labeler, f"{labeler.records}{weight}")
    for pair in found.version_pairs:
        table.add_row("preferred", f"{pair.a} to {pair.b}", _share(pair.win_rate))
    table.add_row("agreement", "", _share(found.agreement.agreement))
    for name in ("pairs", "superseded", "quarantined", "unfinished_erasures", "head"):
        table.add_row(name.replace("_", " "), "", str(getattr(found, name)))
    Console().print(table)


@app.command()
def export(
    state: State = None,
    redis_url: RedisUrl = None,
    form: Annotated[Format, typer.Option("--format", help="native: every record; trl, openai: preference pairs.")] = (
        Format.NATIVE
    ),
    parquet: Annotated[bool, typer.Option("--parquet", help="Parquet instead of JSON lines; needs --output.")] = False,
    output: Annotated[Path | None, typer.Option(help="File to write; default: standard output.")] = None,
) -> None:
    """Write feedback as JSON lines or Parquet. The pair formats leave out superseded and repeated comparisons."""
    if parquet and output is None:
        raise typer.BadParameter("a Parquet file cannot go to standard output; name it with --output")

    async def write(store: FeedbackStore, _: Path) -> tuple[int, int]:
        with ExitStack() as stack:
            file = stack.enter_context(unfinished_file(output.parent)) if output else None
            with _progress("exporting", await store.length()) as advance:
                if form is Format.NATIVE:
                    done = await _export_native(store, file, parquet, advance)
                else:
                    done = await _export_pairs(store, form, file, parquet, advance)
            if file and output:
                publish(file, output)
            return done

    try:
        lines, left_out = _with_store(state, redis_url, write)
    except OSError as error:
        _refuse(f"{output or 'standard output'} cannot be written: {error}")
    left_out_note = f", {left_out} records left out (damaged, or a prompt of token ids only)" if left_out else ""
    typer.echo(f"{lines} {'rows' if parquet else 'lines'}{left_out_note}", err=True)


@app.command("import")
def import_file(
    file: Annotated[Path, typer.Argument(help="A native export: JSON lines, *.parquet, or an archive's directory.")],
    state: State = None,
    redis_url: RedisUrl = None,
    as_json: AsJson = False,
) -> None:
    """Put exported or archived records back, with their ids and places, into an empty Redis; again does no harm."""

    async def restore(store: FeedbackStore, _: Path) -> importing.Imported:
        with _progress("importing", None) as advance:
            return await importing.restore(store, file, advance)

    done = _with_store(state, redis_url, restore)
    told = f"{done.added} records imported, {done.present} were there, {done.erased} left out as erased"
    typer.echo(json.dumps(asdict(done)) if as_json else f"{told}; the log goes to {done.head}")


@app.command()
def archive(state: State = None, redis_url: RedisUrl = None, as_json: AsJson = False) -> None:
    """Verify the archive in the state directory, and add what the log has behind it, as Parquet."""

    async def add(store: FeedbackStore, directory: Path) -> archives.Archived:
        with _progress("archiving", await store.length()) as advance:
            return await archives.archive(store, directory, advance)

    done = _with_store(state, redis_url, add)
    damaged = f"; {done.damaged} damaged records are in the log only" if done.damaged else ""
    told = f"{done.verified} records verified, {done.added} added in {done.files} files, up to {done.last}{damaged}"
    typer.echo(json.dumps(asdict(done)) if as_json else told)


@app.command()
def erase(
    principal: Annotated[str, typer.Argument(help="Whose completions and feedback. Revoke its keys first.")],
    state: State = None,
    redis_url: RedisUrl = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Count what would be erased, and change nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Erase a principal from the log, Redis's files and the archive. Where it was killed, run it again."""

    async def forget(store: FeedbackStore, directory: Path) -> erasure.ErasureReport:
        with _progress("reading" if dry_run else "erasing", await store.length() * (1 if dry_run else 2)) as advance:
            if dry_run:
                return await erasure.survey(store, principal, directory, advance)
            return await erasure.erase(store, principal, directory, by="local", advance=advance)

    done = _with_store(state, redis_url, forget)
    if as_json:
        typer.echo(json.dumps(asdict(done)))
        return
    found = (
        f"{done.records} records, {done.completions} completions, {done.tasks} tasks, {done.archived} in the archive"
    )
    typer.echo(f"{'would be ' if dry_run else ''}erased: {found}")
    if done.unreadable:
        typer.echo(f"{done.unreadable} damaged records stay: nobody can tell whose they are", err=True)


async def _count(store: FeedbackStore, advance: Advance) -> Stats:
    tally, pairs_in_force, superseded = Tally(), 0, 0
    async for batch in store.raw_batches():
        entries = [decoded for entry in batch if (decoded := store.decoded(entry)) is not None]
        tally.add(entries)
        replaced = await _superseded(store, entries)
        superseded += len(replaced)
        for entry in entries:
            if isinstance(entry.record, Comparison) and entry.stream_id not in replaced:
                pairs_in_force += sum(1 for _ in entry.record.pairs())
        advance(len(batch))
    more = {"quarantined": store.quarantined, "unfinished_erasures": len(await store.unfinished_erasures())}
    return Stats(**dict(tally.summary()), pairs=pairs_in_force, superseded=superseded, **more)


async def _export_native(store: FeedbackStore, file: Path | None, parquet: bool, advance: Advance) -> tuple[int, int]:
    """Write every record; returns how many, and how many damaged ones were left out."""
    lines = left_out = 0
    with ExitStack() as stack:
        if parquet and file:
            add = stack.enter_context(ParquetLog(file)).add
        else:
            out = stack.enter_context(file.open("wb")) if file else sys.stdout.buffer

            def add(entry: RawEntry) -> None:
                out.write(json_line(entry))

        async for batch in store.raw_batches():
            for entry in batch:
                if entry.sound:
                    add(entry)
                    lines += 1
                else:
                    left_out += 1
            advance(len(batch))
    return lines, left_out


async def _export_pairs(
    store: FeedbackStore, form: Format, file: Path | None, parquet: bool, advance: Advance
) -> tuple[int, int]:
    """Write the pairs in force; returns how many, and how many records were left out."""
    lines = left_out = 0
    erased = await store.unfinished_erasures()
    with ExitStack() as stack:
        out: PairFile
        if parquet and file:
            out = stack.enter_context(PairParquet(file, form))
        else:
            out = PairLines(stack.enter_context(file.open("wb")) if file else sys.stdout.buffer)
        async for batch in store.raw_batches():
            entries = [decoded for entry in batch if (decoded := store.decoded(entry)) is not None]
            superseded = await _superseded(store, entries)
            for entry in entries:
                if entry.stream_id in superseded or not erased.isdisjoint(owners(entry.record)):
                    continue
                try:
                    rows = list(pairs(entry, form))
                except UnsayablePrompt:
                    left_out += 1
                    continue
                for row in rows:
                    out.add(row)
                lines += len(rows)
            advance(len(batch))
    return lines, left_out + store.quarantined


async def _superseded(store: FeedbackStore, entries: Sequence[LogEntry]) -> set[str]:
    judged = [(one.stream_id, one.record) for one in entries if isinstance(one.record, Comparison | Rating)]
    in_force = await store.in_force([record for _, record in judged])
    return {stream_id for (stream_id, _), holds in zip(judged, in_force, strict=True) if not holds}


def _share(interval: Interval | None) -> str:
    if interval is None:
        return "–"
    low, high = (0.0 if interval.low is None else interval.low), (1.0 if interval.high is None else interval.high)
    return f"{interval.value:.3f} ({low:.3f} to {high:.3f})"


@contextmanager
def _progress(what: str, total: int | None) -> Iterator[Advance]:
    """A bar on a terminal, nothing elsewhere."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda records: progress.update(task, advance=records)


def _with_store(
    state: Path | None, redis_url: str | None, act: Callable[[FeedbackStore, Path], Awaitable[Result]]
) -> Result:
    """Do ``act`` with the store and the archive's directory."""

    async def connected(url: str, directory: Path, settings: FeedbackSettings) -> Result:
        patient = max(SOCKET_TIMEOUT_SECONDS, settings.socket_timeout_seconds)
        store = FeedbackStore.connect(url, settings.model_copy(update={"socket_timeout_seconds": patient}))
        try:
            return await act(store, directory)
        finally:
            await store.close()

    gc.set_threshold(OBJECTS_PER_COLLECTION)
    try:
        loop, settings = LoopSettings.load(state=state, redis_url=redis_url), FeedbackSettings.load()
        with connect_url(loop) as url:
            return asyncio.run(connected(url, loop.state / archives.FOLDER, settings))
    except FeedbackError as error:
        _refuse(str(error))


def _refuse(reason: str) -> NoReturn:
    typer.echo(reason, err=True)
    raise typer.Exit(1)


if __name__ == "__main__":
    app()
