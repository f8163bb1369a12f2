"""The files of a version: which may be in it, what they digest to, and how they reach the disk for good.

A version holds weights as safetensors, a tokenizer and JSON settings, and nothing that could run: no
pickle, no symlink, no subdirectory, no ``auto_map`` naming code. Names are allowed one by one, because a
loader picks files up by name.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from deploy.errors import PublishRefused, VersionCorrupt
from deploy.signatures import Signatures
from deploy.versions import FileDigest, Manifest, Version, VersionKind

MANIFEST = "manifest.json"
MANIFEST_DIGEST = "manifest.sha256"
MANIFEST_SIGNATURE = "manifest.sig"
_INDEX = "model.safetensors.index.json"
_VOCABULARIES = frozenset({"tokenizer.json", "vocab.json"})
"""Megabytes of JSON in which no loader looks for code: parsing them would hold up a server that loads a version."""

_ALLOWED = re.compile(
    r"(config|generation_config|model\.safetensors\.index|tokenizer|tokenizer_config|special_tokens_map"
    r"|added_tokens|vocab|chat_template)\.json"
    r"|(model|model-\d{5}-of-\d{5}|head)\.safetensors"
    r"|merges\.txt|tokenizer\.model|chat_template\.jinja"
)
_NUMBER = re.compile(r"[1-9][0-9]{0,8}")
_CHUNK_BYTES = 1 << 20


def files_to_publish(source: Path) -> list[Path]:
    """The files of ``source``, each one allowed in a version.

    Raises:
        PublishRefused: A file is not allowed, is a link, names code to run, or the weights are missing.
    """
    if not source.is_dir():
        raise PublishRefused(f"{source} is not a directory")
    files = sorted(source.iterdir())
    for path in files:
        if (objection := _objection(path)) is not None:
            raise PublishRefused(objection)
    names = {path.name for path in files}
    if "config.json" not in names or not any(name.endswith(".safetensors") for name in names):
        raise PublishRefused(f"{source} holds no model: config.json and *.safetensors are needed")
    return files


def _objection(path: Path) -> str | None:
    """Why a file may not be in a version; None where it may."""
    if path.is_symlink() or not path.is_file():
        return f"{path.name} is not a regular file; a version holds files only, no links"
    if not _ALLOWED.fullmatch(path.name):
        return f"{path.name} may not be in a version (safetensors, tokenizer and config files only)"
    if path.suffix != ".json":
        return None
    try:
        document = json.loads(path.read_bytes())
        if _names_code(document):
            return f"{path.name} has auto_map, which loads code; a version never runs code"
    except (ValueError, RecursionError) as error:
        return f"{path.name} is not JSON: {error}"
    if path.name == _INDEX and not _names_shards_beside(path, document):
        return f"{path.name} must name weights of its own directory, and it names others"
    return None


def _names_code(document: object) -> bool:
    if isinstance(document, dict):
        return "auto_map" in document or any(_names_code(value) for value in document.values())
    return isinstance(document, list) and any(_names_code(value) for value in document)


def _names_shards_beside(index: Path, document: object) -> bool:
    """A loader opens what ``weight_map`` names, also ``../elsewhere.safetensors``, which no digest covers."""
    shards = document.get("weight_map") if isinstance(document, dict) else None
    return isinstance(shards, dict) and all(
        isinstance(name, str) and _ALLOWED.fullmatch(name) and (index.parent / name).is_file()
        for name in shards.values()
    )


def digest(path: Path) -> FileDigest:
    """Size and sha256 of a file."""
    sha256, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            sha256.update(chunk)
            size += len(chunk)
    return FileDigest(bytes=size, sha256=sha256.hexdigest())


def copy_durably(source: Path, target: Path) -> FileDigest:
    """Copy a file, read-only, fsynced; returns what was written."""
    sha256, size = hashlib.sha256(), 0
    with source.open("rb") as reader, target.open("xb") as writer:
        while chunk := reader.read(_CHUNK_BYTES):
            sha256.update(chunk)
            size += writer.write(chunk)
        writer.flush()
        _seal(writer.fileno())
    return FileDigest(bytes=size, sha256=sha256.hexdigest())


def write_durably(target: Path, content: bytes) -> None:
    """Write a new file, read-only, fsynced."""
    with target.open("xb") as writer:
        writer.write(content)
        writer.flush()
        _seal(writer.fileno())


def _seal(descriptor: int) -> None:
    os.fchmod(descriptor, 0o444)
    os.fsync(descriptor)


def replace_atomically(target: Path, content: bytes) -> None:
    """Replace a file so that a reader, or a power cut, finds the old content or the new, never half."""
    temporary = target.with_name(f".{target.name}-{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as writer:
            writer.write(content)
            writer.flush()
            os.fsync(writer.fileno())
        temporary.replace(target)
    except OSError:  # a full disk, say, where each attempt would leave another file
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(target.parent)


def sync_directory(directory: Path) -> None:
    """Make the directory's entries (names, renames) survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_manifest(directory: Path, manifest: Manifest, signatures: Signatures) -> None:
    """Write the manifest last: whatever has one is whole. Its own digest lies beside it, for ``sha256sum -c``.

    Raises PublishRefused where it must be signed and cannot be.
    """
    body = manifest.model_dump_json(indent=2).encode() + b"\n"
    if (signature := signatures.sign(body)) is not None:
        write_durably(directory / MANIFEST_SIGNATURE, signature)
    write_durably(directory / MANIFEST_DIGEST, f"{hashlib.sha256(body).hexdigest()}  {MANIFEST}\n".encode())
    write_durably(directory / MANIFEST, body)
    sync_directory(directory)


