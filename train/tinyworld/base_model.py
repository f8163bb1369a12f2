"""The tiny world's base model: a Llama of 0.4M parameters, pretrained on the web text once and kept.

The model is a function of the world, the recipe and the seed; a digest of the three names its directory, so a
second study or demo finds it, and a changed recipe never meets a stale model.
"""

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from transformers import LlamaConfig, PreTrainedTokenizerBase

from train import pretrain
from train.batches import TokenStream
from train.running.distributed import Ranks
from train.running.progress import Progress, silent
from train.settings import PretrainSettings
from train.tinyworld import corpus, tokenizer

HELD_OUT_TEXT = -1
"""Seed of the web text that the pretraining loss is measured on; no training uses it."""

METRICS_FILE = "metrics.json"
"""What pretraining returned, beside the model."""

_DIGESTED_DOCUMENTS = 1000


def model_config(vocabulary: PreTrainedTokenizerBase) -> LlamaConfig:
    """The shape of every policy in this world: 0.43M parameters.

    Heads are 32 wide because vLLM's CPU attention supports no smaller ones; the initial weights' SD is larger
    than usual, as small widths need.
    """
    return LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=vocabulary.pad_token_id,
        eos_token_id=vocabulary.eos_token_id,
        bos_token_id=None,
    )


def web_text(vocabulary: PreTrainedTokenizerBase, tokens: int, sequence_length: int, seed: int) -> TokenStream:
    """A stream over at least ``tokens`` tokens of web text, each document ended by ``<eos>``."""
    return TokenStream(_encoded(vocabulary, tokens, seed), sequence_length, seed)


def base_model(home: Path, settings: PretrainSettings, *, seed: int, progress: Progress = silent) -> Path:
    """The directory of the base model, ``home``/base-<digest>; pretrained first where it does not exist yet."""
    vocabulary = tokenizer.build()
    directory = home / f"base-{_digest(vocabulary, settings, seed)}"
    ranks = Ranks.current()
    if ranks.from_first(directory.exists):
        return directory
    unfinished = home / ranks.from_first(lambda: f".tmp-{os.getpid()}-{directory.name}")
    unfinished.mkdir(parents=True, exist_ok=True)
    tokens = settings.steps * settings.batch_size * settings.sequence_length
    text = web_text(vocabulary, tokens, settings.sequence_length, seed)
    metrics = pretrain.run(
        settings, text, vocabulary, model_config(vocabulary), unfinished, seed=seed, progress=progress
    )
    if ranks.first:
        (unfinished / METRICS_FILE).write_text(json.dumps(metrics, indent=1))
    return ranks.from_first(lambda: _put(unfinished, directory))


def _put(unfinished: Path, directory: Path) -> Path:
    try:
        unfinished.rename(directory)
    except OSError:  # another run finished the same model first
        if not directory.exists():
            raise
        shutil.rmtree(unfinished)
    return directory


def _encoded(vocabulary: PreTrainedTokenizerBase, tokens: int, seed: int) -> Iterator[list[int]]:
    documents = corpus.documents(seed)
    while tokens > 0:
        texts = list(itertools.islice(documents, 1000))
        for ids in vocabulary(texts, add_special_tokens=False)["input_ids"]:
            yield [*ids, int(vocabulary.eos_token_id)]
            tokens -= len(ids) + 1


def _digest(vocabulary: PreTrainedTokenizerBase, settings: PretrainSettings, seed: int) -> str:
    described = {
        "world": list(itertools.islice(corpus.documents(seed), _DIGESTED_DOCUMENTS)),
        "tokenizer": vocabulary.backend_tokenizer.to_str(),
        "model": model_config(vocabulary).to_dict(),
        "settings": settings.model_dump(),
        "seed": seed,
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:12]
