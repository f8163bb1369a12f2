"""What a client may post as feedback: the forms that comparisons, demonstrations and blind tasks come in."""

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    StrictBool,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticSerializationError, to_json

from feedback.records import MAX_CANDIDATES, Prompt, RatingFlag, ranking_problem
from serve.errors import InvalidRequest

Labeler = Annotated[str, Field(min_length=1, max_length=128)]
Text = Annotated[str, Field(max_length=100_000)]
Group = Annotated[list[int], Field(max_length=MAX_CANDIDATES)]


def _one_message(metadata: Any, check: ValidatorFunctionWrapHandler) -> Any:
    try:
        return check(metadata)
    except ValidationError as error:
        if not error.errors()[0]["loc"]:
            raise
        # Its own message would name the client's keys.
        raise ValueError("names may have at most 64 characters; values must be text of at most 512") from error


_Strings = dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]]
Pairs = Annotated[_Strings, WrapValidator(_one_message)]
Metadata = Annotated[_Strings, Field(max_length=16), WrapValidator(_one_message)]


class FeedbackBody(BaseModel):
    """Unknown fields are errors: a misspelt one must not be dropped in silence."""

    model_config = ConfigDict(extra="forbid")


class CandidateRef(FeedbackBody):
    """One choice of a completion this server served."""

    completion_id: str = Field(max_length=128)
    index: int = Field(0, ge=0)


class PromptBody(FeedbackBody):
    """A prompt as text or as chat messages."""

    prompt: Text | None = None
    messages: Annotated[list[dict[str, JsonValue]], Field(min_length=1, max_length=256)] | None = None

    @field_validator("messages")
    @classmethod
    def _can_be_recorded(cls, messages: list[dict[str, JsonValue]] | None) -> list[dict[str, JsonValue]] | None:
        try:
            to_json(messages)
        except PydanticSerializationError as error:  # half a surrogate pair, which pydantic checks in plain fields only
            raise ValueError("messages must be valid Unicode text") from error
        return messages

    def asked(self) -> Prompt | None:
        """The prompt of the body, if it has one."""
        if self.messages is not None:
            return Prompt(messages=tuple(self.messages))
        return Prompt(text=self.prompt) if self.prompt is not None else None


class ComparisonBody(PromptBody):
    """A ranking of K candidates; which K is said in exactly one of four ways."""

    completion_id: str | None = Field(None, max_length=128)
    candidates: Annotated[list[CandidateRef], Field(min_length=2, max_length=MAX_CANDIDATES)] | None = None
    task_id: str | None = Field(None, max_length=128)
    completions: Annotated[list[Text], Field(min_length=2, max_length=MAX_CANDIDATES)] | None = None
    ranking: Annotated[list[Group], Field(max_length=MAX_CANDIDATES)] | None = None
    preferred: int | Literal["tie", "both_bad"] | None = None
    labeler: Labeler | None = None
    comment: Annotated[str, Field(max_length=4000)] | None = None
    duration_ms: int | None = Field(None, ge=0)
    metadata: Metadata = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        ways = [self.completion_id, self.candidates, self.task_id, self.completions]
        if sum(way is not None for way in ways) != 1:
            raise ValueError("name the candidates by exactly one of completion_id, candidates, task_id, completions")
        if (self.prompt is None) == (self.messages is None) and self.completions is not None:
            raise ValueError("outside data needs exactly one of prompt and messages")
        if self.completions is None and (self.prompt is not None or self.messages is not None):
            raise ValueError("prompt and messages go with completions only")
        if (self.ranking is None) == (self.preferred is None):
            raise ValueError("give exactly one of ranking and preferred")
        return self

    def ranked(self, count: int) -> tuple[tuple[int, ...], ...]:
        """The ranking of ``count`` candidates. Raises InvalidRequest with what is wrong with it."""
        if self.ranking is not None:
            ranking = tuple(tuple(group) for group in self.ranking)
            if problem := ranking_problem(ranking, count):
                raise InvalidRequest(problem, "ranking")
            return ranking
        if count != 2:
            raise InvalidRequest(f"preferred judges two candidates, and there are {count}; give a ranking", "preferred")
        if self.preferred in ("tie", "both_bad"):
            return ((0, 1),)
        if self.preferred not in (0, 1):
            raise InvalidRequest('preferred must be 0, 1, "tie" or "both_bad"', "preferred")
        return ((self.preferred,), (1 - self.preferred,))


class DemonstrationBody(PromptBody):
    """A completion written by a labeler: for a prompt, or as a correction of a sampled choice."""

    completion: Annotated[str, Field(min_length=1, max_length=100_000)]
    completion_id: str | None = Field(None, max_length=128)
    index: int = Field(0, ge=0)
    labeler: Labeler | None = None
    metadata: Metadata = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_prompt(self) -> Self:
        if sum(way is not None for way in (self.prompt, self.messages, self.completion_id)) != 1:
            raise ValueError("give exactly one of prompt, messages and completion_id")
        return self


class RatingFlags(FeedbackBody):
    """What a labeler says of a completion beside its quality; what is absent or null was not judged."""

    fails_instruction: StrictBool | None = None
    inappropriate_for_assistant: StrictBool | None = None
    hallucination: StrictBool | None = None
    satisfies_constraint: StrictBool | None = None
    sexual_content: StrictBool | None = None
    violent_content: StrictBool | None = None
    encourages_harm: StrictBool | None = None
    denigrates_protected_class: StrictBool | None = None
    harmful_advice: StrictBool | None = None
    expresses_opinion: StrictBool | None = None
    expresses_moral_judgement: StrictBool | None = None


class RatingBody(FeedbackBody):
    """What a labeler says of one choice: overall quality with flags, or a thumb."""

    completion_id: str = Field(max_length=128)
    index: int = Field(0, ge=0)
    overall: Annotated[int, Field(ge=1, le=7, strict=True)] | None = None
    flags: RatingFlags | None = None
    thumb: Literal["up", "down"] | None = None
    labeler: Labeler | None = None
    comment: Annotated[str, Field(max_length=4000)] | None = None

    @model_validator(mode="after")
    def _one_judgement(self) -> Self:
        if (self.overall is None) == (self.thumb is None):
            raise ValueError("give exactly one of overall and thumb")
        if self.thumb is not None and self.flags is not None:
            raise ValueError("flags go with overall")
        return self

    def judged_flags(self) -> dict[RatingFlag, bool]:
        """The flags that were judged."""
        said = ((flag, getattr(self.flags, flag, None)) for flag in get_args(RatingFlag))
        return {flag: judged for flag, judged in said if judged is not None}


class TaskBody(PromptBody):
    """What to show a labeler: k candidates for a prompt, or for one the server picks."""

    k: Annotated[int, Field(ge=2, le=MAX_CANDIDATES)] = 2
    labeler: Labeler | None = None
