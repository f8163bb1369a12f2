"""Settings of the server (table ``serve``)."""

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from feedback.settings import TableSettings


class ServeSettings(TableSettings):
    """How policies are served; sources are given where a number is not ours."""

    table = "serve"
    model_config = SettingsConfigDict(env_prefix="INSTRUCTLOOP_SERVE__")

    host: str = Field("127.0.0.1", description="address to listen on; only loopback is open without keys")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    model_name: str = Field("policy", pattern=r"^[a-z][a-z0-9-]{0,31}$", description="model id of the released policy")

    dtype: str = Field("float32", description="engine precision; float32 on CPU so that log-probs match the trainer's")
    max_model_len: int = Field(256, gt=0, description="tokens of prompt plus completion; at most the model's positions")
    max_num_seqs: int = Field(
        64, gt=0, description="completions sampled at once by one engine; ours, measured on 2 cores"
    )
    kv_cache_gib: int = Field(1, gt=0, description="GiB of key-value cache per engine on CPU (VLLM_CPU_KVCACHE_SPACE)")
    engine_threads: int = Field(1, gt=0, description="OMP threads of one engine on CPU")
    engine_arguments: tuple[str, ...] = Field((), description="more vLLM arguments, passed through as written")
    keep_previous: bool = Field(True, description="keep the previous version's engine live for instant rollback")
    engine_start_timeout_seconds: float = Field(300.0, gt=0, description="longest wait for an engine to answer")
    drain_seconds: float = Field(30.0, gt=0, description="longest wait for running completions before an engine stops")
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
        0.02, gt=0, description="how long finished completions wait to be recorded together"
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
    task_temperature: float = Field(1.0, gt=0, description="temperature of a blind task's candidates; 1 as in PPO")
    task_max_completion_tokens: int = Field(64, gt=0, description="tokens of one candidate of a blind task")
