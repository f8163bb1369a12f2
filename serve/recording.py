"""Keeps each finished completion so that feedback can name it: off the token path, in batches.

The engine's callback only appends to a list; ``run`` writes what has gathered. While Redis is away the
list grows to its capacity, then the oldest records are shed and counted. Requests are never held up.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import JsonValue

from feedback.errors import StoreUnavailable
from feedback.records import Choice, Prompt, StoredCompletion
from feedback.store import FeedbackStore
from serve.metrics import Metrics
from serve.settings import ServeSettings

log = logging.getLogger(__name__)

_BATCH = 256


@dataclass
class SampledChoice:
    """One completion as the engine sampled it."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    version_spans: tuple[tuple[int, int, int], ...] = ()
    """Version, first token, end: which weights sampled which tokens."""


@dataclass
class Sampled:
    """One engine request that has ended: a prompt and its ``n`` completions. Times are None where unknown."""

    request_id: str
    sampling: dict[str, JsonValue]
    """OpenAI's sampling parameters: temperature, top_p, penalties, seed."""
    recorded: bool
    """Whether choices are gathered, or only tokens counted."""
    finished: bool = False
    prompt_token_ids: list[int] = field(default_factory=list)
    completion_tokens: int = 0
    choices: dict[int, SampledChoice] = field(default_factory=dict)
    queued_seconds: float | None = None
    first_token_seconds: float | None = None
    token_seconds: float | None = None
    """Mean seconds between the tokens of one completion."""

    @property
    def finite(self) -> bool:
        """False where a log-prob is no number: the engine gives garbage."""
        return all(math.isfinite(sum(choice.logprobs)) for choice in self.choices.values())


@dataclass
class Asked:
    """What the server knows of a request that the engine does not."""

    completion_id: str
    object: Literal["chat.completion", "text_completion"]
    principal: str
    user: str | None
    model: str
    policy_version: int
    tokenizer: str | None
    prompts: tuple[Prompt, ...]
    metadata: dict[str, str]
    store: bool | None
    parts: dict[int, Sampled] = field(default_factory=dict)
    tokens: int = 0
    """Prompt and completion tokens so far, also of what did not finish: what a rate is charged."""
    answered: dict[int, dict[str, JsonValue]] | None = None
    """For a chat with tools, each choice's ``message`` and ``finish_reason`` as served; kept once these are known."""


