"""A vLLM worker extension for tests: when the file named by SPOIL_FILE appears, the weights in memory go bad."""

import functools
import os
import threading
import time
from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.models.llama import LlamaForCausalLM

from serve.weights import PolicyWorker

_models: list[Any] = []


class SpoilableWorker(PolicyWorker):
    """Ours; importing this module in the engine's process is what counts."""


def _remembering(initialise: Any) -> Any:
    @functools.wraps(initialise)  # vLLM looks at its signature
    def remember(model: Any, *args: Any, **options: Any) -> None:
        initialise(model, *args, **options)
        _models.append(model)

    return remember


def _spoil(file: Path) -> None:
    while not file.exists():
        time.sleep(0.1)
    file.unlink()
    with torch.inference_mode():
        for model in _models:
            model.model.norm.weight.mul_(-1.0)


if "SPOIL_FILE" in os.environ:
    LlamaForCausalLM.__init__ = _remembering(LlamaForCausalLM.__init__)
    threading.Thread(target=_spoil, args=(Path(os.environ["SPOIL_FILE"]),), daemon=True).start()
