"""The part of ``FeedbackStore`` that knows what to show a labeler next: the prompt pool, and who was given what.

``pool:prompts`` holds kept completions, whose prompts may be shown, by *informativeness*: how unsure the newest reward
model is which of two completions a labeler would prefer, in nats (``train.losses.preference_entropy``), 0 to ln 2. A
prompt that no reward model has scored counts as one on which it would be right four times in five, and a little more
the newer it is: prompts known to be less certain come before it, those known to be more certain after it, and
without a reward model the newest comes first.

A prompt is never given to one labeler twice while ``labeler_memory_seconds`` last, renewed with each.
"""

import logging
import math
import random
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from feedback import keys
from feedback.controls import is_golden
from feedback.errors import CorruptRecord
from feedback.records import (
    MAX_CANDIDATES,
    BlindTask,
    Comparison,
    PooledPrompt,
    Prompt,
    StoredCompletion,
    decode,
    unpack,
)
from feedback.redis_store import RedisStore

UNSCORED_NATS = -(0.8 * math.log(0.8) + 0.2 * math.log(0.2))
"""Informativeness of a prompt no reward model has scored: entropy of a preference that is known by four to one."""
NATS_PER_SECOND = 1e-12
"""What unix time adds to it: 0.002 nats in all."""
DRAWN_FROM = 8
"""A labeler gets one of so many most informative prompts, at random: two at once seldom get the same."""
REPEAT_GAP = 10
"""A labeler's newest tasks, which they may remember too well for a repeat to measure anything."""
REMEMBERED_TASKS = 200
"""A labeler's newest tasks among which repeats are looked for."""

_PAGE, _READ = 500, 16
_GOLDEN_PAGES = 20
_GOLDEN_MARK = b'"golden":"true"'
_Reply = Any  # redis-py types replies as bytes | str, whichever decode_responses chose; here they are bytes
_log = logging.getLogger(__name__)
_DRAW = random.SystemRandom()


def unscored(created: float) -> float:
    """Informativeness, in nats, of a prompt asked at ``created`` (unix seconds) that nothing has scored."""
    return UNSCORED_NATS + created * NATS_PER_SECOND


