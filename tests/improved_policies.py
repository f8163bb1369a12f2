"""A tiny policy of any family, taken through all of training: SFT, a reward model, PPO."""

from pathlib import Path

from tiny_policies import EOS, saved_policy, tiny_policy

from train import ppo, reward_model, sft
from train.batches import Demonstrated, RankedPrompt, TokenStream
from train.settings import PpoSettings, RewardModelSettings, SftSettings

LIKED, DISLIKED = 5, 6
PROMPTS = [(3, 4, 7), (8,), (9, 10, 11, 12), (13, 2), (14, 15, 3, 3, 4), (7, 7)]
WRITTEN: list[Demonstrated] = [(prompt, (LIKED, 2 + number, EOS)) for number, prompt in enumerate(PROMPTS)]
RANKED = [
    RankedPrompt(prompt, ((LIKED, 7, EOS), (8, 9, 10, EOS), (DISLIKED, EOS)), pairs=((0, 1), (0, 2), (1, 2)))
    for prompt in PROMPTS
]
SFT = SftSettings(epochs=6, batch_size=4, learning_rate=1e-2, dropout=0.1, pretraining_batch=2)
REWARD_MODEL = RewardModelSettings(epochs=12, batch_prompts=4, learning_rate=1e-2, warmup_steps=0)
PPO = PpoSettings(
    iterations=3,
    episodes_per_iteration=8,
    minibatches=2,
    policy_lr=3e-3,
    policy_lr_warmup_iterations=0,
    value_lr=3e-3,
    value_only_iterations=1,
    max_completion_tokens=5,
    ptx_coef=0.1,
    ptx_batch=2,
    save_every=1,
)


def text() -> TokenStream:
    """Pretraining text."""
    return TokenStream([[3, 5, 7, 9, 11, 13, EOS], [2, 4, 6, 8, EOS]], sequence_length=8, seed=0)


def improve(home: Path, family: str, *, width: int = 16) -> dict[str, dict[str, float]]:
    """Take a policy of ``family`` through the stages, each into a directory of its name; returns their figures."""
    saved_policy(home / "policy", tiny_policy(family, width=width), family)
    return {
        "sft": sft.run(SFT, home / "policy", WRITTEN, home / "sft", pretraining=text(), seed=0),
        "reward_model": reward_model.run(
            REWARD_MODEL, home / "sft", RANKED, home / "reward_model", demonstrations=WRITTEN, held_out=RANKED, seed=0
        ),
        "ppo": ppo.run(
            PPO,
            home / "sft",
            home / "sft",
            home / "reward_model",
            PROMPTS,
            home / "ppo",
            pretraining=text(),
            resume_dir=None,
            seed=0,
        ),
    }
