"""How long the parts of something take."""

import time


class Stopwatch:
    """Runs from when it is made.

    Attributes:
        seconds: of every lap so far as ``<name>_seconds``, and all together as ``seconds``.
    """

    def __init__(self) -> None:
        self.seconds = {"seconds": 0.0}
        self._started = time.monotonic()

    def lap(self, name: str) -> None:
        """End the lap ``name``: all since the last one."""
        now = time.monotonic()
        self.seconds[f"{name}_seconds"] = now - self._started
        self.seconds["seconds"] += now - self._started
        self._started = now
