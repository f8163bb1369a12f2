"""The dataset of a round as a file: what it trains on from its first step to its last, and when it is done again.

Parquet (zstd), a row for each comparison, demonstration and prompt, in token ids; ``part`` says what it is of the
``Dataset``. The footer has a digest over all rows (not over the file, so that a dataset that is built again can be
compared), what was left out and why, and how many rows an erasure has taken since. A file is written under another
name, fsynced and then named: whatever has the name is whole.
"""

import hashlib
import json
import os
import secrets
from collections import defaultdict
from collections.abc import Iterable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import pyarrow as pa
import pyarrow.parquet as pq

from deploy.files import sync_directory
from feedback.records import name_digest
from train.batches import RankedPrompt
from train.errors import DatasetUnusable
from train.rounds.datasets import Asked, Dataset, Judged, Written

DATASET_FILE = "dataset.parquet"
GROUP_ROWS = 2_000
"""Rows written and read at once."""

_IDS = pa.list_(pa.int32())
_SCHEMA = pa.schema(
    [
        ("part", pa.string()),
        ("stream_id", pa.string()),
        ("principals", pa.list_(pa.string())),
        ("labeler", pa.string()),
        ("group", pa.string()),
        ("task", pa.string()),
        ("weight", pa.float64()),
        ("prompt_ids", _IDS),
        ("completions", pa.list_(_IDS)),
        ("pairs", pa.list_(_IDS)),
    ]
)
_DIGEST, _COUNTS, _ERASED = b"instructloop.sha256", b"instructloop.counts", b"instructloop.erased"
_TRAINING, _HELD_OUT, _ANCHOR, _DEMONSTRATION = "training", "held_out", "anchor", "demonstration"
_PROMPT, _HELD_OUT_PROMPT = "prompt", "held_out_prompt"


class _Row(TypedDict):
    part: str
    stream_id: str
    principals: list[str]
    labeler: str
    group: str
    task: str
    weight: float
    prompt_ids: list[int]
    completions: list[list[int]]
    pairs: list[list[int]]


@dataclass(frozen=True)
class Frozen:
    """A dataset as it lies in its file.

    Attributes:
        dataset: what is trained on.
        sha256: digest over its rows.
        erased: rows that erasures have taken out of it since it was first written.
    """

    dataset: Dataset
    sha256: str
    erased: int = 0


def freeze(dataset: Dataset, path: Path) -> Frozen:
    """Write a dataset to ``path``, durably; where another worker has been faster, its file stands and is returned.

    Raises DatasetUnusable where that file cannot be read.
    """
    with _unfinished(path) as unfinished:
        sha256 = _write(unfinished, _rows(dataset), dataset.counts, erased=0)
        try:
            os.link(unfinished, path)
        except FileExistsError:
            return thaw(path)
        sync_directory(path.parent)
    return Frozen(dataset, sha256)


def thaw(path: Path) -> Frozen:
    """The dataset in a file. Raises DatasetUnusable where it is not what was written."""
    counts, sha256, erased = _footer(path)
    digest, parts = _Digest(), defaultdict[str, list[_Row]](list)
    for row in _read(path):
        digest.add(row)
        parts[row["part"]].append(row)
    if digest.hexdigest() != sha256:
        raise DatasetUnusable(f"{path}: the rows do not match the file's own digest; restore it, or remove the run")
    dataset = Dataset(
        training=tuple(map(_judged, parts[_TRAINING])),
        held_out=tuple(map(_judged, parts[_HELD_OUT])),
        anchors=tuple(map(_judged, parts[_ANCHOR])),
        demonstrations=tuple(
            Written(tuple(row["principals"]), tuple(row["prompt_ids"]), tuple(row["completions"][0]))
            for row in parts[_DEMONSTRATION]
        ),
        prompts=tuple(map(_asked, parts[_PROMPT])),
        held_out_prompts=tuple(map(_asked, parts[_HELD_OUT_PROMPT])),
        counts=counts,
    )
    return Frozen(dataset, sha256, erased)


def digest_of(dataset: Dataset) -> str:
    """The digest that ``freeze`` would give."""
    digest = _Digest()
    for row in _rows(dataset):
        digest.add(row)
    return digest.hexdigest()


def covered(path: Path, erased: Set[str]) -> int:
    """How many rows of a file are of erased principals; a row goes with any one of its principals.

    Args:
        path: of the dataset.
        erased: ``feedback.records.name_digest`` of the principals.

    Raises:
        DatasetUnusable: the file cannot be read.
    """
    return sum(_covered(row, erased) for row in _read(path))


