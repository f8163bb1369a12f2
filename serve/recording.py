"""Keeps each finished completion so that feedback can name it: off the token path, in batches.

The engine's callback only appends to a list; ``run`` writes what has gathered. While Redis is away the
list grows to its capacity, then the oldest records are shed and counted. Requests are never held up.
"""

import asyncio
import logging
import time
from dataclasses import dataclass, field
from typing import Literal

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
    text: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str | None = None


@dataclass
class Sampled:
    """One finished engine request: a prompt and its ``n`` completions."""

    request_id: str
    prompt_token_ids: list[int]
    choices: list[SampledChoice]
    temperature: float
    top_p: float


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


class Recorder:
    """Joins what was asked with what was sampled, and keeps the result."""

    def __init__(self, store: FeedbackStore, settings: ServeSettings, metrics: Metrics) -> None:
        self._store = store
        self._settings = settings
        self._metrics = metrics
        self._asked: dict[str, Asked] = {}
        self._waiting: dict[str, StoredCompletion] = {}
        self._wake = asyncio.Event()

    def expect(self, asked: Asked) -> None:
        """Announce a request before the engine gets it; ``store: false`` is never announced."""
        self._asked[asked.completion_id] = asked

    def forget(self, completion_id: str) -> None:
        """The request has ended; what did not finish is not recorded."""
        self._asked.pop(completion_id, None)

    def sampled(self, part: Sampled) -> None:
        """The engine's callback: one prompt's completions are finished.

        vLLM names the request of a text completion's prompt ``i`` ``<id>-<i>``, a chat's plainly ``<id>``.
        """
        completion_id, prompt_index = part.request_id, 0
        if completion_id not in self._asked:
            completion_id, _, number = part.request_id.rpartition("-")
            prompt_index = int(number) if number.isdigit() else 0
        asked = self._asked.get(completion_id)
        if asked is None:
            return
        self._metrics.completion_tokens.labels(asked.policy_version).inc(
            sum(len(choice.token_ids) for choice in part.choices)
        )
        asked.parts[prompt_index] = part
        if len(asked.parts) == len(asked.prompts):
            self._waiting[completion_id] = _joined(asked)
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
        while self._waiting:
            batch = list(self._waiting.values())[:_BATCH]
            try:
                await self._store.keep(batch)
            except StoreUnavailable as error:
                log.warning("completions wait to be recorded", extra={"waiting": len(self._waiting), "why": str(error)})
                return False
            for completion in batch:
                self._waiting.pop(completion.id, None)
            self._metrics.recorded.inc(len(batch))
        return True

    def _shed(self) -> None:
        while len(self._waiting) > self._settings.record_capacity:
            self._waiting.pop(next(iter(self._waiting)))
            self._metrics.unrecorded.inc()


def _joined(asked: Asked) -> StoredCompletion:
    prompts, choices = [], []
    for prompt_index, prompt in enumerate(asked.prompts):
        part = asked.parts[prompt_index]
        prompts.append(
            prompt.model_copy(update={"token_ids": tuple(part.prompt_token_ids), "tokenizer": asked.tokenizer})
        )
        for choice in part.choices:
            choices.append(
                Choice(
                    index=prompt_index * len(part.choices) + choice.index,
                    prompt_index=prompt_index,
                    text=choice.text,
                    token_ids=tuple(choice.token_ids),
                    logprobs=tuple(choice.logprobs),
                    finish_reason=choice.finish_reason,
                )
            )
    first = asked.parts[0]
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
        sampling={"temperature": first.temperature, "top_p": first.top_p},
        metadata=asked.metadata,
        store=asked.store,
    )
