"""Resume points: what comes back, and that nothing damaged or foreign does."""

from pathlib import Path

import pytest
import torch

from train.errors import ResumePointUnusable
from train.running import resume

WEIGHTS = torch.arange(1000.0)
STATE = {"weights": {"w": WEIGHTS}, "history": [{"score": 0.1}], "position": None, "iteration": 3}


@pytest.fixture
def point(tmp_path: Path) -> Path:
    path = tmp_path / "deep" / "run.pt"
    resume.save(path, "ours", STATE)
    return path


def test_what_was_saved_comes_back(point: Path) -> None:
    loaded = resume.load(point, "ours")
    assert loaded is not None
    assert loaded["weights"]["w"].equal(WEIGHTS)
    assert {name: loaded[name] for name in ("history", "position", "iteration")} == {
        "history": [{"score": 0.1}],
        "position": None,
        "iteration": 3,
    }
    assert [path.name for path in point.parent.iterdir()] == ["run.pt"]


def test_a_later_save_replaces_it(point: Path) -> None:
    resume.save(point, "ours", {"iteration": 4})
    assert resume.load(point, "ours") == {"iteration": 4}


def test_nothing_there_is_none(tmp_path: Path) -> None:
    assert resume.load(tmp_path / "run.pt", "ours") is None


def test_one_flipped_bit_anywhere_is_noticed(point: Path) -> None:
    whole = point.read_bytes()
    for position in range(0, len(whole), 97):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        point.write_bytes(damaged)
        with pytest.raises(ResumePointUnusable, match="damaged"):
            resume.load(point, "ours")


@pytest.mark.parametrize("length", [0, 10, 32, 2000])
def test_a_cut_file_is_noticed(point: Path, length: int) -> None:
    point.write_bytes(point.read_bytes()[:length])
    with pytest.raises(ResumePointUnusable, match=r"run\.pt"):
        resume.load(point, "ours")


def test_another_runs_is_refused(point: Path) -> None:
    with pytest.raises(ResumePointUnusable, match="other settings"):
        resume.load(point, "theirs")


def test_a_fingerprint_follows_description_and_weights(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"one")
    (tmp_path / "manifest.json").write_text("{}")
    first = resume.fingerprint_of("settings", [tmp_path])
    (tmp_path / "manifest.json").write_text("{ }")
    assert resume.fingerprint_of("settings", [tmp_path]) == first
    assert resume.fingerprint_of("other settings", [tmp_path]) != first
    weights.write_bytes(b"two")
    assert resume.fingerprint_of("settings", [tmp_path]) != first
