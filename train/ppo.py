"""PPO against a reward model, with a KL reward and a pretraining mix: PPO-ptx (InstructGPT §3.5, eq. 2, and §C.4).

    maximize  E[r(x, y) − β log(π(y|x)/π_ref(y|x))]  +  γ_ptx E[log π(pretraining text)]

A bandit: one prompt, one completion, one score at its end. Each iteration samples a batch of episodes from
the policy and passes over it once. Dropout is off in every model. All randomness of an iteration derives
from the seed and the iteration's number, so a resumed run needs no random state to be bit-identical.

Letters in shapes: B episodes, R completion tokens (right-padded).
"""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from deploy.files import replace_atomically
from train.batches import TokenStream
from train.errors import DatasetUnusable, DeviceUnusable
from train.iteration import alarms
from train.iteration import point as ppo_point
from train.iteration.experience import assess, calibrate, experience_of, reward
from train.iteration.learner import Learner
from train.iteration.numbers import of_episodes
from train.iteration.shared_sampling import SharedSampler
from train.iteration.updates import learn
from train.lora import NO_ADAPTERS
from train.models import nonfinite_weights, pad_id_of, save_policy
from train.running import resume
from train.running.devices import CPU, Device
from train.running.progress import Progress, silent
from train.running.stopwatch import Stopwatch
from train.sampling import Episodes, check_room, open_sampler
from train.settings import LoraSettings, PpoSettings

RESUME_FILE = "ppo.pt"
HISTORY_FILE = "ppo-history.jsonl"

OnIteration = Callable[[int, Episodes], dict[str, float]]
"""Called after each iteration with its number and episodes; what it measures joins the iteration's numbers."""


def run(
    settings: PpoSettings,
    policy_dir: Path,
    reference_dir: Path,
    reward_model_dir: Path,
    prompts: Sequence[tuple[int, ...]],
    out: Path,
    *,
    pretraining: TokenStream | None,
    resume_dir: Path | None,
    seed: int,
    tasks: Sequence[str] | None = None,
    device: Device = CPU,
    lora: LoraSettings = NO_ADAPTERS,
    progress: Progress = silent,
    on_iteration: OnIteration | None = None,
) -> dict[str, float]:
    """Train the policy in ``policy_dir`` and write the result (the averaged policy, where ``ema`` is on) to ``out``.

    Args:
        settings: sizes, learning rates, coefficients.
        policy_dir: the policy to start from.
        reference_dir: the policy that the KL reward measures from: the SFT policy.
        reward_model_dir: scores the episodes; the value model starts as its copy.
        prompts: token ids; every pass over them is in a new order.
        out: directory to write; what it holds is overwritten.
        pretraining: text for the mix; may be None only where ``settings.ptx_coef`` is 0.
        resume_dir: where to keep the resume point and the history of all iterations as JSON lines; None keeps none.
        seed: of prompt order, sampling, minibatches and adapters.
        tasks: of each prompt; some numbers are then reported for each task apart.
        device: to compute on.
        lora: adapters to train in place of all weights of policy and value model.
        progress: called after each iteration with its numbers.
        on_iteration: called after each iteration with its episodes.

    Returns:
        The numbers of the last iteration (see ``train.iteration.numbers``), ``score_sd``, ``missing_eos_score`` and
        ``nonfinite_weights``.

    Raises:
        DatasetUnusable: where prompts do not fit the policy or tasks the prompts, or pretraining text is missing.
        ModelUnusable: where a directory does not hold the model it should, or their vocabularies differ.
        ResumePointUnusable: where the resume point is damaged or another run's.
        TrainingDiverged: where a gradient is not finite; the last resume point stands.
        DeviceUnusable: where minibatches cannot be divided among the processes.
        AlarmRaised: where numbers are beyond the limits in ``settings.alarms``, also when such a run is resumed.
    """
    _check(settings, prompts, tasks, pretraining)
    learner = Learner.load(settings, policy_dir, reference_dir, reward_model_dir, device=device, lora=lora, seed=seed)
    _check_shares(settings, learner.ranks.count)
    check_room(learner.policy, prompts, settings.max_completion_tokens)
    text = pretraining.digest() if pretraining else None
    computed = (lora.model_dump(), device.autocast, learner.ranks.count)
    given = (settings.model_dump(exclude={"alarms"}), seed, tuple(map(tuple, prompts)), text, computed)
    fingerprint = resume.fingerprint_of(repr(given), (policy_dir, reference_dir, reward_model_dir))
    resumed = resume_dir is not None and ppo_point.load(resume_dir / RESUME_FILE, fingerprint, learner, pretraining)

    with open_sampler(settings, policy_dir, learner.tokenizer) as alone:
        sampler = SharedSampler(alone, learner.ranks, pad_id_of(learner.tokenizer))
        if not resumed:
            # 0. Scale scores by the reference policy's completions; see whether sampler and trainer agree.
            asked = [prompts[number] for number in _numbers_of(0, settings, len(prompts), seed)]
            calibrate(learner, sampler, asked, settings, _generator(seed, -1))
        alarms.refuse(alarms.check(settings.alarms, learner.history, learner.sampler_gap))

        for iteration in range(learner.iteration, settings.iterations):
            asked_numbers, generator = _numbers_of(iteration, settings, len(prompts), seed), _generator(seed, iteration)
            clock = Stopwatch()

            # 1. Sample one completion for each of the next prompts.
            episodes = sampler.sample(learner.policy, [prompts[number] for number in asked_numbers], generator)
            clock.lap("sample")

            # 2. Score the completions; see what the reference policy and the value model say of every token.
            assessment = assess(learner, episodes, settings)

            # 3. Reward every token with the KL penalty, the last also with the score.
            rewards = reward(assessment, episodes, learner, settings)

            # 4. Advantages and returns.
            experience = experience_of(episodes, assessment, rewards, settings)
            clock.lap("score")

            # 5. One pass in minibatches: policy and pretraining text together, then the value model.
            updates = learn(learner, experience, pretraining, settings, generator)

            # 6. Average the policy over iterations.
            learner.average(settings.ema)
            clock.lap("update")

            # 7. Log.
            numbers = {"iteration": float(iteration), "kl_coef": learner.kl_coef, **clock.seconds, **updates}
            asked_tasks = [tasks[number] for number in asked_numbers] if tasks else None
            numbers |= of_episodes(experience, episodes, assessment, rewards, learner.score_sd, asked_tasks)
            if on_iteration is not None:
                numbers |= on_iteration(iteration, episodes)
            learner.note(numbers)
            progress("ppo", learner.iteration, settings.iterations, numbers)

            # 8. Steer β, where that is asked; the KL of a policy that does not learn yet says nothing of it.
            if numbers["policy_updates"]:
                learner.steer_kl(numbers["kl_to_reference"], settings)

            # 9. Save a resume point; stop where the numbers are not sound.
            unsound = alarms.check(settings.alarms, learner.history, learner.sampler_gap)
            due = learner.iteration % settings.save_every == 0 or learner.iteration == settings.iterations
            if resume_dir and (due or unsound):
                ppo_point.save(resume_dir / RESUME_FILE, fingerprint, learner, pretraining)
                if learner.ranks.first:
                    _write_history(resume_dir / HISTORY_FILE, learner.history)
            alarms.refuse(unsound)

    result = learner.result()
    save_policy(result, learner.tokenizer, out)
    return {
        **learner.history[-1],
        "score_sd": learner.score_sd,
        "missing_eos_score": learner.missing_eos_score,
        "nonfinite_weights": nonfinite_weights(result),
    }


