"""What a version is measured on, against counting by hand and exact cases."""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tiny_policies import EOS, PAD, saved_policy, tiny_policy, tokenizer
from tokenizers.processors import TemplateProcessing

from deploy.gate import policy_gate, reward_model_gate
from deploy.settings import GateSettings
from train import evaluate
from train.batches import RankedPrompt, TokenStream
from train.errors import DatasetUnusable
from train.measures import completed
from train.measures.probes import Probe
from train.measures.world import World
from train.models import load_policy, save_policy
from train.reward_model import score_completions
from train.scalar_model import load_reward_model, save_reward_model, scalar_model_from
from train.settings import EvaluateSettings

PROMPTS = [(2, 3, 4), (5,), (6, 7), (8, 9, 10, 11), (12, 13), (14,)]
SETTINGS = EvaluateSettings(
    prompts=100,
    max_completion_tokens=6,
    pretraining_sequences=40,
    best_of=4,
    probe_completions=3,
    canary_prompts=2,
    canary_prompt_tokens=5,
)


@pytest.fixture
def policy_dir(tmp_path: Path) -> Path:
    return saved_policy(tmp_path / "policy")


@pytest.fixture
def reward_model_dir(tmp_path: Path) -> Path:
    model = scalar_model_from(tiny_policy(seed=2), torch.Generator().manual_seed(0))
    save_reward_model(model, tokenizer(), tmp_path / "rm")
    return tmp_path / "rm"


def text() -> TokenStream:
    return TokenStream([[2, 3, 4, 5, EOS], [6, 7, EOS], [8, 9, 10, 11, 12, EOS]], sequence_length=7, seed=0)


def test_a_policy_is_its_own_reference_and_is_measured_as_counted(
    policy_dir: Path, reward_model_dir: Path, tmp_path: Path
) -> None:
    stream = text()
    stream.take(2)
    position = stream.position()
    sampled: list[tuple[int, ...]] = []

    def gold(prompt: Sequence[int], completion: Sequence[int]) -> float | None:
        sampled.append(tuple(completion))
        return None if tuple(prompt) == (5,) else float(len(prompt))

    numbers = evaluate.run(
        SETTINGS,
        policy_dir,
        PROMPTS,
        reference_dir=policy_dir,
        reward_model_dir=reward_model_dir,
        pretraining=stream,
        seed=0,
        world=World(gold=gold),
        completions=tmp_path / "completions.jsonl",
    )
    completions = sampled[: len(PROMPTS)]  # before those of which the reward model chooses
    kept = completed.read(tmp_path / "completions.jsonl")
    assert sorted(one.prompt_ids for one in kept) == sorted(PROMPTS)
    assert [one.prompt for one in kept] == [" ".join(f"w{i}" for i in one.prompt_ids) for one in kept]
    said = [" ".join(f"w{i}" for i in ids if i not in (PAD, EOS)) for ids in completions]
    assert [one.completion for one in kept] == said
    assert [one.tokens for one in kept] == list(map(len, completions))
    assert [one.finished for one in kept] == [ids[-1] == EOS for ids in completions]
    assert numbers["kl_to_reference"] == pytest.approx(0, abs=1e-5)
    assert numbers["eos_share"] == sum(completion[-1] == EOS for completion in completions) / 6
    assert numbers["completion_tokens"] == sum(map(len, completions)) / 6
    assert numbers["gold"] == (3 + 2 + 4 + 2 + 1) / 5
    answered = [(one.prompt_ids, rest) for one, rest in zip(kept, completions, strict=True)]
    with torch.no_grad():
        scores = score_completions(load_reward_model(reward_model_dir), answered, PAD)
        rows = stream.take(40)
        loss = load_policy(policy_dir)(input_ids=rows, labels=rows).loss.item()
    assert [one.score for one in kept] == pytest.approx(scores.tolist(), abs=1e-5)
    assert numbers["score"] == pytest.approx(scores.mean().item(), abs=1e-5)
    assert numbers["score_se"] == pytest.approx(scores.std().item() / 6**0.5, abs=1e-5)
    assert numbers["pretraining_loss"] == pytest.approx(loss, abs=1e-5)
    stream.seek(position)
    repeated = evaluate.held_out_loss(load_policy(policy_dir), stream, 40)
    assert repeated == numbers["pretraining_loss"]
    assert stream.position() == position


