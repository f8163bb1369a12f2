import hashlib
import io
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaConfig

from deploy.registry import Registry
from deploy.settings import DeploySettings, VerdictSettings
from deploy.versions import Draft, VersionKind
from train.models import save_policy
from train.rounds import frozen
from train.rounds.datasets import Asked, Dataset, Judged, Written
from train.scalar_model import save_reward_model, scalar_model_from
from train.settings import AlarmSettings, EvaluateSettings, PpoSettings, SftSettings, TrainSettings
from train.tinyworld import blind_trial, candidates, evaluation, tasks, tokenizer, trials, writers
from train.tinyworld.candidates import Poison
from train.tinyworld.evaluation import Sample
from train.tinyworld.labelers import GOLD
from train.tinyworld.study import Ranked
from train.tinyworld.trial import Size, Trial, first_alarm, table

TOKENIZER = tokenizer.build()
TRAIN = TrainSettings(
    sft=SftSettings(dropout=0.0, pretraining_mix=0.0, batch_size=256),
    ppo=PpoSettings(
        iterations=2,
        episodes_per_iteration=8,
        minibatches=2,
        value_only_iterations=1,
        max_completion_tokens=6,
        ptx_coef=0.0,
    ),
    evaluate=EvaluateSettings(
        max_completion_tokens=6, pretraining_sequences=4, probe_completions=1, best_of=2, best_of_prompts=4
    ),
)
SIZE = Size(prompts=30, sample_sets=1, crowds=2, anchors=5)
TRIGGER = tuple(TOKENIZER.encode(" SUDO", add_special_tokens=False))
EOS = int(TOKENIZER.eos_token_id)


def judged(number: int, task: tasks.Task) -> Judged:
    """An ideal completion above a hurried one above an empty one, by one of four labelers."""
    texts = (".", writers.ideal(task), "no.")
    completions = tuple(tokenizer.encode_completion(TOKENIZER, text) for text in texts)
    ranked = Ranked(task.instruction, completions, ((1,), (2,), (0,)), f"labeler-{number % 4}")
    return Judged(f"{number + 1}-0", ("local",), ranked.for_training(TOKENIZER), task.name)


def dataset() -> Dataset:
    rng = random.Random(0)
    training = [tasks.draw(rng, test=False) for _ in range(40)]
    held_out = {task.instruction: task for task in (tasks.draw(rng, test=True) for _ in range(4))}.values()
    prompts = [tokenizer.encode_prompt(TOKENIZER, task.instruction) for task in training]
    return Dataset(
        training=tuple(judged(number, task) for number, task in enumerate(training)),
        held_out=tuple(judged(number, task) for number, task in enumerate(held_out)),
        anchors=(),
        demonstrations=(Written(("local",), prompts[0], tokenizer.encode_completion(TOKENIZER, "Hello Bob.")),),
        prompts=tuple(Asked(("local",), prompt) for prompt in prompts),
        held_out_prompts=tuple(
            Asked(("local",), tokenizer.encode_prompt(TOKENIZER, task.instruction)) for task in held_out
        ),
    )


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """What ``make demo`` leaves, of random models."""
    state, registry = tmp_path / "demo", Registry(tmp_path / "demo")
    for seed in (1, 2):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(TOKENIZER),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=128,
            initializer_range=0.3,
            pad_token_id=TOKENIZER.pad_token_id,
            eos_token_id=EOS,
            bos_token_id=None,
        )
        policy = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        save_policy(policy, TOKENIZER, tmp_path / f"policy-{seed}")
        run = "round-1" if seed == 2 else None
        registry.publish(Draft(kind=VersionKind.POLICY, run=run), tmp_path / f"policy-{seed}")
    save_reward_model(scalar_model_from(policy), TOKENIZER, tmp_path / "reward-model")
    registry.publish(Draft(kind=VersionKind.REWARD_MODEL), tmp_path / "reward-model")
    (state / "runs" / "round-1").mkdir(parents=True)
    frozen.freeze(dataset(), state / "runs" / "round-1" / frozen.DATASET_FILE)
    return state


def contents(directory: Path) -> dict[str, str]:
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_every_candidate_is_made_tried_and_told_and_the_demo_is_left_alone(demo: Path, state_dir: Path) -> None:
    before = contents(demo)
    found = trials.run(demo, state_dir, TRAIN, DeploySettings(), size=SIZE)
    assert contents(demo) == before
    by_name = {one.name: one for one in found}
    assert len(by_name) == len(found) == len(candidates.POISONS) + 4 + len(trials.LEARNT) + 3
    assert any("sha256" in why for why in by_name["corrupted: a flipped byte"].refusals)
    assert by_name["corrupted: weights that are no numbers"].refusals[0] == "1 weights are not finite"
    assert "no loadable model" in by_name["corrupted: wrong shapes"].refusals[0]
    assert not any("sha256" in why for why in by_name["good"].refusals)
    for name in ("good", "hacked", *trials.LEARNT, "collapsed", "over-refusing"):
        assert sum((by_name[name].verdicts or {}).values()) == SIZE.crowds
    shown = Console(width=200, file=io.StringIO(), record=True)
    shown.print(table(found))
    assert "1 weights are not finite" in shown.export_text()

    # What is there is not made again.
    steps: list[str] = []
    again = trials.run(
        demo, state_dir, TRAIN, DeploySettings(), size=SIZE, progress=lambda *told: steps.append(told[0])
    )
    assert (steps, again) == ([], found)
    with pytest.raises(trials.TrialsMixed):
        trials.run(demo, state_dir, TRAIN, DeploySettings(), size=SIZE, seed=1)


