"""Pretraining text from files of each kind, and what is said where a line is bad."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_policies import EOS, tokenizer

from train.errors import DatasetUnusable
from train.settings import TrainSettings
from train.text import documents, held_out_text, training_text

TOKENIZER = tokenizer()


def parquet(path: Path, **columns: list[object]) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def test_text_json_lines_and_parquet_say_the_same(tmp_path: Path) -> None:
    said = ["w2 w3", "w4", "w5 w6 w7"]
    (tmp_path / "a.txt").write_text("w2 w3\nw4\n\n   \nw5 w6 w7\n")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"n": 1, "text": one}) for one in [*said, " "]))
    parquet(tmp_path / "a.parquet", number=[1, 2, 3, 4], text=[*said, ""])
    for name in ("a.txt", "a.jsonl", "a.parquet"):
        assert list(documents(tmp_path / name, "text")) == said, name
    assert list(documents(tmp_path, "text")) == said * 3


def test_a_directory_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second\n")
    parquet(tmp_path / "c.parquet", body=["third"])
    (tmp_path / "a.jsonl").write_text('{"body": "first"}\n')
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / "_SUCCESS").write_text("")
    assert list(documents(tmp_path, "body")) == ["first", "second", "third"]


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "a.jsonl, line 2: is not JSON"),
        ("a.jsonl", b'{"text": "x"}\n\n{"body": "x"}\n', "a.jsonl, line 3: has no text 'text'"),
        ("a.jsonl", b'{"text": 5}\n', "a.jsonl, line 1: has no text 'text'"),
        ("a.jsonl", b'["text"]\n', "a.jsonl, line 1: has no text 'text'"),
        ("a.txt", b"fine\n\xff\xfe\n", "a.txt, line 2: is not UTF-8"),
        ("a.parquet", b"PAR1 not", "a.parquet cannot be read"),
        ("corpus", b"fine\n\xff\n", "corpus, line 2: is not UTF-8"),
    ],
)
def test_what_is_bad_is_named_with_its_line(tmp_path: Path, name: str, content: bytes, complaint: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DatasetUnusable, match=complaint):
        list(documents(tmp_path / name, "text"))


def test_parquet_of_other_columns_or_types_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetUnusable, match="has the columns body and no 'text'"):
        list(documents(parquet(tmp_path / "a.parquet", body=["x"]), "text"))
    with pytest.raises(DatasetUnusable, match=r"b.parquet, row 2: 'text' is no text"):
        list(documents(parquet(tmp_path / "b.parquet", text=["x", None]), "text"))


def test_a_directory_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetUnusable, match=r"holds none of \.txt, \.jsonl, \.parquet"):
        list(documents(tmp_path, "text"))
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(DatasetUnusable, match=r"a.csv is none of"):
        list(documents(tmp_path, "text"))
    with pytest.raises(DatasetUnusable, match="cannot be read"):
        list(documents(tmp_path / "missing.txt", "text"))


def test_one_document_in_twenty_is_measured_on_and_never_trained_on(tmp_path: Path) -> None:
    lines = [f"w{2 + number % 14}" for number in range(60)]
    (tmp_path / "a.txt").write_text("\n".join(lines[:31]))
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines[31:]))
    settings = TrainSettings.model_validate(
        {"pretraining_text": str(tmp_path), "pretrain": {"sequence_length": 2}, "sft": {"pretraining_mix": 0.0}}
    )
    measured, trained = held_out_text(settings, TOKENIZER), training_text(settings, TOKENIZER, seed=0)
    assert measured is not None and trained is not None
    assert (measured.tokens, trained.tokens) == (3 * 2, 57 * 2), "each document with its EOS"
    assert set(measured.take(3).flatten().tolist()) == {EOS, 2 + 0, 2 + 20 % 14, 2 + 40 % 14}


@pytest.mark.parametrize("content", ["\n", "w2 w3 w4\n"])
def test_too_few_documents_to_learn_from_and_measure_on_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.txt").write_text(content)
    settings = TrainSettings.model_validate({"pretraining_text": str(tmp_path / "a.txt")})
    with pytest.raises(DatasetUnusable, match=r"a\.txt holds fewer than two documents"):
        training_text(settings, TOKENIZER, seed=0)
    with pytest.raises(DatasetUnusable, match=r"a\.txt holds fewer than two documents"):
        held_out_text(settings, TOKENIZER)
