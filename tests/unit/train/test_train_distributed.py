"""Two processes under torchrun learn what one does, within rounding; the first alone writes."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from distributed_stages import COMMANDS, ENVIRONMENT, STAGES, command, prepare, prepare_commands, replay
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from feedback.embedded import start_or_join
from train.__main__ import app
from train.running.distributed import Ranks

TESTS = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def state() -> Iterator[Path]:
    """A state directory with its Redis running, whose path leaves room for a unix socket."""
    with tempfile.TemporaryDirectory(prefix="il-") as path, start_or_join(Path(path)):
        yield Path(path)


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory, state: Path) -> Path:
    """What two processes wrote, by stage and by command, and what they printed."""
    home = tmp_path_factory.mktemp("two")
    prepare(home)
    with start_or_join(state) as redis:
        prepare_commands(home, state, redis.url)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": f"{TESTS}:{TESTS.parent}", "OMP_NUM_THREADS": "1"}
    script = [str(TESTS / "distributed_stages.py"), str(home), str(state)]
    ended = subprocess.run([*launch, *script], env=environment, capture_output=True, timeout=300)
    assert ended.returncode == 0, ended.stderr.decode()[-6000:]
    (home / "printed").write_bytes(ended.stdout)
    return home


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "ppo-resumed"])
def test_two_processes_learn_what_one_does(
    stage: str, of_two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(tmp_path)
    if stage.startswith("ppo"):
        replay(of_two / stage, monkeypatch)
    STAGES[stage](tmp_path / stage)
    ours, expected, before = (_weights(home) for home in (of_two / stage, tmp_path / stage, of_two / "policy"))
    assert ours.keys() == expected.keys()
    for name, weight in expected.items():
        if name == "head.safetensors/bias" or name == "head.safetensors/shift":
            continue  # together they cancel, and a ranking's gradient of either is rounding
        moved = 1.0 if name not in before else float((weight - before[name]).abs().max())
        assert float((ours[name] - weight).abs().max()) <= 1e-3 * moved, name
    written = {path.name: path.read_bytes() for path in (tmp_path / stage).glob("*.json")}
    assert written == {path.name: path.read_bytes() for path in (of_two / stage).glob("*.json")}


def test_two_processes_report_what_one_does(of_two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(tmp_path)
    replay(of_two / "ppo", monkeypatch)
    STAGES["ppo"](tmp_path / "ppo")
    ours, expected = (_history(home / "ppo-resume") for home in (of_two, tmp_path))
    assert len(ours) == len(expected) > 2
    for mine, theirs in zip(ours, expected, strict=True):
        assert mine.keys() == theirs.keys()
        for name in theirs:
            if not name.endswith("seconds"):
                assert mine[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), name


def test_two_processes_go_on_where_they_were_stopped(of_two: Path) -> None:
    resumed, whole = _weights(of_two / "ppo-resumed"), _weights(of_two / "ppo")
    assert all(resumed[name].equal(whole[name]) for name in whole)
    assert [path.name for path in (of_two / "ppo-resumed-resume").glob("ppo.parts-*")] == ["ppo.parts-3"]


def test_the_commands_do_with_two_processes_what_they_do_with_one(of_two: Path, state: Path, tmp_path: Path) -> None:
    for name in COMMANDS:
        ended = CliRunner(env=ENVIRONMENT).invoke(app, command(name, state, tmp_path))
        assert ended.exit_code == 0, ended.output
        ours, expected = ({path.name for path in (home / f"by-{name}").iterdir()} for home in (of_two, tmp_path))
        assert ours == expected
    fitted, by_one = (load_file(home / "by-reward-model" / "model.safetensors") for home in (of_two, tmp_path))
    assert all(float((fitted[name] - weight).abs().max()) < 1e-3 for name, weight in by_one.items())
    # Two processes draw other episodes than one.
    first, trained = (load_file(of_two / name / "model.safetensors") for name in ("first", "by-ppo"))
    assert all(weight.isfinite().all() and not weight.equal(first[name]) for name, weight in trained.items())
    assert (of_two / "printed").read_text().count("nonfinite_weights") == len(COMMANDS), "the first process alone"


def _weights(directory: Path) -> dict[str, Tensor]:
    files = sorted(directory.glob("*.safetensors"))
    return {f"{file.name}/{name}": weight for file in files for name, weight in load_file(file).items()}


def _history(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (directory / "ppo-history.jsonl").read_text().splitlines()]


def test_shares_are_disjoint_and_their_weights_make_one_mean() -> None:
    lengths = [4, 2, 5, 1, 3]
    shares = [Ranks(rank, 2).share(range(5), lengths) for rank in range(2)]
    assert [own for own, _ in shares] == [[0, 2, 4], [1, 3]]
    assert [weight for _, weight in shares] == [2 * 12 / 15, 2 * 3 / 15]
    means = [sum(lengths[i] ** 2 for i in own) / sum(lengths[i] for i in own) for own, _ in shares]
    # Of token losses equal to their sequence's length: (16 + 4 + 25 + 1 + 9) / 15.
    assert sum(weight * mean for (_, weight), mean in zip(shares, means, strict=True)) / 2 == pytest.approx(55 / 15)


def test_a_process_without_work_computes_with_the_others_and_counts_nothing() -> None:
    assert [Ranks(rank, 3).share(["a", "b"]) for rank in range(3)] == [(["a"], 1.5), (["b"], 1.5), (["a"], 0.0)]


def test_one_process_has_it_all() -> None:
    ranks = Ranks.current()
    assert ranks == Ranks(0, 1) and ranks.first
    assert ranks.share([7, 8, 9], [1, 2, 3]) == ([7, 8, 9], 1.0)
    assert ranks.mean(2.5) == 2.5 and ranks.gather([1, 2]) == [1, 2]
