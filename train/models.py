"""Policies on disk and in memory: any Hugging Face causal language model, its tokenizer, and what it computes.

Letters in shapes: B sequences, P prompt tokens (left-padded), R completion tokens (right-padded),
T = P + R, V vocabulary.
"""

from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from train.batches import Batch
from train.distributed import Ranks, whole
from train.errors import ModelUnusable
from train.lora import plain_weights

HEAD_FILE = "head.safetensors"
"""Holds a scalar head (weight, bias, shift); a directory with it is a reward model, without it a policy."""


def load_policy(directory: Path) -> PreTrainedModel:
    """The causal language model in ``directory``: fp32, evaluation mode (no dropout), its own code only.

    Raises ModelUnusable where there is none, or it is a reward model.
    """
    if is_reward_model(directory):
        raise ModelUnusable(f"{directory} holds a reward model ({HEAD_FILE}), not a policy")
    return load_pretrained(AutoModelForCausalLM, directory)


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
    """Write config.json, safetensors weights, tokenizer and chat template into ``directory``.

    What is written is a plain model, adapters added up. Of several processes all must call this, and the first writes.
    """
    save_plain(model, directory)
    if Ranks.current().first:
        tokenizer.save_pretrained(directory)


def save_plain(model: PreTrainedModel, directory: Path) -> None:
    """As ``save_policy``, of a policy or a trunk, without a tokenizer."""
    first, weights = Ranks.current().first, {}
    for name, weight in plain_weights(model).items():
        gathered = whole(weight)
        if first:
            weights[name] = gathered.cpu()
    if first:
        model.save_pretrained(directory, state_dict=weights)


def completion_logits(policy: PreTrainedModel, batch: Batch, temperature: float = 1.0) -> Tensor:
    """Logits of every completion token, divided by the sampling ``temperature``: [B, R, V].

    The unembedding runs over the R positions that predict completion tokens only, never over the prompt.
    """
    first, end = batch.prompt_length - 1, batch.input_ids.shape[1] - 1
    predicting = torch.arange(first, end, device=batch.input_ids.device)
    logits = policy(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        logits_to_keep=predicting,
        use_cache=False,
    ).logits
    return cast(Tensor, logits).float() / temperature


def pretraining_loss(policy: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Mean next-token cross-entropy in nats of packed sequences [B, T]; the first token of each is not predicted."""
    tokens = tokens.to(policy.device)
    predicting = torch.arange(tokens.shape[1] - 1, device=tokens.device)
    logits = policy(
        input_ids=tokens, attention_mask=torch.ones_like(tokens), logits_to_keep=predicting, use_cache=False
    ).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def is_reward_model(directory: Path) -> bool:
    """Whether ``directory`` holds a reward model rather than a policy."""
    return (directory / HEAD_FILE).exists()


def nonfinite_weights(model: nn.Module) -> int:
    """How many weights of ``model`` are infinite or nan."""
    return sum(int(whole((~weight.isfinite()).sum())) for weight in model.parameters())


def load_pretrained(auto_class: Any, directory: Path) -> PreTrainedModel:
    """What an Auto class of transformers makes of ``directory``: fp32, evaluation mode, its own code only.

    Raises ModelUnusable where there is no model, or not one of that class.
    """
    if not (directory / "config.json").is_file():
        raise ModelUnusable(f"{directory} holds no model: config.json is missing")
    try:
        model = auto_class.from_pretrained(
            directory, dtype=torch.float32, use_safetensors=True, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelUnusable(f"{directory} holds no loadable model: {error}") from error
    return model.eval()
