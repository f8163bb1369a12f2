"""Reward models and value models: a policy's trunk with one scalar head, or an ensemble of them.

InstructGPT §3.5: "starting from the SFT model with the final unembedding layer removed". An ensemble shares the trunk;
its heads differ where the data do not settle what to say (Osband et al. 2016, arXiv 1602.04621, §3).

Letters in shapes: B sequences, R completion tokens, T tokens in all, d hidden size, n heads.
"""

import copy
import math
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from train.batches import Batch
from train.errors import ModelUnusable
from train.lora import Unadapted
from train.models import HEAD_FILE, last_states, load_pretrained, save_plain, token_states
from train.running.distributed import Ranks, whole


class ScalarModel(nn.Module):
    """A trunk with n linear heads, each to one number per token; reward model and value model are both this.

    Attributes:
        trunk: a Hugging Face model that returns ``last_hidden_state`` [B, T, d]. ``Unadapted``, it is another scalar
            model's, whose adapters this one does not see.
        head: d → n, weights drawn with SD 1/√(d+1) and bias 0 (Stiennon et al. 2020, app. B.1).
        shift: [n], subtracted from what each head says; set so that demonstrations score 0 on average, by every head
            (InstructGPT §C.2).
        shares_prompts: whether several completions of a prompt can go on from one reading of it; None until
            ``train.packing`` has tried.
    """

    shift: Tensor

    def __init__(
        self, trunk: PreTrainedModel | Unadapted, generator: torch.Generator | None = None, *, heads: int = 1
    ) -> None:
        super().__init__()
        self.trunk: PreTrainedModel = trunk
        width = int(trunk.config.hidden_size)
        self.head = nn.Linear(width, heads)
        nn.init.normal_(self.head.weight, std=1 / math.sqrt(width + 1), generator=generator)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("shift", torch.zeros(heads))
        self.shares_prompts: bool | None = None

    @property
    def heads(self) -> int:
        """How many heads: n."""
        return self.head.out_features

    def score(self, batch: Batch) -> Tensor:
        """The number at each sequence's last real token, [B]: a reward model's score, the mean over heads."""
        return self.scores(batch).mean(1)

    def scores(self, batch: Batch) -> Tensor:
        """What each head says at each sequence's last real token, [B, n]."""
        return self.numbers(last_states(self.trunk, batch))

    def values(self, batch: Batch) -> Tensor:
        """The number before each completion token was chosen: a value model's estimate of what is to come.

        [B, R], 0 on the padding.
        """
        return batch.of_tokens(self.numbers(token_states(self.trunk, batch)).mean(-1))

    def numbers(self, hidden: Tensor) -> Tensor:
        """What the heads say, in full precision, of hidden states [..., d]: [..., n]."""
        return cast(Tensor, self.head(hidden.float())) - self.shift

    @torch.no_grad()
    def scale(self, factor: float) -> None:
        """Multiply everything this model says by ``factor``."""
        for weight in (self.head.weight, self.head.bias, self.shift):
            weight.mul_(factor)

    @torch.no_grad()
    def on(self, trunk: PreTrainedModel | Unadapted) -> "ScalarModel":
        """A copy of these heads on another trunk."""
        other = ScalarModel(trunk, heads=self.heads)
        other.head.load_state_dict(self.head.state_dict())
        other.shift.copy_(self.shift)
        return other.train(self.training)

    @torch.no_grad()
    def merged(self, trunk: PreTrainedModel | None = None) -> "ScalarModel":
        """One head that says the mean of these heads, exactly: they are linear. On ``trunk``, or a copy of this one."""
        merged = ScalarModel(copy.deepcopy(self.trunk) if trunk is None else trunk)
        merged.head.weight.copy_(self.head.weight.mean(0, keepdim=True))
        merged.head.bias.copy_(self.head.bias.mean(0, keepdim=True))
        merged.shift.copy_(self.shift.mean(0, keepdim=True))
        return merged.train(self.training)


def scalar_model_from(
    policy: PreTrainedModel, generator: torch.Generator | None = None, *, heads: int = 1
) -> ScalarModel:
    """Fresh heads on a copy of a policy's trunk, in evaluation mode."""
    return ScalarModel(copy.deepcopy(policy.get_decoder()), generator, heads=heads).eval()


def save_reward_model(model: ScalarModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write the trunk (config.json, model.safetensors), the heads (head.safetensors) and the tokenizer files.

    As with ``train.models.save_policy``, adapters are added up, and of several processes the first writes.
    """
    save_plain(model.trunk, directory)
    tensors = {"weight": model.head.weight, "bias": model.head.bias, "shift": model.shift}
    head = {name: whole(tensor.detach()).cpu().contiguous() for name, tensor in tensors.items()}
    if Ranks.current().first:
        save_file(head, directory / HEAD_FILE)
        tokenizer.save_pretrained(directory)


def load_reward_model(directory: Path) -> ScalarModel:
    """What ``save_reward_model`` wrote: fp32, evaluation mode. Raises ModelUnusable where it is none."""
    trunk = load_pretrained(AutoModel, directory)
    try:
        head = load_file(directory / HEAD_FILE)
        model = ScalarModel(trunk, heads=len(head["weight"]))
        with torch.no_grad():
            model.head.weight.copy_(head["weight"])
            model.head.bias.copy_(head["bias"])
            model.shift.copy_(head["shift"])
    except (OSError, SafetensorError, KeyError, TypeError, RuntimeError) as error:
        raise ModelUnusable(f"{directory / HEAD_FILE} is not a scalar head for this trunk: {error}") from error
    return model.eval()
