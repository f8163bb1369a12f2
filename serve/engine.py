"""One policy version = one engine = one ASGI app over vLLM's ``AsyncLLM``. The only file that knows vLLM.

vLLM's own routers are mounted on a private app that no socket serves: ``serve.completions`` authenticates,
caps and resolves the model, then calls ``Engine.app`` in-process, so a completion crosses no network hop.
``_RecordingLLM`` hands every finished request to a callback without touching what the client receives.
"""

import argparse
import asyncio
import json
import math
import types
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import Any

import httpx2
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.entrypoints.openai.chat_completion import api_router as chat_routes
from vllm.entrypoints.openai.completion import api_router as completion_routes
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.inputs import TokensPrompt
from vllm.outputs import RequestOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM

from deploy.versions import CanaryPrompt, Version
from feedback.records import new_id
from serve.error_response import invalid_request
from serve.errors import EngineFailed
from serve.recording import Sampled, SampledChoice
from serve.settings import ServeSettings

_CPU_BATCHED_TOKENS = 4096
"""Tokens a CPU engine prefills at once; without chunking it must be at least the longest prompt."""


class _RecordingLLM(AsyncLLM):
    """``AsyncLLM`` that hands each finished request to ``on_sampled``, off the client's path."""

    on_sampled: Callable[[Sampled], None] | None = None

    async def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **options: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """As vLLM's, recording on the way. A request that does not finish is not recorded."""
        if sampling_params.logprobs is None:
            # The sampled token's own log-prob, which PPO needs; it does not show in the client's answer.
            sampling_params = sampling_params.clone()
            sampling_params.logprobs = 0
        choices: dict[int, SampledChoice] = {}
        output = None
        async for output in super().generate(prompt, sampling_params, request_id, **options):
            _gather(choices, output, delta=sampling_params.output_kind == RequestOutputKind.DELTA)
            yield output
        if output is not None and output.finished and self.on_sampled is not None:
            self.on_sampled(
                Sampled(
                    request_id=request_id,
                    prompt_token_ids=list(output.prompt_token_ids or []),
                    choices=[choices[index] for index in sorted(choices)],
                    temperature=sampling_params.temperature,
                    top_p=sampling_params.top_p,
                )
            )


def _gather(choices: dict[int, SampledChoice], output: RequestOutput, *, delta: bool) -> None:
    for part in output.outputs:
        choice = choices.get(part.index)
        if choice is None or not delta:
            choice = choices[part.index] = SampledChoice(part.index, "", [], [])
        choice.text += part.text
        choice.token_ids += part.token_ids
        if part.logprobs is not None:
            choice.logprobs += [
                at[token].logprob for token, at in zip(part.token_ids, part.logprobs, strict=True) if at is not None
            ]
        choice.finish_reason = part.finish_reason or choice.finish_reason


