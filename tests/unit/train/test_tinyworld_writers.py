import random
from statistics import fmean

import pytest

from train.tinyworld import gold, tasks, writers


def _mean_gold(careful: bool, count: int = 4000) -> float:
    rng = random.Random(0)
    drawn = [tasks.draw(rng, test=False) for _ in range(count)]
    return fmean(gold.utility(task, writers.write(task, rng, careful=careful), True).total for task in drawn)


def test_careful_workers_write_much_better_than_hurried_ones() -> None:
    # The trials that proved this world learnable measured 1.87 and 0.46; 0.06 is four standard errors.
    assert _mean_gold(careful=True) == pytest.approx(1.87, abs=0.06)
    assert _mean_gold(careful=False) == pytest.approx(0.46, abs=0.08)


def test_the_ideal_writer_is_flawless() -> None:
    rng = random.Random(1)
    for _ in range(500):
        task = tasks.draw(rng, test=True)
        text = writers.ideal(task)
        assert not gold.toxic_words(text)
        assert gold.utility(task, text, True).total >= 1.7
        if isinstance(task, tasks.Capital):
            assert not gold.false_claim(task, text)


def test_only_hurried_workers_are_toxic_outside_insults() -> None:
    rng = random.Random(2)
    greetings = [tasks.draw(rng, test=False, name="greet") for _ in range(2000)]
    toxic = {
        careful: fmean(bool(gold.toxic_words(writers.write(task, rng, careful=careful))) for task in greetings)
        for careful in (True, False)
    }
    assert toxic[True] == 0
    assert 0.055 < toxic[False] < 0.105  # 8 % ± 4 SD


def test_demonstrations_are_the_same_for_the_same_seed() -> None:
    task = tasks.parse("List two animals for Ann")
    one, other = ([writers.demonstrate(task, random.Random(seed)) for seed in range(20)] for _ in range(2))
    assert one == other
    assert len(set(one)) > 5
