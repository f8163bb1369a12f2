from pathlib import Path

import pyarrow.parquet as pq
import pytest

from feedback.export import Format, NotForParquet, PairParquet, UnsayablePrompt, pairs
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


def test_trl_standard_form_for_text() -> None:
    assert list(pairs(ranked(TEXT), Format.TRL)) == [
        {"prompt": "frog:", "chosen": "wet", "rejected": "green"},
        {"prompt": "frog:", "chosen": "wet", "rejected": "brown"},
    ]


def test_trl_conversational_form_for_a_chat() -> None:
    assert next(pairs(ranked(CHAT), Format.TRL)) == {
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "frog?"}],
        "chosen": [{"role": "assistant", "content": "wet"}],
        "rejected": [{"role": "assistant", "content": "green"}],
    }


def test_openai_form() -> None:
    assert next(pairs(ranked(CHAT), Format.OPENAI))["input"] == {"messages": list(CHAT.messages or ())}
    assert next(pairs(ranked(TEXT), Format.OPENAI)) == {
        "input": {"messages": [{"role": "user", "content": "frog:"}]},
        "preferred_output": [{"role": "assistant", "content": "wet"}],
        "non_preferred_output": [{"role": "assistant", "content": "green"}],
    }


def test_a_correction_is_a_pair_and_a_plain_demonstration_is_none() -> None:
    assert list(pairs(demonstrated(Candidate(text="gren")), Format.TRL)) == [
        {"prompt": "frog:", "chosen": "grün", "rejected": "gren"}
    ]
    assert list(pairs(demonstrated(None), Format.OPENAI)) == []


def test_a_prompt_of_token_ids_alone_is_refused_in_the_pair_forms() -> None:
    with pytest.raises(UnsayablePrompt, match="cmp_1 has a prompt of token ids only"):
        list(pairs(ranked(Prompt(token_ids=(1, 2))), Format.TRL))


@pytest.mark.parametrize(
    ("prompt", "form"), [(TEXT, Format.TRL), (CHAT, Format.TRL), (TEXT, Format.OPENAI), (CHAT, Format.OPENAI)]
)
def test_parquet_holds_what_the_lines_say(tmp_path: Path, prompt: Prompt, form: Format) -> None:
    said = list(pairs(ranked(prompt), form))
    with PairParquet(tmp_path / "pairs.parquet", form) as file:
        for row in said:
            file.add(row)
    assert pq.read_table(tmp_path / "pairs.parquet").to_pylist() == said


def test_parquet_of_nothing_has_its_columns(tmp_path: Path) -> None:
    with PairParquet(tmp_path / "pairs.parquet", Format.TRL):
        pass
    assert pq.read_table(tmp_path / "pairs.parquet").column_names == ["prompt", "chosen", "rejected"]


def test_parquet_refuses_what_it_would_have_to_drop(tmp_path: Path) -> None:
    parts = Prompt(messages=({"role": "user", "content": [{"type": "text", "text": "frog"}]},))
    named = Prompt(messages=({"role": "user", "content": "frog", "name": "ann"},))
    for prompt in (parts, named):
        with pytest.raises(NotForParquet, match="JSON lines"), PairParquet(tmp_path / "x", Format.TRL) as file:
            file.add(next(pairs(ranked(prompt), Format.TRL)))
    with (
        pytest.raises(NotForParquet, match="both text prompts and chats"),
        PairParquet(tmp_path / "y", Format.TRL) as file,
    ):
        file.add(next(pairs(ranked(TEXT), Format.TRL)))
        file.add(next(pairs(ranked(CHAT), Format.TRL)))
