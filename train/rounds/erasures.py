"""Erasure reaches the datasets that rounds have frozen: what the log says is erased leaves their files.

An erasure concerns the datasets of rounds with a cursor before it; what a principal gave after it is not covered by it,
and stands in datasets of later rounds only. Completions of erased prompts, kept for the report, go too. An unfinished
round whose dataset shrinks begins again, so that nothing is trained on that was erased by then. A finished round's
versions cannot be reproduced any more: the digest in their manifests is not the file's, which says why
(``Frozen.erased``).
"""

import logging
from pathlib import Path

from deploy.files import replace_atomically
from feedback.records import name_digest
from feedback.removal import position
from train import report
from train.errors import TrainError
from train.measures import completed
from train.rounds import frozen
from train.rounds.datasets import Dataset
from train.rounds.log_watch import LogWatch
from train.rounds.runs import RunDirectory

_LOGGER = logging.getLogger(__name__)


class Erasures:
    """Applies to the rounds of a state directory what a watch has read of erasures. Call ``apply`` under the lease."""

    def __init__(self, state: Path, watch: LogWatch) -> None:
        self._state = state
        self._watch = watch
        self._applied: dict[str, str] = {}

    def pending(self) -> list[RunDirectory]:
        """Rounds whose datasets may hold something that was erased since, and was not looked for yet."""
        new = [at for who, at in self._watch.erasures.items() if self._applied.get(who) != at]
        newest = max(map(position, new), default=(0, 0))
        return [run for run in RunDirectory.all(self._state) if position(run.plan.cursor) < newest]

    def apply(self) -> None:
        """Take what was erased out of the frozen datasets; a file that cannot be read is named in the log."""
        read = dict(self._watch.erasures)
        for run in self.pending():
            erased = self._watch.erased_after(run.plan.cursor)
            try:
                if run.dataset.exists() and frozen.covered(run.dataset, erased):
                    if run.outcome is None:
                        run.forget()
                    _erase_completions(run.path, frozen.thaw(run.dataset).dataset, erased)
                    rows = frozen.erase(run.dataset, erased)  # last: a worker that was killed finds it to do again
                    _LOGGER.warning("%s: %d rows of erased principals left its dataset", run.path.name, rows)
            except TrainError as error:
                _LOGGER.error("what was erased may still be in a file, which should be deleted: %s", error)
        self._applied |= read

    def concern(self, run: RunDirectory) -> bool:
        """Whether a round trains on something that was erased since it was frozen."""
        erased = self._watch.erased_after(run.plan.cursor)
        return bool(erased) and run.dataset.exists() and frozen.covered(run.dataset, erased) > 0


def _erase_completions(run: Path, dataset: Dataset, erased: frozenset[str]) -> None:
    """Take completions of erased prompts out of what a version was measured by; its report can be written again."""
    (run / report.PAGE).unlink(missing_ok=True)
    left = {one.prompt_ids for one in dataset.held_out_prompts if erased.isdisjoint(map(name_digest, one.principals))}
    for path in (run / report.COMPLETIONS, run / report.PARENT_COMPLETIONS):
        if path.exists():
            kept = [one.model_dump_json() + "\n" for one in completed.read(path) if one.prompt_ids in left]
            replace_atomically(path, "".join(kept).encode())
