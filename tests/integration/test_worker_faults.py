"""What befalls a worker while it trains: erasures, memory and disk that run out, and how it shows what it does."""

import asyncio
import resource
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_loop import SETTINGS, Loop, tiny_loop

from deploy import release as transitions
from deploy.errors import VersionCorrupt
from deploy.versions import VersionKind
from feedback.records import Erasure, name_digest, new_id
from train import ppo, reward_model
from train.rounds.frozen import thaw
from train.running.board import FOLDER
from train.settings import TrainSettings
from train.worker import Worker


@pytest.fixture
async def loop(state_dir: Path, redis_url: str, tmp_path: Path) -> AsyncIterator[Loop]:
    async with tiny_loop(state_dir, redis_url, tmp_path) as made:
        yield made


def patient(**changes: float) -> TrainSettings:
    """The tiny loop's settings with other settings of the worker."""
    return SETTINGS.model_copy(update={"worker": SETTINGS.worker.model_copy(update=changes)})


def shown(worker: Worker, metric: str, /, **labels: str) -> float | None:
    return worker.metrics.registry.get_sample_value(f"instructloop_worker_{metric}", labels)


async def erase(loop: Loop, principal: str) -> None:
    said = Erasure(id=new_id("era_"), created=1.0, principal="operator", erased=name_digest(principal))
    await loop.stores.feedback.append(said)


async def test_what_is_erased_during_a_round_is_not_trained_on_from_then_on(loop: Loop) -> None:
    await loop.compare(50)
    await loop.compare(30, principal="bob")
    long = SETTINGS.model_copy(update={"ppo": SETTINGS.ppo.model_copy(update={"iterations": 300})})
    training = asyncio.create_task(loop.worker(long).step())
    while not (runs := loop.runs()) or not list(runs[0].path.glob("work-*/ppo.pt")):
        await asyncio.sleep(0.01)
    (run,) = runs
    before = thaw(run.dataset)
    await erase(loop, "bob")
    assert await asyncio.wait_for(training, 60) is None, "the round stops"
    assert run.outcome is None

    outcome = await loop.worker().step()
    assert outcome is not None and outcome.status == "passed"
    after = thaw(run.dataset)
    assert {one.principal for one in before.dataset.training} == {"alice", "bob"}
    assert {one.principal for one in after.dataset.training} == {"alice"}
    assert after.erased > 0
    for kind, number in ((VersionKind.POLICY, 2), (VersionKind.REWARD_MODEL, 1)):
        manifest = loop.registry.get(kind, number).manifest
        of_bob = kind == VersionKind.REWARD_MODEL  # it was published before the erasure
        assert manifest.dataset_sha256 == (before if of_bob else after).sha256
    assert "bob" not in (run.path / "completions.jsonl").read_text()


