"""Changing versions: how long until the first answer of the new one, and whether anyone under load is let down.

Streams are greedy, so that every completion of a version and a prompt has one right text: a completion that is of
two versions, or of another than it says, shows in its text even where its label is consistent.
"""

import asyncio
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from load import Answer, Connection, RequestFailed, chat_request
from servers import BenchFailed

from deploy.operations import promote_canary, start_canary
from deploy.registry import Registry, ReleaseStore
from deploy.release import Release
from deploy.verdict import Verdict
from serve.auth import LOCAL_PRINCIPAL
from serve.traffic import pick_version

Transition = Callable[[Release], Release]

FRACTION = 0.5
_BY = "bench"
_PROMPTS = ("a frog", "an old clock", "the sea", "who are you")
_STREAM_TOKENS = 24
_CHANGE_SECONDS = 240.0
_AFTER_FAILURE_SECONDS = 0.05
_SETTLE_SECONDS = 0.5
"""Before each change: every probe is asking, and what the last change left to do is done."""
_COLD_POLL_SECONDS = 0.05
"""Between two probes for a version whose engine is still to be started; a warm one is probed without pause."""


@dataclass(frozen=True)
class Change:
    """One change of the release, as clients saw it.

    Attributes:
        version: Who asks is served by it only after the change.
        warm: Its engine was live before.
        accepted_ms: How long the change itself took to be accepted.
        sent_ms: For each replica, from that acceptance until the first request that ``version`` served was sent. Below
            0: it was sent, or even answered, before the operator was told.
        first_ms: The same until the first byte of its answer.
        usual_ms: How long an answer to the same request took before the change, median.
        failed: What became of requests that were not answered with a completion meanwhile.
    """

    verb: str
    version: int
    warm: bool
    accepted_ms: float
    sent_ms: tuple[float, ...]
    first_ms: tuple[float, ...]
    usual_ms: float
    failed: tuple[str, ...]


def canary(registry: Registry, number: int) -> Transition:
    """Start a canary without asking its gate: benchmark versions were never measured."""
    return start_canary(registry, number, FRACTION, override="a benchmark")


def promote() -> Transition:
    """Promote the canary without asking for evidence."""
    return promote_canary(Verdict(), override="a benchmark")


def straight_to(number: int) -> Transition:
    """Put a version in the stable one's place at once, as a server that holds one engine must."""

    def transition(release: Release) -> Release:
        return release.model_copy(update={"stable": number, "previous": release.stable})

    return transition


async def change(
    releases: ReleaseStore, ports: Sequence[int], verb: str, transition: Transition, *, warm: bool = True
) -> Change:
    """Make a change, and ask every replica until it answers with the version that the change is about.

    Raises:
        BenchFailed: A replica does not come to serve it.
    """
    before = await releases.read()
    user, version = _witness(before, transition(before))
    pause = 0.0 if warm else _COLD_POLL_SECONDS
    failed: list[str] = []
    probes = [asyncio.create_task(_until_served(port, user, version, pause, failed)) for port in ports]
    try:
        await asyncio.sleep(_SETTLE_SECONDS)
        asked = time.perf_counter()
        await releases.change(transition, verb=verb, by=_BY, reason="")
        accepted = time.perf_counter()
        answers = await asyncio.wait_for(asyncio.gather(*probes), _CHANGE_SECONDS)
    except TimeoutError as error:
        raise BenchFailed(f"{verb}: version {version} was not served in {_CHANGE_SECONDS:.0f} s") from error
    finally:
        for probe in probes:
            probe.cancel()
    first = [by_replica[-1] for by_replica in answers]
    usual = [answer.first_byte - answer.sent for by_replica in answers for answer in by_replica if answer.sent < asked]
    return Change(
        verb,
        version,
        warm,
        accepted_ms=(accepted - asked) * 1000,
        sent_ms=tuple((answer.sent - accepted) * 1000 for answer in first),
        first_ms=tuple((answer.first_byte - accepted) * 1000 for answer in first),
        usual_ms=statistics.median(usual) * 1000,
        failed=tuple(failed),
    )


