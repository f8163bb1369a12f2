"""Signed versions: who can write to the disk cannot make the servers take what the operator's key has not signed."""

import base64
import hashlib
import json
import stat
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from deploy.__main__ import app
from deploy.errors import PublishRefused, SigningKeyUnusable, VersionCorrupt
from deploy.files import MANIFEST, MANIFEST_DIGEST, MANIFEST_SIGNATURE
from deploy.registry import Registry
from deploy.settings import SigningSettings
from deploy.signatures import Signatures, make_key
from deploy.versions import Draft, Version, VersionKind

POLICY = Draft(kind=VersionKind.POLICY)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(b"weights")
    return directory


@pytest.fixture
def publisher(tmp_path: Path) -> Signatures:
    make_key(tmp_path / "key.pem")
    return Signatures.of(SigningSettings(private_key_file=tmp_path / "key.pem"))


@pytest.fixture
def server(tmp_path: Path, publisher: Signatures) -> Signatures:
    """Trusts the publisher's key, as OpenSSL reads it, and cannot sign."""
    told = subprocess.run(
        ["openssl", "pkey", "-in", tmp_path / "key.pem", "-pubout", "-outform", "DER"], capture_output=True, check=True
    )
    return Signatures.of(SigningSettings(trusted_keys=(base64.b64encode(told.stdout[-32:]).decode(),)))


def rewrite_manifest(version: Version) -> None:
    """What someone with write access would do: change the manifest and make its digest fit."""
    body = (version.path / MANIFEST).read_bytes().replace(b'"comparisons": 0', b'"comparisons": 9')
    for name, content in (
        (MANIFEST, body),
        (MANIFEST_DIGEST, f"{hashlib.sha256(body).hexdigest()}  {MANIFEST}\n".encode()),
    ):
        (version.path / name).chmod(0o644)
        (version.path / name).write_bytes(content)


def test_what_is_published_is_signed_and_taken(
    tmp_path: Path, model: Path, publisher: Signatures, server: Signatures
) -> None:
    published = Registry(tmp_path / "state", publisher).publish(POLICY, model)
    servers = Registry(tmp_path / "state", server)
    servers.verify(servers.get(VersionKind.POLICY, 1))
    assert (published.path / MANIFEST_SIGNATURE).exists()
    Registry(tmp_path / "state").verify(published)  # who asks for no signature is not disturbed by one


def test_a_forged_manifest_is_refused_though_its_digest_fits(
    tmp_path: Path, model: Path, publisher: Signatures, server: Signatures
) -> None:
    forged = Registry(tmp_path / "state", publisher).publish(POLICY, model)
    rewrite_manifest(forged)
    assert Registry(tmp_path / "state").get(VersionKind.POLICY, 1).manifest.comparisons == 9
    with pytest.raises(VersionCorrupt, match=r"no key that .* trusts has signed this"):
        Registry(tmp_path / "state", server).get(VersionKind.POLICY, 1)


def test_an_unsigned_version_and_a_strangers_are_refused(
    tmp_path: Path, model: Path, publisher: Signatures, server: Signatures
) -> None:
    make_key(tmp_path / "stranger.pem")
    stranger = Signatures.of(SigningSettings(private_key_file=tmp_path / "stranger.pem"))
    Registry(tmp_path / "state").publish(POLICY, model)
    Registry(tmp_path / "state", stranger).publish(POLICY, model)
    servers = Registry(tmp_path / "state", server)
    with pytest.raises(VersionCorrupt, match="is not signed"):
        servers.get(VersionKind.POLICY, 1)
    with pytest.raises(VersionCorrupt, match="no key"):
        servers.get(VersionKind.POLICY, 2)
    garbled = tmp_path / "state/policies/2" / MANIFEST_SIGNATURE
    garbled.chmod(0o644)
    garbled.write_text("no base64!")
    with pytest.raises(VersionCorrupt, match="not base64"):
        servers.get(VersionKind.POLICY, 2)


def test_who_has_no_private_key_publishes_nothing_where_signatures_count(
    tmp_path: Path, model: Path, server: Signatures
) -> None:
    registry = Registry(tmp_path / "state", server)
    with pytest.raises(PublishRefused, match="private_key_file"):
        registry.publish(POLICY, model)
    assert registry.numbers(VersionKind.POLICY) == [] and registry.sweep() == []


@pytest.mark.parametrize("content", [None, b"", b"no PEM", b"rsa"])
def test_an_unusable_private_key_is_named_and_not_shown(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "key.pem"
    if content == b"rsa":
        subprocess.run(["openssl", "genrsa", "-out", path, "2048"], check=True, capture_output=True)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(SigningKeyUnusable, match=r"private_key_file .*key\.pem") as refused:
        Signatures.of(SigningSettings(private_key_file=path))
    assert "BEGIN" not in str(refused.value)


@pytest.mark.parametrize("text", ["", "short", base64.b64encode(b"x" * 31).decode(), "ü"])
def test_an_unusable_public_key_is_refused(text: str) -> None:
    with pytest.raises(SigningKeyUnusable, match="32 bytes in base64"):
        Signatures.of(SigningSettings(trusted_keys=(text,)))


def test_an_operator_turns_signing_on(
    state_dir: Path, redis_url: str, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def operate(*arguments: str) -> Result:
        return CliRunner().invoke(app, ["--state", str(state_dir), "--redis-url", redis_url, *arguments])

    def make() -> Result:
        return operate("keygen", str(tmp_path / "key.pem"))

    assert operate("import", str(model)).exit_code == 0
    assert operate("sign", "1").exit_code == 1  # no key yet
    public = make().stdout.strip()
    assert len(base64.b64decode(public)) == 32
    assert stat.S_IMODE((tmp_path / "key.pem").stat().st_mode) == 0o600
    assert make().exit_code == 1  # never overwritten
    monkeypatch.setenv("INSTRUCTLOOP_DEPLOY__SIGNING__TRUSTED_KEYS", json.dumps([public]))
    refused = operate("verify", "1")
    assert refused.exit_code == 1 and "is not signed" in refused.stdout
    monkeypatch.setenv("INSTRUCTLOOP_DEPLOY__SIGNING__PRIVATE_KEY_FILE", str(tmp_path / "key.pem"))
    assert operate("sign", "1").stdout == "policy version 1: signed\n"
    assert operate("verify", "1").exit_code == 0
    assert operate("import", str(model)).exit_code == 0
    assert operate("verify").exit_code == 0
