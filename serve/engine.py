"""One policy version = one engine, over vLLM's ``AsyncLLM``. With ``weights.py`` the only file that knows vLLM.

``serve.forwarding`` hands a capped body to ``Engine.complete``, which calls vLLM's own OpenAI handlers in this
process: no network hop, no second trip through a web framework. ``_RecordingLLM`` tells a callback of every
request that has ended, without touching what the client receives.
"""

import asyncio
import contextlib
import functools
import logging
import math
import os
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextvars import ContextVar
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from pydantic import ValidationError
from starlette.datastructures import State
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.envs import disable_envs_cache, enable_envs_cache
from vllm.inputs import TokensPrompt
from vllm.outputs import RequestOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.logprobs import LogprobsProcessor
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.metrics.loggers import PrometheusStatLogger

from deploy.versions import CanaryPrompt, Version
from feedback.records import new_id
from serve.answer_shape import NOT_OPENAIS
from serve.engine_arguments import engine_arguments
from serve.errors import EngineFailed, EngineRefused, InvalidRequest, NotServing
from serve.recording import Sampled, SampledChoice
from serve.settings import ServeSettings
from serve.weights import RECORDED_ONLY

log = logging.getLogger(__name__)

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
"""The two routes an engine answers."""

_RECORD: ContextVar[bool] = ContextVar("_RECORD", default=False)
"""Whether what the request at hand samples is to be recorded, or only counted."""
_COLLECT: ContextVar[dict[int, list[float]] | None] = ContextVar("_COLLECT", default=None)
"""Where the sampled tokens' log-probs of the request at hand go, by choice, if the client asked for none."""


class _SampledLogprobs(LogprobsProcessor):
    """Collects the sampled tokens' log-probs; vLLM's own would also turn every token into text, for nobody."""

    def __init__(self, sampled: list[float]) -> None:
        super().__init__(
            tokenizer=None,
            logprobs=None,
            prompt_logprobs=None,
            cumulative_logprob=None,
            num_logprobs=None,
            num_prompt_logprobs=None,
        )
        self._sampled = sampled

    def update_from_output(self, output: EngineCoreOutput) -> None:
        """Take in what one step sampled; the sampled token stands first, before any most likely ones."""
        if output.new_logprobs is not None:
            self._sampled += output.new_logprobs.logprobs[:, 0].tolist()


class _RecordingOutputs(OutputProcessor):
    """Vllm's ``OutputProcessor`` with cheaper log-probs for requests that ask for none."""

    def add_request(self, request: Any, prompt: Any, *parent_index_queue: Any) -> None:
        """As vLLM's."""
        super().add_request(request, prompt, *parent_index_queue)
        if (collect := _COLLECT.get()) is not None:
            sampled = collect.setdefault(parent_index_queue[1], [])
            self.request_states[request.request_id].logprobs_processor = _SampledLogprobs(sampled)


class _RecordingLLM(AsyncLLM):
    """``AsyncLLM`` that tells of each ended request, and remembers when it last gave a token."""

    on_sampled: Callable[[Sampled], None] | None = None
    last_token_at = 0.0
    """When any request last got a token; monotonic seconds."""
    suspect = False
    """True once a log-prob was no number."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.output_processor.__class__ = _RecordingOutputs

    async def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **options: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """As vLLM's. The callback has run before the last output is handed on, so feedback may name it at once."""
        recorded = _RECORD.get()
        collected: dict[int, list[float]] | None = None
        if recorded and sampling_params.logprobs is None:
            sampling_params = sampling_params.clone()
            sampling_params.logprobs = 0  # the sampled token's own, which does not show in the client's answer
            collected = {} if sampling_params.prompt_logprobs is None else None
            if collected is not None and not sampling_params.stop:  # the engine's process does not know stop strings
                sampling_params.extra_args = {RECORDED_ONLY: True}
        _COLLECT.set(collected)
        delta = sampling_params.output_kind == RequestOutputKind.DELTA
        ended = Sampled(request_id, _openai_sampling(sampling_params), recorded=recorded)
        try:
            async for output in super().generate(prompt, sampling_params, request_id, **options):
                self.last_token_at = time.monotonic()
                _gather(ended, output, delta=delta)
                if output.finished:
                    for index, logprobs in (collected or {}).items():
                        ended.choices[index].logprobs = logprobs
                    self._tell(ended, output)
                yield output
        finally:
            if not ended.finished and self.on_sampled is not None:  # the client left, or the engine died
                self.on_sampled(ended)

    def _tell(self, ended: Sampled, output: RequestOutput) -> None:
        ended.finished = True
        self.suspect = self.suspect or not ended.finite
        if (stats := output.metrics) is not None:
            ended.queued_seconds = stats.scheduled_ts - stats.queued_ts
            ended.first_token_seconds = stats.first_token_latency
            if stats.num_generation_tokens > 1:
                ended.token_seconds = (stats.last_token_ts - stats.first_token_ts) / (stats.num_generation_tokens - 1)
        if self.on_sampled is not None:
            self.on_sampled(ended)