class Recorder:
    """Joins what was asked with what was sampled, and keeps the result."""

    def __init__(
        self,
        store: FeedbackStore,
        settings: ServeSettings,
        metrics: Metrics,
        on_lost: Callable[[str], None] = lambda completion_id: None,
    ) -> None:
        self._store = store
        self._settings = settings
        self._metrics = metrics
        self._on_lost = on_lost
        self._asked: dict[str, Asked] = {}
        self._waiting: dict[str, StoredCompletion] = {}
        self._wake = asyncio.Event()
        self._writing = asyncio.Lock()  # a second copy of a batch must not land after a deletion

    def expect(self, asked: Asked) -> None:
        """Announce a request before the engine gets it."""
        self._asked[asked.completion_id] = asked

    def forget(self, completion_id: str) -> int:
        """The request has ended; what did not finish is not recorded. Returns the tokens it used."""
        asked = self._asked.pop(completion_id, None)
        return asked.tokens if asked is not None else 0

    def sampled(self, part: Sampled) -> None:
        """The engine's callback: one prompt's completions have ended.

        vLLM names the request of a text completion's prompt ``i`` ``<id>-<i>``, a chat's plainly ``<id>``.
        """
        completion_id, prompt_index = part.request_id, 0
        if completion_id not in self._asked:
            completion_id, _, number = part.request_id.rpartition("-")
            prompt_index = int(number) if number.isdigit() else 0
        asked = self._asked.get(completion_id)
        if asked is None:
            return
        asked.tokens += len(part.prompt_token_ids) + part.completion_tokens
        self._measure(asked, part)
        if not part.finished or not part.recorded:
            return
        asked.parts[prompt_index] = part
        if len(asked.parts) == len(asked.prompts) and asked.answered is None:
            self._keep(asked)

    def served(self, completion_id: str, choices: dict[int, dict[str, JsonValue]]) -> None:
        """A chat with tools is answered: each choice's ``message`` and ``finish_reason``, as the client got them."""
        asked = self._asked.get(completion_id)
        if asked is not None and len(asked.parts) == len(asked.prompts):
            asked.answered = choices
            self._keep(asked)

    def _measure(self, asked: Asked, part: Sampled) -> None:
        version = asked.policy_version
        self._metrics.completion_tokens.labels(version).inc(part.completion_tokens)
        self._metrics.prompt_tokens.labels(version).inc(len(part.prompt_token_ids))
        if part.queued_seconds is not None:
            self._metrics.queue_seconds.labels(asked.object, version).observe(part.queued_seconds)
        if part.first_token_seconds is not None:
            self._metrics.first_token_seconds.labels(asked.object, version).observe(part.first_token_seconds)
        if part.token_seconds is not None:
            self._metrics.inter_token_seconds.labels(asked.object, version).observe(part.token_seconds)

    def _keep(self, asked: Asked) -> None:
        self._waiting[asked.completion_id] = _joined(asked)
        self._shed()
        self._wake.set()

    async def find(self, completion_id: str) -> StoredCompletion | None:
        """A completion by id, also one that waits to be written. Raises StoreUnavailable."""
        waiting = self._waiting.get(completion_id)
        return waiting if waiting is not None else await self._store.completion(completion_id)

    async def run(self) -> None:
        """Write what gathers, until cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            # A moment's wait lets the completions that finish together be written together.
            await asyncio.sleep(self._settings.record_interval_seconds)
            if not await self.flush():
                await asyncio.sleep(1.0)
                self._wake.set()

    async def flush(self) -> bool:
        """Write all that waits; False where Redis did not take it (it stays, and is tried again)."""
        async with self._writing:
            while self._waiting:
                batch = list(self._waiting.values())[:_BATCH]
                try:
                    await self._store.keep(batch)
                except StoreUnavailable as error:
                    log.warning(
                        "completions wait to be recorded", extra={"waiting": len(self._waiting), "why": str(error)}
                    )
                    return False
                for completion in batch:
                    self._waiting.pop(completion.id, None)
                self._metrics.recorded.inc(len(batch))
            return True

    def _shed(self) -> None:
        while len(self._waiting) > self._settings.record_capacity:
            lost = self._waiting.pop(next(iter(self._waiting)))
            self._metrics.unrecorded.inc()
            self._on_lost(lost.id)


def _joined(asked: Asked) -> StoredCompletion:
    prompts, choices = [], []
    for prompt_index, prompt in enumerate(asked.prompts):
        part = asked.parts[prompt_index]
        prompts.append(
            prompt.model_copy(update={"token_ids": tuple(part.prompt_token_ids), "tokenizer": asked.tokenizer})
        )
        for _, choice in sorted(part.choices.items()):
            index = prompt_index * len(part.choices) + choice.index
            answered: dict[str, Any] = (asked.answered or {}).get(index, {})
            sampled_by = {version for version, _, _ in choice.version_spans} or {asked.policy_version}
            choices.append(
                Choice(
                    index=index,
                    prompt_index=prompt_index,
                    text=choice.text,
                    token_ids=tuple(choice.token_ids),
                    logprobs=tuple(choice.logprobs),
                    finish_reason=answered.get("finish_reason", choice.finish_reason),
                    message=answered.get("message"),
                    version_spans=() if sampled_by == {asked.policy_version} else choice.version_spans,
                )
            )
    return StoredCompletion(
        id=asked.completion_id,
        object=asked.object,
        created=int(time.time()),
        principal=asked.principal,
        user=asked.user,
        model=asked.model,
        policy_version=asked.policy_version,
        prompts=tuple(prompts),
        choices=tuple(choices),
        sampling=asked.parts[0].sampling,
        metadata=asked.metadata,
        store=asked.store,
    )
