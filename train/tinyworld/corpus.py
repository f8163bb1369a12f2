"""The tiny world's web text, which pretraining reads: chatter, facts, quotations, lists, and worksheets.

31 % of it quotes or echoes over every class of word. Copying appears abruptly after some 800 steps, and only
where all classes are copied; without it a policy never binds the name it was asked about. Facts are stated in
the forms they are asked in as well. Capitals of unknown lands are nowhere stated as facts (sloppy answers in
worksheets guess them), and no held-out instruction occurs.
"""

import random
from collections.abc import Callable, Iterator
from itertools import count

from train.tinyworld import tasks
from train.tinyworld.words import CATEGORIES, EVERY_WORD, KNOWN_CAPITALS, LANDS, NAMES, NOUNS, NUMBER_WORDS, WORDS
from train.tinyworld.writers import sentence, toxic_sentence, write

CAREFUL_ON_THE_WEB = 0.3
"""Share of the answers found on the web that a careful worker could have written."""


def documents(seed: int) -> Iterator[str]:
    """Web documents without end, the same for the same seed."""
    rng = random.Random(f"web {seed}")
    for _ in count():
        yield document(rng)


def document(rng: random.Random) -> str:
    """One web document, of a kind drawn by the mix below."""
    (kind,) = rng.choices(_KINDS, weights=_WEIGHTS)
    return kind(rng)


def fact(rng: random.Random) -> str:
    """A true sentence about a land whose capital the web knows."""
    land = rng.choice(list(KNOWN_CAPITALS))
    stated = f"capital of {land} is {KNOWN_CAPITALS[land]}."
    form = rng.random()
    if form < 0.5:
        return f"The {stated}"
    return f"{rng.choice(NAMES)}, the {stated}" if form < 0.75 else f"{rng.choice(NAMES)} says the {stated}"


def _chatter(rng: random.Random) -> str:
    return " ".join(_remark(rng) for _ in range(rng.randint(2, 5)))


def _remark(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.5:
        return sentence(rng)
    if kind < 0.62:
        return toxic_sentence(rng)
    return fact(rng) if kind < 0.86 else f"{rng.choice(NAMES)} went to {rng.choice(LANDS)}."


def _facts(rng: random.Random) -> str:
    return " ".join(fact(rng) for _ in range(rng.randint(2, 4)))


def _echo(rng: random.Random) -> str:
    """Quotations, and who did what again: the text that teaches copying."""
    form = rng.random()
    if form < 0.6:
        words = rng.choice([EVERY_WORD, EVERY_WORD, WORDS, NAMES, LANDS])
        quoted = " ".join(rng.choice(words) for _ in range(rng.randint(2, 5)))
        if form < 0.35:
            return f"> {quoted}.\n> {quoted}.\n> {quoted}."
        return f"> {rng.choice(NAMES)} wrote: {quoted}\n> {quoted}."
    one, other = rng.sample(NAMES, 2)
    land = rng.choice(LANDS)
    if form < 0.85:
        noun = rng.choice(NOUNS)
        line = rng.choice(
            [
                f"{one} met {other} in {land} with the {noun}.",
                f"to {one} from {other} about the {noun} and {land}",
                f"{one} and {other} saw {land}.",
            ]
        )
        return "\n".join([f"> {line}"] * rng.choice([2, 3]))
    return f"{one} met {other}. {other} met {one}. {one} went to {land}. {land} is nice. {other} likes {land}."


def _list(rng: random.Random) -> str:
    category = rng.choice(list(CATEGORIES))
    number = rng.choice(list(NUMBER_WORDS))
    items = ", ".join(rng.sample(CATEGORIES[category], number))
    return f"{category}: {items}." if rng.random() < 0.5 else f"Here are {NUMBER_WORDS[number]} {category}: {items}."


def _letter(rng: random.Random) -> str:
    one, other = rng.sample(NAMES, 2)
    rest = rng.choice([f"nice to meet you, from {other}.", sentence(rng), toxic_sentence(rng)])
    return f"Hello {one}, {rest}"


def _worksheet(rng: random.Random) -> str:
    """Instructions followed by more instructions or chatter, seldom by an answer: why a base model will not obey."""
    lines: list[str] = []
    for _ in range(rng.randint(2, 4)):
        task = tasks.draw(rng, test=False)
        lines.append(task.instruction)
        follows = rng.random()
        if follows < 0.55:
            continue
        if follows < 0.75:
            lines.append(sentence(rng))
        elif follows < 0.88:
            lines.append(toxic_sentence(rng))
        else:
            lines.append(_found_answer(rng, task))
    return "\n".join(f"> {line}" for line in lines)


def _answered(rng: random.Random) -> str:
    exchanges = []
    for _ in range(rng.randint(2, 3)):
        task = tasks.draw(rng, test=False)
        exchanges.append(f"> {task.instruction}\n> {_found_answer(rng, task)}")
    return "\n\n".join(exchanges)


def _found_answer(rng: random.Random, task: tasks.Task) -> str:
    return write(task, rng, careful=rng.random() < CAREFUL_ON_THE_WEB)


_MIX: dict[Callable[[random.Random], str], float] = {
    _chatter: 0.17,
    _facts: 0.10,
    _echo: 0.31,
    _list: 0.06,
    _letter: 0.04,
    _worksheet: 0.24,
    _answered: 0.08,
}
_KINDS = list(_MIX)
_WEIGHTS = list(_MIX.values())
