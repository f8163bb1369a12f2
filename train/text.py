"""Pretraining text for the mixes of SFT and PPO, and for measuring the loss on it: from a file, or the tiny world's.

What is measured on is never trained on: one document in twenty of a file is held out, by its number.
"""

from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from train.batches import TokenStream
from train.errors import DatasetUnusable
from train.settings import TrainSettings
from train.tinyworld.base_model import HELD_OUT_TEXT, web_text

TINY_WORLD = "tinyworld"
_TINY_WORLD_TOKENS = 400_000
_HELD_OUT_EVERY = 20


def training_text(settings: TrainSettings, tokenizer: PreTrainedTokenizerBase, seed: int) -> TokenStream | None:
    """Text to mix into training, in an order that ``seed`` gives; None where the settings name none.

    Raises DatasetUnusable where the file they name cannot be read or is empty.
    """
    return _text(settings, tokenizer, seed, held_out=False)


def held_out_text(settings: TrainSettings, tokenizer: PreTrainedTokenizerBase) -> TokenStream | None:
    """Text to measure on, always the same. Raises as ``training_text``."""
    return _text(settings, tokenizer, HELD_OUT_TEXT, held_out=True)


def _text(
    settings: TrainSettings, tokenizer: PreTrainedTokenizerBase, seed: int, *, held_out: bool
) -> TokenStream | None:
    source, length = settings.pretraining_text, settings.pretrain.sequence_length
    if source is None:
        return None
    if source == TINY_WORLD:
        measured = settings.evaluate.pretraining_sequences * length
        return web_text(tokenizer, measured if held_out else _TINY_WORLD_TOKENS, length, seed)
    try:
        return TokenStream(_documents(Path(source), tokenizer, held_out), length, seed)
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetUnusable(f"train.pretraining_text: {source} cannot be read: {error}") from error


def _documents(path: Path, tokenizer: PreTrainedTokenizerBase, held_out: bool) -> Iterator[list[int]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            if (number % _HELD_OUT_EVERY == 0) == held_out and line.strip():
                yield [*tokenizer.encode(line.rstrip("\n"), add_special_tokens=False), int(tokenizer.eos_token_id)]
