"""The picture is drawn from what a history has; what is no history or no table says so."""

import json
from pathlib import Path

import pytest
from matplotlib.image import imread

from train.errors import DatasetUnusable
from train.report import Table, draw, read_history

HISTORY = [{"iteration": float(i), "score": 0.1 * i, "kl_to_reference": 0.05 * i, "seconds": 1.0} for i in range(5)]
TABLE = Table(("", "SFT", "PPO"), [("win rate", "0.5", "0.68"), ("toxicity", "0.08", "0.001")])


def test_a_picture_has_a_row_for_every_four_numbers(tmp_path: Path) -> None:
    draw(tmp_path / "two.png", "two numbers", {"seed 0": HISTORY, "seed 1": HISTORY}, TABLE)
    rich = [numbers | {"gold": 1.0, "eos_share": 1.0, "entropy": 0.5, "ptx_loss": 1.0} for numbers in HISTORY[2:]]
    draw(tmp_path / "six.png", "six numbers, some from the third iteration on", {"": HISTORY[:2] + rich}, TABLE)
    two, six = (imread(tmp_path / name) for name in ("two.png", "six.png"))
    assert two.shape[1] == six.shape[1]
    assert six.shape[0] > two.shape[0] + 100
    assert two.std() > 0.05


def test_a_report_without_a_run_is_its_table(tmp_path: Path) -> None:
    draw(tmp_path / "table.png", "no run", {}, TABLE)
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")


def test_a_ragged_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetUnusable, match="3 columns"):
        draw(tmp_path / "x.png", "", {}, Table(("", "SFT", "PPO"), [("win rate", "0.5")]))


def test_a_history_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    path.write_text("".join(json.dumps(numbers) + "\n" for numbers in HISTORY))
    assert read_history(path) == HISTORY
    path.write_text("{broken")
    with pytest.raises(DatasetUnusable, match=r"history\.jsonl"):
        read_history(path)
    with pytest.raises(DatasetUnusable):
        read_history(tmp_path / "missing")
