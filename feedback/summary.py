"""What the log says at a glance: counts, how far labelers agree, and which version is preferred.

Counts are of the whole log. Statistics are of a window of the newest comparisons in force, so that neither memory nor
time grows with the log; how many that are is said beside them. ``Tally`` takes records one at a time, so a
server that has read the log once reads only what is new.
"""

import itertools
import math
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterable
from datetime import UTC, datetime
from functools import cache
from typing import Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from feedback.controls import in_force, is_golden
from feedback.labelers import CrowdReport, assess, candidate_keys, golden_answers
from feedback.preference import Estimate, bradley_terry, compare
from feedback.records import Candidate, Comparison, Erasure, Prompt, Rating, candidate_identity
from feedback.removal import position
from feedback.store import LogEntry

MAX_ASSESSED = 5_000
"""Newest comparisons in force that agreement and reliability are of."""
MAX_PAIR_COMPARISONS = 2_000
"""Newest blind comparisons that each two versions' win rate is of; ours: the most a verdict takes."""
MAX_VERSION_PAIRS = 20
"""Pairs of versions that are told, those judged last."""
MAX_GOLDEN = 1_000
"""Newest golden comparisons that labelers are held against."""
MAX_GROUP = 18
"""Most candidates that comparisons may join into one group: what ``assess`` takes grows with its cube."""
MAX_DAYS, MAX_LABELERS = 366, 1_000
"""Newest days, and labelers with the most records, that are told."""

Window = OrderedDict[tuple[str, str | None], Comparison]
"""The newest comparisons by who judged what in which task, in log order."""
Key = TypeVar("Key", tuple[str, str | None], tuple[int, int])
Kept = TypeVar("Kept", Comparison, Window)


class _Told(BaseModel):
    model_config = ConfigDict(frozen=True)


class Interval(_Told):
    """A figure with its 95 % interval."""

    value: float
    low: float | None = Field(description="null where there is no bound")
    high: float | None = Field(description="likewise")
    n: float = Field(description="independent observations it rests on")

    @classmethod
    def of(cls, estimate: Estimate | None) -> Self | None:
        """An estimate as it is told; None for none."""
        if estimate is None:
            return None
        return cls(value=estimate.value, low=_finite(estimate.low), high=_finite(estimate.high), n=estimate.n)


class DayCount(_Told):
    """Records of one day, by Redis's clock."""

    day: str = Field(description="UTC, 2026-01-31")
    comparisons: int
    demonstrations: int
    ratings: int


class VersionCount(_Told):
    """What was said of one version's completions."""

    version: int
    comparisons: int = Field(description="with a candidate of this version")
    corrections: int
    ratings: int
    overall: float | None = Field(description="mean overall rating, 1 to 7, of all there were; null without any")
    thumbs_up: int
    thumbs_down: int
    flags: dict[str, int] = Field(description="how often each flag was set")


class LabelerCount(_Told):
    """One labeler; what is beyond the count of records is of the comparisons assessed."""

    labeler: str
    records: int
    comparisons: int
    ties: int = Field(description="pairs judged equal")
    reliability: Interval | None = Field(description="probability of reporting the preference the others see")
    agreement: Interval | None = Field(description="share of judgements others gave the same answer to")
    golden: Interval | None = Field(description="share of items with a known answer that were judged so")
    repeats: Interval | None = Field(description="share of items judged the same when shown again")
    weight: float | None = Field(description="of this labeler's comparisons in training, 0 to 1")


class Agreement(_Told):
    """All labelers together."""

    comparisons: int = Field(description="assessed: the newest in force")
    golden: int = Field(description="of these, operators' known answers")
    repeats: int = Field(description="judgements of candidates shown to their labeler before; beside these")
    left_out: int = Field(description="of the newest, those replaced, or joining too many candidates into one group")
    agreement: Interval | None = Field(description="share of pairs of judgements of one item that agree")
    alpha: float | None = Field(description="Krippendorff's, nominal; null without items judged twice")
    alpha_ordinal: float | None = Field(description="the same with a tie half way")


class VersionPair(_Told):
    """How version ``a`` fares against version ``b`` in the newest blind comparisons of the two."""

    a: int
    b: int
    wins: int
    losses: int
    ties: int
    win_rate: Interval | None = Field(description="a tie as half, over comparisons")
    win_rate_by_prompt: Interval | None = Field(description="the same with an interval over prompts")


