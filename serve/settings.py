"""Settings of the server (table ``serve``)."""

from typing import Literal

from pydantic import Field, field_validator
from pydantic_settings import SettingsConfigDict

from feedback.settings import TableSettings

FORBIDDEN_ENGINE_ARGUMENTS = frozenset(
    {
        "--trust-remote-code",  # runs code out of a model's directory
        "--allowed-local-media-path",  # serves files
        "--enable-prompt-embeds",  # tensors from clients
        "--trust-request-chat-template",  # templates from clients
        "--enable-lora",  # on CPU, base requests get an adapter's answers; versions are merged when published
        "--enable-chunked-prefill",  # on CPU, a seeded request then ends the engine
        "--model",
        "--served-model-name",  # versions come from the registry, by number
        "--api-key",  # see feedback keys
    }
)
"""VLLM's arguments that would undo what this server promises."""


class ServeSettings(TableSettings):
    """How policies are served; sources are given where a number is not ours."""

    table = "serve"
    model_config = SettingsConfigDict(env_prefix="INSTRUCTLOOP_SERVE__")

    host: str = Field("127.0.0.1", description="address to listen on; only loopback is open without keys")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    access_log: bool = Field(True, description="log a line for each request: route, status, version, time, id")
    model_name: str = Field("policy", pattern=r"^[a-z][a-z0-9-]{0,31}$", description="model id of the released policy")

    dtype: str = Field("float32", description="engine precision; float32 on CPU so that log-probs match the trainer's")
    max_model_len: int = Field(256, gt=0, description="tokens of prompt plus completion; at most the model's positions")
    max_num_seqs: int = Field(
        64, gt=0, description="completions sampled at once by one engine; ours, measured on 2 cores"
    )
    max_pending_completions: int = Field(
        1024,
        gt=0,
        description="completions sampled or waiting in one engine; beyond, 429 at once; ours: 2 of the largest",
    )
    max_pending_feedback: int = Field(
        256,
        gt=0,
        description="feedback requests under way at once; beyond, 429 at once; ours, measured: a batch of the store; "
        "with twice as many some wait too long in an overload, and get 503",
    )
    kv_cache_gib: int = Field(1, gt=0, description="GiB of key-value cache per engine on CPU (VLLM_CPU_KVCACHE_SPACE)")
    engine_threads: int = Field(1, gt=0, description="OMP threads of one engine on CPU")
    tool_call_parser: str = Field(
        "hermes", description="vLLM's parser of tool calls, by the model's training; empty for none, and no tool_choice"
    )
    engine_arguments: tuple[str, ...] = Field((), description="more vLLM arguments, passed through as written")
    max_engines: int = Field(
        3,
        gt=0,
        description="engines that fit in memory: stable, canary and the kept previous; with 1, versions are swapped "
        "in place and a canary is not served",
    )
    swap: Literal["wait", "keep"] = Field(
        "wait",
        description="in-place change: wait for running completions, so that each has one version; or keep them running "
        "across the change, if latency matters more",
    )
    keep_previous: bool = Field(True, description="keep the previous version's engine live for instant rollback")
    engine_start_timeout_seconds: float = Field(300.0, gt=0, description="longest wait for an engine to answer")
    probe_seconds: float = Field(2.0, gt=0, description="how often each engine is asked for one token")
    engine_hang_seconds: float = Field(
        10.0, gt=0, description="an engine that owes an answer and gives no token for so long is started again; ours"
    )
    canary_check_seconds: float = Field(
        30.0, gt=0, description="how often a running engine must reproduce its manifest's canary prompts; ours"
    )
    drain_seconds: float = Field(
        30.0, gt=0, description="longest wait for running completions before an engine stops, or exchanges its weights"
    )
    logprob_tolerance: float = Field(
        1e-3,
        gt=0,
        description="nats an engine's log-probs of the canary prompts may differ from the manifest's; ours: "
        "vLLM against transformers in float32 differs by 4e-6",
    )

    release_poll_seconds: float = Field(
        1.0, gt=0, description="how often the release is read even if nothing is announced"
    )
    record_interval_seconds: float = Field(
        0.1, gt=0, description="how long finished completions wait to be recorded together; ours: cheaper than 0.02"
    )
    record_capacity: int = Field(
        10_000, gt=0, description="completions that may wait while Redis is away; more are shed"
    )

    max_body_bytes: int = Field(1 << 20, gt=0, description="request body")
    max_n: int = Field(16, gt=0, description="completions per prompt")
    max_logprobs: int = Field(20, ge=0, description="logprobs and top_logprobs (OpenAI's limit)")
    max_stops: int = Field(16, ge=0, description="stop strings")
    max_stop_chars: int = Field(256, gt=0, description="characters of one stop string")
    max_logit_bias: int = Field(1024, ge=0, description="tokens in logit_bias")
    max_prompts: int = Field(32, gt=0, description="prompts in one request")
    max_metadata_pairs: int = Field(16, ge=0, description="metadata pairs (OpenAI's limit)")
    max_schema_bytes: int = Field(16 << 10, gt=0, description="a JSON schema, of an answer or of a tool's parameters")
    max_schema_depth: int = Field(16, gt=0, description="nesting of a JSON schema")
    allow_grammars: bool = Field(
        False, description="let clients constrain answers by regex, grammar or structural tag, whose cost has no bound"
    )
    task_temperature: float = Field(1.0, gt=0, description="temperature of a blind task's candidates; 1 as in PPO")
    task_max_completion_tokens: int = Field(64, gt=0, description="tokens of one candidate of a blind task")

    @field_validator("engine_arguments")
    @classmethod
    def _nothing_forbidden(cls, arguments: tuple[str, ...]) -> tuple[str, ...]:
        names = {argument.partition("=")[0].replace("_", "-") for argument in arguments}
        if forbidden := sorted(names & FORBIDDEN_ENGINE_ARGUMENTS):
            raise ValueError(
                f"{', '.join(forbidden)} may not be given: see FORBIDDEN_ENGINE_ARGUMENTS in serve/settings.py"
            )
        return arguments
