"""PPO's resume point: one file, or with several processes one file that names a directory with a part of each.

That file then holds a digest of the parts, in which a flipped bit would go unnoticed too (``train.running.resume``).

Its tensors are what changes: the weights that learn, their averages and their optimizers' moments, each under a name
of three parts, for instance ``policy/moments/3.exp_avg``.
"""

import shutil
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as load_parts
from torch.distributed.checkpoint.state_dict_saver import save as save_parts

from deploy.files import sync_directory
from train.batches import TokenStream
from train.errors import ResumePointUnusable
from train.iteration.learner import Learner
from train.lora import learning
from train.running import resume

WEIGHTS, AVERAGES, MOMENTS = "weights", "averages", "moments"


def save(path: Path, fingerprint: str, learner: Learner, pretraining: TokenStream | None) -> None:
    """Replace the resume point at ``path`` by where ``learner`` is, at once and durably."""
    state, tensors = learner.state(pretraining), _tensors(learner)
    if learner.ranks.count == 1:
        resume.save(path, fingerprint, {**state, "tensors": tensors})
        return
    parts = path.with_name(f"{path.stem}.parts-{learner.iteration}")
    save_parts(tensors, checkpoint_id=parts)
    if learner.ranks.first:
        sync_directory(parts)
        resume.save(path, fingerprint, {**state, "parts": parts.name, "digest": _digest(parts)})
        for stale in set(path.parent.glob(f"{path.stem}.parts-*")) - {parts}:
            shutil.rmtree(stale)
    distributed.barrier()


def load(path: Path, fingerprint: str, learner: Learner, pretraining: TokenStream | None) -> bool:
    """Bring ``learner`` to the resume point at ``path``; False where there is none.

    Raises ResumePointUnusable where it is damaged or another run's.
    """
    saved = resume.load(path, fingerprint)
    if saved is None:
        return False
    learner.restore(saved, pretraining)
    if "tensors" in saved:
        _put(saved["tensors"], learner)
        return True
    parts = path.with_name(saved["parts"])
    if learner.ranks.from_first(lambda: _digest(parts)) != saved["digest"]:
        raise ResumePointUnusable(f"{parts}, a part of {path}, is damaged; remove both to start this run anew")
    keys = FileSystemReader(parts).read_metadata().state_dict_metadata
    tensors: dict[str, Any] = {key: _empty(key, learner) for key in keys}
    load_parts(tensors, checkpoint_id=parts)
    _put(tensors, learner)
    return True


def _digest(parts: Path) -> str:
    """Of the processes' parts, all of them; that of none where they are gone."""
    return resume.digest_of("", sorted(parts.glob("*")))


def _tensors(learner: Learner) -> dict[str, Tensor]:
    found = {f"policy/{AVERAGES}/{name}": mean for name, mean in (learner.averaged or {}).items()}
    for model_name, (model, optimizer) in learner.trained().items():
        found |= {f"{model_name}/{WEIGHTS}/{name}": weight.detach() for name, weight in learning(model)}
        for number, moments in optimizer.state_dict()["state"].items():
            found |= {f"{model_name}/{MOMENTS}/{number}.{kind}": moment for kind, moment in moments.items()}
    return found


@torch.no_grad()
def _put(tensors: Mapping[str, Tensor], learner: Learner) -> None:
    """Give ``learner`` what ``_tensors`` found."""
    for name, mean in (learner.averaged or {}).items():
        mean.copy_(tensors[f"policy/{AVERAGES}/{name}"])
    for model_name, (model, optimizer) in learner.trained().items():
        for name, weight in learning(model):
            weight.copy_(tensors[f"{model_name}/{WEIGHTS}/{name}"])
        moments: defaultdict[int, dict[str, Tensor]] = defaultdict(dict)
        for key, moment in tensors.items():
            if key.startswith(f"{model_name}/{MOMENTS}/"):
                number, _, kind = key.rpartition("/")[2].partition(".")
                moments[int(number)][kind] = moment
        optimizer.load_state_dict({**optimizer.state_dict(), "state": dict(moments)})


def _empty(key: str, learner: Learner) -> Tensor:
    """A tensor to read ``key`` into, in this process's part of the shape; moments exist only after a first update."""
    model_name, what, name = key.split("/")
    model, optimizer = learner.trained()[model_name]
    if what != MOMENTS:
        return torch.zeros_like(model.get_parameter(name).detach())
    number, _, kind = name.partition(".")
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    return torch.zeros(()) if kind == "step" else torch.zeros_like(weights[int(number)].detach())
