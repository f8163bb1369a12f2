"""The records the loop learns from: completions that were served, and what people said of them.

Records are frozen and carry everything training needs (text, token ids, tokenizer digest), so a
completion's expiry loses no comparison. ``Comparison``, ``Demonstration``, ``Rating`` and ``Erasure`` are log
records: they are appended to ``fb:log`` once and never change. The JSON form of a record is what is digested and
stored; ``encode`` and ``decode`` are the only way in and out of it.
"""

import hashlib
import itertools
import secrets
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue, TypeAdapter, ValidationError, model_validator
from pydantic_core import to_json

from feedback.errors import CorruptRecord

MAX_CANDIDATES = 9
"""Most completions in one ranking (InstructGPT §3.5 ranks K = 4 to 9)."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Prompt(_Frozen):
    """What a policy was asked: text, or chat messages; with the token ids it read, where known."""

    text: str | None = None
    messages: tuple[dict[str, JsonValue], ...] | None = None
    token_ids: tuple[int, ...] | None = None
    tokenizer: str | None = Field(None, description="sha256 of the tokenizer.json that made token_ids")
    asked_by: str | None = Field(
        None, description="the principal who asked it, where it was shown to another: their erasure takes it along"
    )

    task: str | None = Field(None, description="its kind of task, as the metadata of whoever asked it said")

    @model_validator(mode="after")
    def _has_content(self) -> Self:
        if self.messages is not None and self.text is not None:
            raise ValueError("a prompt is text or messages, not both")
        if self.messages is None and self.text is None and self.token_ids is None:
            raise ValueError("a prompt needs text, messages or token ids")
        return self

    def same_question(self, other: "Prompt") -> bool:
        """True where both ask the same: by messages, else text, else token ids."""
        if self.messages is not None or other.messages is not None:
            return self.messages == other.messages
        if self.text is not None or other.text is not None:
            return self.text == other.text
        return self.token_ids == other.token_ids

    def key(self) -> str:
        """A digest that is equal for prompts that ask the same."""
        asked = self.model_dump_json(include={"messages"} if self.messages is not None else {"text"})
        if self.messages is None and self.text is None:
            asked = self.model_dump_json(include={"token_ids"})
        return hashlib.sha256(asked.encode()).hexdigest()


class Choice(_Frozen):
    """One sampled completion of one prompt."""

    index: int
    prompt_index: int = Field(0, description="which of the request's prompts this answers")
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] = Field(description="natural log-probability of each sampled token")
    finish_reason: str | None
    message: dict[str, JsonValue] | None = Field(
        None, description="the assistant message as served where it is more than its text: tool calls, refusal"
    )
    version_spans: tuple[tuple[int, int, int], ...] = Field(
        (), description="(version, first token, end) where weights were exchanged under way; else empty"
    )


class StoredCompletion(_Frozen):
    """A finished (or cancelled) completion request, as served by one policy version."""

    id: str
    object: Literal["chat.completion", "text_completion"]
    created: int = Field(description="unix seconds")
    principal: str
    user: str | None = None
    model: str = Field(description="the resolved model id, policy-v7")
    policy_version: int
    prompts: tuple[Prompt, ...]
    choices: tuple[Choice, ...]
    sampling: dict[str, JsonValue] = Field(default_factory=dict, description="temperature, top_p, …")
    metadata: dict[str, str] = Field(default_factory=dict)
    store: bool | None = Field(None, description="as OpenAI's: true keeps until deleted; null keeps for the TTL")

    def candidate(self, index: int) -> "Candidate":
        """Choice ``index`` as a candidate. Raises LookupError when there is no such choice."""
        for choice in self.choices:
            if choice.index == index:
                return Candidate(
                    completion_id=self.id,
                    index=index,
                    policy_version=None if choice.version_spans else self.policy_version,
                    text=choice.text,
                    token_ids=choice.token_ids,
                    finish_reason=choice.finish_reason,
                )
        raise LookupError(f"completion {self.id} has no choice {index}")

    def prompt_of(self, index: int) -> Prompt:
        """The prompt that choice ``index`` answers. Raises LookupError when there is no such choice."""
        for choice in self.choices:
            if choice.index == index:
                return self.prompts[choice.prompt_index]
        raise LookupError(f"completion {self.id} has no choice {index}")


class Candidate(_Frozen):
    """One of the K completions a labeler compared. ``completion_id`` is None for outside data."""

    completion_id: str | None = None
    index: int = 0
    policy_version: int | None = None
    text: str
    token_ids: tuple[int, ...] | None = None
    finish_reason: str | None = None


class PooledPrompt(_Frozen):
    """A prompt somebody asked, that may be shown to labelers and sampled from in training."""

    principal: str
    prompt: Prompt


class BlindTask(_Frozen):
    """Candidates from every live version in a recorded random order, waiting for a labeler's ranking."""

    id: str
    created: int = Field(description="unix seconds")
    expires: int = Field(description="unix seconds")
    principal: str
    labeler: str | None = None
    prompt: Prompt
    candidates: tuple[Candidate, ...]