def _numbers_of(iteration: int, settings: PpoSettings, prompts: int, seed: int) -> list[int]:
    """Which of ``prompts`` an iteration asks: the next of an endless row of passes, each in an order of its own."""
    start = iteration * settings.episodes_per_iteration
    numbers = range(start, start + settings.episodes_per_iteration)
    orders = {number // prompts: list(range(prompts)) for number in numbers}
    for number, order in orders.items():
        random.Random(f"{seed}/{number}").shuffle(order)
    return [orders[number // prompts][number % prompts] for number in numbers]


def _generator(seed: int, iteration: int) -> torch.Generator:
    """The source of all randomness of one iteration; −1 is the sampling before the first."""
    return torch.Generator().manual_seed(random.Random(f"{seed}/iteration/{iteration}").getrandbits(63))


def _check(
    settings: PpoSettings,
    prompts: Sequence[tuple[int, ...]],
    tasks: Sequence[str] | None,
    pretraining: TokenStream | None,
) -> None:
    if not prompts:
        raise DatasetUnusable("there are no prompts to sample completions for")
    if tasks is not None and len(tasks) != len(prompts):
        raise DatasetUnusable(f"{len(tasks)} tasks for {len(prompts)} prompts: each prompt needs one")
    if settings.ptx_coef and pretraining is None:
        raise DatasetUnusable(
            f"ppo.ptx_coef is {settings.ptx_coef}, but no pretraining text was given: give some, or set it to 0"
        )


def _check_shares(settings: PpoSettings, processes: int) -> None:
    """All processes must run each model as often, so they get equal shares of episodes and text."""
    episodes = settings.episodes_per_iteration // settings.minibatches
    for name, rows in (("a minibatch", episodes), ("ptx_batch", settings.ptx_batch if settings.ptx_coef else 0)):
        if rows % processes:
            raise DeviceUnusable(
                f"ppo: {rows} rows of {name} cannot be divided equally among {processes} processes: change "
                "episodes_per_iteration, minibatches or ptx_batch"
            )


def _write_history(path: Path, history: Sequence[dict[str, float]]) -> None:
    replace_atomically(path, "".join(json.dumps(numbers) + "\n" for numbers in history).encode())
