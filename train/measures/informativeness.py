"""How informative a comparison would be: how unsure a reward model is which completion of a prompt is preferred.

Labelers are asked first where the reward model is least certain (uncertainty sampling, Lewis and Gale 1994, "A
sequential algorithm for training text classifiers"). An ensemble also tells what it does not know from what people do
not agree on: there they are asked where its heads disagree (for rewards: Christiano et al. 2017, arXiv 1706.03741,
§2.2.4). The completions are sampled as a blind task's would be, so that
all prompts are measured alike, however many completions of them were served.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from train.losses import disagreement, preference_entropy
from train.models import load_policy, load_tokenizer, pad_id_of
from train.packing import packed_scores
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
    """How unsure the reward model is which of two of the policy's completions is preferred, in nats, mean over pairs.

    Of one head, the entropy of the preference; of several, the SD over heads of the difference of scores.

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
    answered = list(zip(episodes.prompts, episodes.completions, strict=True))
    number = {one: place for place, one in enumerate(dict.fromkeys(answered))}
    which = torch.tensor([number[one] for one in answered]).view(-1, COMPLETIONS)
    differs = which.unsqueeze(2) != which.unsqueeze(1)
    model = load_reward_model(reward_model_dir)
    scores = packed_scores(model, list(number), pad_id_of(tokenizer))[which]
    unsure = disagreement(scores, differs) if model.heads > 1 else preference_entropy(scores.squeeze(2), differs)
    nats: list[float] = unsure.tolist()
    return nats
