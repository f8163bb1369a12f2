"""The tiny world's people, over HTTP: visitors who keep asking, and labelers who ask, rank and post.

They know the server's address and nothing of its insides. Every request is tallied, and none is retried: what
a person would see fail is counted as failed.
"""

import asyncio
import itertools
import random
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx2
from openai import AsyncOpenAI, OpenAIError
from openai.types.chat import ChatCompletion

from train.errors import TrainError
from train.tinyworld import tasks, writers
from train.tinyworld.evaluation import Sample
from train.tinyworld.labelers import Labeler
from train.tinyworld.tasks import Task

MAX_COMPLETION_TOKENS = 26
"""As in PPO: the longest ideal answer has 20."""

HOT_TEMPERATURE = 1.3
"""Of one of the K candidates, so that rankings see rarer mistakes."""


_FAILURES = (httpx2.HTTPError, OpenAIError)
"""What a request can end in beside an answer."""


class CrowdFailed(TrainError):
    """Too many requests failed to go on."""


@dataclass
class Tally:
    """Requests made, and those that a person would call failed."""

    requests: int = 0
    failed: int = 0


class _Tallied(httpx2.AsyncBaseTransport):
    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._transport = httpx2.AsyncHTTPTransport(limits=httpx2.Limits(max_connections=100))

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        self._tally.requests += 1
        try:
            answer = await self._transport.handle_async_request(request)
        except httpx2.TransportError:
            self._tally.failed += 1
            raise
        self._tally.failed += answer.status_code >= 400
        return answer

    async def aclose(self) -> None:
        await self._transport.aclose()


