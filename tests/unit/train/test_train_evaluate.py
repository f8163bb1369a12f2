"""What a version is measured on, against counting by hand and exact cases."""

import math
from pathlib import Path

import pytest
import torch
from tiny_policies import EOS, PAD, saved_policy, tiny_policy, tokenizer

from deploy.gate import policy_gate, reward_model_gate
from deploy.settings import GateSettings
from train import evaluate
from train.batches import RankedPrompt, TokenStream
from train.models import load_policy
from train.reward_model import score_sequences
from train.sampling import Episodes
from train.scalar_model import load_reward_model, save_reward_model, scalar_model_from
from train.settings import EvaluateSettings

PROMPTS = [(2, 3, 4), (5,), (6, 7), (8, 9, 10, 11), (12, 13), (14,)]
SETTINGS = EvaluateSettings(
    prompts=100, max_completion_tokens=6, pretraining_sequences=40, best_of=4, canary_prompts=2, canary_prompt_tokens=5
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


def test_a_policy_is_its_own_reference_and_is_measured_as_counted(policy_dir: Path, reward_model_dir: Path) -> None:
    seen: list[Episodes] = []

    def keep(episodes: Episodes) -> dict[str, float]:
        seen.append(episodes)
        return {"toxicity_rate": 0.25}

    stream = text()
    stream.take(2)
    position = stream.position()
    numbers = evaluate.run(
        SETTINGS,
        policy_dir,
        PROMPTS,
        reference_dir=policy_dir,
        reward_model_dir=reward_model_dir,
        pretraining=stream,
        seed=0,
        measure=keep,
    )
    (episodes,) = seen
    assert sorted(episodes.prompts) == sorted(PROMPTS)
    assert numbers["kl_to_reference"] == pytest.approx(0, abs=1e-5)
    assert numbers["eos_share"] == sum(completion[-1] == EOS for completion in episodes.completions) / 6
    assert numbers["completion_tokens"] == sum(map(len, episodes.completions)) / 6
    sequences = [(*prompt, *rest) for prompt, rest in zip(episodes.prompts, episodes.completions, strict=True)]
    with torch.no_grad():
        scores = score_sequences(load_reward_model(reward_model_dir), sequences, PAD)
        rows = stream.take(40)
        loss = load_policy(policy_dir)(input_ids=rows, labels=rows).loss.item()
    assert numbers["score"] == pytest.approx(scores.mean().item(), abs=1e-5)
    assert numbers["score_se"] == pytest.approx(scores.std().item() / 6**0.5, abs=1e-5)
    assert numbers["pretraining_loss"] == pytest.approx(loss, abs=1e-5)
    assert numbers["toxicity_rate"] == 0.25
    stream.seek(position)
    repeated = evaluate.held_out_loss(load_policy(policy_dir), stream, 40)
    assert repeated == numbers["pretraining_loss"]
    assert stream.position() == position


def test_the_kl_is_that_of_the_sampled_completions(policy_dir: Path, tmp_path: Path) -> None:
    other = saved_policy(tmp_path / "other", tiny_policy(seed=1))
    many = EvaluateSettings(prompts=3000, max_completion_tokens=1)
    numbers = evaluate.run(
        many, policy_dir, [(3, 4)] * 3000, reference_dir=other, reward_model_dir=None, pretraining=None, seed=0
    )
    p, q = (
        load_policy(directory)(input_ids=torch.tensor([[3, 4]])).logits[0, -1].log_softmax(-1)
        for directory in (policy_dir, other)
    )
    exact = (p.exp() * (p - q)).sum().item()
    assert numbers["kl_to_reference"] == pytest.approx(exact, abs=4 * numbers["kl_se"])
    assert numbers["kl_se"] < 0.1 * exact
    assert not {"score", "pretraining_loss"} & numbers.keys()


def test_every_number_the_gates_ask_for_is_there(policy_dir: Path, reward_model_dir: Path) -> None:
    numbers = evaluate.run(
        SETTINGS, policy_dir, PROMPTS, reference_dir=policy_dir, reward_model_dir=None, pretraining=text(), seed=0
    )
    checks = policy_gate(numbers, numbers, GateSettings()).checks
    assert all(check.value is not None for check in checks)
    assert {check.name for check in checks if check.passed} >= {"finite", "kl_to_reference", "pretraining_loss"}
    ranked = [RankedPrompt((3,), ((4, EOS), (5, EOS)), ((0, 1),))]
    measured = evaluate.run_reward_model(reward_model_dir, ranked)
    assert all(check.value is not None for check in reward_model_gate(measured, measured, GateSettings()).checks)


def test_weights_that_are_not_finite_are_all_there_is_to_say(tmp_path: Path) -> None:
    broken = tiny_policy()
    with torch.no_grad():
        broken.get_input_embeddings().weight[3, 3] = math.nan
    directory = saved_policy(tmp_path, broken)
    numbers = evaluate.run(
        SETTINGS, directory, PROMPTS, reference_dir=directory, reward_model_dir=None, pretraining=None, seed=0
    )
    assert numbers == {"nonfinite_weights": 1}


def test_the_best_of_n_is_the_reward_models_choice(policy_dir: Path, reward_model_dir: Path) -> None:
    model = load_reward_model(reward_model_dir)

    def agrees(episodes: Episodes) -> list[float]:
        sequences = [(*prompt, *rest) for prompt, rest in zip(episodes.prompts, episodes.completions, strict=True)]
        with torch.no_grad():
            return [float(score) for score in score_sequences(model, sequences, PAD)]

    def disagrees(episodes: Episodes) -> list[float]:
        return [-worth for worth in agrees(episodes)]

    def indifferent(episodes: Episodes) -> list[float]:
        return [1.0] * len(episodes.completions)

    arguments = (SETTINGS, policy_dir, reward_model_dir, PROMPTS)
    good = evaluate.best_of(*arguments, agrees, seed=0)
    bad = evaluate.best_of(*arguments, disagrees, seed=0)
    assert good["best_of"] == pytest.approx(good["best_possible"])
    assert good["recovered"] == pytest.approx(1)
    assert good["sampled"] < good["best_of"]
    assert bad["best_of"] < bad["sampled"]
    assert bad["recovered"] < 0
    assert math.isnan(evaluate.best_of(*arguments, indifferent, seed=0)["recovered"])


def test_canary_prompts_are_greedy_with_the_log_probabilities_of_a_plain_forward(policy_dir: Path) -> None:
    policy = load_policy(policy_dir)
    canaries = evaluate.canary_prompts(SETTINGS, policy_dir, PROMPTS)
    assert [canary.prompt_token_ids for canary in canaries] == PROMPTS[:2]
    for canary in canaries:
        prompt, completion = canary.prompt_token_ids, canary.completion_token_ids
        logprobs = policy(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert logprobs.argmax(-1).tolist() == list(completion)
        assert list(canary.logprobs) == pytest.approx(logprobs.amax(-1).tolist(), abs=1e-5)
        assert len(completion) == 5 or completion[-1] == EOS


def test_distinct_bigrams_by_hand() -> None:
    assert evaluate.distinct_2([(1, 2, 1, 2), (1, 2), (3,)]) == 2 / 4
    assert evaluate.distinct_2([(1, 2, 3)]) == 1
    assert evaluate.distinct_2([(1,), (2,)]) == 1