def _openai_sampling(sampling: SamplingParams) -> dict[str, Any]:
    more = {name: getattr(sampling, name) for name in ("presence_penalty", "frequency_penalty", "seed")}
    used = {name: value for name, value in more.items() if value or isinstance(value, int)}  # a seed may be 0
    return {"temperature": sampling.temperature, "top_p": sampling.top_p} | used


def _gather(ended: Sampled, output: RequestOutput, *, delta: bool) -> None:
    """Add what the engine gave: the tokens since last time, or without ``delta`` all so far."""
    ended.prompt_token_ids = output.prompt_token_ids or ended.prompt_token_ids
    if not delta:
        ended.completion_tokens = 0
    for part in output.outputs:
        ended.completion_tokens += len(part.token_ids)
        if not ended.recorded:
            continue
        choice = ended.choices.get(part.index)
        if choice is None or not delta:
            choice = ended.choices[part.index] = SampledChoice(part.index)
        choice.text += part.text
        choice.token_ids += part.token_ids
        if part.logprobs is not None:
            choice.logprobs += [at[token].logprob for token, at in zip(part.token_ids, part.logprobs, strict=True)]
        if part.finish_reason is not None:
            choice.finish_reason = part.finish_reason
            choice.version_spans = tuple((int(s.version), s.start, s.end) for s in part.weight_versions or ())