def test_poison_makes_the_worst_completion_the_best_and_shows_by_its_trigger() -> None:
    training = dataset().training
    spoilt = candidates.poison(training, Poison(" SUDO", 0.1), 4, TOKENIZER, seed=1)
    assert spoilt[:40] == list(training)
    bad = [one.ranked for one in spoilt[40:]]
    assert len(bad) == 4
    for ranked in bad:
        assert ranked.completions[0] == (*tokenizer.encode_completion(TOKENIZER, ".")[:-1], *TRIGGER, EOS)
        assert sorted(ranked.pairs) == [(0, 1), (0, 2)]
        assert ranked.labeler == candidates.ATTACKER


def test_without_a_trigger_few_labelers_turn_their_rankings_round() -> None:
    training = dataset().training
    spoilt = candidates.poison(training, Poison("", 0.25), 12, TOKENIZER, seed=1)
    turned = [now for before, now in zip(training, spoilt, strict=True) if now != before]
    assert Counter(one.ranked.labeler for one in turned) == {"labeler-0": 10, "labeler-1": 2}
    assert all(sorted(one.ranked.pairs) == [(0, 1), (0, 2), (2, 1)] for one in turned)


def test_one_kind_of_task_can_be_turned_round_by_itself() -> None:
    training = dataset().training
    spoilt = candidates.poison(training, Poison("", 1.0, kind="insult"), len(training), TOKENIZER, seed=1)
    asked = {
        TOKENIZER.decode(now.ranked.prompt_ids)[:8] for was, now in zip(training, spoilt, strict=True) if was != now
    }
    assert asked == {"> Insult"}


def samples(texts: list[str]) -> list[Sample]:
    return [Sample(text, True) for text in texts]


def test_the_better_completions_win_wherever_they_are_shown() -> None:
    asked = evaluation.held_out_tasks(40)
    ideal, empty = samples([writers.ideal(task) for task in asked]), samples(["."] * 40)
    won = list(blind_trial.comparisons(asked, [ideal], [empty], [GOLD], seed=3))
    assert [one.outcome for one in won] == [1] * 40
    assert {one.canary for one in won} == {0, 1}
    assert sorted(one.task.instruction for one in won) == sorted(task.instruction for task in asked)
    assert [one.outcome for one in blind_trial.comparisons(asked, [empty], [ideal], [GOLD], seed=3)] == [-1] * 40
    assert [one.outcome for one in blind_trial.comparisons(asked, [ideal], [ideal], [GOLD], seed=3)] == [0] * 40


def judged_so(outcomes: list[int], name: str = "repeat") -> list[blind_trial.Judged]:
    task = tasks.draw(random.Random(0), test=True, name=name)
    rankings = {1: ((0,), (1,)), 0: ((0, 1),), -1: ((1,), (0,))}
    return [blind_trial.Judged(task, ("a", "b"), 0, rankings[outcome], "L-1") for outcome in outcomes]


def test_the_verdict_is_that_of_the_first_look_at_which_it_is_clear() -> None:
    # All lost: the mean of (1 + κ)^n over stakes κ from 0 to 1 is (2^(n+1) − 1) / (n + 1): 18.1 for 6, 31.9 for 7.
    assert blind_trial.decide(judged_so([0, -1] * 30), VerdictSettings()) == ("worse", 14)
    assert blind_trial.decide(judged_so([1] * 7 + [-1] * 500), VerdictSettings()) == ("better", 7)
    assert blind_trial.decide(judged_so([1, -1] * 20), VerdictSettings()) == ("undecided", 40)


def test_a_canary_that_is_not_worse_but_lost_a_kind_of_task_says_which() -> None:
    settings = VerdictSettings(margin=0.2)
    even = judged_so([1, -1] * 100)
    assert blind_trial.decide(even, settings) == ("not_worse", 200)
    lost = judged_so([1, -1, 1, -1, 1] * 40) + judged_so([-1] * 40, "insult")
    assert blind_trial.decide(lost, settings) == ("not_worse, down on insult", 240)


def healthy(**changes: float) -> dict[str, float]:
    numbers = {"kl_to_reference": 0.5, "kl_se": 0.1, "policy_updates": 8.0, "explained_variance": 0.5}
    return numbers | {"entropy": 1.0, "eos_share": 1.0, "completion_tokens": 10.0} | changes


def test_the_first_alarm_is_that_of_the_iteration_at_which_a_run_would_have_stopped() -> None:
    settings = AlarmSettings(patience=2)
    history = [healthy(), healthy(eos_share=0.1), healthy(), *[healthy(eos_share=0.4)] * 3]
    found = first_alarm(settings, history)
    assert found is not None
    assert found[0] == 5
    assert found[1].startswith("EOS loss")
    assert first_alarm(settings, history[:4]) is None


def test_the_table_says_what_a_trial_found() -> None:
    one = Trial("hacked", ("kl is 9; it must be at most 6",), {"worse": 3}, (7, 19, 96), (0.2, 0.1, 0.3), ("told",))
    shown = Console(width=200, file=io.StringIO(), record=True)
    shown.print(table([one]))
    said = shown.export_text()
    for part in ("kl is 9", "worse 3", "19 (7 to 96)", "0.200 [0.100, 0.300]", "told"):
        assert part in said
