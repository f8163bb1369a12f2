"""Look at versions and move the release: ``python -m deploy list|show|diff|status|canary|promote|rollback|…``.

Exit 0: done. Exit 1: refused, with the reasons. Exit 2: wrong usage.
"""

import asyncio
import getpass
import json
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from deploy import operations
from deploy import release as transitions
from deploy.errors import DeployError, StaleGeneration, VersionCorrupt
from deploy.files import files_to_publish
from deploy.operations import Transition
from deploy.registry import Registry, ReleaseStore
from deploy.release import Release
from deploy.settings import DeploySettings
from deploy.up import up as run_loop
from deploy.versions import Draft, Version, VersionKind, differences
from feedback.embedded import connect_url
from feedback.errors import FeedbackError
from feedback.settings import FeedbackSettings, LoopSettings, SettingsError
from feedback.store import FeedbackStore

Result = TypeVar("Result")

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
OfRewardModel = Annotated[bool, typer.Option("--reward-model", help="Reward models instead of policies.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would happen; change nothing.")]
Expect = Annotated[int | None, typer.Option(help="Refuse unless the release is at this generation.")]
Override = Annotated[str | None, typer.Option(help="Go ahead without the gate's or verdict's consent; say why.")]
Port = Annotated[int, typer.Option(help="Port of the server on loopback.")]
Reason = Annotated[str, typer.Option(help="Why; kept in the log.")]


@dataclass(frozen=True)
class _Loop:
    """Where everything is, once the command line and the settings are read."""

    loop: LoopSettings
    settings: DeploySettings

    @property
    def registry(self) -> Registry:
        return Registry(self.loop.state)


@dataclass(frozen=True)
class _Stores:
    releases: ReleaseStore
    feedback: FeedbackStore


@app.callback()
def main(
    context: typer.Context,
    state: Annotated[Path | None, typer.Option(help="State directory; default: the settings', else ./state.")] = None,
    redis_url: Annotated[str | None, typer.Option(help="A Redis of your own instead of the state directory's.")] = None,
) -> None:
    """Look at versions and move the release."""
    try:
        context.obj = _Loop(LoopSettings.load(state=state, redis_url=redis_url), DeploySettings.load())
    except SettingsError as error:
        raise typer.BadParameter(str(error)) from error


@app.command("list")
def list_versions(context: typer.Context, reward_model: OfRewardModel = False, as_json: AsJson = False) -> None:
    """List the versions, oldest first."""
    registry: Registry = context.obj.registry
    kind = _kind(reward_model)
    rows: list[dict[str, Any]] = []
    for number in registry.numbers(kind):
        try:
            rows.append(_summary(registry.get(kind, number)))
        except VersionCorrupt as error:
            rows.append({"version": number, "corrupt": str(error)})
    if as_json:
        return _print_json(rows)
    table = Table("version", "created", "parent", "comparisons", "gate")
    for row in rows:
        cells = [row.get("created", ""), row.get("parent"), row.get("comparisons"), row.get("corrupt") or row["gate"]]
        table.add_row(str(row["version"]), *("" if cell is None else str(cell) for cell in cells))
    Console().print(table)


@app.command()
def show(context: typer.Context, number: int, reward_model: OfRewardModel = False, as_json: AsJson = False) -> None:
    """Print a version's manifest and its ancestors back to the first."""
    kind = _kind(reward_model)
    with _refusing():
        lineage = list(_lineage(context.obj.registry, kind, number))
    manifest = lineage[0].manifest.model_dump(mode="json")
    if as_json:
        return _print_json(manifest | {"lineage": [version.number for version in lineage]})
    for name, value in manifest.items():
        if name not in ("canary_prompts", "files", "gate"):
            typer.echo(f"{name:18} {json.dumps(value)}")
    for name, file in lineage[0].manifest.files.items():
        typer.echo(f"file               {name} {file.bytes} bytes sha256 {file.sha256}")
    for check in lineage[0].manifest.gate.checks if lineage[0].manifest.gate else ():
        typer.echo(f"gate               {'passed' if check.passed else 'FAILED'}: {check.sentence}")
    typer.echo(f"lineage            {' <- '.join(str(version.number) for version in lineage)}")


@app.command()
def diff(context: typer.Context, a: int, b: int, reward_model: OfRewardModel = False, as_json: AsJson = False) -> None:
    """Print the settings and metrics in which two versions differ."""
    with _refusing():
        first, second = (context.obj.registry.get(_kind(reward_model), number).manifest for number in (a, b))
    found = differences(first, second)
    if as_json:
        return _print_json({name: {"a": left, "b": right} for name, (left, right) in found.items()})
    table = Table("what", str(a), str(b))
    for name, (left, right) in found.items():
        table.add_row(name, str(left), str(right))
    Console().print(table)


