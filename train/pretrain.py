"""Next-token pretraining: a causal language model from random weights.

    loss = −mean log π(x_t | x_<t)    over packed sequences [B, T]

InstructGPT starts from GPT-3 (Brown et al. 2020, app. B); this stage stands in for it where no base model is
given, as in the tiny world. AdamW, linear warmup, one half cosine, gradients clipped to a global norm.
"""

import time
from collections import deque
from pathlib import Path
from statistics import fmean

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase

from train.batches import TokenStream
from train.models import pretraining_loss, save_policy
from train.running.devices import CPU, Device
from train.running.distributed import Ranks
from train.running.optimizer import adamw, cosine_factor, update
from train.running.progress import Progress, silent
from train.settings import PretrainSettings

_AVERAGED_STEPS = 50
"""The reported loss is the mean over this many last steps."""


def run(
    settings: PretrainSettings,
    stream: TokenStream,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    out: Path,
    *,
    seed: int,
    device: Device = CPU,
    progress: Progress = silent,
) -> dict[str, float]:
    """Pretrain a model of shape ``config`` on ``stream`` and write it to ``out`` as a policy directory.

    Args:
        settings: steps, batch size, learning rate.
        stream: packed text; its ``sequence_length`` is what the model is trained at.
        tokenizer: saved beside the model.
        config: the model's Hugging Face configuration.
        out: directory to write; what it holds is overwritten.
        seed: of the initial weights. The order of the text is the stream's own.
        device: to compute on.
        progress: called after each step.

    Returns:
        ``loss`` (nats per token, mean of the last 50 steps), ``tokens`` seen, ``seconds``.

    Raises:
        TrainingDiverged: where a gradient is not finite; nothing is written.
    """
    started, ranks = time.monotonic(), Ranks.current()

    # 1. Random weights, the same on every device, leaving the caller's random state alone.
    with CPU.seeded(seed):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    device.prepare(ranks.shard(model)).train()
    optimizer = adamw(model, settings.learning_rate, weight_decay=settings.weight_decay)
    losses: deque[float] = deque(maxlen=_AVERAGED_STEPS)

    for step in range(settings.steps):
        # 2. The loss of the next B sequences, [B, T].
        text = stream.take(settings.batch_size)
        rows, weight = ranks.share(range(len(text)))
        loss = weight * pretraining_loss(model, text[rows])
        torch.autograd.backward(loss)
        losses.append(ranks.mean(float(loss.detach())))

        # 3. One step of AdamW at this step's learning rate.
        factor = cosine_factor(
            step, settings.steps, warmup=settings.warmup_steps, final_fraction=settings.final_lr_fraction
        )
        update(optimizer, model.parameters(), settings.learning_rate * factor, settings.max_grad_norm)
        progress("pretrain", step + 1, settings.steps, {"loss": fmean(losses)})

    # 4. Save.
    save_policy(model.eval(), tokenizer, out)
    return {
        "loss": fmean(losses),
        "tokens": float(settings.steps * settings.batch_size * stream.sequence_length),
        "seconds": time.monotonic() - started,
    }
