"""Two versions measured side by side: means over seeds, and win rates of what they completed."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from deploy.versions import Manifest, Version, VersionKind
from feedback.records import Candidate, Comparison, Prompt
from train.measures import completed, side_by_side
from train.measures.completed import Completed

SCORES = {(1, 0): (1.0, 2.0), (1, 1): (1.0, 0.0), (2, 0): (0.0, 2.0), (2, 1): (0.0, 1.0)}
"""Of two prompts' completions, by version and seed."""


def version(number: int) -> Version:
    manifest = Manifest(
        kind=VersionKind.POLICY, version=number, created=datetime.now(UTC), code_version="", packages={}, files={}
    )
    return Version(manifest, Path("nowhere"))


def measure(one: Version, seed: int, kept: Path) -> dict[str, float]:
    def said(place: int, score: float) -> Completed:
        return Completed(prompt_ids=(place,), prompt="", completion="", tokens=1, finished=True, score=score)

    completed.write(kept, [said(place, score) for place, score in enumerate(SCORES[one.number, seed])])
    return {"nonfinite_weights": 0.0, "eos_share": 0.5 + 0.2 * seed} | ({"score": 1.0} if seed == 0 else {})


def judged(winner: int) -> Comparison:
    return Comparison(
        id=f"cmp_{winner}",
        created=1,
        principal="ann",
        labeler="ann",
        prompt=Prompt(text="hello"),
        candidates=tuple(Candidate(text=str(n), policy_version=n, index=n) for n in (1, 2)),
        ranking=((winner - 1,), (2 - winner,)),
        source="task",
        task_id="task_1",
    )


def test_figures_are_means_over_seeds_of_what_every_seed_measured() -> None:
    figures = side_by_side.run(measure, version(1), None, [0, 1], ())
    assert figures == {"nonfinite_weights": 0.0, "eos_share": pytest.approx(0.6)}


def test_win_rates_are_by_completions_and_by_labelers() -> None:
    figures = side_by_side.run(measure, version(1), version(2), [0, 1], [judged(1)])
    # Seed 0: one win and one tie, .75; seed 1: one win and one loss, .5.
    assert figures["win_rate_reward_model"] == pytest.approx(0.625)
    assert {"win_rate_reward_model_low", "win_rate_reward_model_seeds_low"} <= figures.keys()
    assert figures["win_rate_labelers_comparisons"] == 1
