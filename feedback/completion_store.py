"""The part of ``FeedbackStore`` that keeps served completions and blind tasks.

Unlike the log, all of it can go: it expires, its maker deletes it, or the prompt pool is trimmed. Its users hold a
``FeedbackStore``, which extends this class.
"""

import logging
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

from redis.asyncio import Redis

from feedback import keys
from feedback.errors import CorruptRecord, FeedbackError
from feedback.pool import PromptPool, unscored
from feedback.records import BlindTask, StoredCompletion, pack, unpack
from feedback.settings import FeedbackSettings

MAX_BATCH = 128
"""Most completions read at once: about 10 ms of the event loop's time for completions of 64 tokens."""

_STORED = Path(__file__).with_name("stored.lua").read_text()
_Reply = Any  # redis-py types replies as bytes | str, whichever decode_responses chose; here they are bytes
_log = logging.getLogger(__name__)


class NotStored(FeedbackError):
    """The named completion is not one of the principal's with ``store: true``, or not any more."""


class CompletionStore(PromptPool):
    """Completions, prompts and tasks in Redis; every method may raise StoreUnavailable."""

    def __init__(self, client: Redis, settings: FeedbackSettings, where: str) -> None:
        super().__init__(client, settings, where)
        self._stored_behind = client.register_script(_STORED)

    async def keep(self, completions: Sequence[StoredCompletion]) -> None:
        """Keep served completions so that feedback can name them; those with ``store: false`` are not kept."""
        wanted = [completion for completion in completions if completion.store is not False]
        if not wanted:
            return
        async with self._answering(), self._redis.pipeline(transaction=False) as pipe:
            for completion in wanted:
                key, packed = keys.completion(completion.id), pack(completion)
                if completion.store:
                    pipe.set(key, packed)
                    pipe.zadd(keys.completions_of(completion.principal), {completion.id: completion.created})
                else:
                    pipe.set(key, packed, ex=self._settings.completion_ttl_seconds)
            # What a blind task asked came from the pool, whose first asker's completion decides how long it stays.
            asked = [one for one in wanted if all(prompt.asked_by is None for prompt in one.prompts)]
            if asked:
                pipe.zadd(keys.POOL, {completion.id: unscored(completion.created) for completion in asked})
            pipe.zremrangebyrank(keys.POOL, 0, -self._settings.pool_prompts - 1)
            await pipe.execute()

    async def completion(self, completion_id: str) -> StoredCompletion | None:
        """A kept completion, or None. Raises CorruptRecord where it is damaged."""
        if ":" in completion_id:  # no completion's id: with gen: before it, it could name another kind of key
            return None
        async with self._answering():
            packed: _Reply = await self._redis.get(keys.completion(completion_id))
        return None if packed is None else unpack(StoredCompletion, packed)

    async def stored(
        self, principal: str, *, after: str | None = None, newest_first: bool = False, batch: int = 100
    ) -> AsyncGenerator[StoredCompletion, None]:
        """A principal's completions with ``store: true`` by time, then id; damaged ones are left out and logged.

        What is deleted meanwhile, be it the one yielded last, neither hides nor repeats another.

        Args:
            principal: who made them.
            after: id of the one to begin behind.
            newest_first: the other way round.
            batch: how many to read first; then twice as many each time, up to ``MAX_BATCH``.

        Raises:
            NotStored: ``after`` is none of them.
        """
        index = keys.completions_of(principal)
        place: Sequence[Any] = ()
        if after is not None:
            async with self._answering():
                created = await self._redis.zscore(index, after)
            if created is None:
                raise NotStored("that id is no stored completion of this principal's")
            place = (after, created)
        while True:
            async with self._answering():
                arguments = ["desc" if newest_first else "asc", batch, *place]
                found: _Reply = await self._stored_behind(keys=[index], args=arguments)
            ids, place = [completion_id.decode() for completion_id in found[::2]], found[-2:]
            for completion in await self._completions(ids, index):
                yield completion
            if len(ids) < batch:
                return
            batch = min(2 * batch, MAX_BATCH)

    async def set_metadata(self, completion_id: str, metadata: dict[str, str]) -> StoredCompletion | None:
        """Replace a kept completion's metadata; it lives as long as before. None where it is gone.

        Nothing else of a completion ever changes, so that of two replacements the last holds.
        """
        completion = await self.completion(completion_id)
        if completion is None:
            return None
        changed = completion.model_copy(update={"metadata": metadata})
        async with self._answering():
            # XX: one that was deleted since it was read stays deleted.
            kept = await self._redis.set(keys.completion(completion_id), pack(changed), xx=True, keepttl=True)
        return changed if kept else None

    async def delete_completion(self, completion: StoredCompletion) -> bool:
        """Delete a kept completion and take its prompt from the pool; False where it was gone already.

        Feedback on it stays: it holds its own copy of what was judged.
        """
        async with self._answering(), self._redis.pipeline(transaction=True) as pipe:
            pipe.delete(keys.completion(completion.id))
            pipe.zrem(keys.completions_of(completion.principal), completion.id)
            pipe.zrem(keys.POOL, completion.id)
            [deleted, *_] = await pipe.execute()
        return bool(deleted)

    async def delete_completions(self, completions: Sequence[StoredCompletion]) -> int:
        """Delete many at once, as ``delete_completion`` does one; returns how many there still were."""
        deleted = 0
        for start in range(0, len(completions), MAX_BATCH):
            async with self._answering(), self._redis.pipeline(transaction=False) as pipe:
                batch = completions[start : start + MAX_BATCH]
                pipe.delete(*(keys.completion(completion.id) for completion in batch))
                pipe.zrem(keys.POOL, *(completion.id for completion in batch))
                for completion in batch:
                    pipe.zrem(keys.completions_of(completion.principal), completion.id)
                deleted += (await pipe.execute())[0]
        return deleted

    async def keep_task(self, task: BlindTask) -> None:
        """Keep a blind task until its labeler's comparison can no longer be in time."""
        async with self._answering():
            await self._redis.set(keys.task(task.id), pack(task), ex=self._settings.task_ttl_seconds)

    async def task(self, task_id: str) -> BlindTask | None:
        """A blind task, or None. Raises CorruptRecord where it is damaged."""
        if ":" in task_id:  # likewise: task:seen:… and task:given:… are no tasks
            return None
        async with self._answering():
            packed: _Reply = await self._redis.get(keys.task(task_id))
        return None if packed is None else unpack(BlindTask, packed)

    async def _completions(self, ids: Sequence[str], index: str) -> list[StoredCompletion]:
        """Those of ``ids`` that can be read; ids without a completion leave the index."""
        if not ids:
            return []
        async with self._answering():
            packed: _Reply = await self._redis.mget([keys.completion(completion_id) for completion_id in ids])
            if gone := [completion_id for completion_id, kept in zip(ids, packed, strict=True) if kept is None]:
                await self._redis.zrem(index, *gone)
        completions = []
        for completion_id, kept in zip(ids, packed, strict=True):
            if kept is None:
                continue
            try:
                completions.append(unpack(StoredCompletion, kept))
            except CorruptRecord as error:
                _log.error("completion %s is left out: %s", completion_id, error)
        return completions