def erase(path: Path, erased: Set[str]) -> int:
    """Write a file anew without the rows that are ``covered``; returns how many there were. Raises as that does."""
    rows = covered(path, erased)
    counts, _, before = _footer(path)
    with _unfinished(path) as unfinished:
        _write(unfinished, (row for row in _read(path) if not _covered(row, erased)), counts, before + rows)
        unfinished.replace(path)
        sync_directory(path.parent)
    return rows


def _covered(row: _Row, erased: Set[str]) -> bool:
    return not erased.isdisjoint(map(name_digest, row["principals"]))


def _rows(dataset: Dataset) -> Iterator[_Row]:
    for part, judged in ((_TRAINING, dataset.training), (_HELD_OUT, dataset.held_out), (_ANCHOR, dataset.anchors)):
        for one in judged:
            ranked = one.ranked
            yield _row(part, one.principals, ranked.prompt_ids) | {
                "stream_id": one.stream_id,
                "labeler": ranked.labeler,
                "group": ranked.group,
                "task": one.task,
                "weight": ranked.weight,
                "completions": list(map(list, ranked.completions)),
                "pairs": list(map(list, ranked.pairs)),
            }
    for written in dataset.demonstrations:
        row = _row(_DEMONSTRATION, written.principals, written.prompt_ids)
        yield row | {"completions": [list(written.completion)]}
    for part, prompts in ((_PROMPT, dataset.prompts), (_HELD_OUT_PROMPT, dataset.held_out_prompts)):
        for asked in prompts:
            yield _row(part, asked.principals, asked.prompt_ids) | {"task": asked.task}


def _row(part: str, principals: tuple[str, ...], prompt_ids: tuple[int, ...]) -> _Row:
    return {
        "part": part,
        "stream_id": "",
        "principals": list(principals),
        "labeler": "",
        "group": "",
        "task": "",
        "weight": 1.0,
        "prompt_ids": list(prompt_ids),
        "completions": [],
        "pairs": [],
    }


def _judged(row: _Row) -> Judged:
    ranked = RankedPrompt(
        tuple(row["prompt_ids"]),
        tuple(map(tuple, row["completions"])),
        tuple((chosen, rejected) for chosen, rejected in row["pairs"]),
        weight=row["weight"],
        labeler=row["labeler"],
        group=row["group"],
    )
    return Judged(row["stream_id"], tuple(row["principals"]), ranked, row["task"])


def _asked(row: _Row) -> Asked:
    return Asked(tuple(row["principals"]), tuple(row["prompt_ids"]), row["task"])


class _Digest:
    """sha256 over rows as JSON, one a line."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()

    def add(self, row: _Row) -> None:
        self._sha256.update(json.dumps(row, sort_keys=True).encode() + b"\n")

    def hexdigest(self) -> str:
        return self._sha256.hexdigest()


def _write(path: Path, rows: Iterable[_Row], counts: dict[str, int], erased: int) -> str:
    digest, group = _Digest(), list[_Row]()
    with pq.ParquetWriter(path, _SCHEMA, compression="zstd", write_page_checksum=True) as writer:
        for row in rows:
            digest.add(row)
            group.append(row)
            if len(group) == GROUP_ROWS:
                writer.write_batch(pa.RecordBatch.from_pylist(group, _SCHEMA))
                group.clear()
        if group:
            writer.write_batch(pa.RecordBatch.from_pylist(group, _SCHEMA))
        footer = {_DIGEST: digest.hexdigest(), _COUNTS: json.dumps(counts), _ERASED: str(erased)}
        writer.add_key_value_metadata(footer)
    with path.open("rb") as written:
        os.fsync(written.fileno())
    return digest.hexdigest()


def _read(path: Path) -> Iterator[_Row]:
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for batch in file.iter_batches(batch_size=GROUP_ROWS):
                yield from batch.to_pylist()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DatasetUnusable(f"{path}: cannot be read: {error}") from error


def _footer(path: Path) -> tuple[dict[str, int], str, int]:
    """What was left out, the digest, and how many rows were erased."""
    try:
        footer = pq.read_metadata(path).metadata
        return json.loads(footer[_COUNTS]), footer[_DIGEST].decode(), int(footer[_ERASED])
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise DatasetUnusable(f"{path}: is no frozen dataset: {error}") from error


@contextmanager
def _unfinished(target: Path) -> Iterator[Path]:
    """A path beside ``target`` to write at; what was not renamed is deleted."""
    path = target.with_name(f".{target.name}-{secrets.token_hex(4)}")
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
