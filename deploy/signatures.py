"""Signed manifests: a version counts only where a key that the operator trusts has signed it (Ed25519, RFC 8032).

A manifest holds the digest of every file, so its signature covers the version. Digests alone find what decayed; whoever
can write to the state directory can make new ones, but no signature.
"""

import base64
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from deploy.errors import PublishRefused, SigningKeyUnusable, VersionCorrupt
from deploy.settings import SigningSettings

_PUBLIC_KEY_BYTES = 32


class Signatures:
    """Signs what is published here, and refuses what no trusted key has signed. Without any key it asks nothing."""

    def __init__(self, private: Ed25519PrivateKey | None, trusted: Sequence[Ed25519PublicKey]) -> None:
        self._private = private
        self._trusted = [*([private.public_key()] if private else []), *trusted]

    @classmethod
    def of(cls, settings: SigningSettings) -> Self:
        """The keys that the settings name. Raises SigningKeyUnusable, which never says what a key file holds."""
        private = None if settings.private_key_file is None else _read_private(settings.private_key_file)
        return cls(private, [_decode_public(text) for text in settings.trusted_keys])

    @property
    def required(self) -> bool:
        """Whether a version needs a signature."""
        return bool(self._trusted)

    def sign(self, manifest: bytes) -> bytes | None:
        """The signature of a manifest's bytes, base64; None where none is needed.

        Raises PublishRefused where signatures are required and there is no key to make one with.
        """
        if self._private is not None:
            return base64.b64encode(self._private.sign(manifest)) + b"\n"
        if self.required:
            raise PublishRefused("versions must be signed here; set deploy.signing.private_key_file to publish one")
        return None

    def check(self, manifest: bytes, signature: bytes | None, where: Path) -> None:
        """Raise VersionCorrupt unless ``signature`` is of these bytes, by a trusted key, or none is needed."""
        if not self.required:
            return
        if signature is None:
            raise VersionCorrupt(f"{where}: is not signed, and deploy.signing demands that it is")
        try:
            raw = base64.b64decode(signature.strip(), validate=True)
        except ValueError as error:
            raise VersionCorrupt(f"{where}: its signature is not base64") from error
        if not any(_is_signed(key, raw, manifest) for key in self._trusted):
            raise VersionCorrupt(f"{where}: no key that deploy.signing trusts has signed this")


UNSIGNED = Signatures(None, ())
"""For a registry whose settings name no key: signatures are neither made nor asked for."""


def make_key(path: Path) -> str:
    """Write a new private key (PEM, readable by its owner only) to ``path``; returns its public half, base64.

    Raises SigningKeyUnusable where the file exists or cannot be written.
    """
    private = Ed25519PrivateKey.generate()
    pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(pem)
    except OSError as error:
        raise SigningKeyUnusable(f"{path} cannot be written: {error.strerror}") from error
    return base64.b64encode(private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)).decode()


def _read_private(path: Path) -> Ed25519PrivateKey:
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise SigningKeyUnusable(f"deploy.signing.private_key_file {path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise SigningKeyUnusable(f"deploy.signing.private_key_file {path} is no Ed25519 key in PEM without a password")
    return key


def _decode_public(text: str) -> Ed25519PublicKey:
    try:
        raw = base64.b64decode(text, validate=True)
    except ValueError:
        raw = b""
    if len(raw) != _PUBLIC_KEY_BYTES:
        raise SigningKeyUnusable(
            f"each of deploy.signing.trusted_keys must be {_PUBLIC_KEY_BYTES} bytes in base64, as deploy keygen prints"
        )
    return Ed25519PublicKey.from_public_bytes(raw)


def _is_signed(key: Ed25519PublicKey, signature: bytes, manifest: bytes) -> bool:
    try:
        key.verify(signature, manifest)
    except InvalidSignature:
        return False
    return True
