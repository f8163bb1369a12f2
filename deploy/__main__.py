"""Look at versions and move the release: ``python -m deploy list|show|diff|status|canary|promote|rollback|…``.

Exit 0: done. Exit 1: refused, with the reasons. Exit 2: wrong usage.
"""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from deploy import operations, version_commands
from deploy import release as transitions
from deploy.command_line import AsJson, DryRun, Loop, Reason, Stores, operator, print_json, refusing, with_stores
from deploy.errors import StaleGeneration
from deploy.evidence import HISTORY
from deploy.operations import Transition
from deploy.release import Release
from deploy.settings import DeploySettings
from deploy.up import up as run_loop
from feedback.settings import LoopSettings, SettingsError

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
app.add_typer(version_commands.app)
Expect = Annotated[int | None, typer.Option(help="Refuse unless the release is at this generation.")]
Override = Annotated[str | None, typer.Option(help="Go ahead without the gate's or verdict's consent; say why.")]
Port = Annotated[int, typer.Option(help="Port of the server on loopback.")]


@app.callback()
def main(
    context: typer.Context,
    state: Annotated[Path | None, typer.Option(help="State directory; default: the settings', else ./state.")] = None,
    redis_url: Annotated[str | None, typer.Option(help="A Redis of your own instead of the state directory's.")] = None,
) -> None:
    """Look at versions and move the release."""
    try:
        context.obj = Loop(LoopSettings.load(state=state, redis_url=redis_url), DeploySettings.load())
    except SettingsError as error:
        raise typer.BadParameter(str(error)) from error


@app.command()
def up(context: typer.Context, port: Port = 8000) -> None:
    """Run Redis, a server and a training worker on this machine until Ctrl-C."""
    with refusing():
        run_loop(context.obj.loop, port, typer.echo)


@app.command()
def status(context: typer.Context, as_json: AsJson = False) -> None:
    """Print the release, the verdict on its canary, and how far each server has followed."""

    async def look(stores: Stores) -> dict[str, Any]:
        release = await stores.releases.read()
        history = await stores.releases.history(HISTORY)
        verdict = await operations.current_verdict(stores.feedback, release, context.obj.settings.verdict, history)
        replicas = await stores.releases.replicas()
        return {
            "release": release.model_dump(),
            "verdict": verdict.model_dump() | {"sentence": verdict.sentence()} if release.canary else None,
            "replicas": [r.model_dump() | {"converged": r.generation == release.generation} for r in replicas],
        }

    found = with_stores(context.obj, look)
    if as_json:
        return print_json(found)
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

    async def act(stores: Stores) -> Release:
        transition = operations.start_canary(context.obj.registry, number, fraction, override)
        return await _change(stores, transition, "canary", operations.why(reason, override), expect, dry_run)

    _print_release(with_stores(context.obj, act), dry_run, as_json)


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

    async def act(stores: Stores) -> Release:
        release = await stores.releases.read()
        history = await stores.releases.history(HISTORY)
        verdict = await operations.current_verdict(stores.feedback, release, context.obj.settings.verdict, history)
        transition = operations.promote_canary(verdict, override)
        judged = release.generation if expect is None else expect  # the verdict holds for this release only
        why = operations.why(reason or (verdict.sentence() if release.canary else ""), override)
        return await _change(stores, transition, "promote", why, judged, dry_run)

    _print_release(with_stores(context.obj, act), dry_run, as_json)


@app.command()
def rollback(
    context: typer.Context,
    reason: Reason = "",
    expect: Expect = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Drop the canary; without one, return to the previous version."""

    async def act(stores: Stores) -> Release:
        return await _change(stores, transitions.rollback, "rollback", reason, expect, dry_run)

    _print_release(with_stores(context.obj, act), dry_run, as_json)


@app.command()
def history(
    context: typer.Context,
    count: Annotated[int, typer.Option(min=1, help="Newest entries to print.")] = 50,
    as_json: AsJson = False,
) -> None:
    """Print every attempted change, newest first: who, what, why, and what came of it."""

    async def look(stores: Stores) -> list[dict[str, Any]]:
        return [{"at": attempt.at} | attempt.model_dump() for attempt in await stores.releases.history(count)]

    attempts = with_stores(context.obj, look)
    if as_json:
        return print_json(attempts)
    table = Table("when", "verb", "by", "outcome", "reason")
    for attempt in attempts:
        when = datetime.fromtimestamp(attempt["at"], UTC).isoformat(timespec="seconds")
        table.add_row(when, attempt["verb"], attempt["by"], attempt["outcome"], attempt["reason"])
    Console().print(table)


async def _change(
    stores: Stores, transition: Transition, verb: str, reason: str, expect: int | None, dry_run: bool
) -> Release:
    if not dry_run:
        return await stores.releases.change(transition, verb=verb, by=operator(), reason=reason, expect=expect)
    release = await stores.releases.read()
    if expect not in (None, release.generation):
        raise StaleGeneration(f"the release is at generation {release.generation}, not {expect}")
    return transition(release)


def _sentence(release: Release) -> str:
    stable = "no version is stable" if release.stable is None else f"version {release.stable} is stable"
    canary = f", version {release.canary} serves {release.canary_fraction:.0%}" if release.canary is not None else ""
    previous = f", previous was {release.previous}" if release.previous is not None else ""
    return f"generation {release.generation}: {stable}{canary}{previous}"


def _print_release(release: Release, dry_run: bool, as_json: bool) -> None:
    if as_json:
        return print_json(release.model_dump() | {"dry_run": dry_run})
    typer.echo(f"would be {_sentence(release)}" if dry_run else _sentence(release))


if __name__ == "__main__":
    app()