class VersionStrength(_Told):
    """Bradley–Terry strength of a version in the same comparisons; compares within one baseline only."""

    version: int
    baseline: int
    log_odds: Interval | None


class Summary(_Told):
    """The log at a glance."""

    object: Literal["feedback.summary"] = "feedback.summary"
    head: str = Field(description="stream id of the newest record counted")
    comparisons: int
    demonstrations: int
    ratings: int
    erasures: int
    days: list[DayCount]
    versions: list[VersionCount]
    labelers: list[LabelerCount] = Field(description=f"the {MAX_LABELERS} with the most records")
    labelers_total: int
    agreement: Agreement
    version_pairs: list[VersionPair]
    strengths: list[VersionStrength]


class _VersionTally:
    def __init__(self) -> None:
        self.comparisons = self.corrections = self.ratings = self.scaled = self.overall = 0
        self.thumbs: Counter[str] = Counter()
        self.flags: Counter[str] = Counter()


class Tally:
    """Counts records as they come, and keeps the newest comparisons for statistics."""

    def __init__(self) -> None:
        self.head = "0-0"
        self.kinds: Counter[str] = Counter()
        self.labelers: Counter[str] = Counter()
        self._days: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._versions: defaultdict[int, _VersionTally] = defaultdict(_VersionTally)
        self._newest: Window = OrderedDict()
        self._golden: Window = OrderedDict()
        self._blind: OrderedDict[tuple[int, int], Window] = OrderedDict()

    def add(self, entries: Iterable[LogEntry]) -> None:
        """Count records, in log order."""
        for entry in entries:
            record, self.head = entry.record, entry.stream_id
            self.kinds[record.kind] += 1
            if isinstance(record, Erasure):
                continue
            self.labelers[record.labeler] += 1
            self._days[_day(entry.stream_id)][record.kind] += 1
            if isinstance(record, Comparison):
                self._add_comparison(record)
            elif isinstance(record, Rating):
                self._add_rating(record)
            elif record.corrects is not None and record.corrects.policy_version is not None:
                self._versions[record.corrects.policy_version].corrections += 1

    def _add_comparison(self, record: Comparison) -> None:
        versions = sorted({c.policy_version for c in record.candidates if c.policy_version is not None})
        for version in versions:
            self._versions[version].comparisons += 1
        # In another task the same candidates are a repeat, which replaces nothing.
        judged, slim = (record.candidates_key(), record.task_id), _slim(record)
        if is_golden(record):
            _put(self._golden, judged, slim, MAX_GOLDEN)
        else:
            _put(self._newest, judged, slim, MAX_ASSESSED)
        if record.source == "task":
            for pair in itertools.combinations(versions, 2):
                newest = self._blind.get(pair, OrderedDict())
                _put(newest, judged, slim, MAX_PAIR_COMPARISONS)
                _put(self._blind, pair, newest, MAX_VERSION_PAIRS)

    def _add_rating(self, record: Rating) -> None:
        if (version := record.candidate.policy_version) is None:
            return
        tally = self._versions[version]
        tally.ratings += 1
        if record.overall is not None:
            tally.scaled, tally.overall = tally.scaled + 1, tally.overall + record.overall
        if record.thumb is not None:
            tally.thumbs[record.thumb] += 1
        tally.flags.update(flag for flag, is_set in record.flags.items() if is_set)

    def summary(self) -> Summary:
        """The counts and statistics so far: up to seconds of computing, and no look at Redis."""
        # Golden answers come first: whoever posted one and is given its candidates answers for both.
        found = in_force([*self._golden.values(), *_assessable(self._newest.values())])
        assessed = [*found.golden, *found.ordinary, *found.checks]
        report = assess(assessed, golden=golden_answers(found.golden), repeats=found.repeats)
        blind = {pair: in_force(window.values()).ordinary for pair, window in sorted(self._blind.items())}
        return Summary(
            head=self.head,
            comparisons=self.kinds["comparison"],
            demonstrations=self.kinds["demonstration"],
            ratings=self.kinds["rating"],
            erasures=self.kinds["erasure"],
            days=self.days(),
            versions=[_version_count(version, tally) for version, tally in sorted(self._versions.items())],
            labelers=[
                _labeler_count(name, records, report) for name, records in self.labelers.most_common(MAX_LABELERS)
            ],
            labelers_total=len(self.labelers),
            agreement=Agreement(
                comparisons=len(assessed),
                golden=len(found.golden),
                repeats=len(found.repeats),
                left_out=len(self._newest) + len(self._golden) - len(assessed) - len(found.repeats),
                agreement=Interval.of(report.agreement),
                alpha=_finite(report.alpha),
                alpha_ordinal=_finite(report.alpha_ordinal),
            ),
            version_pairs=[_version_pair(a, b, judged) for (a, b), judged in blind.items()],
            strengths=[
                VersionStrength(version=one.version, baseline=one.baseline, log_odds=Interval.of(one.log_odds))
                for one in bradley_terry({one.id: one for judged in blind.values() for one in judged}.values())
            ],
        )

    def days(self) -> list[DayCount]:
        """The newest days, oldest first."""
        return [
            DayCount(
                day=day,
                comparisons=counts["comparison"],
                demonstrations=counts["demonstration"],
                ratings=counts["rating"],
            )
            for day, counts in sorted(self._days.items())[-MAX_DAYS:]
        ]


