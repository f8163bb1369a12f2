import json

import pytest

from feedback.export import Format, rows
from feedback.records import Candidate, Comparison, Demonstration, Prompt
from feedback.store import LogEntry

CHAT = Prompt(messages=({"role": "system", "content": "Be brief."}, {"role": "user", "content": "frog?"}))
TEXT = Prompt(text="frog:")


def ranked(prompt: Prompt) -> LogEntry:
    return LogEntry(
        "5-0",
        Comparison(
            id="cmp_1",
            created=1.0,
            principal="alice",
            labeler="L-1",
            prompt=prompt,
            source="outside",
            candidates=tuple(Candidate(text=text) for text in ("green", "brown", "wet")),
            ranking=((2,), (0, 1)),
        ),
    )


def demonstrated(corrects: Candidate | None) -> LogEntry:
    return LogEntry(
        "6-0",
        Demonstration(
            id="demo_1", created=1.0, principal="a", labeler="a", prompt=TEXT, completion="grün", corrects=corrects
        ),
    )


def test_native_is_the_record_with_its_place() -> None:
    entry = ranked(TEXT)
    [row] = rows(entry, Format.NATIVE)
    assert row.pop("stream_id") == "5-0"
    assert Comparison.model_validate_json(json.dumps(row)) == entry.record
    assert len(list(rows(demonstrated(None), Format.NATIVE))) == 1


def test_trl_standard_form_for_text() -> None:
    assert list(rows(ranked(TEXT), Format.TRL)) == [
        {"prompt": "frog:", "chosen": "wet", "rejected": "green"},
        {"prompt": "frog:", "chosen": "wet", "rejected": "brown"},
    ]


def test_trl_conversational_form_for_a_chat() -> None:
    assert next(rows(ranked(CHAT), Format.TRL)) == {
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "frog?"}],
        "chosen": [{"role": "assistant", "content": "wet"}],
        "rejected": [{"role": "assistant", "content": "green"}],
    }


def test_openai_form() -> None:
    assert next(rows(ranked(CHAT), Format.OPENAI))["input"] == {"messages": list(CHAT.messages or ())}
    assert next(rows(ranked(TEXT), Format.OPENAI)) == {
        "input": {"messages": [{"role": "user", "content": "frog:"}]},
        "preferred_output": [{"role": "assistant", "content": "wet"}],
        "non_preferred_output": [{"role": "assistant", "content": "green"}],
    }


def test_a_correction_is_a_pair_and_a_plain_demonstration_is_none() -> None:
    assert list(rows(demonstrated(Candidate(text="gren")), Format.TRL)) == [
        {"prompt": "frog:", "chosen": "grün", "rejected": "gren"}
    ]
    assert list(rows(demonstrated(None), Format.OPENAI)) == []


def test_a_prompt_of_token_ids_alone_is_refused_in_the_pair_forms() -> None:
    with pytest.raises(ValueError, match="cmp_1 has a prompt of token ids only"):
        list(rows(ranked(Prompt(token_ids=(1, 2))), Format.TRL))