@app.command()
def up(context: typer.Context, port: Port = 8000) -> None:
    """Run Redis, a server and a training worker on this machine until Ctrl-C."""
    with _refusing():
        run_loop(context.obj.loop, port, typer.echo)


@app.command()
def status(context: typer.Context, as_json: AsJson = False) -> None:
    """Print the release, the verdict on its canary, and how far each server has followed."""

    async def look(stores: _Stores) -> dict[str, Any]:
        release = await stores.releases.read()
        verdict = await operations.current_verdict(stores.feedback, release, context.obj.settings.verdict)
        replicas = await stores.releases.replicas()
        return {
            "release": release.model_dump(),
            "verdict": verdict.model_dump() | {"sentence": verdict.sentence()} if release.canary else None,
            "replicas": [r.model_dump() | {"converged": r.generation == release.generation} for r in replicas],
        }

    found = _with_stores(context.obj, look)
    if as_json:
        return _print_json(found)
    typer.echo(_sentence(Release.model_validate(found["release"])))
    if found["verdict"]:
        typer.echo(f"verdict: {found['verdict']['sentence']}")
    for replica in found["replicas"]:
        state = "converged" if replica["converged"] else f"at generation {replica['generation']}"
        typer.echo(f"server {replica['replica']}: {state}, live {list(replica['live'])} {replica['detail']}".rstrip())
    if not found["replicas"]:
        typer.echo("no server is running")


