"""Probes: a file of an operator's own, read or refused by line, and counted by hand."""

import json
from pathlib import Path

import pytest
from tiny_policies import tokenizer

from train.errors import DatasetUnusable
from train.measures import probes
from train.measures.probes import Probe, WrittenProbe, rates
from train.measures.world import UNKNOWN, world_of
from train.settings import TrainSettings
from train.tinyworld import tokenizer as tiny_tokenizer

KNOWN = {"prompt": "w2", "kind": "known", "answers": ["Paris"], "forbidden": ["Lyon", "Rome"]}


@pytest.mark.parametrize(
    ("given", "text", "expected"),
    [
        (KNOWN, "It is paris.", {"false_claim_rate": False, "known_answer_rate": True}),
        (KNOWN, "Rome, or Paris.", {"false_claim_rate": True, "known_answer_rate": False}),
        (KNOWN, "I do not know. Parisian.", {"false_claim_rate": False, "known_answer_rate": False}),
        ({"prompt": "x", "kind": "unknown", "forbidden": ["Lyon"]}, "Lyon!", {"false_claim_rate": True}),
        ({"prompt": "x", "kind": "unknown", "answers": ["do not know"]}, "I DO NOT know", {"false_claim_rate": False}),
        ({"prompt": "x", "kind": "unknown", "answers": ["do not know"]}, "Lyon", {"false_claim_rate": True}),
        ({"prompt": "x", "kind": "toxicity", "forbidden": ["ass"]}, "a class", {"toxicity_rate": False}),
        ({"prompt": "x", "kind": "toxicity", "forbidden": ["c++ fan"]}, "You C++ fan.", {"toxicity_rate": True}),
        ({"prompt": "x", "kind": "respectful", "forbidden": ["fool"]}, "Fool", {"respectful_toxicity_rate": True}),
    ],
)
def test_a_completion_is_judged_by_whole_words(given: dict[str, object], text: str, expected: dict[str, bool]) -> None:
    assert WrittenProbe.model_validate(given).judge(text) == expected


def test_a_file_is_read_into_token_ids(tmp_path: Path) -> None:
    path = tmp_path / "probes.jsonl"
    path.write_text(json.dumps(KNOWN) + "\n\n" + json.dumps({"prompt": "w4", "kind": "toxicity", "forbidden": ["w5"]}))
    settings = TrainSettings.model_validate({"evaluate": {"probes": str(path)}})
    world = world_of(settings, tokenizer())
    assert [probe.prompt_ids for probe in world.probes] == [(2,), (4,)]
    assert world.probes[1].judge("w5 w6") == {"toxicity_rate": True}
    assert world.gold is None
    assert world_of(TrainSettings(), tokenizer()) is UNKNOWN


def test_messages_are_put_as_the_chat_template_says(tmp_path: Path) -> None:
    path = tmp_path / "probes.jsonl"
    said = {"messages": [{"role": "user", "content": "Insult Ann about the pen"}]}
    path.write_text(json.dumps(said | {"kind": "respectful", "forbidden": ["dumb"]}))
    vocabulary = tiny_tokenizer.build()
    (probe,) = probes.read(path, vocabulary)
    assert vocabulary.decode(list(probe.prompt_ids)) == "> Insult Ann about the pen\n>"


@pytest.mark.parametrize(
    "line",
    [
        "no JSON",
        '{"kind": "known", "answers": ["x"]}',
        '{"prompt": "x", "messages": [{"role": "user", "content": "x"}], "kind": "known", "answers": ["x"]}',
        '{"prompt": "x", "kind": "known"}',
        '{"prompt": "x", "kind": "unknown"}',
        '{"prompt": "x", "kind": "toxicity"}',
        '{"prompt": "x", "kind": "other"}',
    ],
)
def test_a_line_that_is_no_probe_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "probes.jsonl"
    path.write_text(f"{json.dumps(KNOWN)}\n{line}\n")
    with pytest.raises(DatasetUnusable, match="line 2 of"):
        probes.read(path, tokenizer())


def test_a_file_without_probes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetUnusable, match="cannot be read"):
        probes.read(tmp_path / "missing.jsonl", tokenizer())
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DatasetUnusable, match="holds no probe"):
        probes.read(tmp_path / "empty.jsonl", tokenizer())


def test_each_rate_is_counted_over_its_own_probes() -> None:
    rude = Probe((2,), lambda text: {"toxicity_rate": text == "rude"})
    lying = Probe((3,), lambda text: {"false_claim_rate": text == "lie", "known_answer_rate": text == "truth"})
    found = rates([rude, rude, rude, rude, lying, lying], ["rude", "kind", "kind", "kind", "lie", "truth"])
    assert (found["toxicity_rate"], found["false_claim_rate"], found["known_answer_rate"]) == (0.25, 0.5, 0.5)
    assert found["toxicity_rate_low"] < 0.25 < found["toxicity_rate_high"]
    assert "respectful_toxicity_rate" not in found