def test_the_kl_is_that_of_the_sampled_completions(policy_dir: Path, tmp_path: Path) -> None:
    other = saved_policy(tmp_path / "other", tiny_policy(seed=1))
    many = EvaluateSettings(prompts=2000, max_completion_tokens=1)
    numbers = evaluate.run(
        many, policy_dir, [(3, 4)] * 2000, reference_dir=other, reward_model_dir=None, pretraining=None, seed=0
    )
    p, q = (
        load_policy(directory)(input_ids=torch.tensor([[3, 4]])).logits[0, -1].log_softmax(-1)
        for directory in (policy_dir, other)
    )
    exact = (p.exp() * (p - q)).sum().item()
    assert numbers["kl_to_reference"] == pytest.approx(exact, abs=4 * numbers["kl_se"])
    assert numbers["kl_k3"] == pytest.approx(exact, rel=0.2)
    assert numbers["kl_se"] < 0.1 * exact
    assert not {"score", "gold", "pretraining_loss"} & numbers.keys()


def test_every_number_the_gates_ask_for_is_there(policy_dir: Path, reward_model_dir: Path) -> None:
    numbers = evaluate.run(
        SETTINGS, policy_dir, PROMPTS, reference_dir=policy_dir, reward_model_dir=None, pretraining=text(), seed=0
    )
    checks = policy_gate(numbers, numbers, GateSettings()).checks
    assert all(check.value is not None for check in checks)
    assert {check.name for check in checks if check.passed} >= {"finite", "kl_to_reference", "pretraining_loss"}
    ranked = [RankedPrompt((prompt,), ((4, EOS), (5, EOS)), ((0, 1),)) for prompt in (2, 3)]
    measured = evaluate.run_reward_model(reward_model_dir, ranked, anchors=ranked)
    checks = reward_model_gate(measured, measured, GateSettings()).checks
    assert all(check.value is not None for check in checks)
    assert {check.name for check in checks} >= {"anchor_accuracy", "trigger_drift", "best_of_win_rate"}


def test_a_reward_model_is_right_about_what_it_scores_higher(reward_model_dir: Path) -> None:
    with torch.no_grad():
        a, b = score_completions(
            load_reward_model(reward_model_dir), [((3,), (4, EOS)), ((3,), (5, EOS))], PAD
        ).tolist()
    agreed = ((0, 1),) if a > b else ((1, 0),)
    agreeing = RankedPrompt((3,), ((4, EOS), (5, EOS)), agreed)
    contrary = RankedPrompt((3,), ((4, EOS), (5, EOS)), (agreed[0][::-1],))
    found = evaluate.run_reward_model(reward_model_dir, [agreeing, contrary], anchors=[agreeing], own=[contrary])
    assert (found["held_out_accuracy"], found["anchor_accuracy"], found["own_accuracy"]) == (0.5, 1, 0)
    assert found["own_accuracy_low"] == 0 < found["own_accuracy_high"] < 1


def test_weights_that_are_not_finite_are_all_there_is_to_say(tmp_path: Path) -> None:
    broken = tiny_policy()
    with torch.no_grad():
        broken.get_input_embeddings().weight[3, 3] = math.nan
    directory = saved_policy(tmp_path, broken)
    numbers = evaluate.run(
        SETTINGS, directory, PROMPTS, reference_dir=directory, reward_model_dir=None, pretraining=None, seed=0
    )
    assert numbers == {"nonfinite_weights": 1}