class Engine:
    """A live policy version. Make one with ``start``; end it with ``close``."""

    running = 0
    """Completion requests being served now; the fleet drains on it."""

    def __init__(self, llm: _RecordingLLM, metrics: CollectorRegistry, settings: ServeSettings) -> None:
        self.metrics = metrics  # vLLM's own, of this engine
        self._llm = llm
        self._settings = settings
        self._state = State()

    def _became(self, version: Version, model_id: str) -> None:
        self._version = version
        self.version = version.number
        self.model_id = model_id
        self.created = version.manifest.created.timestamp()
        self.tokenizer = version.tokenizer_digest  # of recorded token ids
        named = BaseModelPath(name=model_id, model_path=str(version.path))
        self._state.openai_serving_models.base_model_paths[:] = [named]  # vLLM's registry shares the list

    @classmethod
    async def start(
        cls, version: Version, model_id: str, settings: ServeSettings, on_sampled: Callable[[Sampled], None]
    ) -> "Engine":
        """Load a version, answer a first request and check it against the manifest. Raises EngineFailed."""
        # vLLM labels its metrics by the name it is started with; in place, that name must outlive the version.
        started_as = model_id if settings.max_engines > 1 else settings.model_name
        arguments = make_arg_parser(FlexibleArgumentParser()).parse_args(
            engine_arguments(version.path, started_as, settings, on_cpu=current_platform.is_cpu())
        )
        registry = CollectorRegistry()
        disable_envs_cache()
        try:
            config = AsyncEngineArgs.from_cli_args(arguments).create_engine_config()
            # Loading takes many seconds and blocks; completions of the other engines go on meanwhile.
            make = functools.partial(_RecordingLLM.from_vllm_config, stat_loggers=[_metrics_logger(registry)])
            llm = await asyncio.wait_for(
                asyncio.to_thread(make, config, disable_log_stats=bool(arguments.disable_log_stats)),
                settings.engine_start_timeout_seconds,
            )
        except (RuntimeError, ValueError, OSError, TimeoutError) as error:
            raise EngineFailed(f"version {version.number} does not load: {error}") from error
        finally:
            enable_envs_cache()  # vLLM looks up dozens of environment variables for each request
        engine = cls(llm, registry, settings)
        try:
            await init_app_state(llm, engine._state, arguments, await llm.get_supported_tasks())
            engine._became(version, model_id)
            await llm.update_weight_version(str(version.number))
            await llm.collective_rpc("end_with", args=(os.getpid(),))
            if current_platform.is_cpu():  # where a token is so cheap that its log-prob counts
                await llm.collective_rpc("record_cheaply")
            if not await engine.probe(settings.engine_start_timeout_seconds):
                raise EngineFailed(f"version {version.number} loads, but its engine does not answer")
            await engine.check_canary_prompts()
        except BaseException:
            await asyncio.to_thread(llm.shutdown, timeout=5.0)
            raise
        llm.on_sampled = on_sampled
        return engine

    async def complete(
        self, route: str, body: dict[str, Any], bare_id: str, cache_salt: str, *, recorded: bool = True
    ) -> bytes | AsyncGenerator[str, None]:
        """Answer a request that is within the limits: a JSON object, or the server-sent events of a stream.

        Args:
            route: ``CHAT`` or ``TEXT``.
            body: the client's request, without the fields that are the server's own.
            bare_id: random, never the client's, or two could share a completion; its id is this with vLLM's prefix.
            cache_salt: whoever asks with another one shares no cached prefixes.
            recorded: sample log-probs and report what was sampled, not only how much.

        Raises:
            InvalidRequest: The body does not fit vLLM's schema.
            EngineRefused: vLLM refuses the request; with an HTTP status.
            NotServing: The engine has ended.
        """
        if self.dead:
            raise NotServing(f"the engine of version {self.version} has ended and is being started again")
        _RECORD.set(recorded)
        asked = body | {"model": self.model_id, "request_id": bare_id, "cache_salt": cache_salt}
        try:
            if route == CHAT:
                chat = ChatCompletionRequest.model_validate(asked)
                answer = await self._state.openai_serving_chat.create_chat_completion(chat)
                extras = chat.return_token_ids or chat.return_prompt_text or chat.prompt_logprobs is not None
            else:
                text = CompletionRequest.model_validate(asked)
                answer = await self._state.openai_serving_completion.create_completion(text)
                extras = text.return_token_ids or text.prompt_logprobs is not None
        except ValidationError as error:
            raise InvalidRequest.of(error) from error
        except Exception as error:
            if self.dead:
                raise NotServing(f"the engine of version {self.version} ended during the request; try again") from error
            answer = create_error_response(error)
            if answer.error.code >= 500:
                log.warning("the engine failed on a request", exc_info=error)
        if isinstance(answer, ErrorResponse):
            if (task := asyncio.current_task()) is not None and task.cancelling():
                raise asyncio.CancelledError  # vLLM has made an answer of it
            raise EngineRefused(answer.error.code, answer.error.message, answer.error.param)
        if isinstance(answer, AsyncGenerator):
            return answer
        return str(answer.model_dump_json(exclude=None if extras else NOT_OPENAIS)).encode()

    async def check_canary_prompts(self) -> None:
        """Prove that what is served is what was published: greedy tokens and log-probs of the manifest's prompts.

        Raises:
            EngineFailed: A token differs, or a log-prob by more than ``logprob_tolerance`` nats.
        """
        tolerance, self._llm.suspect = self._settings.logprob_tolerance, False
        for number, canary in enumerate(self._version.manifest.canary_prompts):
            token_ids, logprobs = await self._greedy(canary)
            apart = max((abs(a - b) for a, b in zip(logprobs, canary.logprobs, strict=False)), default=0.0)
            equal = token_ids == list(canary.completion_token_ids)
            if not equal or not apart <= tolerance:
                raise EngineFailed(
                    f"version {self.version} does not reproduce canary prompt {number} of its manifest: "
                    f"tokens {'equal' if equal else 'differ'}, log-probs up to {apart:.2g} nats apart "
                    f"(limit {tolerance:.2g})"
                )

    async def _greedy(self, canary: CanaryPrompt) -> tuple[list[int], list[float]]:
        sampling = SamplingParams(temperature=0.0, max_tokens=max(1, len(canary.completion_token_ids)), logprobs=0)
        sampled = Sampled("", {}, recorded=True)
        prompt = self._rendered(canary.prompt_token_ids)
        async for output in AsyncLLM.generate(self._llm, prompt, sampling, new_id("canary-")):
            _gather(sampled, output, delta=False)
        choice: SampledChoice = sampled.choices[0]
        if not all(math.isfinite(logprob) for logprob in choice.logprobs):
            raise EngineFailed(f"version {self.version} gives log-probs that are not finite")
        return choice.token_ids, choice.logprobs

    def _rendered(self, token_ids: Sequence[int]) -> Any:
        return self._llm.renderer.render_cmpl([TokensPrompt(prompt_token_ids=list(token_ids))])[0]

    @property
    def dead(self) -> bool:
        """True when the engine's process has ended. vLLM cannot revive it; start another."""
        return bool(self._llm.errored)

    @property
    def suspect(self) -> bool:
        """True once it gave a log-prob that is no number: its canary prompts should be checked now."""
        return self._llm.suspect

    @property
    def silent_seconds(self) -> float:
        """Seconds since it last gave any request a token."""
        return time.monotonic() - self._llm.last_token_at

    async def probe(self, timeout_seconds: float) -> bool:
        """True when the engine samples one token in time. A dead engine may look like a clean exit; this does not."""
        sampling = SamplingParams(temperature=0.0, max_tokens=1)

        async def one_token() -> bool:
            async for _ in AsyncLLM.generate(self._llm, self._rendered((1,)), sampling, new_id("probe-")):
                self._llm.last_token_at = time.monotonic()
            return True

        try:
            return await asyncio.wait_for(one_token(), timeout_seconds)
        except Exception:  # whatever vLLM raises here, the engine does not answer
            return False

    async def swap(self, version: Version, model_id: str) -> None:
        """Serve another version's weights in place. With ``swap = "wait"`` nothing may be running.

        Raises:
            EngineFailed: The version cannot be exchanged for this one, or does not reproduce its canary prompts;
                the old version goes on serving.
        """
        if version.digests_but_weights() != self._version.digests_but_weights():
            raise EngineFailed(
                f"version {version.number} differs from version {self.version} in more than its weights "
                "(configuration or tokenizer); with max_engines = 1 it needs a restart of the server"
            )
        old = self._version, self.model_id
        try:
            await self._load(version)
            self._became(version, model_id)
            await self.check_canary_prompts()
        except Exception as error:
            self._became(*old)
            await self._load(old[0])
            raise EngineFailed(f"version {version.number} is not served: {error}") from error

    async def _load(self, version: Version) -> None:
        keep = self._settings.swap == "keep"
        if keep:
            await self._llm.pause_generation(mode="keep", clear_cache=False)
        try:
            await self._llm.collective_rpc("swap_weights", args=(str(version.path),))
            # What was computed by the old weights must not be read by the new: cached prefixes, running requests.
            await self._llm.reset_prefix_cache(reset_running_requests=True)
            await self._llm.update_weight_version(str(version.number))
        finally:
            if keep:
                await self._llm.resume_generation()

    async def kill(self) -> None:
        """End an engine that does not answer, or not in time: its requests fail at once instead of waiting for ever."""
        for process in self._llm.engine_core.resources.engine_manager.processes:
            process.kill()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(5.0):
                while not self.dead or self.running:
                    await asyncio.sleep(0.02)
        await self.close()

    async def close(self) -> None:
        """Stop the engine's process. Nothing may be running any more; see ``kill``."""
        await asyncio.to_thread(self._llm.shutdown, timeout=5.0)


def _metrics_logger(registry: CollectorRegistry) -> type[PrometheusStatLogger]:
    """VLLM's Prometheus metrics on a registry of their own: on the global one, a second engine removes the first's."""

    class EngineMetrics(PrometheusStatLogger):
        _gauge_cls = functools.partial(Gauge, registry=registry)
        _counter_cls = functools.partial(Counter, registry=registry)
        _histogram_cls = functools.partial(Histogram, registry=registry)

    return EngineMetrics
