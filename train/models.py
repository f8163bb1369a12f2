"""Policies on disk and in memory: any Hugging Face causal language model, its tokenizer, and what it computes.

Letters in shapes: B sequences, R completion tokens (right-padded), N real completion tokens of all sequences,
T tokens, V vocabulary, d hidden size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.functional import embedding
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from train.batches import Batch
from train.errors import ModelUnusable
from train.lora import Unadapted, plain_weights
from train.running.distributed import Ranks, whole

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


def token_logits(policy: PreTrainedModel, batch: Batch, temperature: float = 1.0) -> Tensor:
    """Logits of every real completion token, sequence by sequence, divided by the sampling ``temperature``: [N, V].

    The unembedding runs over the states that predict these tokens only, never over the prompt or the padding.
    """
    rows = batch.rows()
    with _unembedding_only(policy, rows.predicting):
        logits = policy(input_ids=rows.input_ids, use_cache=False).logits
    return cast(Tensor, logits).float() / temperature


def completion_logits(policy: PreTrainedModel, batch: Batch, temperature: float = 1.0) -> Tensor:
    """``token_logits`` where the tokens stand: [B, R, V], 0 on the padding."""
    logits = token_logits(policy, batch, temperature)
    placed = logits.new_zeros(*batch.completion_mask.shape, logits.shape[-1])
    return placed.index_put((batch.completion_mask,), logits)


def token_states(trunk: PreTrainedModel, batch: Batch) -> Tensor:
    """The hidden states that predict each real completion token, sequence by sequence: [N, d]."""
    rows = batch.rows()
    return _picked(trunk(input_ids=rows.input_ids, use_cache=False).last_hidden_state, rows.predicting)


def last_states(trunk: PreTrainedModel, batch: Batch) -> Tensor:
    """The hidden state of each sequence's last real token: [B, d]."""
    rows = batch.rows()
    return _picked(trunk(input_ids=rows.input_ids, use_cache=False).last_hidden_state, rows.last)


def pretraining_loss(policy: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Mean next-token cross-entropy in nats of packed sequences [B, T]; the first token of each is not predicted."""
    tokens = tokens.to(policy.device)
    predicting = torch.arange(tokens.shape[1] - 1, device=tokens.device)
    logits = policy(
        input_ids=tokens, attention_mask=torch.ones_like(tokens), logits_to_keep=predicting, use_cache=False
    ).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


@contextmanager
def _unembedding_only(policy: PreTrainedModel | Unadapted, places: Tensor) -> Iterator[None]:
    """Inside, the unembedding of ``policy`` sees the states at ``places`` [N] alone, and gives [N, V].

    A model's own ``logits_to_keep`` keeps the same columns of every sequence, and ragged prompts end in different ones.
    """
    model = policy.adapted if isinstance(policy, Unadapted) else policy
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, states: (_picked(states[0], places),))
    try:
        yield
    finally:
        hook.remove()


def _picked(states: Tensor, places: Tensor) -> Tensor:
    """``states`` [B, W, d] at ``places`` [N] of the flattened sequences; a look-up, whose backward is fast on a CPU."""
    return embedding(places, states.flatten(0, 1))


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
