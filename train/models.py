"""The four models on disk and in memory: policy, reference policy, reward model, value model.

A policy is any Hugging Face causal language model. A reward model and a value model are its trunk with a
scalar head (InstructGPT §3.5: "starting from the SFT model with the final unembedding layer removed").

Letters in shapes: B sequences, P prompt tokens (left-padded), R completion tokens (right-padded),
T = P + R, d hidden size, V vocabulary.
"""

import copy
import math
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from train.batches import Batch
from train.errors import ModelUnusable

HEAD_FILE = "head.safetensors"
"""Holds a scalar head (weight, bias, shift); a directory with it is a reward model, without it a policy."""


def load_policy(directory: Path) -> PreTrainedModel:
    """The causal language model in ``directory``: fp32, evaluation mode (no dropout), its own code only.

    Raises ModelUnusable where there is none, or it is a reward model.
    """
    if is_reward_model(directory):
        raise ModelUnusable(f"{directory} holds a reward model ({HEAD_FILE}), not a policy")
    return _load(AutoModelForCausalLM, directory)


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in ``directory``. Raises ModelUnusable where it is missing or has no end-of-sequence token."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelUnusable(f"{directory} holds no usable tokenizer: {error}") from error
    if tokenizer.eos_token_id is None:
        raise ModelUnusable(f"the tokenizer in {directory} has no end-of-sequence token, so no completion could end")
    return tokenizer


def pad_id_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to pad with: the tokenizer's, else its EOS. Which one never matters: masks come from lengths, not ids."""
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def save_policy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write config.json, safetensors weights, tokenizer and chat template into ``directory``."""
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def completion_logits(policy: PreTrainedModel, batch: Batch, temperature: float = 1.0) -> Tensor:
    """Logits of every completion token, divided by the sampling ``temperature``: [B, R, V].

    The unembedding runs over the R positions that predict completion tokens only, never over the prompt.
    """
    predicting = torch.arange(batch.prompt_length - 1, batch.input_ids.shape[1] - 1)
    logits = policy(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        logits_to_keep=predicting,
        use_cache=False,
    ).logits
    return cast(Tensor, logits) / temperature


def pretraining_loss(policy: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Mean next-token cross-entropy in nats of packed sequences [B, T]; the first token of each is not predicted."""
    logits = policy(input_ids=tokens, logits_to_keep=torch.arange(tokens.shape[1] - 1), use_cache=False).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


class ScalarModel(nn.Module):
    """A trunk with a linear head to one number per token; reward model and value model are both this.

    Attributes:
        trunk: a Hugging Face model that returns ``last_hidden_state`` [B, T, d].
        head: d → 1, weights drawn with SD 1/√(d+1) and bias 0 (Stiennon et al. 2020, app. B.1).
        shift: subtracted from every output; set so that demonstrations score 0 on average (InstructGPT §C.2).
    """

    shift: Tensor

    def __init__(self, trunk: PreTrainedModel, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.trunk = trunk
        width = int(trunk.config.hidden_size)
        self.head = nn.Linear(width, 1)
        nn.init.normal_(self.head.weight, std=1 / math.sqrt(width + 1), generator=generator)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("shift", torch.zeros(()))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        """One number per token, [B, T]; meaningless where ``attention_mask`` [B, T] is 0."""
        hidden = self._hidden(input_ids, attention_mask, position_ids)
        return cast(Tensor, self.head(hidden)).squeeze(-1) - self.shift

    def score(self, batch: Batch) -> Tensor:
        """The number at each sequence's last real token, [B]: a reward model's score."""
        hidden = self._hidden(batch.input_ids, batch.attention_mask, batch.position_ids)
        last = hidden[torch.arange(len(hidden)), batch.last]
        return cast(Tensor, self.head(last)).squeeze(-1) - self.shift

    def values(self, batch: Batch) -> Tensor:
        """The number before each completion token was chosen, [B, R]: a value model's estimate of what is to come."""
        hidden = self._hidden(batch.input_ids, batch.attention_mask, batch.position_ids)
        return cast(Tensor, self.head(hidden[:, batch.prompt_length - 1 : -1])).squeeze(-1) - self.shift

    @torch.no_grad()
    def scale(self, factor: float) -> None:
        """Multiply everything this model says by ``factor``."""
        for weight in (self.head.weight, self.head.bias, self.shift):
            weight.mul_(factor)

    def _hidden(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        output = self.trunk(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
        )
        return cast(Tensor, output.last_hidden_state)


def scalar_model_from(policy: PreTrainedModel, generator: torch.Generator | None = None) -> ScalarModel:
    """A fresh head on a copy of a policy's trunk, in evaluation mode."""
    return ScalarModel(copy.deepcopy(policy.get_decoder()), generator).eval()


def is_reward_model(directory: Path) -> bool:
    """Whether ``directory`` holds a reward model rather than a policy."""
    return (directory / HEAD_FILE).exists()


def save_reward_model(model: ScalarModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write the trunk (config.json, model.safetensors), the head (head.safetensors) and the tokenizer files."""
    model.trunk.save_pretrained(directory)
    head = {"weight": model.head.weight, "bias": model.head.bias, "shift": model.shift}
    save_file({name: tensor.detach().contiguous() for name, tensor in head.items()}, directory / HEAD_FILE)
    tokenizer.save_pretrained(directory)


def load_reward_model(directory: Path) -> ScalarModel:
    """What ``save_reward_model`` wrote: fp32, evaluation mode. Raises ModelUnusable where it is none."""
    model = ScalarModel(_load(AutoModel, directory))
    try:
        head = load_file(directory / HEAD_FILE)
        with torch.no_grad():
            model.head.weight.copy_(head["weight"])
            model.head.bias.copy_(head["bias"])
            model.shift.copy_(head["shift"])
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise ModelUnusable(f"{directory / HEAD_FILE} is not a scalar head for this trunk: {error}") from error
    return model.eval()


def nonfinite_weights(model: nn.Module) -> int:
    """How many weights of ``model`` are infinite or nan."""
    return sum(int((~weight.isfinite()).sum()) for weight in model.parameters())


def _load(auto_class: Any, directory: Path) -> PreTrainedModel:
    if not (directory / "config.json").is_file():
        raise ModelUnusable(f"{directory} holds no model: config.json is missing")
    try:
        model = auto_class.from_pretrained(
            directory, dtype=torch.float32, use_safetensors=True, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelUnusable(f"{directory} holds no loadable model: {error}") from error
    return model.eval()
