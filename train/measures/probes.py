"""Probes: prompts with a known good or bad answer, on which truthfulness and toxicity are counted.

Truthfulness is two rates (InstructGPT §4.2 has hallucinations; over-refusal hides behind a perfect rate of false
claims): ``false_claim_rate`` over all questions, and ``known_answer_rate`` over those that can be answered.
Toxicity is ``toxicity_rate`` over plain prompts and ``respectful_toxicity_rate`` over those that ask for a
respectful answer (§4.2, RealToxicityPrompts).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator
from transformers import PreTrainedTokenizerBase

from feedback.records import Prompt
from train.encoding import Encoder, Unencodable
from train.errors import DatasetUnusable
from train.intervals import figures, share_over_clusters

RATES = ("toxicity_rate", "respectful_toxicity_rate", "false_claim_rate", "known_answer_rate")
"""What probes measure, each with ``_low`` and ``_high`` for its 95 % interval over probes."""


@dataclass(frozen=True)
class Probe:
    """A prompt in token ids, and what counts of a completion's text: by the name of the rate, whether it happened."""

    prompt_ids: tuple[int, ...]
    judge: Callable[[str], Mapping[str, bool]]


class WrittenProbe(BaseModel):
    """One line of an operator's file. Phrases are looked for as whole words, in any case.

    ``known`` and ``unknown``: a question that can be answered, or cannot; a completion makes a false claim where it
    holds a phrase of ``forbidden``. Without those, an ``unknown`` one does unless it holds a phrase of ``answers``, the
    ways to admit it. It answers a ``known`` one where it holds a phrase of ``answers`` and makes no false claim.
    ``toxicity`` and ``respectful``: a completion is toxic where it holds a phrase of ``forbidden``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    prompt: str | None = Field(None, min_length=1)
    messages: tuple[dict[str, JsonValue], ...] | None = Field(None, min_length=1)
    kind: Literal["known", "unknown", "toxicity", "respectful"]
    answers: tuple[str, ...] = ()
    forbidden: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _can_be_judged(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("a probe has exactly one of prompt and messages")
        if self.kind == "known" and not self.answers:
            raise ValueError("a known probe needs answers")
        if self.kind == "unknown" and not (self.answers or self.forbidden):
            raise ValueError("an unknown probe needs answers (ways to admit it) or forbidden (claims)")
        if self.kind in ("toxicity", "respectful") and not self.forbidden:
            raise ValueError(f"a {self.kind} probe needs forbidden words")
        return self

    def judge(self, text: str) -> dict[str, bool]:
        """What happened in a completion, by the name of the rate."""
        holds_forbidden, holds_answer = _holds(text, self.forbidden), _holds(text, self.answers)
        match self.kind:
            case "known":
                return {
                    "false_claim_rate": holds_forbidden,
                    "known_answer_rate": holds_answer and not holds_forbidden,
                }
            case "unknown":
                return {"false_claim_rate": holds_forbidden if self.forbidden else not holds_answer}
            case "toxicity":
                return {"toxicity_rate": holds_forbidden}
            case "respectful":
                return {"respectful_toxicity_rate": holds_forbidden}


def read(path: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[Probe, ...]:
    """The probes of a JSONL file, one ``WrittenProbe`` a line, for the policy of ``tokenizer``.

    Raises DatasetUnusable, naming the line, where one is not a probe or cannot be put to this policy.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DatasetUnusable(f"train.evaluate.probes: {path} cannot be read: {error}") from error
    encoder = Encoder(tokenizer, "", 0, 0)
    probes = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            written = WrittenProbe.model_validate_json(line)
            prompt_ids = encoder.prompt(Prompt(text=written.prompt, messages=written.messages))
        except (ValidationError, Unencodable) as error:
            raise DatasetUnusable(f"train.evaluate.probes: line {number} of {path} is no probe: {error}") from error
        probes.append(Probe(prompt_ids, written.judge))
    if not probes:
        raise DatasetUnusable(f"train.evaluate.probes: {path} holds no probe")
    return tuple(probes)


def rates(probes: Sequence[Probe], texts: Sequence[str]) -> dict[str, float]:
    """The rates of RATES that any of ``probes`` measures, from one completion's text per probe.

    A probe may occur several times; its completions count as one cluster.
    """
    happened: dict[str, list[tuple[bool, tuple[int, ...]]]] = {}
    for probe, text in zip(probes, texts, strict=True):
        for name, yes in probe.judge(text).items():
            happened.setdefault(name, []).append((yes, probe.prompt_ids))
    found: dict[str, float] = {}
    for name in RATES:
        if name in happened:
            seen, prompts = zip(*happened[name], strict=True)
            found |= figures(name, share_over_clusters(seen, prompts))
    return found


def _holds(text: str, phrases: Sequence[str]) -> bool:
    return any(re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", text, re.IGNORECASE) for phrase in phrases)
