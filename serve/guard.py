"""This server's part of guarding a canary: it counts how both arms run, and looks whether something is decided."""

import asyncio
import contextlib
import logging
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from deploy.arms import FIRST_TOKEN_SECONDS, ArmFigures
from deploy.errors import DeployError
from deploy.guard import Guard
from feedback.errors import FeedbackError
from serve.errors import EngineFailed, EngineRefused, NotServing, ServeError
from serve.metrics import Metrics
from serve.recording import Sampled

log = logging.getLogger(__name__)

MAX_PER_USER = 20
"""Requests of one user that count: a user stays on one arm, so one who asks oddly must not decide about it."""
MAX_USERS = 100_000
"""Users whose requests are counted; those who come later count no more, until the release changes."""
MAX_UNWRITTEN = 20_000
"""Requests whose completions may yet turn out to be lost: the newest, more than may wait to be recorded."""


@dataclass
class _Tally:
    requests: int = 0
    errors: int = 0
    timed: int = 0
    slower: list[int] = field(default_factory=lambda: [0] * len(FIRST_TOKEN_SECONDS))
    completions: int = 0
    unfinished: int = 0
    unrecorded: int = 0


class ArmCounter:
    """Counts the requests that the release routes, by version, since the release last changed.

    Requests that name a version are left out: who pins the canary could otherwise bring it down.
    """

    def __init__(self) -> None:
        self._generation = 0
        self._tallies: dict[int, _Tally] = {}
        self._asked: Counter[int] = Counter()
        self._running: dict[str, int] = {}
        """Version by bare request id."""
        self._unwritten: dict[str, tuple[int, int]] = {}
        """Version, and completions counted for it, by bare request id."""

    def begin(self, generation: int) -> None:
        """The release has changed: start from zero."""
        if generation != self._generation:
            self._generation = generation
            self._tallies, self._asked = {}, Counter()
            self._running, self._unwritten = {}, {}

    @contextlib.contextmanager
    def counted(self, version: int, principal: str, user: str | None, request_id: str) -> Iterator[None]:
        """Count one routed request, however it ends; of a named user, only the first ``MAX_PER_USER``."""
        if user is not None and not self._may_count(hash((principal, user))):
            yield
            return
        generation, failed = self._generation, False
        self._running[request_id] = version
        try:
            yield
        except Exception as error:
            failed = _is_our_fault(error)
            raise
        finally:
            self._running.pop(request_id, None)
            if generation == self._generation:
                tally = self._tallies.setdefault(version, _Tally())
                tally.requests += 1
                tally.errors += failed

    def _may_count(self, user: int) -> bool:
        if self._asked[user] >= MAX_PER_USER or (user not in self._asked and len(self._asked) >= MAX_USERS):
            return False
        self._asked[user] += 1
        return True

    def sampled(self, part: Sampled) -> None:
        """The engine's callback: one prompt's completions have ended."""
        request = _bare(part.request_id)
        version = self._running.get(request)
        if version is None or not part.finished:
            return
        tally = self._tallies.setdefault(version, _Tally())
        if part.first_token_seconds is not None:
            tally.timed += 1
            for place in range(bisect_left(FIRST_TOKEN_SECONDS, part.first_token_seconds)):
                tally.slower[place] += 1
        tally.completions += len(part.choices)
        tally.unfinished += sum(choice.finish_reason == "length" for choice in part.choices.values())
        _, before = self._unwritten.get(request, (version, 0))
        self._unwritten[request] = version, before + len(part.choices)
        if len(self._unwritten) > MAX_UNWRITTEN:
            del self._unwritten[next(iter(self._unwritten))]

    def lost(self, completion_id: str) -> None:
        """A finished request could not be kept for feedback; as many of its completions count as were counted."""
        version, completions = self._unwritten.pop(_bare(completion_id), (None, 0))
        if version is not None:
            self._tallies[version].unrecorded += completions

    def figures(self) -> dict[int, ArmFigures]:
        """What was counted, by version."""
        return {
            version: ArmFigures.model_validate(vars(tally) | {"slower": tuple(tally.slower)})
            for version, tally in self._tallies.items()
        }


def _is_our_fault(error: Exception) -> bool:
    """Whether the client gets a 5xx for it."""
    if isinstance(error, EngineRefused):
        return error.status >= 500 and not error.queue_full
    return isinstance(error, NotServing | EngineFailed) or not isinstance(error, ServeError)


def _bare(request_id: str) -> str:
    """The id a request was given, of what vLLM calls it or one of its prompts: ``cmpl-<id>-0``, ``chatcmpl-<id>``."""
    parts = request_id.split("-")
    return parts[1] if len(parts) > 1 else request_id


async def guard_canary(guard: Guard, seconds: float, metrics: Metrics) -> None:
    """Look every few seconds until cancelled. With Redis gone nothing is decided, which is said once."""
    blind = False
    while True:
        await asyncio.sleep(seconds)
        try:
            look = await guard.look()
        except (DeployError, FeedbackError) as error:
            if not blind:
                log.warning("the canary is not guarded until Redis answers again", extra={"why": str(error)})
            blind = True
            continue
        if blind:
            log.info("the canary is guarded again")
        blind = False
        metrics.canary.show(look)