@app.command()
def canary(
    context: typer.Context,
    number: int,
    fraction: Annotated[float, typer.Option(help="Share of sticky traffic, above 0 and at most 0.5.")],
    override: Override = None,
    reason: Reason = "",
    expect: Expect = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Let a version serve a share of the traffic and one side of blind comparisons."""
    transition = operations.start_canary(context.obj.registry, number, fraction, override)

    async def act(stores: _Stores) -> Release:
        return await _change(stores, transition, "canary", _why(reason, override), expect, dry_run)

    _print_release(_with_stores(context.obj, act), dry_run, as_json)


@app.command()
def promote(
    context: typer.Context,
    override: Override = None,
    reason: Reason = "",
    expect: Expect = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Make the canary stable, once blind comparisons have decided for it."""

    async def act(stores: _Stores) -> Release:
        release = await stores.releases.read()
        verdict = await operations.current_verdict(stores.feedback, release, context.obj.settings.verdict)
        transition = operations.promote_canary(verdict, override)
        judged = release.generation if expect is None else expect  # the verdict holds for this release only
        why = _why(reason or (verdict.sentence() if release.canary else ""), override)
        return await _change(stores, transition, "promote", why, judged, dry_run)

    _print_release(_with_stores(context.obj, act), dry_run, as_json)


@app.command()
def rollback(
    context: typer.Context,
    reason: Reason = "",
    expect: Expect = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Drop the canary; without one, return to the previous version."""

    async def act(stores: _Stores) -> Release:
        return await _change(stores, transitions.rollback, "rollback", reason, expect, dry_run)

    _print_release(_with_stores(context.obj, act), dry_run, as_json)


@app.command()
def history(
    context: typer.Context,
    count: Annotated[int, typer.Option(min=1, help="Newest entries to print.")] = 50,
    as_json: AsJson = False,
) -> None:
    """Print every attempted change, newest first: who, what, why, and what came of it."""

    async def look(stores: _Stores) -> list[dict[str, Any]]:
        return [{"at": attempt.at} | attempt.model_dump() for attempt in await stores.releases.history(count)]

    attempts = _with_stores(context.obj, look)
    if as_json:
        return _print_json(attempts)
    table = Table("when", "verb", "by", "outcome", "reason")
    for attempt in attempts:
        when = datetime.fromtimestamp(attempt["at"], UTC).isoformat(timespec="seconds")
        table.add_row(when, attempt["verb"], attempt["by"], attempt["outcome"], attempt["reason"])
    Console().print(table)


@app.command()
def verify(
    context: typer.Context,
    numbers: Annotated[list[int] | None, typer.Argument(help="Default: every version.")] = None,
    reward_model: OfRewardModel = False,
    as_json: AsJson = False,
) -> None:
    """Compare every file of the versions with its digest."""
    registry: Registry = context.obj.registry
    kind = _kind(reward_model)
    problems = {number: _problem(registry, kind, number) for number in numbers or registry.numbers(kind)}
    if as_json:
        _print_json(problems)
    else:
        for number, problem in problems.items():
            typer.echo(f"{kind} version {number}: {problem or 'every file is as published'}")
    if any(problems.values()):
        raise typer.Exit(1)


@app.command()
def gc(context: typer.Context, dry_run: DryRun = False, as_json: AsJson = False) -> None:
    """Remove what publishers that died left behind. Versions are never removed."""
    with _refusing():
        swept = [str(path) for path in context.obj.registry.sweep(dry_run=dry_run)]
    if as_json:
        return _print_json(swept)
    typer.echo("\n".join(f"{'would remove' if dry_run else 'removed'} {path}" for path in swept) or "nothing to remove")


@app.command("import")
def import_directory(
    context: typer.Context,
    directory: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="A model to make a version of.")],
    reward_model: OfRewardModel = False,
    reason: Reason = "",
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Publish a model from elsewhere as a version; the very first policy becomes stable at once."""
    if dry_run:
        with _refusing():
            names = [path.name for path in files_to_publish(directory)]
        return _print_json(names) if as_json else typer.echo(f"would publish {', '.join(names)}")

    async def act(stores: _Stores) -> Version:
        release = await stores.releases.read()
        version: Version = context.obj.registry.publish(Draft(kind=_kind(reward_model)), directory)
        await stores.releases.record_publish(version, None)
        if not reward_model and release.stable is None:
            first = partial(transitions.first, number=version.number)
            await stores.releases.change(first, verb="first", by=_operator(), reason=reason or "the first import")
        return version

    version = _with_stores(context.obj, act)
    if as_json:
        return _print_json(_summary(version))
    typer.echo(f"{directory} is {version}: {version.path}")


async def _change(
    stores: _Stores, transition: Transition, verb: str, reason: str, expect: int | None, dry_run: bool
) -> Release:
    if not dry_run:
        return await stores.releases.change(transition, verb=verb, by=_operator(), reason=reason, expect=expect)
    release = await stores.releases.read()
    if expect not in (None, release.generation):
        raise StaleGeneration(f"the release is at generation {release.generation}, not {expect}")
    return transition(release)


def _with_stores(loop: _Loop, act: Callable[[_Stores], Awaitable[Result]]) -> Result:
    """Run ``act`` against this loop's Redis; a refusal ends the command with exit 1."""

    async def connected(url: str) -> Result:
        feedback = FeedbackStore.connect(url, FeedbackSettings.load())
        stores = _Stores(ReleaseStore.connect(url, loop.loop.state), feedback)
        try:
            return await act(stores)
        finally:
            await stores.releases.close()
            await stores.feedback.close()

    with _refusing(), connect_url(loop.loop) as url:
        return asyncio.run(connected(url))


@contextmanager
def _refusing() -> Iterator[None]:
    try:
        yield
    except (DeployError, FeedbackError) as error:
        typer.echo(f"refused: {error}", err=True)
        raise typer.Exit(1) from error


def _lineage(registry: Registry, kind: VersionKind, number: int | None) -> Iterator[Version]:
    while number is not None:
        version = registry.get(kind, number)
        yield version
        number = version.manifest.parent


def _problem(registry: Registry, kind: VersionKind, number: int) -> str | None:
    try:
        registry.verify(registry.get(kind, number))
    except DeployError as error:
        return str(error)
    return None


def _summary(version: Version) -> dict[str, Any]:
    manifest = version.manifest
    gate = "never measured" if manifest.gate is None else "passed" if manifest.gate.passed else "failed"
    return {
        "version": version.number,
        "created": manifest.created.isoformat(timespec="seconds"),
        "parent": manifest.parent,
        "reward_model": manifest.reward_model,
        "comparisons": manifest.comparisons,
        "gate": gate,
    }


def _sentence(release: Release) -> str:
    stable = "no version is stable" if release.stable is None else f"version {release.stable} is stable"
    canary = f", version {release.canary} serves {release.canary_fraction:.0%}" if release.canary is not None else ""
    previous = f", previous was {release.previous}" if release.previous is not None else ""
    return f"generation {release.generation}: {stable}{canary}{previous}"


def _print_release(release: Release, dry_run: bool, as_json: bool) -> None:
    if as_json:
        return _print_json(release.model_dump() | {"dry_run": dry_run})
    typer.echo(f"would be {_sentence(release)}" if dry_run else _sentence(release))


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))


def _why(reason: str, override: str | None) -> str:
    return "; ".join(part for part in (reason, override and f"override: {override}") if part)


def _operator() -> str:
    return f"{getpass.getuser()}@{socket.gethostname()}"


def _kind(reward_model: bool) -> VersionKind:
    return VersionKind.REWARD_MODEL if reward_model else VersionKind.POLICY


if __name__ == "__main__":
    app()
