"""What every trainer is given: one random Llama, rankings and prompts in token ids, written to files once."""

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from train.models import save_policy
from train.scalar_model import save_reward_model, scalar_model_from

LAYERS, WIDTH, INNER, HEADS, VOCABULARY, WINDOW = 4, 256, 688, 4, 2048, 1024
COMPLETION_TOKENS = 32
"""Of a completion in a ranking, on average."""
RAGGED = 0.25
"""Lengths in rankings are even between this share below and above their mean."""
PROMPT_TOKENS = SAMPLED_TOKENS = 64
"""Of PPO: of every prompt and of every completion; where lengths are ragged, of the longest."""
SHORTEST_PROMPT = 16
"""Of ragged prompts, whose lengths are even between this and the longest."""
END_PROBABILITY = 1 / 32
"""Of EOS at every token of a ragged completion, about."""

_PAD, _EOS = 0, 1
_SPECIAL = 2


@dataclass(frozen=True)
class Inputs:
    """A directory with all of it.

    Attributes:
        home: The directory.
    """

    home: Path

    @property
    def policy(self) -> Path:
        """The policy, with a tokenizer."""
        return self.home / "policy"

    def ppo(self, *, ragged: bool) -> "PpoInputs":
        """What PPO is given: completions that end by themselves behind prompts of any length, or all of full length."""
        return PpoInputs(self.home / ("ragged" if ragged else "full"))

    @property
    def parameters(self) -> int:
        """Of the policy."""
        return int(json.loads((self.home / "parameters.json").read_text()))

    def write(self, prompts: int) -> None:
        """Write the models, and ``prompts`` prompts of each kind."""
        torch.manual_seed(0)
        policy = AutoModelForCausalLM.from_config(_config(), dtype=torch.float32)
        save_policy(policy, _tokenizer(_EOS), self.policy)
        (self.home / "parameters.json").write_text(str(policy.num_parameters()))
        rng = random.Random(0)
        # EOS is an id beyond the model's vocabulary, so no completion can end early.
        self.ppo(ragged=False).write(policy, VOCABULARY, [_tokens(rng, PROMPT_TOKENS) for _ in range(prompts)])
        _let_end(policy)
        lengths = [rng.randint(SHORTEST_PROMPT, PROMPT_TOKENS) for _ in range(prompts)]
        self.ppo(ragged=True).write(policy, _EOS, [_tokens(rng, length) for length in lengths])

    def rankings(self, completions: int, prompt_tokens: int, prompts: int) -> Path:
        """Write rankings, the best completion first: a JSON list of ``{"prompt": ids, "completions": [ids, …]}``."""
        path = self.home / f"rankings-{completions}-{prompt_tokens}-{prompts}.json"
        rng = random.Random(path.name)
        ranked = [
            {
                "prompt": _tokens(rng, _ragged(rng, prompt_tokens)),
                "completions": [_tokens(rng, _ragged(rng, COMPLETION_TOKENS)) for _ in range(completions)],
            }
            for _ in range(prompts)
        ]
        path.write_text(json.dumps(ranked))
        return path


@dataclass(frozen=True)
class PpoInputs:
    """A directory with a policy, a reward model on the same trunk, and prompts: JSON, a list of token ids each."""

    home: Path

    @property
    def policy(self) -> Path:
        """The policy, with a tokenizer."""
        return self.home / "policy"

    @property
    def reward_model(self) -> Path:
        """As ours saves one."""
        return self.home / "reward-model"

    @property
    def prompts(self) -> Path:
        """A file."""
        return self.home / "prompts.json"

    def write(self, policy: PreTrainedModel, eos: int, prompts: list[list[int]]) -> None:
        """Write all of it; ``eos`` ends a completion."""
        save_policy(policy, _tokenizer(eos), self.policy)
        scorer = scalar_model_from(policy, torch.Generator().manual_seed(0))
        save_reward_model(scorer, _tokenizer(eos), self.reward_model)
        self.prompts.write_text(json.dumps(prompts))


@torch.no_grad()
def _let_end(policy: PreTrainedModel) -> None:
    """Make EOS as probable as ``END_PROBABILITY`` after any token, by a direction that all hidden states share."""
    shared = torch.zeros(WIDTH)
    shared[0] = 1.0
    policy.get_input_embeddings().weight += shared
    tokens = torch.randint(_SPECIAL, VOCABULARY, (8, PROMPT_TOKENS))
    along = policy.get_decoder()(input_ids=tokens).last_hidden_state @ shared
    logit = math.log(VOCABULARY * END_PROBABILITY / (1 - END_PROBABILITY))
    policy.get_output_embeddings().weight[_EOS] = logit / along.mean() * shared


def _config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def _tokenizer(eos: int) -> PreTrainedTokenizerBase:
    words = {f"w{i}": i for i in range(_SPECIAL, VOCABULARY)} | {"<pad>": _PAD, "<eos>": eos}
    wordwise = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=wordwise, eos_token="<eos>", pad_token="<pad>")


def _tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(_SPECIAL, VOCABULARY) for _ in range(count)]


def _ragged(rng: random.Random, mean: int) -> int:
    return round(mean * rng.uniform(1 - RAGGED, 1 + RAGGED))
