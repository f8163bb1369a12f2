"""How long to leave it after failures: twice as long after each in a row, so that nothing that fails is hammered."""

import random
import time
from collections.abc import Iterable

from train.rounds.runs import RunDirectory

_JITTER = 0.25
"""Up to this part of a wait is added at random: workers that failed together do not come back together."""


class Backoff:
    """Counts failures in a row and says how long still to wait."""

    def __init__(self, first_seconds: float, max_seconds: float) -> None:
        """Nothing has failed yet.

        Args:
            first_seconds: the wait after one failure; each further one doubles it.
            max_seconds: the longest wait.
        """
        self.failures = 0
        self._first = first_seconds
        self._most = max_seconds
        self._until = 0.0  # of the monotonic clock: one that is set must not stop the training

    @property
    def seconds_left(self) -> float:
        """How long still to wait; 0 where nothing is to wait for."""
        return max(0.0, self._until - time.monotonic())

    def failed(self, seconds_ago: float = 0.0) -> None:
        """Take in a failure."""
        self.failures += 1
        wait = self._first * 2 ** min(self.failures - 1, 60) * random.uniform(1.0, 1.0 + _JITTER)
        self._until = time.monotonic() + min(wait, self._most) - max(0.0, seconds_ago)

    def succeeded(self) -> None:
        """Take in that it works; the next failure counts as the first."""
        self.failures, self._until = 0, 0.0

    def resume(self, rounds: Iterable[RunDirectory]) -> None:
        """Take in how rounds ended before this process began, or how often they were killed at the same point."""
        rounds = list(rounds)
        outcomes = sorted((run.outcome for run in rounds if run.outcome), key=lambda outcome: outcome.finished)
        for outcome in outcomes:
            if outcome.status == "failed":
                self.failed(time.time() - outcome.finished)
            else:
                self.succeeded()
        for attempts in filter(None, (run.attempts() for run in rounds)):
            for _ in range(attempts.killed - 1):  # being killed once may be anything
                self.failed(time.time() - attempts.began)