def test_without_a_prompt_there_is_nothing_to_measure_on(policy_dir: Path) -> None:
    with pytest.raises(DatasetUnusable, match="no held-out prompts"):
        evaluate.run(
            SETTINGS, policy_dir, [], reference_dir=policy_dir, reward_model_dir=None, pretraining=None, seed=0
        )


def test_probes_are_asked_several_times_each(policy_dir: Path) -> None:
    judged: list[str] = []

    def judge(completion: str) -> dict[str, bool]:
        judged.append(completion)
        return {"toxicity_rate": len(completion) % 2 == 0}

    numbers = evaluate.run(
        SETTINGS,
        policy_dir,
        PROMPTS,
        reference_dir=policy_dir,
        reward_model_dir=None,
        pretraining=None,
        seed=0,
        world=World(probes=tuple(Probe(prompt, judge) for prompt in PROMPTS)),
    )
    assert len(judged) == 3 * len(PROMPTS)
    assert len(set(judged)) > len(PROMPTS)
    share = sum(len(completion) % 2 == 0 for completion in judged) / len(judged)
    assert 0 < share < 1
    assert numbers["toxicity_rate"] == pytest.approx(share)
    assert numbers["toxicity_rate_low"] < share < numbers["toxicity_rate_high"]


def test_two_versions_are_sampled_independently_and_each_the_same_way_again(policy_dir: Path, tmp_path: Path) -> None:
    nearly = tiny_policy()
    with torch.no_grad():
        nearly.get_input_embeddings().weight[2, 0] += 1e-6  # as good as equal: common random numbers would show
    other = saved_policy(tmp_path / "other", nearly)

    def completions(directory: Path, name: str) -> list[str]:
        evaluate.run(
            SETTINGS,
            directory,
            PROMPTS * 10,
            reference_dir=policy_dir,
            reward_model_dir=None,
            pretraining=None,
            seed=0,
            completions=tmp_path / name,
        )
        return [one.completion for one in completed.read(tmp_path / name)]

    first, again, others = completions(policy_dir, "a"), completions(policy_dir, "b"), completions(other, "c")
    assert first == again
    assert sum(mine == theirs for mine, theirs in zip(first, others, strict=True)) < 30


def test_progress_reaches_its_end_and_what_it_raises_ends_the_measuring(
    policy_dir: Path, reward_model_dir: Path
) -> None:
    seen: list[tuple[str, int, int]] = []

    def progress(stage: str, done: int, total: int, numbers: dict[str, float]) -> None:
        seen.append((stage, done, total))
        if stop:
            raise KeyboardInterrupt

    def measure() -> None:
        evaluate.run(
            SETTINGS,
            policy_dir,
            PROMPTS * 30,
            reference_dir=policy_dir,
            reward_model_dir=reward_model_dir,
            pretraining=None,
            seed=0,
            world=World((Probe((2,), lambda text: {}),), lambda prompt, completion: 0.0),
            progress=progress,
        )

    stop = False
    measure()
    # 100 prompts, a probe three times, and four completions of each of 64 prompts, 128 a part.
    assert seen == [("evaluate", done, 359) for done in (100, 103, 231, 359)]
    stop = True
    with pytest.raises(KeyboardInterrupt):
        measure()
    assert len(seen) == 5


def test_the_best_of_n_is_the_reward_models_choice() -> None:
    # Two prompts of three completions, (score, worth): the choice is the first of one and the third of the other.
    worth = [(2.0, 1.0), (1.0, 4.0), (0.0, 1.0), (0.0, 0.0), (1.0, 3.0), (2.0, 6.0)]
    found = evaluate.best_of(worth, 3)
    assert found == {
        "best_of_sampled": 2.5,
        "best_of_chosen": 3.5,
        "best_of_possible": 5.0,
        "best_of_recovered": pytest.approx(0.4),
        "own_accuracy": 4
        / 5,  # of the five pairs that differ in worth, the one of the first prompt's first two is wrong
    }
    assert "best_of_recovered" not in evaluate.best_of([(1.0, 2.0), (0.0, 2.0)], 2)


