"""``train reproduce``: versions come out again bit for bit, and what cannot be had again is refused with its reason."""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from tiny_loop import SETTINGS, Loop, tiny_loop
from typer.testing import CliRunner, Result

from deploy.versions import Draft, VersionKind
from feedback.records import Erasure, name_digest, new_id
from train.__main__ import app
from train.rounds.frozen import thaw
from train.rounds.runs import RunDirectory

Train = Callable[..., Awaitable[Result]]
AVERAGED = SETTINGS.model_copy(update={"ppo": SETTINGS.ppo.model_copy(update={"ema": 0.5})})


@pytest.fixture
async def loop(state_dir: Path, redis_url: str, tmp_path: Path) -> AsyncIterator[Loop]:
    (tmp_path / "sft").mkdir()
    async with tiny_loop(state_dir, redis_url, tmp_path / "sft") as made:
        await made.compare(60)
        assert (outcome := await made.worker(AVERAGED).step()) is not None and outcome.policy == 2
        yield made


@pytest.fixture
def train(loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    other = tmp_path / "other.toml"  # what counts is in the manifest
    other.write_text("[train.ppo]\niterations = 7\n[train.reward_model]\nlearning_rate = 0.5\n")
    monkeypatch.setenv("INSTRUCTLOOP_SETTINGS", str(other))

    async def run(*arguments: str) -> Result:
        command = ["--state", str(loop.state), "--redis-url", loop.url, *arguments]
        return await asyncio.to_thread(CliRunner().invoke, app, command)

    return run


def names(run: RunDirectory) -> set[str]:
    return {name for one in thaw(run.dataset).dataset.training for name in one.principals}


async def erase(loop: Loop, principal: str) -> None:
    said = Erasure(id=new_id("era_"), created=1.0, principal="operator", erased=name_digest(principal))
    await loop.stores.feedback.append(said)


async def test_versions_come_out_again_bit_for_bit(loop: Loop, train: Train) -> None:
    await loop.compare(40)
    assert (outcome := await loop.worker(AVERAGED).step()) is not None and outcome.policy == 3
    for arguments in (["2"], ["3"], ["1", "--reward-model"], ["2", "--reward-model"]):
        again = await train("reproduce", *arguments)
        assert again.exit_code == 0, again.output
        assert "model.safetensors: equal" in again.stdout and "reproduced, bit for bit" in again.stdout
        assert "warning" not in again.stderr
    page = await train("report", "3")
    assert page.exit_code == 0, page.output
    assert "<html" in Path(page.stdout.strip()).read_text()
    report = json.loads((await train("reproduce", "2", "--json")).stdout)
    published = loop.registry.get(VersionKind.POLICY, 2).manifest.files["model.safetensors"].sha256
    assert report["equal"] and report["files"] == [
        {"name": "model.safetensors", "published": published, "rebuilt": published, "equal": True}
    ]


async def test_a_version_that_comes_out_otherwise_is_not_reproduced(loop: Loop, train: Train) -> None:
    made = loop.registry.get(VersionKind.REWARD_MODEL, 1)
    (run,) = loop.runs()
    other = run.path.with_name("other")
    other.mkdir()
    shutil.copy(run.dataset, other)
    files = loop.state / "files"
    files.mkdir()
    for name in made.manifest.files:
        shutil.copy(made.path / name, files)
    said = {name: value for name, value in dict(made.manifest).items() if name in Draft.model_fields}
    loop.registry.publish(Draft(**said | {"seeds": {"run": 5}, "run": other.name}), files)
    again = await train("reproduce", "2", "--reward-model")
    assert again.exit_code == 1
    assert "differs: published" in again.stdout and "NOT reproduced" in again.stdout

    refused = await train("reproduce", "1")
    assert refused.exit_code == 1
    assert "no round has made policy version 1" in refused.stderr


async def test_without_its_dataset_a_version_is_rebuilt_from_the_log_while_that_gives_it(
    loop: Loop, train: Train
) -> None:
    (run,) = loop.runs()
    run.dataset.unlink()
    assert (await train("reproduce", "2")).exit_code == 0
    await erase(loop, "alice")
    refused = await train("reproduce", "2")
    assert refused.exit_code == 1
    assert "refused" in refused.stderr


async def test_an_erasure_leaves_the_frozen_dataset_and_makes_its_versions_not_reproducible(
    loop: Loop, train: Train
) -> None:
    await loop.compare(50, principal="bob")
    assert (outcome := await loop.worker(AVERAGED).step()) is not None and outcome.policy == 3
    first, second = loop.runs()
    assert (names(first), names(second)) == ({"alice"}, {"alice", "bob"})
    before = first.dataset.read_bytes()

    await erase(loop, "bob")
    assert await loop.worker().step() is None, "no round is due"
    assert names(second) == {"alice"}
    assert b"bob" not in second.dataset.read_bytes()
    assert first.dataset.read_bytes() == before, "bob was not in it"
    assert (await train("reproduce", "2")).exit_code == 0
    for arguments in (["3"], ["2", "--reward-model"]):
        refused = await train("reproduce", *arguments)
        assert refused.exit_code == 1
        assert "rows were erased since" in refused.stderr
