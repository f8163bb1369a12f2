"""The command line that vLLM gets for one policy version: what our settings mean in vLLM's words."""

from pathlib import Path

from serve.settings import ServeSettings

_CPU_BATCHED_TOKENS = 4096
"""Tokens a CPU engine prefills at once; without chunking it must be at least the longest prompt."""


def engine_arguments(model: Path, model_id: str, settings: ServeSettings, *, on_cpu: bool) -> list[str]:
    """Arguments for vLLM's own parser; the operator's ``engine_arguments`` come last, so they win."""
    arguments = [
        "--model", str(model),
        "--served-model-name", model_id,
        "--dtype", settings.dtype,
        "--max-model-len", str(settings.max_model_len),
        "--max-num-seqs", str(settings.max_num_seqs),
        "--max-num-queued-reqs", str(settings.max_pending_completions),
        "--max-logprobs", str(settings.max_logprobs),
        # Recorded log-probs must be of the distribution that was sampled from.
        "--logprobs-mode", "processed_logprobs",
        "--enable-prompt-tokens-details",
        "--worker-extension-cls", "serve.weights.PolicyWorker",
    ]  # fmt: skip
    if settings.tool_call_parser:
        arguments += ["--enable-auto-tool-choice", "--tool-call-parser", settings.tool_call_parser]
    if on_cpu:
        arguments += [
            "--enforce-eager",
            # A seeded request whose prefill is chunked kills a CPU engine of vLLM 0.32.
            "--no-enable-chunked-prefill",
            "--max-num-batched-tokens", str(max(settings.max_model_len, _CPU_BATCHED_TOKENS)),
            # The name "uni" would be rewritten to "mp", which costs a third process.
            "--scheduler-cls", "serve.weights.OnceScheduler",
            "--distributed-executor-backend", "vllm.v1.executor.uniproc_executor.UniProcExecutor",
        ]  # fmt: skip
    return [*arguments, *settings.engine_arguments]
