"""Controls: blind tasks that measure the labeler and not the completions.

- A *golden* task shows candidates whose order is known: those of an operator's comparison of outside data with the
  metadata ``golden: true``. No policy sampled them, so none of them has a completion id, as every other task's has.
- A *repeat* shows the candidates of an earlier task again, in reverse. Every other task has candidates of its own, so
  two comparisons of one labeler that name the same ones and two tasks are a judgement and its repetition.

No record says of itself which it is, and so nothing shown to a labeler can; ``in_force`` tells them apart. Neither
kind teaches a reward model or counts for a version. A labeler who ranks the candidates of *one* task again has changed
their mind, and the later ranking replaces the earlier one; a repetition replaces nothing: it measures how far the
first judgement, which was learnt from, holds.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from feedback.records import Comparison

GOLDEN = ("golden", "true")
"""Name and value in the metadata of a comparison whose answer is to be taken as known."""


@dataclass(frozen=True)
class Repeat:
    """One labeler's judgements of the same candidates in two tasks, each the latest of its task."""

    first: Comparison
    again: Comparison


@dataclass(frozen=True)
class InForce:
    """Comparisons that no later ones replace, by what they are good for; each in log order.

    Attributes:
        ordinary: to learn from, and to judge versions by.
        golden: operators' known answers.
        checks: labelers' judgements of golden candidates.
        repeats: judgements of candidates the labeler had judged before, with these.
    """

    ordinary: tuple[Comparison, ...]
    golden: tuple[Comparison, ...]
    checks: tuple[Comparison, ...]
    repeats: tuple[Repeat, ...]


@dataclass
class _Judged:
    """What one labeler said of some candidates: ``latest`` in ``task`` or in none, ``again`` in other tasks."""

    latest: Comparison
    task: str | None
    again: dict[str | None, Comparison]


def is_golden(comparison: Comparison) -> bool:
    """Whether it is an operator's known answer."""
    name, value = GOLDEN
    return comparison.source == "outside" and comparison.metadata.get(name) == value


def is_check(comparison: Comparison) -> bool:
    """Whether it is a labeler's judgement of golden candidates."""
    return comparison.source == "task" and all(one.completion_id is None for one in comparison.candidates)


def in_force(comparisons: Iterable[Comparison]) -> InForce:
    """Sort comparisons by what they are good for, without those that later ones replace.

    Args:
        comparisons: in log order.
    """
    judged: dict[tuple[str, bool], _Judged] = {}
    for one in comparisons:
        # Who posted a golden answer and is then given its candidates answers for both.
        key, task = (one.candidates_key(), is_check(one)), one.task_id if one.source == "task" else None
        before = judged.get(key)
        if before is None:
            judged[key] = _Judged(one, task, {})
        elif task is None or before.task in (None, task):
            judged[key] = _Judged(one, before.task or task, judged.pop(key).again)  # at the end: it is newer
        else:
            before.again[task] = one
    latest = [one.latest for one in judged.values()]
    return InForce(
        ordinary=tuple(one for one in latest if not is_golden(one) and not is_check(one)),
        golden=tuple(filter(is_golden, latest)),
        checks=tuple(filter(is_check, latest)),
        repeats=tuple(Repeat(one.latest, again) for one in judged.values() for again in one.again.values()),
    )