def _witness(before: Release, after: Release) -> tuple[str, int]:
    """A user whose version the change changes, and which it becomes."""
    for number in range(1000):
        user = f"user-{number}"
        old, new = (pick_version(release, LOCAL_PRINCIPAL, user, "") for release in (before, after))
        if old != new:
            return user, new
    raise BenchFailed(f"the change from {before.live()} to {after.live()} concerns nobody")


async def _until_served(port: int, user: str, version: int, pause_seconds: float, failed: list[str]) -> list[Answer]:
    """Ask over and over; every answer, the last of which is the first one by ``version``. Failures go to ``failed``."""
    connection = await Connection.open(port)
    request = chat_request(_PROMPTS[0], 1, user=user)
    answers: list[Answer] = []
    try:
        while not answers or answers[-1].version != version:
            try:
                answer = await connection.ask(request)
                answer.check()
                answers.append(answer)
            except RequestFailed as error:
                failed.append(str(error))
                connection = await _again(connection, port)
            await asyncio.sleep(pause_seconds)
        return answers
    finally:
        connection.close()


async def _again(connection: Connection, port: int) -> Connection:
    """Another connection in a failed one's place, after a moment."""
    connection.close()
    await asyncio.sleep(_AFTER_FAILURE_SECONDS)
    return await Connection.open(port)


@dataclass
class Streams:
    """Callers that go on streaming while the release changes; ``async with`` it.

    Attributes:
        failures: What became of requests that got no whole answer.
        mislabelled: Answers whose events and header do not all name one version.
    """

    ports: Sequence[int]
    count: int
    asked: int = 0
    failures: list[str] = field(default_factory=list)
    mislabelled: int = 0
    _texts: dict[tuple[int | None, int], Counter[bytes]] = field(default_factory=lambda: defaultdict(Counter))
    _callers: list[asyncio.Task[None]] = field(default_factory=list)

    async def __aenter__(self) -> Self:
        self._callers = [
            asyncio.create_task(self._call(self.ports[number % len(self.ports)])) for number in range(self.count)
        ]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for caller in self._callers:
            caller.cancel()
        ended = await asyncio.gather(*self._callers, return_exceptions=True)
        if error is None and (broken := [one for one in ended if isinstance(one, Exception)]):
            raise broken[0]

    def mixed(self) -> int:
        """Completions that are not of one version: mislabelled, or with another text than their version's."""
        strays = sum(texts.total() - texts.most_common(1)[0][1] for texts in self._texts.values())
        return self.mislabelled + strays

    def versions(self) -> dict[int, int]:
        """Completions by version. Raises BenchFailed where versions cannot be told apart by their texts."""
        right: set[tuple[int, bytes]] = set()
        served: Counter[int] = Counter()
        for (version, prompt), texts in self._texts.items():
            right.add((prompt, texts.most_common(1)[0][0]))
            served[version or 0] += texts.total()
        if len(right) < len(self._texts):
            raise BenchFailed("two versions complete a prompt alike, so a mixed completion would not show")
        return dict(sorted(served.items()))

    async def _call(self, port: int) -> None:
        requests = [chat_request(prompt, _STREAM_TOKENS, stream=True, temperature=0) for prompt in _PROMPTS]
        connection = await Connection.open(port)
        try:
            while True:
                prompt = self.asked % len(_PROMPTS)
                self.asked += 1
                try:
                    answer = await connection.ask(requests[prompt])
                    answer.check()
                    self._note(prompt, answer)
                except RequestFailed as error:
                    self.failures.append(str(error))
                    connection = await _again(connection, port)
        finally:
            connection.close()

    def _note(self, prompt: int, answer: Answer) -> None:
        self.mislabelled += answer.models() != {f"policy-v{answer.version}"}
        self._texts[answer.version, prompt][answer.content()] += 1
