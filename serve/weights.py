"""vLLM worker extension: exchange a running engine's weights for another version's, all or nothing.

``reload_weights`` of vLLM 0.32 leaves the model half loaded, and the engine hanging, when it meets a file it
cannot use. So everything is read and checked first, and nothing is touched until it has passed. On CPU the
output layer of a model with tied embeddings is packed once, when the engine starts; it must be packed again, or
it goes on answering with the old weights.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open


class PolicyWeights:
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
