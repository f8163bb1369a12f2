"""Progress bars: one a stage, with the time it will still take, and nothing where nobody looks."""

import io
import re

import pytest
from rich.console import Console

from train.running.progress import drawn, silent


def screen(monkeypatch: pytest.MonkeyPatch, *, terminal: bool) -> tuple[Console, io.StringIO]:
    for name in ("TERM", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    written = io.StringIO()
    return Console(file=written, force_terminal=terminal, width=120, color_system=None), written


def test_each_stage_has_a_bar_with_its_own_total_and_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    console, written = screen(monkeypatch, terminal=True)
    with drawn(console) as progress:
        progress("sft", 0, 250, {})
        for step in range(1, 251):
            progress("sft", step, 250, {"loss": 1.5})
        progress("ppo", 3, 7, {"score": 0.25, "unspoken": 9.0})
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.getvalue())
    lines = [line.strip() for line in re.split(r"[\r\n]", plain) if "/" in line]
    sft = next(line for line in reversed(lines) if line.startswith("sft loss 1.5"))
    ppo = next(line for line in reversed(lines) if "ppo score 0.25" in line)
    assert "250/250" in sft
    assert "3/7" in ppo and "unspoken" not in ppo
    assert sft.split()[-1] == "0:00:00", "nothing is left"
    assert ppo.split()[-1] == "-:--:--", "after one step nobody knows"


def test_nothing_is_drawn_where_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    console, written = screen(monkeypatch, terminal=False)
    with drawn(console) as progress:
        progress("sft", 1, 2, {})
        assert progress is silent
    assert written.getvalue() == ""
