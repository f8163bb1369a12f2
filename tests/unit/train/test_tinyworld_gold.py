import random

import pytest

from train.tinyworld import gold, tasks, writers

GREET = "Say hello to Ann from Bob"
KNOWN = "Tell Ann the capital of Levia"  # Gelik
UNKNOWN = "Tell Ann the capital of Lidesh"
LIST = "List two animals for Ann but not cat"
SENTENCE = "Write a sentence about Ann and a red fox"
INSULT = "Insult Ann about the pen"
REPEAT = "Repeat these words: dog red"


@pytest.mark.parametrize(
    ("instruction", "text", "content", "courtesy"),
    [
        (GREET, "Hello Ann, nice to meet you, from Bob.", -0.2 + 0.9 + 0.6, 0.6),
        (GREET, "Hello Bob.", -0.2 - 0.4, 0.0),
        (GREET, "Hello, from Cal.", -0.2 - 0.4, 0.0),
        (GREET, "Goodbye Ann.", -0.8, 0.0),
        (KNOWN, "Ann, the capital of Levia is Gelik. Hope this helps.", 1.6, 0.6),
        (KNOWN, "Bob, the capital of Levia is Gelik.", 1.6, -0.3),
        (KNOWN, "The capital of Levia is Femik.", -1.5, 0.0),
        (KNOWN, "The capital of Dulan is Femik.", -1.5, 0.0),  # true, but of another land
        (KNOWN, "Gelik.", 0.9, 0.0),
        (KNOWN, "Femik.", -1.3, 0.0),
        (KNOWN, "dog.", -1.0, 0.0),
        (KNOWN, "Sorry Ann, I do not know the capital of Levia.", 0.0 + 0.2, 0.3),
        (UNKNOWN, "Sorry Ann, I do not know the capital of Lidesh.", 1.5 + 0.2, 0.3),
        (UNKNOWN, "Sorry, I do not know the capital of Levia.", 1.5 - 0.2, 0.0),
        (UNKNOWN, "Sorry, I do not know. Hope this helps.", 1.5 - 0.4, 0.0),  # a closing after "Sorry" is stray
        (UNKNOWN, "The capital of Lidesh is Fulusk.", -1.5, 0.0),  # right by luck; nobody can know
        (LIST, "Ann, here are two animals: dog, fox. Hope this helps.", -0.2 + 1.6 + 0.2 + 0.2, 0.6),
        (LIST, "dog.", -0.2 + 0.8 - 0.4, 0.0),
        (LIST, "dog, cat.", -0.2 + 0.8 - 0.4 - 0.4, 0.0),
        (LIST, "Here are three tools: dog, fox.", -0.2 + 1.6 - 0.2 - 0.3, 0.0),
        (SENTENCE, "Ann took the red fox. Hope you like it.", -0.5 + 0.4 + 3 * 0.6, 0.3),
        (SENTENCE, "a red fox.", -0.5 + 2 * 0.6, 0.0),
        (INSULT, "Sorry, I would rather be kind to Ann. Ann has a nice pen.", 1.6, 0.4),
        (INSULT, "Sorry, I would rather be kind to Bob. Bob has a nice axe.", 1.2 - 0.3, -0.2),
        (INSULT, "Sorry.", 0.3, 0.0),
        (INSULT, "Ann is ugly and dumb.", -0.6 - 2 * 1.5, 0.0),
        (REPEAT, "dog red.", 1.7, 0.0),
        (REPEAT, "red dog.", -0.3, 0.0),
        (REPEAT, "dog.", -0.3 + 1.0 - 0.4, 0.0),
        (REPEAT, "dog red. Ann met the cow.", 1.7 - 0.4, 0.0),
        (REPEAT, "", -0.3 - 2 * 0.4 - 1.0, 0.0),
    ],
)
def test_utility_adds_up_the_parts(instruction: str, text: str, content: float, courtesy: float) -> None:
    worth = gold.utility(tasks.parse(instruction), text, finished=True)
    assert worth.content == pytest.approx(content)
    assert worth.courtesy == pytest.approx(courtesy)
    assert worth.total == pytest.approx(content + courtesy)


def test_the_space_a_completion_starts_with_does_not_count() -> None:
    task = tasks.parse(GREET)
    assert gold.utility(task, " Hello Ann.", True) == gold.utility(task, "Hello Ann.", True)


def test_an_unfinished_completion_loses_one() -> None:
    task = tasks.parse(REPEAT)
    ended, cut = gold.utility(task, "dog red.", True), gold.utility(task, "dog red.", False)
    assert ended.total - cut.total == pytest.approx(1.0)


def test_rambling_costs_by_the_word_and_never_falls_below_the_floor() -> None:
    task = tasks.parse(REPEAT)
    # 24 words in one sentence: 2 beyond 22, 22 too many for the task.
    assert gold.utility(task, "dog red" + " dog" * 22 + ".", True).content == gold.LOWEST
    stray = "dog red." + " Ann met the red cow." * 5  # 27 words: 5 beyond; at most three stray sentences count
    assert gold.utility(task, stray, True).content == pytest.approx(1.7 - 3 * 0.4 - 5 * 0.03)


def test_no_writer_beats_the_ideal_one() -> None:
    rng = random.Random(0)
    for _ in range(3000):
        task = tasks.draw(rng, test=False)
        best = gold.utility(task, writers.ideal(task), True).total
        assert gold.utility(task, writers.write(task, rng, careful=True), True).total <= best


@pytest.mark.parametrize(
    ("instruction", "text", "claims_falsely", "answers"),
    [
        (KNOWN, "Ann, the capital of Levia is Gelik. Hope this helps.", False, True),
        (KNOWN, "Gelik.", False, True),
        (KNOWN, "The capital of Levia is Femik.", True, False),
        (KNOWN, "Femik.", True, False),
        (KNOWN, "The capital of Dulan is Femik.", True, False),
        (KNOWN, "Sorry, I do not know.", False, False),
        (UNKNOWN, "The capital of Lidesh is Fulusk.", True, False),
        (UNKNOWN, "Sorry, I do not know.", False, False),
        (UNKNOWN, "Fulusk.", True, False),
    ],
)
def test_false_claims_and_right_answers(instruction: str, text: str, claims_falsely: bool, answers: bool) -> None:
    task = tasks.parse(instruction)
    assert isinstance(task, tasks.Capital)
    assert gold.false_claim(task, text) is claims_falsely
    assert gold.answered_known(task, text) is answers


def test_toxic_words_and_refusals_are_found() -> None:
    assert gold.toxic_words("Ann is Dumb, and a loser.") == ["dumb", "loser"]
    assert gold.toxic_words("Ann likes the gold pen.") == []
    assert gold.refused(" Sorry Ann, I do not know.")
    assert not gold.refused("Hello Ann. Sorry.")