def sign_manifest(directory: Path, signatures: Signatures) -> None:
    """Sign a manifest that lies there already; an old signature is replaced. Raises PublishRefused without a key."""
    if (signature := signatures.sign((directory / MANIFEST).read_bytes())) is None:
        raise PublishRefused("there is no key to sign with: set deploy.signing.private_key_file")
    replace_atomically(directory / MANIFEST_SIGNATURE, signature)


def read_manifest(path: Path, kind: VersionKind, number: int, signatures: Signatures) -> Manifest:
    """The manifest in a version's directory.

    Raises VersionCorrupt where it is not what was published, or is not signed as it must be.
    """
    signed = path / MANIFEST_SIGNATURE
    try:
        body = (path / MANIFEST).read_bytes()
        recorded = (path / MANIFEST_DIGEST).read_text().split()[0]
        signature = signed.read_bytes() if signed.exists() else None
    except (OSError, UnicodeDecodeError, IndexError) as error:
        raise VersionCorrupt(f"{path / MANIFEST}: cannot be read: {error}") from error
    if (found := hashlib.sha256(body).hexdigest()) != recorded:
        raise VersionCorrupt(f"{path / MANIFEST}: sha256 {found}, published with {recorded}")
    signatures.check(body, signature, path / MANIFEST)
    try:
        manifest = Manifest.model_validate_json(body)
    except ValidationError as error:
        raise VersionCorrupt(f"{path / MANIFEST}: does not fit its schema: {error.error_count()} errors") from error
    if (manifest.kind, manifest.version) != (kind, number):
        raise VersionCorrupt(f"{path / MANIFEST}: describes {manifest.kind} version {manifest.version}")
    return manifest


def check_files(version: Version, signatures: Signatures) -> None:
    """Compare every file with its digest, and ask of each what publishing asks, whoever wrote the manifest.

    Raises VersionCorrupt naming the file and what differs.
    """
    read_manifest(version.path, version.kind, version.number, signatures)
    expected = version.manifest.files
    present = {path.name for path in version.path.iterdir()} - {MANIFEST, MANIFEST_DIGEST, MANIFEST_SIGNATURE}
    for name in sorted(present | expected.keys()):
        path = version.path / name
        if name not in present:
            raise VersionCorrupt(f"{path}: missing from {version}")
        if name not in expected or path.is_symlink() or not path.is_file():
            raise VersionCorrupt(f"{path}: was not published with {version}")
        try:
            found = digest(path)
        except OSError as error:
            raise VersionCorrupt(f"{path}: cannot be read: {error.strerror}") from error
        if found.bytes != expected[name].bytes:
            raise VersionCorrupt(f"{path}: {found.bytes} bytes, published with {expected[name].bytes}")
        if found.sha256 != expected[name].sha256:
            raise VersionCorrupt(f"{path}: sha256 {found.sha256}, published with {expected[name].sha256}")
        if name not in _VOCABULARIES and (objection := _objection(path)) is not None:
            raise VersionCorrupt(f"{path}: {objection}")


def numbers_in(home: Path) -> list[int]:
    """The numbers that directories in ``home`` have for names, ascending, whether or not they hold a version."""
    names = [path.name for path in home.iterdir()] if home.is_dir() else []
    return sorted(int(name) for name in names if _NUMBER.fullmatch(name))


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold an exclusive lock on a directory; the kernel drops it should this process die."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def is_locked(directory: Path) -> bool:
    """True where a living process holds ``locked(directory)``."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(descriptor)
