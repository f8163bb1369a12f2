"""Among careless and contrary labelers, weights by reliability make a better reward model."""

import random
from pathlib import Path

from tiny_policies import EOS, saved_policy, tiny_policy

from feedback.labelers import PRIOR_WEIGHT
from feedback.records import Candidate, Comparison, Prompt
from feedback.store import LogEntry
from train import reward_model
from train.batches import RankedPrompt
from train.encoding import Encoder
from train.models import load_tokenizer
from train.rounds.datasets import Dataset, build
from train.settings import RewardModelSettings, WorkerSettings

LIKED = 5
RIGHT = {f"careful-{n}": 0.95 for n in range(6)} | {f"guesses-{n}": 0.5 for n in range(3)}
RIGHT |= {f"inverts-{n}": 0.05 for n in range(4)}
"""How often each labeler prefers the completion with more of the liked token."""
SETTINGS = RewardModelSettings(epochs=2, batch_prompts=16, learning_rate=3e-3)


def completion(rng: random.Random) -> tuple[int, ...]:
    return (*(rng.choice((LIKED, rng.randrange(2, 16))) for _ in range(rng.randrange(3, 7))), EOS)


def pairs(count: int, seed: int) -> list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    """Prompt, better and worse completion."""
    rng = random.Random(seed)
    found: list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = []
    while len(found) < count:
        prompt = tuple(rng.randrange(2, 16) for _ in range(4))
        worse, better = sorted((completion(rng), completion(rng)), key=lambda ids: ids.count(LIKED))
        if worse.count(LIKED) < better.count(LIKED):
            found.append((prompt, better, worse))
    return found


def judged(count: int, judges: int, seed: int) -> list[LogEntry]:
    """Each pair judged by a few of the labelers."""
    rng = random.Random(seed)
    entries: list[LogEntry] = []
    for number, (prompt, *both) in enumerate(pairs(count, seed)):
        for labeler in rng.sample(sorted(RIGHT), judges):
            right = rng.random() < RIGHT[labeler]
            record = Comparison(
                id=f"cmp_{number}_{labeler}",
                created=1.0,
                principal="crowd",
                labeler=labeler,
                prompt=Prompt(text=str(number), token_ids=prompt, tokenizer="same"),
                source="candidates",
                candidates=tuple(
                    Candidate(completion_id=f"c{number}", index=i, text="", token_ids=ids, finish_reason="stop")
                    for i, ids in enumerate(both)
                ),
                ranking=((0,), (1,)) if right else ((1,), (0,)),
            )
            entries.append(LogEntry(f"{len(entries) + 1}-0", record))
    return entries


def test_a_crowd_with_spammers_and_inverters(tmp_path: Path) -> None:
    policy = saved_policy(tmp_path / "policy", tiny_policy(width=32))
    encoder = Encoder(load_tokenizer(policy), "same", window=64, max_completion_tokens=8)
    entries = judged(400, 4, seed=1)
    clean = [RankedPrompt(prompt, (better, worse), ((0, 1),)) for prompt, better, worse in pairs(300, seed=2)]

    def accuracy(dataset: Dataset, name: str) -> float:
        ranked = [one.ranked for one in dataset.training]
        out = tmp_path / name
        measured = reward_model.run(SETTINGS, policy, ranked, out, demonstrations=[], held_out=clean, seed=0)
        return measured["held_out_accuracy"]

    by_reliability = build(entries, [], encoder, WorkerSettings())
    all_alike = build(entries, [], encoder, WorkerSettings(labeler_weights=False))
    trusted = {one.ranked.labeler: one.ranked.weight for one in by_reliability.training}
    assert all(trusted[name] > PRIOR_WEIGHT for name in trusted if name.startswith("careful"))
    assert all(trusted[name] < PRIOR_WEIGHT / 2 for name in trusted if not name.startswith("careful"))
    weighted, plain = accuracy(by_reliability, "weighted"), accuracy(all_alike, "plain")
    assert weighted > 0.75, "found: 0.77 to 0.85 on 250 to 500 pairs of three seeds"
    assert weighted > plain + 0.05, "found: 0.09 to 0.24 more"
