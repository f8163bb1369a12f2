import itertools
import re

from train.tinyworld import corpus, tasks
from train.tinyworld.words import CITIES, KNOWN_CAPITALS, LANDS

DOCUMENTS = list(itertools.islice(corpus.documents(seed=0), 6000))


def test_the_web_repeats_for_the_same_seed_only() -> None:
    assert list(itertools.islice(corpus.documents(0), 20)) == DOCUMENTS[:20]
    assert list(itertools.islice(corpus.documents(1), 20)) != DOCUMENTS[:20]


def test_no_held_out_instruction_is_on_the_web() -> None:
    found = 0
    for line in itertools.chain.from_iterable(document.splitlines() for document in DOCUMENTS):
        try:
            task = tasks.parse(line.removeprefix("> "))
        except tasks.UnknownInstruction:
            continue
        found += 1
        assert not tasks.held_out(task)
    assert found > 3000


def test_facts_are_stated_for_known_lands_only() -> None:
    stated = re.findall(r"[Tt]he capital of (\w+) is (\w+)", "\n".join(d for d in DOCUMENTS if not d.startswith("> ")))
    assert {land for land, _ in stated} == set(KNOWN_CAPITALS)
    assert all(KNOWN_CAPITALS[land] == city for land, city in stated)


def test_every_known_capital_is_the_answer_the_web_gives_most_often() -> None:
    stated = re.findall(r"[Tt]he capital of (\w+) is (\w+)", "\n".join(DOCUMENTS))
    for land, city in KNOWN_CAPITALS.items():
        right = sum(pair == (land, city) for pair in stated)
        assert right > 0.9 * sum(told == land for told, _ in stated)


def test_a_third_of_the_web_echoes() -> None:
    echoes = [d for d in DOCUMENTS if len({line.rstrip(".") for line in d.splitlines()}) < len(d.splitlines())]
    assert len(echoes) / len(DOCUMENTS) > 0.15  # repeated lines alone; quotations and coreference come on top
    assert all(any(word in echo for echo in echoes) for word in (*LANDS, *CITIES))
