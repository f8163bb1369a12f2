"""Small random policies with a tokenizer of one word per token: real models that compute in milliseconds."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from train.models import save_policy

VOCABULARY = 16
PAD, EOS = 0, 1
WINDOW = 64

FAMILIES = ("llama", "gpt2")
"""Rotary and learnt positions, with and without dropout modules: what a causal language model may look like."""


def tiny_policy(family: str = "llama", *, width: int = 16, seed: int = 0, dropout: float = 0.0) -> PreTrainedModel:
    """A random policy, in evaluation mode; its weights are large enough for probabilities to differ visibly."""
    torch.manual_seed(seed)
    if family == "gpt2":
        config = GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=width,
            n_layer=2,
            n_head=2,
            n_positions=WINDOW,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            initializer_range=0.3,
            pad_token_id=PAD,
            eos_token_id=EOS,
            bos_token_id=None,
        )
        return GPT2LMHeadModel(config).eval()
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=True,
        attention_dropout=dropout,
        initializer_range=0.3,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def tokenizer() -> PreTrainedTokenizerBase:
    """Tokens <pad>, <eos>, w2 … w15."""
    words = {"<pad>": PAD, "<eos>": EOS} | {f"w{i}": i for i in range(2, VOCABULARY)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")), pad_token="<pad>", eos_token="<eos>"
    )


def saved_policy(directory: Path, policy: PreTrainedModel | None = None) -> Path:
    """``directory`` with a policy (a tiny Llama unless given) and its tokenizer in it."""
    save_policy(tiny_policy() if policy is None else policy, tokenizer(), directory)
    return directory
