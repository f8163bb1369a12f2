"""Win rates by hand: all pairs of a prompt, half of a tie, and intervals over prompts and over runs."""

from pathlib import Path

import pytest

from feedback.records import Candidate, Comparison, Prompt
from train.errors import DatasetUnusable
from train.measures import completed
from train.measures.completed import Completed
from train.measures.win_rate import by_completions, by_labelers


def made(prompt: int, score: float | None, gold: float | None = None) -> Completed:
    return Completed(
        prompt_ids=(prompt,), prompt=f"w{prompt}", completion="", tokens=1, finished=True, score=score, gold=gold
    )


def test_pairs_of_a_prompt_are_averaged_before_prompts_are() -> None:
    ours = [made(1, 2.0), made(1, 0.0), made(2, 5.0)]
    theirs = [made(2, 5.0), made(1, 1.0), made(3, 9.0)]
    found = by_completions([ours], [theirs])
    # Prompt 1: a win and a loss; prompt 2: a tie; prompt 3 is not shared.
    assert found["win_rate_reward_model"] == 0.5
    assert (found["win_rate_reward_model_low"], found["win_rate_reward_model_high"]) == (0.5, 0.5)
    assert "win_rate_gold" not in found


def test_gold_and_the_reward_model_may_disagree() -> None:
    ours = [made(prompt, 1.0, -1.0) for prompt in range(10)]
    theirs = [made(prompt, 0.0, 0.0) for prompt in range(10)]
    found = by_completions([ours], [theirs])
    assert (found["win_rate_reward_model"], found["win_rate_gold"]) == (1, 0)


def test_runs_have_an_interval_of_their_own() -> None:
    theirs = [made(prompt, 0.0) for prompt in range(10)]
    runs = [[made(prompt, 1.0 if prompt < wins else -1.0) for prompt in range(10)] for wins in (6, 7, 8)]
    found = by_completions(runs, [theirs] * 3)
    assert found["win_rate_reward_model"] == pytest.approx(0.7)
    assert found["win_rate_reward_model_seeds_low"] == pytest.approx(0.451586, abs=1e-6)
    # Prompts that are won in every run and prompts that are lost in every run: wider than 30 independent ones.
    assert found["win_rate_reward_model_high"] - found["win_rate_reward_model_low"] > 0.4


def test_versions_without_a_prompt_in_common_are_refused() -> None:
    with pytest.raises(DatasetUnusable, match="no prompt in common"):
        by_completions([[made(1, 1.0)]], [[made(2, 1.0)]])
    with pytest.raises(DatasetUnusable, match="1 runs"):
        by_completions([[made(1, 1.0)]], [])


def compared(prompt: str, best_version: int, *, tie: bool = False, source: str = "task") -> Comparison:
    places = {2: 0, 1: 1}
    ranking = ((0, 1),) if tie else ((places[best_version],), (1 - places[best_version],))
    return Comparison.model_validate(
        {
            "id": "cmp_1",
            "created": 1.0,
            "principal": "alice",
            "labeler": "L",
            "prompt": Prompt(text=prompt),
            "source": source,
            "candidates": (Candidate(text="a", policy_version=2), Candidate(text="b", policy_version=1)),
            "ranking": ranking,
        }
    )


def test_labelers_are_counted_in_blind_comparisons_alone() -> None:
    judged = [compared("p", 2), compared("p", 2), compared("q", 1), compared("q", 1, tie=True)]
    found = by_labelers([*judged, compared("r", 1, source="choices")], 2, 1)
    assert found["win_rate_labelers"] == (1 + 1 + 0 + 0.5) / 4
    assert (found["win_rate_labelers_comparisons"], found["win_rate_labelers_ties"]) == (4, 0.25)
    assert (found["win_rate_labelers_low"], found["win_rate_labelers_high"]) == (0.25, 1)
    assert by_labelers(judged, 3, 1) == {}


def test_completions_are_read_as_they_were_written(tmp_path: Path) -> None:
    kept = [made(1, 0.5, -2.0), made(2, None).model_copy(update={"completion": "line\nbreak \u2028 é"})]
    completed.write(tmp_path / "kept.jsonl", kept)
    assert completed.read(tmp_path / "kept.jsonl") == kept
    (tmp_path / "kept.jsonl").write_text('{"prompt": 1}\n')
    with pytest.raises(DatasetUnusable, match=r"kept\.jsonl"):
        completed.read(tmp_path / "kept.jsonl")
