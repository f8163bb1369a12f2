"""Small random policies with a tokenizer of one word per token: real models that compute in milliseconds."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from train.models import save_policy

VOCABULARY = 16
PAD, EOS = 0, 1
WINDOW = 64

FAMILIES = ("llama", "gpt2", "qwen2", "untied", "no_pad")
"""What a causal language model may look like.

Rotary positions with tied embeddings; learnt positions and dropout modules; biases in the attention, fewer key than
query heads; an output layer of its own; no padding token.
"""


def tiny_policy(family: str = "llama", *, width: int = 16, seed: int = 0, dropout: float = 0.0) -> PreTrainedModel:
    """A random policy, in evaluation mode; its weights are large enough for probabilities to differ visibly."""
    torch.manual_seed(seed)
    policy = AutoModelForCausalLM.from_config(_config(family, width, dropout), dtype=torch.float32)
    if family == "qwen2":
        for name, bias in policy.named_parameters():
            if name.endswith(".bias"):
                torch.nn.init.normal_(bias, std=0.3)  # drawn as zeros, they would hide that they were forgotten
    return policy.eval()


def _config(family: str, width: int, dropout: float) -> PretrainedConfig:
    common = {
        "vocab_size": VOCABULARY,
        "initializer_range": 0.3,
        "pad_token_id": None if family == "no_pad" else PAD,
        "eos_token_id": EOS,
        "bos_token_id": None,
    }
    if family == "gpt2":
        dropouts = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
        return GPT2Config(n_embd=width, n_layer=2, n_head=2, n_positions=WINDOW, **dropouts, **common)
    shape = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1 if family == "qwen2" else 2,
        "max_position_embeddings": WINDOW,
        "tie_word_embeddings": family != "untied",
        "attention_dropout": dropout,
    }
    return (Qwen2Config if family == "qwen2" else LlamaConfig)(**shape, **common)


def tokenizer(family: str = "llama") -> PreTrainedTokenizerBase:
    """Tokens <pad>, <eos>, w2 … w15; of the family without a padding token, <pad> is a token like any other."""
    words = {"<pad>": PAD, "<eos>": EOS} | {f"w{i}": i for i in range(2, VOCABULARY)}
    wordwise = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    padding = {} if family == "no_pad" else {"pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=wordwise, eos_token="<eos>", **padding)


def saved_policy(directory: Path, policy: PreTrainedModel | None = None, family: str = "llama") -> Path:
    """``directory`` with a policy (a tiny one of ``family`` unless given) and its tokenizer in it."""
    save_policy(tiny_policy(family) if policy is None else policy, tokenizer(family), directory)
    return directory
