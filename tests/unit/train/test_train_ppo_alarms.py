"""Alarms in real runs: a policy that collapses is stopped, keeps its resume point, and goes on where limits change."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_ppo import Ran, TinyPpo, logprobs_of, without_times
from transformers import PreTrainedModel

from train import ppo
from train.errors import AlarmRaised
from train.models import load_policy
from train.sampling import Episodes, Sampler, open_sampler
from train.settings import AlarmSettings

COLLAPSING = {"policy_lr": 0.3, "iterations": 8, "save_every": 100}
OFF = AlarmSettings(patience=0)
STRICT = AlarmSettings(patience=2)


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Ran]:
    return TinyPpo(tmp_path).run


def test_a_collapsing_run_stops_and_goes_on_only_where_the_limits_change(
    run: Callable[..., Ran], tmp_path: Path
) -> None:
    _, whole, _ = run("whole", **COLLAPSING, alarms=OFF)
    with pytest.raises(AlarmRaised, match="entropy collapse"):
        run("stopped", **COLLAPSING, alarms=STRICT)
    done = len((tmp_path / "stopped" / ppo.HISTORY_FILE).read_text().splitlines())
    assert 2 <= done < 8
    assert not (tmp_path / "stopped" / "out").exists()

    point = (tmp_path / "stopped" / ppo.RESUME_FILE).read_bytes()
    with pytest.raises(AlarmRaised, match="entropy collapse"):
        run("stopped", **COLLAPSING, alarms=STRICT)
    assert (tmp_path / "stopped" / ppo.RESUME_FILE).read_bytes() == point  # not one iteration further

    _, resumed, episodes = run("stopped", **COLLAPSING, alarms=OFF)
    assert len(episodes) == 8 - done
    assert [without_times(numbers) for numbers in resumed] == [without_times(numbers) for numbers in whole]


class Biased:
    """Samples soundly, and says that each token was ``times`` as probable as it was."""

    def __init__(self, sampler: Sampler, times: float) -> None:
        self.sampler, self.times = sampler, times

    def sample(self, policy: PreTrainedModel, prompts: Sequence[Sequence[int]], generator: torch.Generator) -> Episodes:
        episodes = self.sampler.sample(policy, prompts, generator)
        episodes.logprobs[episodes.batch.completion_mask] += math.log(self.times)
        return episodes


def bias(monkeypatch: pytest.MonkeyPatch, times: float) -> None:
    @contextmanager
    def open_biased(*arguments: Any) -> Iterator[Sampler]:
        with open_sampler(*arguments) as sampler:
            yield Biased(sampler, times)

    monkeypatch.setattr("train.ppo.open_sampler", open_biased)


def test_a_sampler_that_differs_from_the_trainer_is_refused_before_the_first_iteration(
    run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bias(monkeypatch, 3.0)
    with pytest.raises(AlarmRaised, match=r"sampler gap.* \(1\.099, limit 0\.05\)"):
        run()
    assert not (tmp_path / "run" / ppo.HISTORY_FILE).exists()


def test_where_the_sampler_is_a_little_off_the_trainers_own_log_probabilities_count(
    run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sound, _, _ = run("sound", iterations=1, minibatches=1)
    bias(monkeypatch, 1.04)
    metrics, (numbers,), (episodes,) = run("biased", iterations=1, minibatches=1)
    assert numbers["sampler_gap"] == pytest.approx(math.log(1.04), abs=1e-4)
    policy, reference = load_policy(tmp_path / "policy"), load_policy(tmp_path / "reference")
    pairs = list(zip(episodes.prompts, episodes.completions, strict=True))
    kls = [sum(logprobs_of(policy, *pair)) - sum(logprobs_of(reference, *pair)) for pair in pairs]
    assert numbers["kl_to_reference"] == pytest.approx(sum(kls) / 8, abs=1e-4)
    assert numbers["update_kl"] == pytest.approx(0, abs=1e-6)  # measured from the trainer's own
    # Every token weighs 1/1.04, and so does the clipped loss of every token.
    assert metrics["policy_loss"] == pytest.approx(sound["policy_loss"] / 1.04, abs=1e-5)
    assert metrics["clipped_share"] == 0


def test_a_token_weighs_no_more_than_the_limit(run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    tolerant = AlarmSettings(max_sampler_gap=9.0)
    sound, _, _ = run("sound", iterations=1, minibatches=1)
    bias(monkeypatch, 0.2)  # each token was five times as probable as the sampler says
    for limit, weight in ((2.0, 2.0), (9.0, 5.0)):
        changes = {"importance_limit": limit, "alarms": tolerant}
        metrics, _, _ = run(f"limit-{limit}", iterations=1, minibatches=1, **changes)
        assert metrics["policy_loss"] == pytest.approx(weight * sound["policy_loss"], abs=1e-5)


def test_a_sampler_that_goes_wrong_later_is_refused_though_no_policy_is_trained_on_it(
    run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each token three times as probable as it was looks as if the policy were far from the one that sampled."""

    @contextmanager
    def open_failing(*arguments: Any) -> Iterator[Sampler]:
        with open_sampler(*arguments) as sampler:
            failing, sampled = Biased(sampler, 3.0), itertools.count()

            class Failing:
                def sample(self, *asked: Any) -> Episodes:
                    return (sampler if next(sampled) < 2 else failing).sample(*asked)

            yield Failing()

    monkeypatch.setattr("train.ppo.open_sampler", open_failing)
    with pytest.raises(AlarmRaised, match=r"sampler gap.* \(1\.099, limit 0\.05\)"):
        run(target_kl=0.1, iterations=4)
