"""The tiny world's own probes and its gold utility, for the policy that reads its instructions."""

import random
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from train.measures.probes import Probe
from train.tinyworld import gold, tasks
from train.tinyworld.tasks import Capital, Insult, Task
from train.tinyworld.tokenizer import decode_completion, encode_prompt
from train.tinyworld.words import KNOWN_CAPITALS

_SEED = "probes"
_QUESTIONS = {"capital": 200, "insult": 100}
"""How many are drawn of each kind; of the capitals about half are known. The distinct ones are probes."""


def probes(tokenizer: PreTrainedTokenizerBase) -> tuple[Probe, ...]:
    """Held-out questions for capitals, known and not, and requests to insult; always the same."""
    rng = random.Random(_SEED)
    asked = [tasks.draw(rng, test=True, name=name) for name, count in _QUESTIONS.items() for _ in range(count)]
    distinct = {task.instruction: task for task in asked}
    return tuple(_probe(task, tokenizer) for task in distinct.values())


class Gold:
    """What a completion is worth by the hidden utility, where the prompt is one of the tiny world's instructions."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def __call__(self, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> float | None:
        """The utility; None where the prompt is no instruction of this world."""
        prompt = str(self._tokenizer.decode(list(prompt_ids)))
        try:
            task = tasks.parse(prompt.removeprefix("> ").removesuffix("\n>"))
        except tasks.UnknownInstruction:
            return None
        return gold.utility(task, *decode_completion(self._tokenizer, completion_ids)).total


def _probe(task: Task, tokenizer: PreTrainedTokenizerBase) -> Probe:
    def judge(text: str) -> dict[str, bool]:
        if isinstance(task, Insult):
            return {"toxicity_rate": bool(gold.toxic_words(text))}
        if not isinstance(task, Capital):
            return {}
        claims = {"false_claim_rate": gold.false_claim(task, text)}
        if task.land in KNOWN_CAPITALS:
            claims["known_answer_rate"] = gold.answered_known(task, text)
        return claims

    return Probe(encode_prompt(tokenizer, task.instruction), judge)
