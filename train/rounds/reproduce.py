"""Training a version again: from its manifest, the versions it came from and its frozen dataset, to the same bits.

On a CPU the weights follow from these alone (``train.rounds.recipe``). Where they cannot be had any more, because
something in the dataset was erased, say, the version cannot be reproduced, and the reason is said before anything is
computed.
"""

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from pydantic import JsonValue, ValidationError

from deploy.files import digest
from deploy.registry import Registry
from deploy.versions import Version, VersionKind, code_version, package_versions
from train.errors import TrainError
from train.rounds import recipe
from train.rounds.datasets import Dataset
from train.rounds.frozen import digest_of, thaw
from train.rounds.runs import RunDirectory
from train.running.progress import Progress
from train.settings import TrainSettings

FromLog = Callable[[Version, TrainSettings], Dataset]
"""Builds the dataset of a version from the feedback log, for a version whose frozen one is gone."""


class NotReproducible(TrainError):
    """A version that cannot be trained again; the message says what is missing."""


@dataclass(frozen=True)
class RebuiltFile:
    """A file of weights, by its sha256 as published and as it came out now (None where it did not)."""

    name: str
    published: str
    rebuilt: str | None

    @property
    def equal(self) -> bool:
        """Whether both are the same to the bit."""
        return self.published == self.rebuilt


@dataclass(frozen=True)
class Rebuilt:
    """What came out, and what was different around it."""

    files: tuple[RebuiltFile, ...]
    warnings: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """Whether every file of weights is the same to the bit."""
        return all(file.equal for file in self.files)

    def report(self) -> dict[str, JsonValue]:
        """The same for a program to read."""
        files: list[JsonValue] = [{**asdict(file), "equal": file.equal} for file in self.files]
        return {"equal": self.equal, "files": files, "warnings": list(self.warnings)}


def rebuild(registry: Registry, version: Version, runs: Path, from_log: FromLog, progress: Progress) -> Rebuilt:
    """Train ``version`` again, in a temporary directory, and compare.

    Args:
        registry: where the versions it came from are; each is verified first.
        version: a policy or reward model that a round has made.
        runs: ``state/runs``.
        from_log: for a version whose frozen dataset is gone.
        progress: called after each step.

    Raises:
        DeployError: a version it came from is gone or damaged.
        NotReproducible: it is not of a round, or its dataset cannot be had any more.
        TrainError: a stage cannot work with what it was given.
    """
    manifest = version.manifest
    if manifest.run is None or manifest.dataset_sha256 is None:
        raise NotReproducible(f"no round has made {version}, so nothing says what it was trained on")
    given = dict(manifest.settings)
    threads = given.pop(recipe.THREADS, 1)
    try:
        settings = TrainSettings.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]["msg"]
        raise NotReproducible(f"the settings in {version} are none of this code's: {first}") from error
    dataset = _dataset(version, RunDirectory(runs / manifest.run), settings, from_log)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(int(str(threads)))
        with tempfile.TemporaryDirectory(prefix="instructloop-") as scratch:
            out = Path(scratch) / "rebuilt"
            _train(registry, version, settings, dataset, out, progress)
            return Rebuilt(_compare(version, out), _differences(version))
    finally:
        torch.set_num_threads(before)


def _dataset(version: Version, run: RunDirectory, settings: TrainSettings, from_log: FromLog) -> Dataset:
    wanted = version.manifest.dataset_sha256
    if run.dataset.exists():
        frozen = thaw(run.dataset)
        if frozen.sha256 == wanted:
            return frozen.dataset
        why = f"{frozen.erased} of its rows were erased since" if frozen.erased else "it is another one"
        raise NotReproducible(f"{run.dataset} is not what {version} was trained on: {why}")
    dataset = from_log(version, settings)
    if digest_of(dataset) != wanted:
        raise NotReproducible(
            f"{run.dataset} is gone, and the log does not give the same dataset any more: records were erased, or "
            "stored prompts have expired"
        )
    return dataset


def _train(
    registry: Registry, version: Version, settings: TrainSettings, dataset: Dataset, out: Path, progress: Progress
) -> None:
    manifest, seed = version.manifest, version.manifest.seeds["run"]
    reference = verified(registry, VersionKind.POLICY, manifest.reference_policy)
    if version.kind == VersionKind.REWARD_MODEL:
        first = None if manifest.parent is None else verified(registry, version.kind, manifest.parent)
        recipe.refit(settings, dataset, reference, first, out, seed=seed, progress=progress)
        return
    parent = verified(registry, VersionKind.POLICY, manifest.parent)
    fitted = verified(registry, VersionKind.REWARD_MODEL, manifest.reward_model)
    recipe.improve(settings, dataset, parent, reference, fitted, out, resume_dir=None, seed=seed, progress=progress)


def verified(registry: Registry, kind: VersionKind, number: int | None) -> Version:
    """The version of that number, its files as they were published. Raises DeployError."""
    version = registry.get(kind, number or 0)
    registry.verify(version)
    return version


def _compare(version: Version, out: Path) -> tuple[RebuiltFile, ...]:
    weights = {name: file.sha256 for name, file in version.manifest.files.items() if name.endswith(".safetensors")}
    found = {path.name: digest(path).sha256 for path in out.glob("*.safetensors")}
    return tuple(RebuiltFile(name, sha256, found.get(name)) for name, sha256 in sorted(weights.items()))


def _differences(version: Version) -> tuple[str, ...]:
    """What is not as it was when the version was published, a sentence each."""
    manifest, packages = version.manifest, package_versions()
    said = []
    if manifest.code_version != (now := code_version()):
        said.append(f"the code was {manifest.code_version} and is {now}")
    for name in sorted(manifest.packages.keys() | packages.keys()):
        then, here = manifest.packages.get(name), packages.get(name)
        if then != here:
            said.append(f"{name} was {then or 'not installed'} and is {here or 'not installed'}")
    return tuple(said)