def test_canary_prompts_are_greedy_with_the_log_probabilities_of_a_plain_forward(policy_dir: Path) -> None:
    policy = load_policy(policy_dir)
    canaries = evaluate.canary_prompts(SETTINGS.model_copy(update={"canary_prompts": 6}), policy_dir, PROMPTS)
    assert sorted(canary.prompt_token_ids for canary in canaries) == sorted(PROMPTS)
    for canary in canaries:
        prompt, completion = canary.prompt_token_ids, canary.completion_token_ids
        logprobs = policy(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert logprobs.argmax(-1).tolist() == list(completion)
        assert list(canary.logprobs) == pytest.approx(logprobs.amax(-1).tolist(), abs=1e-5)
        assert len(completion) == 5 or completion[-1] == EOS


def test_a_canary_prompt_that_rounding_might_decide_comes_last(policy_dir: Path) -> None:
    policy, asked = load_policy(policy_dir), [(a, b) for a in range(2, 16) for b in range(2, 16)]
    canaries = evaluate.canary_prompts(SETTINGS.model_copy(update={"canary_prompts": 1000}), policy_dir, asked)
    sure = []
    for canary in canaries:
        ids = (*canary.prompt_token_ids, *canary.completion_token_ids)
        best, second = policy(input_ids=torch.tensor([ids])).logits[0, 1:-1].topk(2).values.unbind(1)
        sure.append((best - second).min().item() >= evaluate.NEAR_TIE)
    assert 100 < sum(sure) < len(asked) - 2
    assert sure == sorted(sure, reverse=True)
    assert [one.prompt_token_ids for one in canaries[: sum(sure)]] == sorted(
        one.prompt_token_ids for one in canaries[: sum(sure)]
    ), "otherwise in the order given"
    assert evaluate.canary_prompts(SETTINGS, policy_dir, asked) == canaries[:2]


def test_drawn_canary_prompts_are_ordinary_tokens_that_fit_and_the_same_for_every_policy(tmp_path: Path) -> None:
    many = SETTINGS.model_copy(update={"canary_prompts": 20, "canary_prompt_tokens": 52})
    drawn = set[tuple[int, ...]]()
    for seed in range(2):
        policy = saved_policy(tmp_path / str(seed), tiny_policy(seed=seed))
        canaries = evaluate.canary_prompts(many, policy)
        assert canaries == evaluate.canary_prompts(many, policy)
        assert len({len(one.prompt_token_ids) for one in canaries}) > 5
        drawn |= {one.prompt_token_ids for one in canaries}
    assert len(drawn) < 60, "the two policies are asked much the same"
    assert max(map(len, drawn)) == 64 - 52, "as long as the window leaves room for"
    assert {token for prompt in drawn for token in prompt} == set(range(2, 16))


def test_drawn_canary_prompts_begin_as_the_tokenizer_begins(tmp_path: Path) -> None:
    words = tokenizer()
    words.add_special_tokens({"bos_token": "w2"})
    words.backend_tokenizer.post_processor = TemplateProcessing(single="w2 $A", special_tokens=[("w2", 2)])
    save_policy(tiny_policy(), words, tmp_path)
    for canary in evaluate.canary_prompts(SETTINGS, tmp_path):
        assert canary.prompt_token_ids[0] == 2 and 2 not in canary.prompt_token_ids[1:]


def test_distinct_shares_by_hand() -> None:
    assert evaluate.distinct([(1, 2, 1, 2), (1, 2), (3,)], 2) == 2 / 4
    assert evaluate.distinct([(1, 2, 1, 2), (1, 2), (3,)], 1) == 3 / 7
    assert evaluate.distinct([(1, 2, 3)], 2) == 1
    assert evaluate.distinct([(1,), (2,)], 2) == 1
