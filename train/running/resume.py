"""Resume points: everything a stopped run needs to go on as if it had never stopped, in one file.

The file is written beside its final name, synced and renamed, so a run killed at any moment leaves the last
whole one. It is a torch archive followed by its sha256: torch reads a flipped bit without complaint. A
fingerprint of what the run was given (settings, seed, data, weights) keeps a resume point from being
continued by another run.
"""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from deploy.files import sync_directory
from train.errors import ResumePointUnusable

_CHUNK_BYTES = 1 << 20


def save(path: Path, fingerprint: str, state: dict[str, Any]) -> None:
    """Replace the resume point at ``path`` atomically and durably by ``state``: tensors, numbers, text, containers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    with unfinished.open("w+b") as file:
        torch.save({"fingerprint": fingerprint, "state": state}, file)
        file.seek(0)
        file.write(hashlib.file_digest(file, "sha256").digest())
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
    if not _is_whole(path):
        raise ResumePointUnusable(f"{path} is damaged; remove it to start this run anew")
    saved = torch.load(path, map_location="cpu", weights_only=True)
    if saved["fingerprint"] != fingerprint:
        raise ResumePointUnusable(
            f"{path} belongs to a run with other settings, seed, data or models; remove it to start this run anew"
        )
    return dict(saved["state"])


def _is_whole(path: Path) -> bool:
    """Whether the file ends in the sha256 of all before it."""
    digest, remaining = hashlib.sha256(), path.stat().st_size - hashlib.sha256().digest_size
    with path.open("rb") as file:
        while remaining > 0 and (chunk := file.read(min(remaining, _CHUNK_BYTES))):
            digest.update(chunk)
            remaining -= len(chunk)
        return remaining == 0 and file.read() == digest.digest()


def fingerprint_of(described: str, directories: Iterable[Path]) -> str:
    """A digest of a description of a run and of the weights in its model ``directories``."""
    return digest_of(described, (file for each in directories for file in sorted(each.glob("*.safetensors"))))


def digest_of(described: str, paths: Iterable[Path]) -> str:
    """A digest of a description, and of the names and contents of files in this order."""
    digest = hashlib.sha256(described.encode())
    for path in paths:
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
