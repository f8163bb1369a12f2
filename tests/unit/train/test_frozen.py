"""Datasets as files: the same comes back, damage is seen, and an erasure takes what is a principal's."""

from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feedback.records import name_digest
from train.batches import RankedPrompt
from train.errors import DatasetUnusable
from train.rounds.datasets import Asked, Dataset, Judged, Written
from train.rounds.frozen import DATASET_FILE, covered, digest_of, erase, freeze, thaw

NAMES = st.text(max_size=5)
IDS = st.lists(st.integers(0, 2**31 - 1), max_size=4).map(tuple)
OWNERS = st.lists(NAMES, min_size=1, max_size=2).map(tuple)
JUDGED = st.builds(
    Judged,
    st.just("5-1"),
    OWNERS,
    st.builds(
        RankedPrompt,
        IDS,
        st.lists(IDS, max_size=3).map(tuple),
        st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=3).map(tuple),
        weight=st.floats(0, 1),
        labeler=NAMES,
        group=NAMES,
    ),
    NAMES,
)
ASKED = st.builds(Asked, OWNERS, IDS, NAMES)


def many(one: st.SearchStrategy[object]) -> st.SearchStrategy[tuple[object, ...]]:
    return st.lists(one, max_size=3).map(tuple)


DATASETS = st.builds(
    Dataset,
    many(JUDGED),
    many(JUDGED),
    many(JUDGED),
    many(st.builds(Written, OWNERS, IDS, IDS)),
    many(ASKED),
    many(ASKED),
    st.dictionaries(NAMES, st.integers(0, 9), max_size=3),
)


def judged(principal: str, number: int) -> Judged:
    return Judged(f"{number}-0", (principal,), RankedPrompt((number,), ((1,), (2,)), ((0, 1),), group=f"g{number}"))


DATASET = Dataset(
    training=(judged("ann", 1), judged("bob", 2), judged("ann", 3)),
    held_out=(judged("bob", 4), judged("ann", 5)),
    anchors=(judged("operator", 6),),
    demonstrations=(Written(("bob", "ann"), (7,), (8, 1)), Written(("bob",), (9,), (8, 1))),
    prompts=(Asked(("ann",), (1,)), Asked(("eve",), (10,), "copy")),
    held_out_prompts=(Asked(("bob",), (4,)), Asked(("ann",), (5,))),
    counts={"superseded": 4},
)


@given(DATASETS)
@settings(max_examples=50, deadline=None)
def test_what_is_frozen_comes_back(tmp_path_factory: pytest.TempPathFactory, dataset: Dataset) -> None:
    path = tmp_path_factory.mktemp("run") / DATASET_FILE
    frozen = freeze(dataset, path)
    assert thaw(path) == frozen
    assert frozen.dataset == dataset
    assert frozen.sha256 == digest_of(dataset)


def test_a_large_dataset_is_written_in_groups(tmp_path: Path) -> None:
    large = replace(DATASET, training=tuple(judged("ann", number) for number in range(4_500)))
    freeze(large, tmp_path / DATASET_FILE)
    written = pq.ParquetFile(tmp_path / DATASET_FILE)
    assert written.num_row_groups == 3
    assert written.metadata.row_group(0).column(0).compression == "ZSTD"
    assert thaw(tmp_path / DATASET_FILE).dataset == large


def test_the_first_to_freeze_wins(tmp_path: Path) -> None:
    path = tmp_path / DATASET_FILE
    first = freeze(DATASET, path)
    late = freeze(replace(DATASET, prompts=()), path)
    assert late == first == thaw(path), "a worker that was paused trains on what its successor trains on"
    assert [one.name for one in tmp_path.iterdir()] == [DATASET_FILE]


def test_the_digest_depends_on_what_is_trained_on_and_on_nothing_else() -> None:
    assert digest_of(replace(DATASET, counts={})) == digest_of(DATASET)
    assert digest_of(replace(DATASET, training=DATASET.training[::-1])) != digest_of(DATASET)
    weighted = (DATASET.training[0].weighted(0.5), *DATASET.training[1:])
    assert digest_of(replace(DATASET, training=weighted)) != digest_of(DATASET)
    assert digest_of(replace(DATASET, prompts=DATASET.held_out_prompts)) != digest_of(DATASET)


def test_an_erasure_takes_every_row_of_a_principal_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / DATASET_FILE
    before = freeze(DATASET, path)
    ann = {name_digest("ann")}
    assert covered(path, ann) == 6
    assert erase(path, ann) == 6
    left = thaw(path)
    assert left.dataset == Dataset(
        training=(judged("bob", 2),),
        held_out=(judged("bob", 4),),
        anchors=(judged("operator", 6),),
        demonstrations=(Written(("bob",), (9,), (8, 1)),),
        prompts=(Asked(("eve",), (10,), "copy"),),
        held_out_prompts=(Asked(("bob",), (4,)),),
        counts={"superseded": 4},
    )
    assert left.erased == 6 and left.sha256 != before.sha256
    assert b"ann" not in path.read_bytes()
    assert erase(path, {name_digest("eve")}) == 1
    assert thaw(path).erased == 7, "it remembers all that was taken"
    assert covered(path, ann) == 0


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / DATASET_FILE
    freeze(DATASET, path)
    whole = path.read_bytes()
    seen = 0
    for place in range(0, len(whole), 37):
        flipped = bytearray(whole)
        flipped[place] ^= 1
        path.write_bytes(flipped)
        try:
            assert thaw(path).dataset == DATASET or thaw(path).dataset.counts != DATASET.counts
        except DatasetUnusable as error:
            assert str(path) in str(error)
            seen += 1
    assert seen > 20
    path.write_bytes(whole[:-30])
    with pytest.raises(DatasetUnusable, match=str(path)):
        thaw(path)