def _version_count(version: int, tally: _VersionTally) -> VersionCount:
    return VersionCount(
        version=version,
        comparisons=tally.comparisons,
        corrections=tally.corrections,
        ratings=tally.ratings,
        overall=tally.overall / tally.scaled if tally.scaled else None,
        thumbs_up=tally.thumbs["up"],
        thumbs_down=tally.thumbs["down"],
        flags=dict(tally.flags),
    )


def _labeler_count(name: str, records: int, report: CrowdReport) -> LabelerCount:
    known = report.labelers.get(name)
    return LabelerCount(
        labeler=name,
        records=records,
        comparisons=known.comparisons if known else 0,
        ties=known.ties if known else 0,
        reliability=Interval.of(known.reliability) if known else None,
        agreement=Interval.of(known.agreement) if known else None,
        golden=Interval.of(known.golden) if known else None,
        repeats=Interval.of(known.repeats) if known else None,
        weight=known.weight if known else None,
    )


def _version_pair(a: int, b: int, comparisons: Iterable[Comparison]) -> VersionPair:
    found = compare(comparisons, a, b)
    return VersionPair(
        a=a,
        b=b,
        wins=found.wins,
        losses=found.losses,
        ties=found.ties,
        win_rate=Interval.of(found.win_rate),
        win_rate_by_prompt=Interval.of(found.win_rate_by_prompt),
    )


def _slim(record: Comparison) -> Comparison:
    """The same to statistics in a few hundred bytes: a text lends its length to reading speed, or else its digest."""
    candidates = tuple(
        Candidate(
            completion_id=candidate.completion_id,
            index=candidate.index,
            policy_version=candidate.policy_version,
            text=_blank(min(-(-len(candidate.text) // 16), 1024))
            if candidate.completion_id
            else candidate_identity(candidate),
        )
        for candidate in record.candidates
    )
    slimmed = {
        "prompt": Prompt(text=record.prompt.key()),
        "candidates": candidates,
        "comment": None,
        "metadata": record.metadata if is_golden(record) else {},
    }
    return record.model_copy(update=slimmed)


@cache
def _blank(sixteens: int) -> str:
    return " " * (16 * sixteens)


def _assessable(newest: Iterable[Comparison]) -> list[Comparison]:
    """The newest comparisons that join at most ``MAX_GROUP`` candidates, in order."""
    group_of: dict[str, str] = {}
    size: Counter[str] = Counter()

    def root(name: str) -> str:
        while (above := group_of.setdefault(name, name)) != name:
            group_of[name] = name = group_of.setdefault(above, above)
        return name

    taken = []
    for record in reversed(list(newest)):
        roots = {root(key) for key in candidate_keys(record)}
        total = sum(size[one] or 1 for one in roots)
        if total <= MAX_GROUP:
            first = min(roots)
            group_of.update(dict.fromkeys(roots, first))
            size[first] = total
            taken.append(record)
    return taken[::-1]


def _put(window: OrderedDict[Key, Kept], key: Key, kept: Kept, most: int) -> None:
    window.pop(key, None)  # what is replaced goes to the end, too
    window[key] = kept
    if len(window) > most:
        window.popitem(last=False)


def _day(stream_id: str) -> str:
    seconds = min(position(stream_id)[0] / 1000, datetime.max.replace(tzinfo=UTC).timestamp() - 1)
    return datetime.fromtimestamp(seconds, UTC).date().isoformat()


def _finite(figure: float) -> float | None:
    return figure if math.isfinite(figure) else None
