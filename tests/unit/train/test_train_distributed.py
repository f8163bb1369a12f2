"""Two processes under torchrun learn what one does, within rounding; the first alone writes."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from distributed_stages import STAGES, prepare
from safetensors.torch import load_file

from train.distributed import Ranks

TESTS = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What two processes wrote, by stage."""
    home = tmp_path_factory.mktemp("two")
    prepare(home)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": f"{TESTS}:{TESTS.parent}", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [*launch, str(TESTS / "distributed_stages.py"), str(home)], env=environment, capture_output=True, timeout=180
    )
    assert ended.returncode == 0, ended.stderr.decode()[-4000:]
    yield home


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_learn_what_one_does(stage: str, of_two: Path, tmp_path: Path) -> None:
    prepare(tmp_path)
    STAGES[stage](tmp_path / stage)
    ours, expected = (_weights(home / stage) for home in (of_two, tmp_path))
    before = _weights(of_two / "policy")
    assert ours.keys() == expected.keys()
    moved = max(float((expected[name] - before[name]).abs().max()) for name in before if name in expected)
    apart = max(float((ours[name] - expected[name]).abs().max()) for name in expected)
    assert apart < 1e-4 * moved
    written = {path.name: path.read_bytes() for path in (tmp_path / stage).glob("*.json")}
    assert written == {path.name: path.read_bytes() for path in (of_two / stage).glob("*.json")}


def _weights(directory: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.name}/{name}": weight
        for file in directory.glob("*.safetensors")
        for name, weight in load_file(file).items()
    }


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
