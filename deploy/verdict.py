"""The verdict: what blind comparisons say about a canary, valid however often one looks.

Each claim is tested by betting against its opposite, on the comparisons that are no tie (``deploy.bets``). Three
wealths are kept: *better* bets against a preference of at most ½, *worse* does the same with wins and losses exchanged,
and *not worse* bets against at most ½ − margin. The highest value each has reached is what counts: where what it bets
against is true, it ever reaches 1/α with probability at most α.

A version that is not worse overall may still have lost one kind of task: *not worse* also asks that none be
down by more than ``max_task_drop`` standard errors. And since each step may lose the margin, not being worse does
not suffice for one promotion in every ``strict_every`` (``promotions_in_a_row``).
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from deploy.bets import log_wealth
from deploy.release import Attempt
from deploy.settings import VerdictSettings

Decision = Literal["better", "worse", "not_worse", "undecided"]

_SAID: dict[Decision, str] = {
    "better": "the canary is better",
    "worse": "the canary is worse",
    "not_worse": "the canary is not worse within the margin",
}
_LOOKS_AT_ONCE = 4096


class TaskDrop(BaseModel):
    """A kind of task that the canary has lost."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    task: str
    wins: int
    losses: int


class Verdict(BaseModel):
    """What the comparisons seen so far say; wealths are the highest reached, of which ``needed`` (1/α) decides."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    decision: Decision = "undecided"
    wealth_better: float = 1.0
    wealth_worse: float = 1.0
    wealth_not_worse: float = 1.0
    needed: float = 20.0
    wins: int = 0
    comparisons: int = 0
    ties: int = 0
    held: bool = False
    tasks_down: tuple[TaskDrop, ...] = ()
    must_be_better: bool = False

    @property
    def for_promotion(self) -> bool:
        """True where the canary may become stable without an override."""
        return self.decision == "better" or (self.decision == "not_worse" and not self.must_be_better)

    def sentence(self) -> str:
        """The verdict for an operator, with the figures it rests on."""
        held = ", and held for the operator" if self.held else " yet"
        parts = [_SAID.get(self.decision, f"undecided{held}")]
        if self.tasks_down:
            down = ", ".join(f"{one.task} ({one.wins} of {one.wins + one.losses} won)" for one in self.tasks_down)
            parts.append(f"not worse overall, but down on {down}")
        if self.decision == "not_worse" and self.must_be_better:
            parts.append("the last promotions were of versions not worse either, so this one must be better")
        seen = f"{self.comparisons} blind comparisons without a tie ({self.wins} for the canary), {self.ties} ties"
        wealths = (
            f"better {self.wealth_better:.3g}, not worse {self.wealth_not_worse:.3g}, worse {self.wealth_worse:.3g}"
        )
        return f"{'; '.join(parts)}: {seen}; wealth {wealths}, {self.needed:.3g} decides"


def judge(outcomes: Iterable[float], settings: VerdictSettings) -> Verdict:
    """The verdict on comparisons in the order they were made: +1 the canary won, −1 it lost, 0 a tie.

    Better and worse are final, whichever was reached first; not worse may still become either. Tasks and earlier
    promotions are not looked at here.
    """
    signs = np.sign(np.fromiter(outcomes, np.float64))
    decided = signs[signs != 0]
    wins, losses = np.cumsum(decided > 0), np.cumsum(decided < 0)
    log_needed = math.log(1 / settings.alpha)
    better, at_better = _highest(wins, losses, 0.0, log_needed)
    worse, at_worse = _highest(losses, wins, 0.0, log_needed)
    not_worse, at_not_worse = _highest(wins, losses, settings.margin, log_needed)
    decision: Decision = "not_worse" if math.isfinite(at_not_worse) else "undecided"
    if (final := min(at_better, at_worse)) < math.inf:
        decision = "better" if at_better == final else "worse"
    in_time = min(final, at_not_worse) <= settings.max_comparisons
    return Verdict(
        decision=decision,
        wealth_better=_wealth(better),
        wealth_worse=_wealth(worse),
        wealth_not_worse=_wealth(not_worse),
        needed=1 / settings.alpha,
        wins=int((decided > 0).sum()),
        comparisons=len(decided),
        ties=len(signs) - len(decided),
        held=len(decided) >= settings.max_comparisons and not in_time,
    )


def tasks_down(outcomes: Sequence[float], tasks: Sequence[str], settings: VerdictSettings) -> tuple[TaskDrop, ...]:
    """The kinds of task that the canary has lost by more than ``max_task_drop`` standard errors.

    Of w wins and l losses on a task's own comparisons, w − l has standard error √(w + l) where neither version is
    preferred; so a few losses are no drop yet.

    Args:
        outcomes: as for ``judge``.
        tasks: the kind of task of each.
        settings: how far down is too far.
    """
    wins = Counter(task for outcome, task in zip(outcomes, tasks, strict=True) if outcome > 0)
    losses = Counter(task for outcome, task in zip(outcomes, tasks, strict=True) if outcome < 0)
    return tuple(
        TaskDrop(task=task, wins=wins[task], losses=losses[task])
        for task in sorted(losses)
        if losses[task] - wins[task] > settings.max_task_drop * math.sqrt(losses[task] + wins[task])
    )


def promotions_in_a_row(history: Sequence[Attempt]) -> int:
    """How many promotions before now were of versions that were not found better, back to the last one that was.

    One that was rolled back since counts no more. What the log does not call better counts as not: an override, or
    an operator's own reason.

    Args:
        history: the audit log, newest first, as ``ReleaseStore.history`` gives it.
    """
    better: list[bool] = []
    stable: int | None = None
    for attempt in reversed(history):
        if not attempt.accepted or attempt.generation is None:
            continue
        if attempt.verb == "promote":
            better.append(_SAID["better"] in attempt.reason)
        elif attempt.verb == "rollback" and attempt.stable != stable and better:
            better.pop()
        stable = attempt.stable
    better.reverse()
    return better.index(True) if True in better else len(better)


def _highest(
    wins: npt.NDArray[np.int_], losses: npt.NDArray[np.int_], margin: float, log_needed: float
) -> tuple[float, float]:
    """The highest log wealth over the looks [N], at least 0; and which look first reached the needed one, from 1."""
    highest, reached = 0.0, math.inf
    for start in range(0, len(wins), _LOOKS_AT_ONCE):
        path = log_wealth(wins[start : start + _LOOKS_AT_ONCE], losses[start : start + _LOOKS_AT_ONCE], margin)
        highest = max(highest, float(path.max()))
        if math.isinf(reached) and highest >= log_needed:
            reached = start + int((path >= log_needed).argmax()) + 1
    return highest, reached


def _wealth(log: float) -> float:
    """The wealth itself, held below infinity so that JSON can carry it."""
    return math.exp(min(log, 700.0))