class PromptPool(RedisStore):
    """Prompts and tasks by labeler; every method may raise StoreUnavailable."""

    async def pool_prompts(self, count: int) -> list[PooledPrompt]:
        """At most ``count`` different prompts of kept completions, the most informative; newest first.

        With each goes who asked it last. The prompts say so themselves, too: whatever they are shown in goes with that
        principal's erasure.
        """
        found: dict[str, tuple[int, PooledPrompt]] = {}
        start = 0
        while len(found) < count:
            async with self._answering():
                ids: _Reply = await self._redis.zrevrange(keys.POOL, start, start + min(count, _PAGE) - 1)
            if not ids:
                break
            completions = await self._pooled(ids)
            for completion in completions:
                for prompt in _asked(completion):
                    pooled = PooledPrompt(principal=prompt.asked_by or completion.principal, prompt=prompt)
                    if prompt.key() not in found or found[prompt.key()][0] < completion.created:
                        found[prompt.key()] = completion.created, pooled
            start += len(completions)
        newest = sorted(list(found.values())[:count], key=lambda one: -one[0])
        return [pooled for _, pooled in newest]

    async def prompts_to_score(self, count: int) -> dict[str, tuple[Prompt, ...]]:
        """Completions of the pool, by id, that a reward model should score now: at most ``count``, with their prompts.

        Half are the newest that none has scored; the others are those that labelers get next.
        """
        band = (unscored(1e10), UNSCORED_NATS)
        async with self._answering():
            new: _Reply = await self._redis.zrevrangebyscore(keys.POOL, *band, start=0, num=count)
            first: _Reply = await self._redis.zrevrange(keys.POOL, 0, count - 1)
        chosen = list(dict.fromkeys([*new[: count // 2], *first, *new]))[:count]
        return {
            completion.id: prompts for completion in await self._pooled(chosen) if (prompts := _readable(completion))
        }

    async def score_prompts(self, nats: Mapping[str, float]) -> None:
        """Set the informativeness of completions that are in the pool, by id; others stay out of it."""
        if nats:
            async with self._answering():
                await self._redis.zadd(keys.POOL, dict(nats), xx=True)

    async def draw_prompt(self, labeler: str) -> Prompt | None:
        """One of the most informative prompts never given to this labeler, and give it; None where there is none left.

        The prompt says who asked it.
        """
        while found := await self._not_given(labeler):
            for prompt in _DRAW.sample(found, len(found)):
                if await self.give(labeler, prompt):  # else a request at the same time was quicker
                    return prompt
        return None

    async def give(self, labeler: str, prompt: Prompt) -> bool:
        """Note that a labeler is given a prompt; False where that was noted before."""
        key = keys.given_prompts(labeler)
        async with self._answering(), self._redis.pipeline(transaction=True) as pipe:
            pipe.sadd(key, prompt.key())
            pipe.expire(key, self._settings.labeler_memory_seconds)
            [added, _] = await pipe.execute()
        return bool(added)

    async def take_back(self, labeler: str, prompt: Prompt) -> None:
        """Undo ``give``: the labeler got nothing to see."""
        async with self._answering():
            await self._redis.srem(keys.given_prompts(labeler), prompt.key())

    async def remember_task(self, labeler: str, task: BlindTask) -> None:
        """Note a task as one that may be repeated."""
        key = keys.given_tasks(labeler)
        async with self._answering(), self._redis.pipeline(transaction=True) as pipe:
            pipe.lpush(key, task.id)
            pipe.ltrim(key, 0, REMEMBERED_TASKS - 1)
            pipe.expire(key, self._settings.task_ttl_seconds)
            await pipe.execute()

    async def draw_repeat(self, labeler: str, principal: str, k: int) -> BlindTask | None:
        """One of this labeler's earlier tasks with ``k`` candidates, that they have judged; None where there is none.

        It is none of the last ``REPEAT_GAP``, is the same principal's, and is never drawn again.
        """
        given = keys.given_tasks(labeler)
        async with self._answering():
            ids: _Reply = await self._redis.lrange(given, REPEAT_GAP, -1)
            ids = _DRAW.sample(ids, min(len(ids), _READ))
            packed: _Reply = await self._redis.mget([keys.task(one.decode()) for one in ids]) if ids else []
        for task_id, kept in zip(ids, packed, strict=True):
            with suppress(CorruptRecord):
                task = unpack(BlindTask, kept) if kept is not None else None
                if task is None or task.principal != principal or len(task.candidates) != k:
                    continue
                async with self._answering():
                    judged = await self._redis.exists(keys.latest(_judgement(task, labeler).candidates_key()))
                    if judged and await self._redis.lrem(given, 0, task_id):  # by one request at a time
                        return task
        return None

    async def golden_ids(self, k: int) -> list[str]:
        """Ids of the golden comparisons of ``k`` candidates or more; some may have been erased or replaced since.

        A log with very many new records is looked through over several calls.
        """
        async with self._answering():
            cursor: _Reply = await self._redis.get(keys.GOLDEN_CURSOR)
        looked_at = (cursor or b"0-0").decode()
        for _ in range(_GOLDEN_PAGES):
            async with self._answering(), self._redis.pipeline(transaction=True) as pipe:
                entries: _Reply = await self._redis.xrange(keys.LOG, min=f"({looked_at}", count=_PAGE)
                if not entries:
                    break
                looked_at = entries[-1][0].decode()
                if golden := dict(_golden(fields for _, fields in entries)):
                    pipe.zadd(keys.GOLDEN, golden)
                pipe.set(keys.GOLDEN_CURSOR, looked_at)
                await pipe.execute()
        async with self._answering():
            found: _Reply = await self._redis.zrangebyscore(keys.GOLDEN, k, MAX_CANDIDATES)
        return [one.decode() for one in found]

    async def drop_golden(self, comparison_id: str) -> None:
        """A golden comparison is gone, or no longer holds."""
        async with self._answering():
            await self._redis.zrem(keys.GOLDEN, comparison_id)

    async def _not_given(self, labeler: str) -> list[Prompt]:
        """The ``DRAWN_FROM`` most informative prompts that this labeler was not given, or as many as there are."""
        seen, start = keys.given_prompts(labeler), 0
        found: dict[str, Prompt] = {}
        while True:
            async with self._answering():
                ids: _Reply = await self._redis.zrevrange(keys.POOL, start, start + _PAGE - 1)
                known: _Reply = await self._redis.smismember(seen, ids) if ids else []
            unread = [one for one, is_known in zip(ids, known, strict=True) if not is_known]
            gone = 0
            for at in range(0, len(unread), _READ):  # a completion is large: read no more than needed
                completions = await self._pooled(unread[at : at + _READ])
                gone += len(unread[at : at + _READ]) - len(completions)
                found |= await self._fresh(seen, completions)
                if len(found) >= DRAWN_FROM:
                    return list(found.values())[:DRAWN_FROM]
            if len(ids) < _PAGE:
                return list(found.values())
            start += len(ids) - gone

    async def _fresh(self, seen: str, completions: Iterable[StoredCompletion]) -> dict[str, Prompt]:
        """Prompts of ``completions`` not in the set ``seen``, by key; a completion without one is put there itself."""
        prompts = {one.id: {prompt.key(): prompt for prompt in _readable(one)} for one in completions}
        wanted = list({key for of_one in prompts.values() for key in of_one})
        async with self._answering():
            known: _Reply = await self._redis.smismember(seen, wanted) if wanted else []
            given = {key for key, is_known in zip(wanted, known, strict=True) if is_known}
            if spent := [one for one, of_one in prompts.items() if of_one.keys() <= given]:
                await self._redis.sadd(seen, *spent)
                await self._redis.expire(seen, self._settings.labeler_memory_seconds)
        return {key: prompt for of_one in prompts.values() for key, prompt in of_one.items() if key not in given}

    async def _pooled(self, ids: list[bytes]) -> list[StoredCompletion]:
        """The completions of the pool with these ids; those that are gone or damaged leave the pool."""
        if not ids:
            return []
        async with self._answering():
            packed: _Reply = await self._redis.mget([keys.completion(one.decode()) for one in ids])
        completions, gone = [], []
        for completion_id, kept in zip(ids, packed, strict=True):
            try:
                if kept is not None:
                    completions.append(unpack(StoredCompletion, kept))
                    continue
            except CorruptRecord as error:
                _log.error("%s leaves the prompt pool: %s", completion_id.decode(), error)
            gone.append(completion_id)
        if gone:
            async with self._answering():
                await self._redis.zrem(keys.POOL, *gone)
        return completions


def _asked(completion: StoredCompletion) -> list[Prompt]:
    """What a completion's request asked, with who asked, and what kind of task they said it was."""
    task = completion.metadata.get("task")
    return [
        prompt.model_copy(update={"asked_by": prompt.asked_by or completion.principal, "task": prompt.task or task})
        for prompt in completion.prompts
    ]


def _readable(completion: StoredCompletion) -> tuple[Prompt, ...]:
    """The same, without prompts of token ids only."""
    return tuple(prompt for prompt in _asked(completion) if prompt.text or prompt.messages)


def _judgement(task: BlindTask, labeler: str) -> Comparison:
    """A comparison of the task's candidates, to ask for its key."""
    everything = tuple(range(len(task.candidates)))
    return Comparison(
        id="",
        created=task.created,
        principal=task.principal,
        labeler=labeler,
        prompt=task.prompt,
        source="task",
        candidates=task.candidates,
        ranking=(everything,),
    )


def _golden(entries: Iterable[dict[bytes, bytes]]) -> Iterable[tuple[str, int]]:
    """Id and number of candidates of each golden comparison among raw entries of the log."""
    for fields in entries:
        if fields.get(b"kind") == b"comparison" and _GOLDEN_MARK in fields.get(b"json", b""):
            with suppress(CorruptRecord):
                record = decode(fields[b"json"], fields.get(b"sha256", b"").decode(errors="replace"))
                if isinstance(record, Comparison) and is_golden(record):
                    yield record.id, len(record.candidates)
