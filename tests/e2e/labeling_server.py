"""The server without an engine: its own app over a real Redis, where canned texts stand in for sampled ones."""

import asyncio
import json
import threading
import time
import warnings
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import uvicorn
from fastapi import APIRouter, FastAPI, Request
from starlette.responses import StreamingResponse

from deploy.settings import DeploySettings
from feedback.principals import KeyStore, Scope
from feedback.records import BlindTask, Candidate, Choice, LogRecord, Prompt, StoredCompletion, new_id
from feedback.settings import FeedbackSettings
from feedback.store import FeedbackStore
from serve.auth import CompletionsPrincipal, FeedbackPrincipal
from serve.feedback_bodies import TaskBody
from serve.settings import ServeSettings

Result = TypeVar("Result")


@dataclass
class LabelingServer:
    """A running one, and what the stub engine is to answer."""

    redis_url: str
    app: FastAPI
    loop: asyncio.AbstractEventLoop
    url: str = ""
    prompts: list[Prompt] = field(default_factory=list)
    """What the next tasks ask, in order; then always about a frog."""
    texts: list[str] = field(default_factory=lambda: [f"Frog number {n} is green." for n in range(1, 10)])
    """What is answered, cut to as many as are asked for."""
    golden: bool = False
    """Whether the next tasks show what no policy sampled."""
    word_seconds: float = 0.0
    """How long a streamed answer takes for a word."""

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Await something beside the server: the browser's driver has taken this thread's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)

    def records(self) -> list[LogRecord]:
        """All that is in the log."""

        async def read() -> list[LogRecord]:
            store = FeedbackStore.connect(self.redis_url, FeedbackSettings())
            try:
                return [entry.record async for entry in store.scan()]
            finally:
                await store.close()

        return self.run(read())

    def wait_for_records(self, count: int) -> list[LogRecord]:
        """The log's records once there are so many; fails where there are more, or not so many in 10 s."""
        deadline = time.monotonic() + 10
        while len(found := self.records()) < count and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(found) == count, found
        return found

    def make_key(self, *scopes: Scope) -> str:
        """The text of a new key of alice's."""

        async def make() -> str:
            keys = KeyStore.connect(self.redis_url, FeedbackSettings())
            try:
                return (await keys.create("alice", scopes))[0]
            finally:
                await keys.close()

        return self.run(make())

    def sampled(self, object_: Any, principal: str, prompt: Prompt, texts: list[str], version: int) -> StoredCompletion:
        """What an engine would have sampled."""
        return StoredCompletion(
            id=new_id("chatcmpl-"),
            object=object_,
            created=int(time.time()),
            principal=principal,
            model=f"policy-v{version}",
            policy_version=version,
            prompts=(prompt,),
            choices=tuple(
                Choice(index=index, text=text, token_ids=(1,), logprobs=(-0.5,), finish_reason="stop")
                for index, text in enumerate(texts)
            ),
        )

    def stub_engine(self) -> APIRouter:
        """The two routes that need one."""
        router = APIRouter()

        @router.post("/v1/feedback/tasks", status_code=201)
        async def create_task(body: TaskBody, request: Request, principal: FeedbackPrincipal) -> dict[str, Any]:
            store: FeedbackStore = request.app.state.services.store
            prompt = self.prompts.pop(0) if self.prompts else Prompt(text="Tell me about a frog.")
            texts = self.texts[: body.k]
            arms = [
                self.sampled("text_completion", principal, prompt, texts[arm::2], version)
                for arm, version in enumerate((7, 8))
            ]
            await store.keep(arms)
            candidates: list[Candidate] = [arms[place % 2].candidate(place // 2) for place in range(len(texts))]
            if self.golden:
                candidates = [Candidate(text=text, index=index) for index, text in enumerate(texts)]
            now = int(time.time())
            task = BlindTask(
                id=new_id("task_"),
                created=now,
                expires=now + 3600,
                principal=principal,
                labeler=body.labeler,
                prompt=prompt,
                candidates=tuple(candidates),
            )
            await store.keep_task(task)
            asked: dict[str, Any] = {"messages": prompt.messages, "prompt": prompt.text}
            shown = [{"index": index, "text": text} for index, text in enumerate(texts)]
            return {"id": task.id, "expires": task.expires, "candidates": shown} | {
                name: value for name, value in asked.items() if value is not None
            }

        @router.post("/v1/chat/completions")
        async def complete(request: Request, principal: CompletionsPrincipal) -> StreamingResponse:
            body = await request.json()
            assert body["stream"] is True
            prompt = Prompt(messages=tuple(body["messages"]))
            completion = self.sampled("chat.completion", principal, prompt, self.texts[: body["n"]], 7)
            await request.app.state.services.store.keep([completion])
            return StreamingResponse(self._chunks(completion), media_type="text/event-stream")

        return router

    async def _chunks(self, completion: StoredCompletion) -> AsyncIterator[str]:
        words = [choice.text.split(" ") for choice in completion.choices]
        for place in range(max(map(len, words))):
            await asyncio.sleep(self.word_seconds)
            for index, said in enumerate(words):
                if place < len(said):
                    delta = {"content": (" " if place else "") + said[place]}
                    choices = [{"index": index, "delta": delta}]
                    chunk = {"id": completion.id, "model": completion.model, "choices": choices}
                    yield f"data: {json.dumps(chunk)}\n\n"
        yield "data: [DONE]\n\n"


@contextmanager
def serving(redis_url: str, state: Path) -> Iterator[LabelingServer]:
    """The app in a thread of its own; ``create_app`` is the real one, the stub engine's routes stand before its."""
    with warnings.catch_warnings():  # vLLM, which the app imports, has torch warn of torch
        warnings.filterwarnings("ignore", "`torch.jit.script_method` is deprecated", DeprecationWarning)
        from serve.app import create_app

    started = threading.Event()
    app = create_app(ServeSettings(), FeedbackSettings(), DeploySettings(), state, redis_url)
    server = LabelingServer(redis_url, app, asyncio.new_event_loop())
    app.router.routes[:0] = server.stub_engine().routes
    uvicorn_server = uvicorn.Server(
        uvicorn.Config(app, port=0, log_config=None, access_log=False, timeout_graceful_shutdown=1)
    )

    async def serve() -> None:
        async def tell() -> None:
            while not uvicorn_server.started:
                await asyncio.sleep(0.01)
            port = uvicorn_server.servers[0].sockets[0].getsockname()[1]
            server.url = f"http://127.0.0.1:{port}"
            started.set()

        await asyncio.gather(uvicorn_server.serve(), tell())

    thread = threading.Thread(target=server.loop.run_until_complete, args=(serve(),), daemon=True)
    thread.start()
    try:
        assert started.wait(30), "the server did not start"
        yield server
    finally:
        uvicorn_server.should_exit = True
        thread.join(30)
        server.loop.close()
