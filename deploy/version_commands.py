"""Commands about versions: ``python -m deploy list|show|diff|verify|gc|import|sign|keygen``."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from deploy import release as transitions
from deploy.command_line import AsJson, DryRun, Loop, Reason, Stores, operator, print_json, refusing, with_stores
from deploy.errors import DeployError, VersionCorrupt
from deploy.files import files_to_publish, sign_manifest
from deploy.registry import Registry
from deploy.signatures import Signatures, make_key
from deploy.versions import Draft, Version, VersionKind, differences

app = typer.Typer()
OfRewardModel = Annotated[bool, typer.Option("--reward-model", help="Reward models instead of policies.")]


@app.command("list")
def list_versions(context: typer.Context, reward_model: OfRewardModel = False, as_json: AsJson = False) -> None:
    """List the versions, oldest first."""
    kind = _kind(reward_model)
    rows: list[dict[str, Any]] = []
    with refusing():
        registry: Registry = context.obj.registry
        for number in registry.numbers(kind):
            try:
                rows.append(_summary(registry.get(kind, number)))
            except VersionCorrupt as error:
                rows.append({"version": number, "corrupt": str(error)})
    if as_json:
        return print_json(rows)
    table = Table("version", "created", "parent", "comparisons", "gate")
    for row in rows:
        cells = [row.get("created", ""), row.get("parent"), row.get("comparisons"), row.get("corrupt") or row["gate"]]
        table.add_row(str(row["version"]), *("" if cell is None else str(cell) for cell in cells))
    Console().print(table)


@app.command()
def show(context: typer.Context, number: int, reward_model: OfRewardModel = False, as_json: AsJson = False) -> None:
    """Print a version's manifest and its ancestors back to the first."""
    kind = _kind(reward_model)
    with refusing():
        lineage = list(_lineage(context.obj.registry, kind, number))
    manifest = lineage[0].manifest.model_dump(mode="json")
    if as_json:
        return print_json(manifest | {"lineage": [version.number for version in lineage]})
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
    with refusing():
        first, second = (context.obj.registry.get(_kind(reward_model), number).manifest for number in (a, b))
    found = differences(first, second)
    if as_json:
        return print_json({name: {"a": left, "b": right} for name, (left, right) in found.items()})
    table = Table("what", str(a), str(b))
    for name, (left, right) in found.items():
        table.add_row(name, str(left), str(right))
    Console().print(table)


@app.command()
def verify(
    context: typer.Context,
    numbers: Annotated[list[int] | None, typer.Argument(help="Default: every version.")] = None,
    reward_model: OfRewardModel = False,
    as_json: AsJson = False,
) -> None:
    """Compare every file of the versions with its digest."""
    kind = _kind(reward_model)
    with refusing():
        registry: Registry = context.obj.registry
        problems = {number: _problem(registry, kind, number) for number in numbers or registry.numbers(kind)}
    if as_json:
        print_json(problems)
    else:
        for number, problem in problems.items():
            typer.echo(f"{kind} version {number}: {problem or 'every file is as published'}")
    if any(problems.values()):
        raise typer.Exit(1)


@app.command()
def gc(context: typer.Context, dry_run: DryRun = False, as_json: AsJson = False) -> None:
    """Remove what publishers that died left behind. Versions are never removed."""
    with refusing():
        swept = [str(path) for path in context.obj.registry.sweep(dry_run=dry_run)]
    if as_json:
        return print_json(swept)
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
        with refusing():
            names = [path.name for path in files_to_publish(directory)]
        return print_json(names) if as_json else typer.echo(f"would publish {', '.join(names)}")

    async def act(stores: Stores) -> Version:
        release = await stores.releases.read()
        version: Version = context.obj.registry.publish(Draft(kind=_kind(reward_model)), directory)
        await stores.releases.record_publish(version, None)
        if not reward_model and release.stable is None:
            first = partial(transitions.first, number=version.number)
            await stores.releases.change(first, verb="first", by=operator(), reason=reason or "the first import")
        return version

    version = with_stores(context.obj, act)
    if as_json:
        return print_json(_summary(version))
    typer.echo(f"{directory} is {version}: {version.path}")


@app.command()
def sign(
    context: typer.Context,
    numbers: Annotated[list[int], typer.Argument(help="Versions that were published before there was a key.")],
    reward_model: OfRewardModel = False,
) -> None:
    """Vouch for versions as they are now: verify their digests and sign their manifests."""
    loop: Loop = context.obj
    with refusing():
        signatures, unsigned = Signatures.of(loop.settings.signing), Registry(loop.loop.state)
        for number in numbers:
            version = unsigned.get(_kind(reward_model), number)
            unsigned.verify(version)
            sign_manifest(version.path, signatures)
            typer.echo(f"{version}: signed")


@app.command()
def keygen(path: Annotated[Path, typer.Argument(help="File to write the private key to; it must not exist.")]) -> None:
    """Make a key to sign versions with, and print its public half, for deploy.signing.trusted_keys."""
    with refusing():
        typer.echo(make_key(path))


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


def _kind(reward_model: bool) -> VersionKind:
    return VersionKind.REWARD_MODEL if reward_model else VersionKind.POLICY
