import itertools
import random

import pytest

from feedback.records import ranking_problem
from train.tinyworld import labelers, tasks, writers
from train.tinyworld.gold import utility
from train.tinyworld.labelers import GOLD, Labeler

REPEAT = "Repeat these words: dog red"
GOOD, HALF, BAD = "dog red.", "dog cow.", "Ann is dumb."
FINISHED = [True, True, True]


def test_gold_ranks_by_utility_and_ties_what_is_equal() -> None:
    assert GOLD.rank(REPEAT, [BAD, GOOD, HALF], FINISHED) == ((1,), (2,), (0,))
    # "dog cow." and "cow red." each have one of two words in place.
    assert GOLD.rank(REPEAT, ["cow red.", GOOD, HALF], FINISHED) == ((1,), (0, 2))
    assert GOLD.rank(REPEAT, [GOOD, GOOD, HALF], [False, True, True]) == ((1,), (0, 2))  # an unfinished one loses 1


def test_a_difference_below_the_threshold_is_a_tie() -> None:
    # Utilities 1.7 and 0.7: one apart.
    assert Labeler("L", 1, noise=0, tie_threshold=0.99).rank(REPEAT, [HALF, GOOD], [True, True]) == ((1,), (0,))
    assert Labeler("L", 1, noise=0, tie_threshold=1.01).rank(REPEAT, [HALF, GOOD], [True, True]) == ((0, 1),)


def test_equal_texts_are_always_tied() -> None:
    noisy = Labeler("L", 1, noise=5.0, tie_threshold=0.0, position_bias=3.0)
    for seed in range(20):
        task = tasks.draw(random.Random(seed), test=False)
        ranking = noisy.rank(task.instruction, ["Hello.", "Sorry.", " Hello."], FINISHED)
        assert any({0, 2} <= set(group) for group in ranking)


def test_biases_decide_where_the_texts_are_equally_good() -> None:
    task = "Write a sentence about Ann and a red fox"
    texts = ["Ann met the red fox.", "Ann ate the red fox."]
    first = Labeler("L", 1, noise=0, tie_threshold=0, position_bias=0.1)
    assert first.rank(task, texts, [True, True]) == ((0,), (1,))
    longer = Labeler("L", 1, noise=0, tie_threshold=0, length_bias=0.1)
    more = "Ann met the red fox and the cow."
    assert longer.rank(task, [texts[0], more], [True, True]) == ((1,), (0,))


def test_a_judgement_depends_on_what_is_shown_and_on_nothing_before() -> None:
    one, other = Labeler("L", 7), Labeler("L", 7)
    other.rank(REPEAT, [GOOD, BAD], [True, True])
    shown = [GOOD, HALF, "dog.", "red dog.", BAD]
    assert one.rank(REPEAT, shown, [True] * 5) == other.rank(REPEAT, shown, [True] * 5)
    judgements = {Labeler("L", seed).rank(REPEAT, shown, [True] * 5) for seed in range(20)}
    assert len(judgements) > 5


def test_every_ranking_is_one_the_server_accepts() -> None:
    rng = random.Random(0)
    for labeler in labelers.population(20, seed=0):
        task = tasks.draw(rng, test=True)
        texts = [writers.demonstrate(task, rng) for _ in range(6)]
        assert ranking_problem(labeler.rank(task.instruction, texts, [True] * 6), 6) is None


def test_an_instruction_of_another_world_is_refused() -> None:
    with pytest.raises(tasks.UnknownInstruction):
        GOLD.rank("Write a poem", [GOOD, BAD], [True, True])


def test_two_labelers_agree_on_about_73_percent() -> None:
    """On demonstrations, whose utilities differ about as much as an SFT policy's samples (there it is 73 %)."""
    people = labelers.population(100, seed=3)
    rng = random.Random(4)
    agreed: list[bool] = []
    for _ in range(1500):
        task = tasks.draw(rng, test=False)
        texts = [writers.demonstrate(task, rng) for _ in range(4)]
        worth = [utility(task, text, True).total for text in texts]
        one, other = (_places(labeler, task.instruction, texts) for labeler in rng.sample(people, 2))
        agreed += [
            (one[i] < one[j]) == (other[i] < other[j])
            for i, j in itertools.combinations(range(4), 2)
            if worth[i] != worth[j] and one[i] != one[j] and other[i] != other[j]
        ]
    assert 0.70 < sum(agreed) / len(agreed) < 0.77


def _places(labeler: Labeler, instruction: str, texts: list[str]) -> dict[int, int]:
    ranking = labeler.rank(instruction, texts, [True] * len(texts))
    return {index: place for place, group in enumerate(ranking) for index in group}


def test_the_population_is_seeded_and_differs_in_reliability() -> None:
    people = labelers.population(40, seed=5)
    assert people == labelers.population(40, seed=5)
    assert people != labelers.population(40, seed=6)
    assert len({labeler.name for labeler in people}) == 40
    noises = sorted(labeler.noise for labeler in people)
    assert 1.5 < noises[35] / noises[4] < 4