class Crowd:
    """Labelers at work on one server, at most ``at_once`` of them at a time."""

    def __init__(self, url: str, labelers: Sequence[Labeler], *, at_once: int = 24) -> None:
        self.tally = Tally()
        self.acknowledged: set[str] = set()
        """Ids of the comparisons that the server has said it keeps."""
        self._http = httpx2.AsyncClient(transport=_Tallied(self.tally), base_url=url, timeout=60.0)
        self._openai = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", http_client=self._http, max_retries=0)
        self._labelers = labelers
        self._at_once = asyncio.Semaphore(at_once)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def compare(self, asked: Sequence[Task], k: int, done: Callable[[], None]) -> None:
        """For each task: ask for k completions (one of them hot), rank them, post the ranking."""
        await self._each(
            zip(asked, itertools.cycle(self._labelers)), lambda pair: self._compare(pair[0], pair[1], k), done
        )

    async def demonstrate(self, asked: Sequence[Task], seed: int, done: Callable[[], None]) -> None:
        """For each task: write a completion and post it."""
        rng = random.Random(f"writers {seed}")
        written = [(task, writers.demonstrate(task, rng)) for task in asked]

        async def post(pair: tuple[Task, str]) -> None:
            task, completion = pair
            messages = [{"role": "user", "content": task.instruction}]
            await self._post("/v1/feedback/demonstrations", {"messages": messages, "completion": completion})

        await self._each(written, post, done)

    async def judge_blind(self, asked: Sequence[Task], done: Callable[[], None]) -> None:
        """For each task: take a blind pair and say which is better. Nothing shown tells the versions apart."""
        await self._each(zip(asked, itertools.cycle(self._labelers)), lambda pair: self._judge(pair[0], pair[1]), done)

    async def sample_sets(
        self, asked: Sequence[Task], model: str, sets: int, done: Callable[[], None]
    ) -> list[list[Sample]]:
        """``sets`` completions of each task by ``model``, as [sets][N]."""
        answers: dict[int, ChatCompletion] = {}

        async def ask(numbered: tuple[int, Task]) -> None:
            number, task = numbered
            answers[number] = await self._ask(task, model, n=sets)

        await self._each(enumerate(asked), ask, done)
        if len(answers) < len(asked):
            raise CrowdFailed(f"{model} answered only {len(answers)} of {len(asked)} prompts")
        return [[_sample(answers[number], place) for number in range(len(asked))] for place in range(sets)]

    async def answered_by(self, version: int) -> None:
        """Ask again and again until ``version`` is the stable one and has answered."""
        task = tasks.draw(random.Random(0), test=False)
        while True:
            models = {model.id: model.model_dump() async for model in self._openai.models.list()}
            answer = await self._ask(task, "policy", n=1)
            if models["policy"]["policy_version"] == version and answer.model == f"policy-v{version}":
                return
            await asyncio.sleep(0.02)

    async def visit(self, seed: int, pause_seconds: float) -> None:
        """Ask the released policy one thing after another until cancelled, every other one streamed."""
        rng = random.Random(f"visitor {seed}")
        for number in itertools.count():
            task = tasks.draw(rng, test=False)
            with suppress(*_FAILURES):
                if number % 2:
                    await self._ask(task, "policy", n=1, user=f"visitor-{seed}")
                else:
                    await self._stream(task, f"visitor-{seed}")
            await asyncio.sleep(pause_seconds)

    async def _each(
        self, items: Iterable[Any], act: Callable[[Any], Awaitable[None]], done: Callable[[], None]
    ) -> None:
        async def one(item: Any) -> None:
            async with self._at_once:
                with suppress(*_FAILURES):  # tallied; the others go on
                    await act(item)
            done()

        async with asyncio.TaskGroup() as group:
            for item in items:
                group.create_task(one(item))

    async def _compare(self, task: Task, labeler: Labeler, k: int) -> None:
        plain, hot = await asyncio.gather(
            self._ask(task, "policy", n=k - 1), self._ask(task, "policy", n=1, temperature=HOT_TEMPERATURE)
        )
        shown = [(answer, choice.index) for answer in (plain, hot) for choice in answer.choices]
        random.Random(plain.id).shuffle(shown)  # labelers have a position bias, and it must not fall on the hot one
        samples = [_sample(answer, index) for answer, index in shown]
        ranking = labeler.rank(task.instruction, [s.text for s in samples], [s.finished for s in samples])
        await self._post_comparison(
            {
                "candidates": [{"completion_id": answer.id, "index": index} for answer, index in shown],
                "ranking": ranking,
                "labeler": labeler.name,
            }
        )

    async def _judge(self, task: Task, labeler: Labeler) -> None:
        blind = await self._post(
            "/v1/feedback/tasks",
            {"k": 2, "messages": [{"role": "user", "content": task.instruction}], "labeler": labeler.name},
        )
        texts = [candidate["text"] for candidate in blind["candidates"]]
        ranking = labeler.rank(task.instruction, texts, [True] * len(texts))
        await self._post_comparison({"task_id": blind["id"], "ranking": ranking, "labeler": labeler.name})

    async def _ask(
        self, task: Task, model: str, *, n: int, temperature: float = 1.0, user: str = "crowd"
    ) -> ChatCompletion:
        return await self._openai.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": task.instruction}],
            n=n,
            temperature=temperature,
            max_completion_tokens=MAX_COMPLETION_TOKENS,
            user=user,
        )

    async def _stream(self, task: Task, user: str) -> None:
        finished = None
        stream = await self._openai.chat.completions.create(
            model="policy",
            messages=[{"role": "user", "content": task.instruction}],
            max_completion_tokens=MAX_COMPLETION_TOKENS,
            stream=True,
            user=user,
        )
        async for chunk in stream:
            for choice in chunk.choices:
                finished = choice.finish_reason or finished
        self.tally.failed += finished is None  # a stream that stops short is a failed request, too

    async def _post_comparison(self, body: dict[str, Any]) -> None:
        kept = await self._post("/v1/feedback/comparisons", body)
        self.acknowledged.add(kept["id"])

    async def _post(self, route: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = await self._http.post(route, json=body)
        answer.raise_for_status()
        posted: dict[str, Any] = answer.json()
        return posted


def _sample(answer: ChatCompletion, index: int) -> Sample:
    choice = answer.choices[index]
    return Sample((choice.message.content or "").strip(), choice.finish_reason == "stop")