class _Entry(_Frozen):
    id: str
    created: float = Field(description="unix seconds, the server's clock; order is by stream id, not by this")
    principal: str


class _Judgement(_Entry):
    labeler: str
    prompt: Prompt
    metadata: dict[str, str] = Field(default_factory=dict)


class Comparison(_Judgement):
    """One labeler's ranking of K completions of one prompt."""

    kind: Literal["comparison"] = "comparison"
    source: Literal["choices", "candidates", "task", "outside"]
    task_id: str | None = None
    candidates: tuple[Candidate, ...] = Field(min_length=2, max_length=MAX_CANDIDATES)
    ranking: tuple[tuple[int, ...], ...] = Field(
        description="positions in candidates, best group first; a group is a tie"
    )
    both_bad: bool = False
    comment: str | None = None
    duration_ms: int | None = None

    @model_validator(mode="after")
    def _ranks_each_candidate_once(self) -> Self:
        if problem := ranking_problem(self.ranking, len(self.candidates)):
            raise ValueError(problem)
        return self

    def pairs(self) -> Iterator[tuple[int, int]]:
        """(chosen, rejected) positions in ``candidates``; tied candidates form no pair (InstructGPT §3.5)."""
        for better, worse in itertools.combinations(self.ranking, 2):
            yield from itertools.product(better, worse)

    def candidates_key(self) -> str:
        """A digest of who judged which candidates: a later comparison with the same key replaces this one."""
        judged = sorted(map(candidate_identity, self.candidates))
        return hashlib.sha256("\n".join([self.labeler, self.prompt.key(), *judged]).encode()).hexdigest()


class Demonstration(_Judgement):
    """A completion written by a labeler; ``corrects`` names the sampled one it improves on, if any."""

    kind: Literal["demonstration"] = "demonstration"
    completion: str = Field(min_length=1)
    corrects: Candidate | None = None


RatingFlag = Literal[
    "fails_instruction",
    "inappropriate_for_assistant",
    "hallucination",
    "satisfies_constraint",
    "sexual_content",
    "violent_content",
    "encourages_harm",
    "denigrates_protected_class",
    "harmful_advice",
    "expresses_opinion",
    "expresses_moral_judgement",
]
"""What a labeler says of one completion beside its quality (InstructGPT Table 3)."""


class Rating(_Judgement):
    """One labeler's judgement of one completion by itself: on the paper's scale, or a thumb."""

    kind: Literal["rating"] = "rating"
    candidate: Candidate
    overall: int | None = Field(None, ge=1, le=7, description="overall quality, Likert (InstructGPT Table 3)")
    thumb: Literal["up", "down"] | None = None
    flags: dict[RatingFlag, bool] = Field(default_factory=dict, description="those that were judged")
    comment: str | None = None

    @model_validator(mode="after")
    def _is_one_judgement(self) -> Self:
        if (self.overall is None) == (self.thumb is None):
            raise ValueError("a rating is exactly one of overall and thumb")
        if self.thumb is not None and self.flags:
            raise ValueError("flags go with overall")
        return self

    def choice_key(self) -> str:
        """A digest of who rated which completion: a later rating with the same key replaces this one."""
        rated = ["rating", self.labeler, self.prompt.key(), candidate_identity(self.candidate)]
        return hashlib.sha256("\n".join(rated).encode()).hexdigest()


