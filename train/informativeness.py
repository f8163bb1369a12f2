"""How informative a comparison would be: how unsure a reward model is which completion of a prompt is preferred.

Labelers are asked first where the reward model is least certain (uncertainty sampling, Lewis and Gale 1994, "A
sequential algorithm for training text classifiers"). The completions are sampled as a blind task's would be, so that
all prompts are measured alike, however many completions of them were served.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from train.losses import preference_entropy
from train.models import load_policy, load_tokenizer, pad_id_of
from train.reward_model import score_sequences
from train.sampling import sample_episodes
from train.scalar_model import load_reward_model
from train.settings import EvaluateSettings

COMPLETIONS = 4
"""Sampled of each prompt: six pairs."""


@torch.no_grad()
def run(
    settings: EvaluateSettings,
    policy_dir: Path,
    reward_model_dir: Path,
    prompts: Sequence[tuple[int, ...]],
    *,
    seed: int,
) -> list[float]:
    """Mean entropy, in nats, of the reward model's preference between two of the policy's completions.

    Args:
        settings: temperature and length of the completions.
        policy_dir: the policy labelers are shown.
        reward_model_dir: the reward model.
        prompts: in token ids; one number for each.
        seed: of sampling.

    Raises:
        DatasetUnusable: where a prompt leaves no room for a completion.
        ModelUnusable: where a directory does not hold the model it should.
    """
    if not prompts:
        return []
    tokenizer = load_tokenizer(policy_dir)
    episodes = sample_episodes(
        load_policy(policy_dir),
        [prompt for prompt in prompts for _ in range(COMPLETIONS)],
        eos_id=int(tokenizer.eos_token_id),
        pad_id=pad_id_of(tokenizer),
        max_completion_tokens=settings.max_completion_tokens,
        temperature=settings.temperature,
        generator=torch.Generator().manual_seed(seed),
    )
    sequences = [(*prompt, *rest) for prompt, rest in zip(episodes.prompts, episodes.completions, strict=True)]
    number = {text: place for place, text in enumerate(dict.fromkeys(sequences))}
    which = torch.tensor([number[sequence] for sequence in sequences]).view(-1, COMPLETIONS)
    scores = score_sequences(load_reward_model(reward_model_dir), list(number), pad_id_of(tokenizer))[which]
    nats: list[float] = preference_entropy(scores, which.unsqueeze(2) != which.unsqueeze(1)).tolist()
    return nats
