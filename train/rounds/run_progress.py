"""How far a round is, for people and other processes: ``progress.json`` in its directory, and the log."""

import json
import logging
import time
from pathlib import Path

from deploy.files import replace_atomically

_LOGGER = logging.getLogger(__name__)
_SHOW_SECONDS, _LOG_SECONDS = 1.0, 15.0
_SAID = ("loss", "score", "kl_to_reference", "eos_share", "ptx_loss")
"""Numbers worth a place in a log line."""


class RunProgress:
    """Shows what it is told as a ``Progress``."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "progress.json"
        self._run = directory.name
        self._stage = ""
        self._done_before: int | None = None
        self._began = self._shown = self._logged = 0.0

    def __call__(self, stage: str, done: int, total: int, numbers: dict[str, float]) -> None:
        """Take in one step."""
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._began, self._shown, self._logged = stage, now, 0.0, now
            self._done_before = None
            _LOGGER.info("%s: %s begins", self._run, stage)
        if self._done_before is None and done:  # a stage that is resumed does not begin at its first step
            self._done_before, self._began = (0, self._began) if done == 1 else (done, now)
        steps = done - (self._done_before or 0)
        left = (now - self._began) / steps * (total - done) if steps else None
        if now - self._shown >= _SHOW_SECONDS or done == total:
            self._shown = now
            shown = {"run": self._run, "stage": stage, "done": done, "total": total, "seconds_left": left}
            replace_atomically(self._path, json.dumps(shown | {"numbers": numbers}).encode())
        if now - self._logged >= _LOG_SECONDS or done == total:
            self._logged = now
            said = " ".join(f"{name} {numbers[name]:.4g}" for name in _SAID if name in numbers)
            _LOGGER.info("%s: %s %d/%d %s, %.0f s left", self._run, stage, done, total, said, left or 0.0)
