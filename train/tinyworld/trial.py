"""What became of a candidate that ought not to be released, and all of them as a table."""

from dataclasses import dataclass

from rich.table import Table

from train.iteration import alarms
from train.settings import AlarmSettings

MOST_REASONS = 4
"""Told of one candidate in the table; the JSON has all."""


@dataclass(frozen=True)
class Size:
    """How much a trial measures.

    Attributes:
        prompts: held-out prompts that candidate and stable version complete.
        sample_sets: completions of each prompt by each.
        crowds: how often the blind comparisons are made anew, each time in another order by other labelers.
        anchors: held-out prompts whose completions the gold labeler ranks, as known answers for reward models.
    """

    prompts: int = 1000
    sample_sets: int = 2
    crowds: int = 21
    anchors: int = 100


@dataclass(frozen=True)
class Trial:
    """What became of one candidate.

    Attributes:
        name: which candidate.
        refusals: what its gate, or the registry, has against it; none where it may become the canary.
        verdicts: how many crowds came to which verdict, whatever the gate said.
        comparisons: blind comparisons until it, ties among them: fewest, median and most of the crowds.
        gold: its win rate over the stable version by gold utility, with the ends of its 95 % interval.
        notes: what else was seen.
    """

    name: str
    refusals: tuple[str, ...]
    verdicts: dict[str, int] | None = None
    comparisons: tuple[int, int, int] | None = None
    gold: tuple[float, float, float] | None = None
    notes: tuple[str, ...] = ()


def table(trials: list[Trial]) -> Table:
    """The trials to read."""
    shown = Table("candidate", "refused because", "verdict of blind comparisons", "after", "gold win rate", "notes")
    for one in trials:
        why = [reason.partition(" (")[0] for reason in one.refusals]
        more = [f"and {len(why) - MOST_REASONS} more"] if len(why) > MOST_REASONS else []
        verdicts = ", ".join(f"{name} {count}" for name, count in (one.verdicts or {}).items())
        after = "{1} ({0} to {2})".format(*one.comparisons) if one.comparisons else ""
        gold = "{:.3f} [{:.3f}, {:.3f}]".format(*one.gold) if one.gold else ""
        reasons = "\n".join([*why[:MOST_REASONS], *more]) or "passed"
        shown.add_row(one.name, reasons, verdicts, after, gold, "\n".join(one.notes))
        shown.add_section()
    return shown


def first_alarm(settings: AlarmSettings, history: alarms.History) -> tuple[int, str] | None:
    """After how many iterations a run with this history would have been stopped, and why; None where never.

    The sampler's gap is not in it: sampler and trainer are the same code here.
    """
    for count in range(1, len(history) + 1):
        if raised := alarms.check(settings, history[:count], sampler_gap=0.0):
            return count, str(raised[0])
    return None
