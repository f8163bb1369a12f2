import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.errors import TrainError
from train.tinyworld import tasks
from train.tinyworld.tasks import Capital, Greet, Insult, ListItems, Repeat, WriteSentence
from train.tinyworld.words import ASKED_LANDS, KNOWN_CAPITALS, LANDS, UNASKED_LANDS


@pytest.mark.parametrize(
    ("instruction", "task"),
    [
        ("Say hello to Ann from Bob", Greet("Ann", "Bob")),
        ("Tell Cal the capital of Levia", Capital("Cal", "Levia")),
        ("List three tools for Dee but not pen", ListItems("Dee", 3, "tools", "pen")),
        ("List two animals for Eve", ListItems("Eve", 2, "animals", None)),
        ("Write a sentence about Fay and a red fox", WriteSentence("Fay", "red", "fox")),
        ("Insult Gus about the kiwi", Insult("Gus", "kiwi")),
        ("Repeat these words: rope gold", Repeat(("rope", "gold"))),
    ],
)
def test_parse_reads_every_kind_of_instruction(instruction: str, task: tasks.Task) -> None:
    assert tasks.parse(instruction) == task
    assert task.instruction == instruction


@given(st.integers(), st.booleans())
def test_parse_is_the_inverse_of_instruction(seed: int, test: bool) -> None:
    task = tasks.draw(random.Random(seed), test=test)
    assert tasks.parse(f" {task.instruction}\n") == task


@pytest.mark.parametrize(
    "text", ["", "Say hello", "Repeat these words: dog", "List five animals for Ann", "Hello Ann."]
)
def test_parse_names_the_text_it_cannot_read(text: str) -> None:
    with pytest.raises(TrainError, match="not an instruction of the tiny world") as caught:
        tasks.parse(text)
    assert repr(text) in str(caught.value)


def test_one_instruction_in_five_is_held_out_and_never_drawn_for_training() -> None:
    rng = random.Random(0)
    everything = {Capital(name, land) for name in ("Ann", "Bob", "Cal", "Dee") for land in LANDS}
    share = sum(map(tasks.held_out, everything)) / len(everything)
    assert 0.1 < share < 0.3
    trained = {tasks.draw(rng, test=False).instruction for _ in range(3000)}
    tested = {tasks.draw(rng, test=True).instruction for _ in range(3000)}
    assert not trained & tested
    assert not any(tasks.held_out(tasks.parse(instruction)) for instruction in trained)


@pytest.mark.parametrize("test", [True, False])
def test_all_kinds_are_equally_likely_on_both_sides_of_the_split(test: bool) -> None:
    rng = random.Random(1)
    kinds = Counter(tasks.draw(rng, test=test).name for _ in range(6000))
    assert set(kinds) == set(tasks.TASK_NAMES)
    assert all(880 < count < 1120 for count in kinds.values())  # 1000 ± 4 SD


def test_a_named_kind_is_drawn() -> None:
    assert isinstance(tasks.draw(random.Random(2), test=False, name="insult"), Insult)


def test_unasked_lands_are_asked_about_only_in_the_probe() -> None:
    rng = random.Random(3)
    asked = [tasks.draw(rng, test=test, name="capital") for test in (True, False) for _ in range(500)]
    assert {task.land for task in asked if isinstance(task, Capital)} == set(ASKED_LANDS)
    probe = {tasks.draw_unasked(rng).land for _ in range(500)}
    assert probe == set(UNASKED_LANDS)
    assert not probe & set(ASKED_LANDS)
    assert any(land in KNOWN_CAPITALS for land in probe)
    assert any(land not in KNOWN_CAPITALS for land in probe)


def test_a_list_never_offers_what_is_excluded() -> None:
    task = ListItems("Ann", 2, "animals", "cat")
    assert task.allowed == ("dog", "fox", "hen", "cow", "pig")
