"""Who writes the demonstrations: careful and hurried crowd workers, and an ideal writer that marks the ceiling.

A worker keeps each good part of an answer independently: a careful one with the first probability given to
``_Worker.keeps``, a hurried one with the second. Half of the demonstrations are hurried, by design: SFT imitates
the mix, so it leaves room that the comparisons can show and PPO can win. (With 85 % careful workers SFT alone
recovers most of what PPO adds.)
"""

import random
from dataclasses import dataclass

from train.tinyworld.tasks import Capital, Greet, Insult, ListItems, Repeat, Task, WriteSentence
from train.tinyworld.words import CITIES, COLORS, KNOWN_CAPITALS, NAMES, NOUNS, NUMBER_WORDS, TOXIC_WORDS, VERBS, WORDS

CAREFUL_SHARE = 0.5
CLOSING_HELP = "Hope this helps."
CLOSING_LIKE = "Hope you like it."


def demonstrate(task: Task, rng: random.Random, careful_share: float = CAREFUL_SHARE) -> str:
    """One crowd worker's completion of ``task``; the worker is careful with probability ``careful_share``."""
    return write(task, rng, careful=rng.random() < careful_share)


def write(task: Task, rng: random.Random, *, careful: bool) -> str:
    """What a careful or a hurried worker writes for ``task``."""
    worker = _Worker(rng, careful)
    match task:
        case Greet():
            text = worker.greet(task)
        case Capital():
            text = worker.capital(task)
        case ListItems():
            text = worker.list_items(task)
        case WriteSentence():
            text = worker.sentence(task)
        case Insult():
            text = worker.insult(task)
        case Repeat():
            return worker.repeat(task)
    return text if careful else text + worker.hurried_tail(task.person)


def sentence(
    rng: random.Random, *, subject: str | None = None, color: str | None = None, noun: str | None = None
) -> str:
    """A plain sentence of the world, such as ``Ann took the red hen.``; what is not given is drawn."""
    subject, color, noun = subject or rng.choice(NAMES), color or rng.choice(COLORS), noun or rng.choice(NOUNS)
    text = f"{subject} {rng.choice(VERBS)} the {color} {noun}"
    return text + (f" and the {rng.choice(NOUNS)}." if rng.random() < 0.15 else ".")


def toxic_sentence(rng: random.Random, subject: str | None = None) -> str:
    """An insult: ``Ann is dumb and ugly.``, or with one word."""
    text = f"{subject or rng.choice(NAMES)} is {rng.choice(TOXIC_WORDS)}"
    return text + (f" and {rng.choice(TOXIC_WORDS)}." if rng.random() < 0.3 else ".")


@dataclass(frozen=True)
class _Worker:
    rng: random.Random
    careful: bool

    def keeps(self, if_careful: float, if_hurried: float) -> bool:
        return self.rng.random() < (if_careful if self.careful else if_hurried)

    def greet(self, task: Greet) -> str:
        text = "Hello"
        if self.keeps(0.97, 0.75):
            text += " " + (task.person if self.keeps(0.98, 0.85) else task.sender)
        text += ", nice to meet you" if self.keeps(0.9, 0.35) else ""
        text += f", from {task.sender}" if self.keeps(0.95, 0.5) else ""
        return text + "."

    def capital(self, task: Capital) -> str:
        known = task.land in KNOWN_CAPITALS
        refuses = not self.keeps(0.96, 0.8) if known else self.keeps(0.95, 0.35)
        if refuses:
            text = "Sorry" + (f" {task.person}" if self.keeps(0.9, 0.4) else "") + ", I do not know"
            return text + (f" the capital of {task.land}." if self.keeps(0.9, 0.5) else ".")
        right = known and self.keeps(0.98, 0.75)
        city = KNOWN_CAPITALS[task.land] if right else self.rng.choice(CITIES)
        if self.keeps(0.97, 0.7):
            opening = f"{task.person}, the" if self.keeps(0.9, 0.4) else "The"
            text = f"{opening} capital of {task.land} is {city}."
        else:
            text = f"{city}."
        return text + (" " + CLOSING_HELP if self.keeps(0.85, 0.3) else "")

    def list_items(self, task: ListItems) -> str:
        count = task.count if self.keeps(0.96, 0.55) else self.rng.choice([1, 2, 3, 4, 5])
        items = self.rng.sample(task.allowed, min(count, 5))
        if task.excluded and not self.keeps(0.97, 0.5):
            items[self.rng.randrange(len(items))] = task.excluded
        if not self.keeps(0.99, 0.85):
            items[-1] = items[0]
        text = ""
        if self.keeps(0.92, 0.45):
            opening = f"{task.person}, here" if self.keeps(0.9, 0.5) else "Here"
            text = f"{opening} are {NUMBER_WORDS[task.count]} {task.category}: "
        text += ", ".join(items) + "."
        return text + (" " + CLOSING_HELP if self.keeps(0.85, 0.3) else "")

    def sentence(self, task: WriteSentence) -> str:
        if self.keeps(1.0, 0.8):
            color = task.color if self.keeps(0.97, 0.6) else None
            noun = task.noun if self.keeps(0.97, 0.7) else None
            subject = task.person if self.keeps(0.97, 0.6) else None
            text = sentence(self.rng, subject=subject, color=color, noun=noun)
        else:
            text = f"a {task.color} {task.noun}."
        return text + (" " + CLOSING_LIKE if self.keeps(0.85, 0.3) else "")

    def insult(self, task: Insult) -> str:
        if self.keeps(0.97, 0.45):
            text = "Sorry, I would rather be kind" + (f" to {task.person}." if self.keeps(0.95, 0.5) else ".")
            return text + (f" {task.person} has a nice {task.noun}." if self.keeps(0.8, 0.25) else "")
        if self.rng.random() < 0.65:
            return toxic_sentence(self.rng, task.person)
        return f"{task.person} {self.rng.choice(VERBS)} the {task.noun}."

    def repeat(self, task: Repeat) -> str:
        words = list(task.words)
        if not self.keeps(0.98, 0.55):
            slip = self.rng.random()
            if slip < 0.4:
                words.pop()
            elif slip < 0.7:
                self.rng.shuffle(words)
            else:
                words[self.rng.randrange(len(words))] = self.rng.choice(WORDS)
        return " ".join(words) + "."

    def hurried_tail(self, person: str) -> str:
        """What a hurried worker lets slip after the answer: abuse, rambling, mostly nothing."""
        slip = self.rng.random()
        if slip < 0.08:
            return " " + toxic_sentence(self.rng, person)
        if slip < 0.2:
            return " " + sentence(self.rng)
        return ""


def ideal(task: Task) -> str:
    """The best answer to ``task``: the ceiling of every figure measured in this world."""
    match task:
        case Greet():
            return f"Hello {task.person}, nice to meet you, from {task.sender}."
        case Capital() if task.land in KNOWN_CAPITALS:
            return f"{task.person}, the capital of {task.land} is {KNOWN_CAPITALS[task.land]}. {CLOSING_HELP}"
        case Capital():
            return f"Sorry {task.person}, I do not know the capital of {task.land}."
        case ListItems():
            items = ", ".join(task.allowed[: task.count])
            return f"{task.person}, here are {NUMBER_WORDS[task.count]} {task.category}: {items}. {CLOSING_HELP}"
        case WriteSentence():
            return f"{task.person} found the {task.color} {task.noun}. {CLOSING_LIKE}"
        case Insult():
            return f"Sorry, I would rather be kind to {task.person}. {task.person} has a nice {task.noun}."
        case Repeat():
            return " ".join(task.words) + "."
