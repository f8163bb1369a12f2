"""Resume points: everything a stopped run needs to go on as if it had never stopped, in one file.

The file is written beside its final name, synced and renamed, so a run killed at any moment leaves the last
whole one. A fingerprint of what the run was given (settings, seed, data, weights) keeps a resume point
from being continued by another run.
"""

import hashlib
import os
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from deploy.files import sync_directory
from train.errors import ResumePointUnusable


def save(path: Path, fingerprint: str, state: dict[str, Any]) -> None:
    """Replace the resume point at ``path`` atomically and durably by ``state``: tensors, numbers, text, containers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    with unfinished.open("wb") as file:
        torch.save({"fingerprint": fingerprint, "state": state}, file)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
    sync_directory(path.parent)


def load(path: Path, fingerprint: str) -> dict[str, Any] | None:
    """The state saved at ``path``, or None where there is none. No code in the file is run.

    Raises ResumePointUnusable where the file is damaged or was written under another fingerprint.
    """
    if not path.exists():
        return None
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        found, state = saved["fingerprint"], saved["state"]
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise ResumePointUnusable(f"{path} is damaged ({error}); remove it to start this run anew") from error
    if found != fingerprint:
        raise ResumePointUnusable(
            f"{path} belongs to a run with other settings, seed, data or models; remove it to start this run anew"
        )
    return dict(state)


def fingerprint_of(described: str, directories: Iterable[Path]) -> str:
    """A digest of a description of a run and of the weights in its model ``directories``."""
    digest = hashlib.sha256(described.encode())
    for directory in directories:
        for weights in sorted(directory.glob("*.safetensors")):
            with weights.open("rb") as file:
                digest.update(weights.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
