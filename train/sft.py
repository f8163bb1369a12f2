"""Supervised fine-tuning on labelers' demonstrations (InstructGPT §3.5 and §C.1).

    loss = −mean log π(y_t | x, y_<t) over completion tokens  +  mix · pretraining loss

Only completion tokens, EOS included, carry a loss: the policy is to answer prompts, not to write them. The
pretraining term is the start that §C.3 gives to PPO. The learning rate decays by half a cosine to 10 %.
"""

import random
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from train.batches import Batch, Demonstrated, TokenStream, collate
from train.errors import DatasetUnusable
from train.lora import NO_ADAPTERS, adapt
from train.models import load_policy, load_tokenizer, pad_id_of, pretraining_loss, save_policy, token_logits
from train.running.devices import CPU, Device
from train.running.distributed import Ranks
from train.running.optimizer import adamw, cosine_factor, update
from train.running.progress import Progress, silent
from train.settings import LoraSettings, SftSettings


def run(
    settings: SftSettings,
    policy_dir: Path,
    demonstrations: Sequence[Demonstrated],
    out: Path,
    *,
    pretraining: TokenStream | None,
    seed: int,
    device: Device = CPU,
    lora: LoraSettings = NO_ADAPTERS,
    progress: Progress = silent,
) -> dict[str, float]:
    """Fine-tune the policy in ``policy_dir`` on ``demonstrations`` and write it to ``out``.

    Args:
        settings: epochs, batch size, learning rate, dropout, pretraining mix.
        policy_dir: the policy to start from.
        demonstrations: prompts with their completions, in token ids.
        out: directory to write; what it holds is overwritten.
        pretraining: text for the mix; may be None only where ``settings.pretraining_mix`` is 0.
        seed: of the order of the demonstrations, of dropout and of adapters.
        device: to compute on.
        lora: adapters to train in place of all weights.
        progress: called after each step.

    Returns:
        ``loss`` (nats per completion token, mean of the last epoch), ``first_epoch_loss``, ``seconds``.

    Raises:
        DatasetUnusable: where there is nothing to learn from, or a demonstration does not fit the model.
        ModelUnusable: where ``policy_dir`` holds no policy.
        TrainingDiverged: where a gradient is not finite; nothing is written.
    """
    started = time.monotonic()
    if settings.pretraining_mix and pretraining is None:
        raise DatasetUnusable(
            f"sft.pretraining_mix is {settings.pretraining_mix}, but no pretraining text was given: "
            "give some, or set it to 0"
        )

    # 1. The policy, with dropout on while it learns.
    ranks, policy = Ranks.current(), load_policy(policy_dir)
    tokenizer = load_tokenizer(policy_dir)
    pad_id = pad_id_of(tokenizer)
    _check(demonstrations, int(policy.config.max_position_embeddings))
    _set_dropout(policy, settings.dropout)
    device.prepare(ranks.shard(adapt(policy, lora, seed=seed))).train()
    optimizer = adamw(policy, settings.learning_rate)

    # 2. Every demonstration once per epoch, in a new order each time.
    rng = random.Random(seed)
    order = list(range(len(demonstrations)))
    starts = range(0, len(order), settings.batch_size)
    steps = settings.epochs * len(starts)
    epoch_losses: list[float] = []
    step = 0
    with device.seeded(seed + ranks.rank):
        for _ in range(settings.epochs):
            rng.shuffle(order)
            losses: list[float] = []
            for start in starts:
                # 3. Cross-entropy of the completion tokens, and of pretraining text.
                chosen = [demonstrations[i] for i in order[start : start + settings.batch_size]]
                own, weight = ranks.share(chosen, [len(completion) for _, completion in chosen])
                batch = collate([prompt for prompt, _ in own], [completion for _, completion in own], pad_id)
                loss = weight * completion_loss(policy, device.place(batch))
                torch.autograd.backward(loss)
                losses.append(ranks.mean(float(loss.detach())))
                if settings.pretraining_mix and pretraining is not None:
                    # A backward of its own, so that both graphs are never in memory together; the gradients add up.
                    text = pretraining.take(settings.pretraining_batch)
                    rows, weight = ranks.share(range(len(text)))
                    torch.autograd.backward(settings.pretraining_mix * weight * pretraining_loss(policy, text[rows]))

                # 4. One step of AdamW at this step's learning rate.
                factor = cosine_factor(step, steps, final_fraction=settings.final_lr_fraction)
                update(optimizer, policy.parameters(), settings.learning_rate * factor, settings.max_grad_norm)
                step += 1
                progress("sft", step, steps, {"loss": fmean(losses)})
            epoch_losses.append(fmean(losses))

    # 5. Save; the configuration keeps the dropout it came with.
    save_policy(policy.eval(), tokenizer, out)
    return {"loss": epoch_losses[-1], "first_epoch_loss": epoch_losses[0], "seconds": time.monotonic() - started}


def completion_loss(policy: PreTrainedModel, batch: Batch) -> Tensor:
    """Mean cross-entropy, in nats, over the real completion tokens of ``batch``: a scalar."""
    return nn.functional.cross_entropy(token_logits(policy, batch), batch.completion_ids[batch.completion_mask])


def _check(demonstrations: Sequence[Demonstrated], window: int) -> None:
    if not demonstrations:
        raise DatasetUnusable("there are no demonstrations to learn from")
    for number, (prompt, completion) in enumerate(demonstrations):
        if not prompt or not completion:
            raise DatasetUnusable(f"demonstration {number} has an empty {'completion' if prompt else 'prompt'}")
        if len(prompt) + len(completion) > window:
            raise DatasetUnusable(
                f"demonstration {number} has {len(prompt) + len(completion)} tokens; the policy's window is {window}"
            )


def _set_dropout(policy: PreTrainedModel, probability: float) -> None:
    """Set every dropout of the model; decoder families keep it in modules or, for attention, in a number."""
    for module in policy.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
        elif isinstance(getattr(module, "attention_dropout", None), int | float):
            module.attention_dropout = probability