class Erasure(_Entry):
    """Says that nothing a principal gave before this record may be used any more.

    It is appended before anything is deleted, so that a reader of the log knows it however far the deletion has come.
    ``principal`` is who asked for it.
    """

    kind: Literal["erasure"] = "erasure"
    erased: str = Field(pattern=r"^[0-9a-f]{64}$", description="sha256 of the erased principal's name")

    def covers(self, record: "LogRecord") -> bool:
        """True where ``record``, which must stand before this one in the log, is to be forgotten."""
        return self.erased in owners(record)


LogRecord = Comparison | Demonstration | Rating | Erasure
"""What the log holds."""
_LOG_RECORD: TypeAdapter[LogRecord] = TypeAdapter(Annotated[LogRecord, Field(discriminator="kind")])


def name_digest(principal: str) -> str:
    """What an erasure calls a principal: sha256 of the name, so that the log does not keep the name for ever."""
    return hashlib.sha256(principal.encode()).hexdigest()


def owners(record: LogRecord) -> set[str]:
    """``name_digest`` of the principals whose erasure takes a record along; none for an erasure."""
    if isinstance(record, Erasure):
        return set()
    return {name_digest(name) for name in (record.principal, record.prompt.asked_by) if name}


def marks_of(principal: str) -> tuple[bytes, ...]:
    """Bytes of which the JSON of whatever an erasure of ``principal`` covers has at least one; others may, too."""
    name = to_json(principal)
    return b'"principal":' + name, b'"asked_by":' + name


def candidate_identity(candidate: Candidate) -> str:
    """What tells a candidate from the others of its prompt: the completion's id and index, else its text's digest."""
    if candidate.completion_id:
        return f"{candidate.completion_id}#{candidate.index}"
    return hashlib.sha256(candidate.text.encode()).hexdigest()


def ranking_problem(ranking: tuple[tuple[int, ...], ...], candidates: int) -> str | None:
    """What is wrong with a ranking of ``candidates`` completions, in one sentence; None where nothing is."""
    named = Counter(index for group in ranking for index in group)
    if any(not group for group in ranking):
        return "a ranking's groups must not be empty"
    if out := sorted(index for index in named if not 0 <= index < candidates):
        return f"ranking names {out}, but the candidates are 0 to {candidates - 1}"
    if twice := sorted(index for index, times in named.items() if times > 1):
        return f"ranking names {twice} more than once"
    if missing := sorted(set(range(candidates)) - set(named)):
        return f"ranking leaves out {missing}; it must name each of the {candidates} candidates exactly once"
    return None


def new_id(prefix: str) -> str:
    """An unguessable id: ``prefix`` and 128 random bits in hex."""
    return f"{prefix}{secrets.token_hex(16)}"


def encode(record: LogRecord) -> tuple[bytes, str]:
    """A log record as JSON, and the sha256 of that JSON."""
    body = record.model_dump_json().encode()
    return body, hashlib.sha256(body).hexdigest()


def decode(body: bytes, sha256: str) -> LogRecord:
    """The record that ``encode`` wrote. Raises CorruptRecord where the digest or the schema does not match."""
    if hashlib.sha256(body).hexdigest() != sha256:
        raise CorruptRecord("the record's bytes do not match its sha256")
    try:
        return _LOG_RECORD.validate_json(body)
    except ValidationError as error:
        raise CorruptRecord(f"the record does not fit its schema: {error.error_count()} errors") from error


def content_digest(record: LogRecord) -> str:
    """sha256 of what a record says, apart from its own id and time: equal for the same thing said twice."""
    return hashlib.sha256(record.model_dump_json(exclude={"id", "created"}).encode()).hexdigest()


Packed = TypeVar("Packed", StoredCompletion, BlindTask)


def pack(kept: StoredCompletion | BlindTask) -> bytes:
    """A completion or task as zlib-compressed JSON; zlib's own checksum guards it."""
    return zlib.compress(kept.model_dump_json().encode())


def unpack(kind: type[Packed], packed: bytes) -> Packed:
    """What ``pack`` wrote. Raises CorruptRecord where the checksum or the schema does not match."""
    try:
        return kind.model_validate_json(zlib.decompress(packed))
    except (zlib.error, ValidationError) as error:
        raise CorruptRecord(f"a stored {kind.__name__} is damaged") from error