async def test_a_round_without_memory_fails_by_that_name_and_is_not_hammered(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhaust(*_: object, **__: object) -> dict[str, float]:
        return {"never": float(torch.empty(1 << 60)[0])}

    await loop.compare(60)
    worker = loop.worker(patient(backoff_seconds=1000.0))
    with monkeypatch.context() as patched:
        patched.setattr(ppo, "run", exhaust)
        outcome = await worker.step()
    assert outcome is not None and outcome.status == "failed"
    assert outcome.reasons[0].startswith("out of memory: ")
    assert shown(worker, "failures_total", error="RuntimeError") == 1
    assert shown(worker, "rounds_total", outcome="failed") == 1
    assert (shown(worker, "backoff_seconds") or 0) > 0

    await loop.compare(50)
    assert await worker.step() is None, "due, but it waits"
    restarted = loop.worker(patient(backoff_seconds=1000.0))
    assert await restarted.step() is None, "a worker that is started again waits, too"
    assert shown(worker, "waiting_comparisons") == shown(restarted, "waiting_comparisons") == 50
    later = loop.worker(patient(backoff_seconds=0.001))
    assert shown(later, "failures_in_a_row") == 1
    outcome = await later.step()
    assert outcome is not None and outcome.status == "passed"
    assert shown(later, "failures_in_a_row") == shown(later, "backoff_seconds") == 0


@contextmanager
def small_files(most_bytes: int) -> Iterator[None]:
    """This process can write no larger files inside; the error is that of a disk with as little room."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_a_round_without_room_on_the_disk_waits_and_goes_on_when_there_is(loop: Loop) -> None:
    await loop.compare(60)
    worker = loop.worker(patient(backoff_seconds=1.0))
    with small_files(2_000), pytest.raises(OSError, match="File too large"):
        await worker.step()
    (run,) = loop.runs()
    assert run.outcome is None
    assert not run.dataset.exists(), "nothing half written has the name"
    assert shown(worker, "failures_in_a_row") == 1
    assert await worker.step() is None
    while shown(worker, "backoff_seconds"):
        await asyncio.sleep(0.05)
    outcome = await worker.step()
    assert outcome is not None and outcome.status == "passed"
    assert run.plan.cursor == loop.registry.get(VersionKind.POLICY, 2).manifest.feedback_cursor
    assert not list(run.path.glob(".*"))


async def test_a_disk_that_is_full_when_weights_are_written_is_waited_out(loop: Loop) -> None:
    await loop.compare(60)
    worker = loop.worker(patient(backoff_seconds=0.001))
    with small_files(12_000), pytest.raises(OSError, match=r"weights could not be written: .*File too large"):
        await worker.step()
    (run,) = loop.runs()
    assert run.dataset.exists() and run.outcome is None
    assert shown(worker, "failures_in_a_row") == 1
    outcome = await worker.step()
    assert outcome is not None and outcome.status == "passed"


async def test_an_error_nobody_foresaw_is_not_hammered_by_whoever_starts_the_worker_again(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_off(*_: object, **__: object) -> dict[str, float]:
        raise KeyError("a mistake of ours")

    await loop.compare(60)
    with monkeypatch.context() as patched:
        patched.setattr(reward_model, "run", break_off)
        for _ in range(3):  # the first of them freezes the dataset, and so gets further
            with pytest.raises(KeyError):
                await loop.worker(patient(backoff_seconds=1000.0)).step()
    waiting = loop.worker(patient(backoff_seconds=1000.0))
    assert shown(waiting, "failures_in_a_row") == 1, "once may be anything"
    assert await waiting.step() is None
    outcome = await loop.worker(patient(backoff_seconds=0.001)).step()
    assert outcome is not None and outcome.status == "passed"
    assert shown(loop.worker(), "failures_in_a_row") == 0


@pytest.mark.parametrize("kind", list(VersionKind))
async def test_nothing_is_trained_from_a_version_that_has_changed_on_the_disk(loop: Loop, kind: VersionKind) -> None:
    await loop.compare(60)
    outcome = await loop.worker().step()
    assert outcome is not None and outcome.policy == 2
    await loop.stores.releases.change(lambda release: transitions.canary(release, 2, 0.5), verb="", by="t", reason="")
    await loop.stores.releases.change(transitions.promote, verb="", by="t", reason="")
    await loop.compare(40)
    reference = loop.registry.get(kind, 1).path / "model.safetensors"  # version 2 is the parent now, and whole
    body = bytearray(reference.read_bytes())
    body[-1] ^= 1
    reference.chmod(0o644)
    reference.write_bytes(body)
    worker = loop.worker(patient(backoff_seconds=1000.0))
    with pytest.raises(VersionCorrupt, match="sha256"):
        await worker.step()
    assert shown(worker, "failures_in_a_row") == 1
    assert loop.runs()[1].outcome is None


async def test_every_stage_shows_its_numbers_as_metrics_and_in_tensorboard(loop: Loop) -> None:
    await loop.compare(60)
    worker = loop.worker()
    assert await worker.step() is not None
    assert shown(worker, "lease_held") == 0
    assert (shown(worker, "stage_number", stage="reward_model", name="held_out_accuracy") or 0) > 0.5
    for stage in ("dataset", "reward_model", "ppo", "evaluate", "evaluate_parent"):
        assert shown(worker, "stage_seconds_count", stage=stage) == 1, stage
    assert shown(worker, "stage_progress_ratio", stage="ppo") is None, "no stage is under way"

    (run,) = loop.runs()
    board = EventAccumulator(str(run.path / FOLDER))
    board.Reload()
    assert {"reward_model/loss", "ppo/kl_to_reference", "evaluate/eos_share"} <= set(board.Tags()["scalars"])
    iterations = [event.step for event in board.Scalars("ppo/score")]
    assert sorted(set(iterations)) == [1, 2, 3]
    assert shown(worker, "stage_number", stage="ppo", name="score") == pytest.approx(
        board.Scalars("ppo/score")[-1].value
    )
