"""Pretraining text for the mixes of SFT and PPO, and for measuring the loss on it: from files, or the tiny world's.

A document is a line of a text file, or one field of a line of JSON or of a row of Parquet. What is measured on is never
trained on: one document in twenty is held out, by its number in the order of the files' names.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from train.batches import TokenStream
from train.errors import DatasetUnusable
from train.settings import TrainSettings
from train.tinyworld.base_model import HELD_OUT_TEXT, web_text

TINY_WORLD = "tinyworld"
SUFFIXES = (".txt", ".jsonl", ".parquet")
"""What a directory may hold; a single file of another name is read as text."""
_TINY_WORLD_TOKENS = 400_000
_HELD_OUT_EVERY = 20


def training_text(settings: TrainSettings, tokenizer: PreTrainedTokenizerBase, seed: int) -> TokenStream | None:
    """Text to mix into training, in an order that ``seed`` gives; None where the settings name none.

    Raises DatasetUnusable where a file cannot be read, naming it and the line, or where there is no text.
    """
    return _text(settings, tokenizer, seed, held_out=False)


def held_out_text(settings: TrainSettings, tokenizer: PreTrainedTokenizerBase) -> TokenStream | None:
    """Text to measure on, always the same. Raises as ``training_text``."""
    return _text(settings, tokenizer, HELD_OUT_TEXT, held_out=True)


def documents(source: Path, field: str) -> Iterator[str]:
    """Every document that is not blank, of a file or of all files of a directory in the order of their names.

    Args:
        source: the file or directory; in it, names that begin with a dot or an underscore are passed over.
        field: of JSON lines and Parquet.

    Raises:
        DatasetUnusable: A file cannot be read or holds something else; the message names file and line.
    """
    for file in _files(source):
        read = {".jsonl": _json_lines, ".parquet": _parquet}.get(file.suffix)
        try:
            for document in _lines(file) if read is None else read(file, field):
                if document.strip():
                    yield document
        except (OSError, pa.ArrowException) as error:
            raise DatasetUnusable(f"train.pretraining_text: {file} cannot be read: {error}") from error


def _text(
    settings: TrainSettings, tokenizer: PreTrainedTokenizerBase, seed: int, *, held_out: bool
) -> TokenStream | None:
    source, length = settings.pretraining_text, settings.pretrain.sequence_length
    if source is None:
        return None
    if source == TINY_WORLD:
        measured = settings.evaluate.pretraining_sequences * length
        return web_text(tokenizer, measured if held_out else _TINY_WORLD_TOKENS, length, seed)
    chosen = _chosen(Path(source), settings.pretraining_field, held_out=held_out)
    ending = [int(tokenizer.eos_token_id)]
    return TokenStream((tokenizer.encode(text, add_special_tokens=False) + ending for text in chosen), length, seed)


def _chosen(source: Path, field: str, *, held_out: bool) -> Iterator[str]:
    """The documents to measure on, or those to learn from. Raises DatasetUnusable where they are too few for both."""
    number = -1
    for number, document in enumerate(documents(source, field)):
        if (number % _HELD_OUT_EVERY == 0) == held_out:
            yield document
    if number < 1:
        raise DatasetUnusable(
            f"train.pretraining_text: {source} holds fewer than two documents; the first and then one in "
            f"{_HELD_OUT_EVERY} are measured on, the others are learnt from"
        )


def _files(source: Path) -> list[Path]:
    if not source.is_dir():
        return [source]
    files = sorted(path for path in source.iterdir() if not path.name.startswith((".", "_")))
    if strange := [path for path in files if path.suffix not in SUFFIXES or not path.is_file()]:
        raise DatasetUnusable(f"train.pretraining_text: {strange[0]} is none of {', '.join(SUFFIXES)}; move it away")
    if not files:
        raise DatasetUnusable(f"train.pretraining_text: {source} holds none of {', '.join(SUFFIXES)}")
    return files


def _lines(file: Path) -> Iterator[str]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield line.decode().rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise DatasetUnusable(f"train.pretraining_text: {file}, line {number}: is not UTF-8") from error


def _json_lines(file: Path, field: str) -> Iterator[str]:
    for number, line in enumerate(_lines(file), 1):
        if not line.strip():
            continue
        try:
            said = json.loads(line)
        except ValueError as error:
            raise DatasetUnusable(f"train.pretraining_text: {file}, line {number}: is not JSON: {error}") from error
        if not isinstance(said, dict) or not isinstance(document := said.get(field), str):
            raise DatasetUnusable(
                f"train.pretraining_text: {file}, line {number}: has no text {field!r}; see train.pretraining_field"
            )
        yield document


def _parquet(file: Path, field: str) -> Iterator[str]:
    number = 0
    with pq.ParquetFile(file) as rows:
        columns = rows.schema_arrow.names
        if field not in columns:
            raise DatasetUnusable(
                f"train.pretraining_text: {file} has the columns {', '.join(columns)} and no {field!r}; "
                "see train.pretraining_field"
            )
        for batch in rows.iter_batches(columns=[field]):
            for document in batch.column(0).to_pylist():
                number += 1
                if not isinstance(document, str):
                    raise DatasetUnusable(f"train.pretraining_text: {file}, row {number}: {field!r} is no text")
                yield document
