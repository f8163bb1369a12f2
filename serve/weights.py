"""What of ours runs inside vLLM's engine process: the exchange of weights, its end, and cheap log-probs.

``PolicyWorker`` exchanges a running engine's weights for another version's, all or nothing.

``reload_weights`` of vLLM 0.32 leaves the model half loaded, and the engine hanging, when it meets a file it
cannot use. So everything is read and checked first, and nothing is touched until it has passed. On CPU the
output layer of a model with tied embeddings is packed once, when the engine starts; it must be packed again, or
it goes on answering with the old weights.

``OnceScheduler`` keeps the log-probs that are only recorded until a request has ended. Sent with every token, as vLLM
does, and with the rank that it counts for each, they cost a small model's engine a fifth of its time.
"""

import contextlib
import os
import select
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import LogprobsLists, LogprobsTensors

RECORDED_ONLY = "instructloop_recorded_only"
"""In a request's ``extra_args``: nobody but the record wants its log-probs."""


class PolicyWorker:
    """Mixed into vLLM's worker, whose ``model_config``, ``model_runner`` and ``reload_weights`` it uses."""

    model_config: Any
    model_runner: Any
    reload_weights: Any

    def swap_weights(self, directory: str) -> None:
        """Serve the weights in ``directory`` from the next step on.

        Raises:
            ValueError: They are not this model's: a name or shape differs, or a number is not finite. The old
                weights go on serving.
        """
        staged = _tensors(Path(directory))
        expected = self._expected_shapes()
        found = {name: tuple(tensor.shape) for name, tensor in staged.items()}
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        if wrong:
            raise ValueError(f"weights have other names or shapes than the model being served: {', '.join(wrong[:5])}")
        if infinite := [name for name, tensor in staged.items() if not torch.isfinite(tensor).all()]:
            raise ValueError(f"weights are not finite: {', '.join(sorted(infinite)[:5])}")
        self.reload_weights(weights_iterator=iter(staged.items()))
        self._pack_tied_output_layer()

    def end_with(self, server: int) -> None:
        """End as soon as the process ``server`` has: vLLM's engine would outlive a server that is killed."""

        def wait() -> None:
            with contextlib.suppress(ProcessLookupError):  # it has ended already
                select.select([os.pidfd_open(server)], [], [])
            os.kill(os.getpid(), signal.SIGKILL)

        threading.Thread(target=wait, daemon=True).start()

    def record_cheaply(self) -> None:
        """From now on a log-prob of the sampled token alone is just looked up, without its rank in the vocabulary."""
        sampler = self.model_runner.sampler
        whole = sampler.gather_logprobs

        def gather(logprobs: torch.Tensor, num_logprobs: int, token_ids: torch.Tensor) -> LogprobsTensors:
            if num_logprobs:
                return whole(logprobs, num_logprobs, token_ids)
            column = token_ids.unsqueeze(-1)
            return LogprobsTensors(column.int(), logprobs.gather(-1, column), torch.zeros_like(token_ids).int())

        sampler.gather_logprobs = gather

    def _expected_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the weights the engine was started with, by name; versions never change on disk."""
        return {name: tuple(tensor.shape) for name, tensor in _tensors(Path(self.model_config.model)).items()}

    def _pack_tied_output_layer(self) -> None:
        head = getattr(self.model_runner.get_model(), "lm_head", None)
        if head is not None and self.model_config.hf_config.tie_word_embeddings:
            head.quant_method.process_weights_after_loading(head)


def _tensors(directory: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            names: list[str] = file.keys()
            tensors |= {name: file.get_tensor(name) for name in names}
    if not tensors:
        raise ValueError(f"there are no weights in {directory.name}")
    return tensors


class OnceScheduler(Scheduler):
    """VLLM's scheduler; of a request marked ``RECORDED_ONLY`` it sends the log-probs with the last token only."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._held: dict[str, list[Any]] = {}

    def add_request(self, request: Any) -> None:
        """As vLLM's."""
        super().add_request(request)
        if request.sampling_params is not None and RECORDED_ONLY in (request.sampling_params.extra_args or ()):
            self._held[request.request_id] = []

    def update_from_output(self, *step: Any) -> Any:
        """As vLLM's, without the log-probs held back."""
        outputs = super().update_from_output(*step)
        for client in outputs.values():
            for output in client.outputs:
                held = self._held.get(output.request_id)
                if held is not None:
                    self._hold(output, held)
        return outputs

    def _hold(self, output: Any, held: list[Any]) -> None:
        if output.new_logprobs is not None:
            held.append(output.new_logprobs.logprobs[:, :1])  # the sampled token stands first
            output.new_logprobs = None
        if output.finish_reason is not None:
            del self._held[output.request_id]
            if held:
                sampled = np.concatenate(held)
                unused = np.zeros((len(sampled), 1), dtype=np.int32)
                output.new_logprobs = LogprobsLists(unused, sampled, unused[:, 0], None)

    def finish_requests(self, request_ids: Any, *status: Any) -> Any:
        """As vLLM's: requests that were ended from outside."""
        finished = super().finish_requests(request_ids, *status)
        for request_id in [request_id for request_id in self._held if request_id not in self.requests]:
            del self._held[request_id]
        return finished