class Engine:
    """A live policy version. Make one with ``start``; end it with ``close``."""

    def __init__(self, version: Version, llm: _RecordingLLM, app: FastAPI) -> None:
        self.version = version.manifest.version
        self.canary_prompts = version.manifest.canary_prompts
        self.created = version.manifest.created.timestamp()
        self.tokenizer = tokenizer_digest(version)
        """Names the tokenizer of recorded token ids."""
        self.app = app
        self.running = 0
        """Completion requests being served now; the fleet drains on it."""
        self._llm = llm
        self._client = httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://engine")

    @classmethod
    async def start(
        cls, version: Version, model_id: str, settings: ServeSettings, on_sampled: Callable[[Sampled], None]
    ) -> "Engine":
        """Load a version, answer a first request and check it against the manifest. Raises EngineFailed."""
        arguments = make_arg_parser(FlexibleArgumentParser()).parse_args(_arguments(version.path, model_id, settings))
        try:
            config = AsyncEngineArgs.from_cli_args(arguments).create_engine_config()
            # Loading takes many seconds and blocks; completions of the other engines go on meanwhile.
            llm = await asyncio.wait_for(
                asyncio.to_thread(_RecordingLLM.from_vllm_config, config, disable_log_stats=True),
                settings.engine_start_timeout_seconds,
            )
        except (RuntimeError, ValueError, OSError, TimeoutError) as error:
            raise EngineFailed(f"version {version.number} does not load: {error}") from error
        try:
            engine = cls(version, llm, await _openai_routes(llm, arguments))
            if not await engine.probe(settings.engine_start_timeout_seconds):
                raise EngineFailed(f"version {version.number} loads, but its engine does not answer")
            await engine.check_canary_prompts(settings.logprob_tolerance)
        except BaseException:
            await asyncio.to_thread(llm.shutdown, timeout=5.0)
            raise
        llm.on_sampled = on_sampled
        return engine

    async def check_canary_prompts(self, tolerance: float) -> None:
        """Prove that what is served is what was published: greedy tokens and log-probs of the manifest's prompts.

        Raises:
            EngineFailed: A token differs, or a log-prob by more than ``tolerance`` nats.
        """
        for number, canary in enumerate(self.canary_prompts):
            token_ids, logprobs = await self._greedy(canary)
            apart = max((abs(a - b) for a, b in zip(logprobs, canary.logprobs, strict=False)), default=0.0)
            if tuple(token_ids) != tuple(canary.completion_token_ids) or not apart <= tolerance:
                raise EngineFailed(
                    f"version {self.version} does not reproduce canary prompt {number} of its manifest: "
                    f"tokens {'equal' if tuple(token_ids) == tuple(canary.completion_token_ids) else 'differ'}, "
                    f"log-probs up to {apart:.2g} nats apart (limit {tolerance:.2g})"
                )

    async def _greedy(self, canary: CanaryPrompt) -> tuple[list[int], list[float]]:
        sampling = SamplingParams(temperature=0.0, max_tokens=max(1, len(canary.completion_token_ids)), logprobs=0)
        choices: dict[int, SampledChoice] = {}
        async for output in self._llm.generate(self._rendered(canary.prompt_token_ids), sampling, new_id("canary-")):
            _gather(choices, output, delta=False)
        choice = choices[0]
        if not all(math.isfinite(logprob) for logprob in choice.logprobs):
            raise EngineFailed(f"version {self.version} gives log-probs that are not finite")
        return choice.token_ids, choice.logprobs

    def _rendered(self, token_ids: Sequence[int]) -> Any:
        (rendered,) = self._llm.renderer.render_cmpl([TokensPrompt(prompt_token_ids=list(token_ids))])
        return rendered

    @property
    def dead(self) -> bool:
        """True when the engine's process has ended. vLLM cannot revive it; start another."""
        return bool(self._llm.errored)

    async def probe(self, timeout_seconds: float) -> bool:
        """True when the engine samples one token in time. A dead engine may look like a clean exit; this does not."""
        sampling = SamplingParams(temperature=0.0, max_tokens=1)

        async def one_token() -> bool:
            async for _ in AsyncLLM.generate(self._llm, self._rendered((1,)), sampling, new_id("probe-")):
                pass
            return True

        try:
            return await asyncio.wait_for(one_token(), timeout_seconds)
        except Exception:  # whatever vLLM raises here, the engine does not answer
            return False

    async def complete(self, route: str, body: dict[str, Any], completion_id: str) -> dict[str, Any]:
        """A completion for the server itself (blind tasks). Raises EngineFailed with vLLM's message."""
        answer = await self._client.post(route, json=body, headers={"x-request-id": completion_id})
        if answer.status_code != 200:
            raise EngineFailed(f"version {self.version} answered {answer.status_code}: {answer.text[:200]}")
        completed: dict[str, Any] = json.loads(answer.content)
        return completed

    async def close(self) -> None:
        """Stop the engine's process. Requests that still run fail; drain first."""
        await self._client.aclose()
        await asyncio.to_thread(self._llm.shutdown, timeout=5.0)


async def _openai_routes(llm: AsyncLLM, arguments: argparse.Namespace) -> FastAPI:
    """The completion routes of vLLM over an engine, on an app that no socket serves."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    await init_app_state(llm, app.state, arguments, await llm.get_supported_tasks())
    chat_routes.attach_router(app)
    completion_routes.attach_router(app)
    init_exception_handler(app)
    app.add_exception_handler(RequestValidationError, invalid_request)  # vLLM's own echoes the offending value
    app.state.server = types.SimpleNamespace(should_exit=False)  # vLLM's handlers ask for it when an engine dies
    return app


def tokenizer_digest(version: Version) -> str | None:
    """sha256 of the version's ``tokenizer.json``, None for a version without one."""
    file = version.manifest.files.get("tokenizer.json")
    return file.sha256 if file is not None else None


def _arguments(model: Path, model_id: str, settings: ServeSettings) -> list[str]:
    """The command line vLLM gets for one version."""
    arguments = [
        "--model", str(model),
        "--served-model-name", model_id,
        "--dtype", settings.dtype,
        "--max-model-len", str(settings.max_model_len),
        "--max-num-seqs", str(settings.max_num_seqs),
        "--max-logprobs", str(settings.max_logprobs),
        # Recorded log-probs must be of the distribution that was sampled from.
        "--logprobs-mode", "processed_logprobs",
    ]  # fmt: skip
    if current_platform.is_cpu():
        arguments += [
            "--enforce-eager",
            # A seeded request whose prefill is chunked kills a CPU engine of vLLM 0.32.
            "--no-enable-chunked-prefill",
            "--max-num-batched-tokens", str(max(settings.max_model_len, _CPU_BATCHED_TOKENS)),
            # The name "uni" would be rewritten to "mp", which costs a third process.
            "--distributed-executor-backend", "vllm.v1.executor.uniproc_executor.UniProcExecutor",
        ]  # fmt: skip
    return [*arguments, *settings.engine_arguments]
