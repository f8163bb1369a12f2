"""Versions on a real disk: published whole or not at all, and noticed where they change."""

import hashlib
import json
import multiprocessing
import os
import re
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from deploy import files
from deploy.errors import LeaseLost, PublishRefused, VersionCorrupt, VersionNotFound
from deploy.registry import Registry
from deploy.versions import Draft, Version, VersionKind

POLICY = Draft(kind=VersionKind.POLICY)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Files as a policy has them; the registry does not look inside the weights."""
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "llama"}')
    (directory / "model.safetensors").write_bytes(bytes(range(256)) * 5000)
    (directory / "tokenizer.json").write_text("{}")
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    return directory


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "state")


def test_a_version_is_what_was_published(registry: Registry, model: Path) -> None:
    draft = POLICY.model_copy(update={"feedback_cursor": "5-1", "comparisons": 7, "metrics": {"eos_share": 0.97}})
    published = registry.publish(draft, model)
    found = registry.get(VersionKind.POLICY, 1)
    assert found == published
    assert found.manifest.feedback_cursor == "5-1"
    weights = (model / "model.safetensors").read_bytes()
    assert found.manifest.files["model.safetensors"].sha256 == hashlib.sha256(weights).hexdigest()
    assert (found.path / "model.safetensors").read_bytes() == weights
    registry.verify(found)


def test_numbers_count_up_for_each_kind_by_itself(registry: Registry, model: Path) -> None:
    assert [registry.publish(POLICY, model).number for _ in range(3)] == [1, 2, 3]
    assert registry.publish(Draft(kind=VersionKind.REWARD_MODEL), model).number == 1
    assert [version.number for version in registry.list(VersionKind.POLICY)] == [1, 2, 3]


def test_a_long_list_of_versions_is_looked_through_once(
    registry: Registry, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(4):
        registry.publish(POLICY, model)
    searched: list[Path] = []
    search = files.numbers_in

    def counted(home: Path) -> list[int]:
        searched.append(home)
        return search(home)

    monkeypatch.setattr(files, "numbers_in", counted)
    assert len(registry.list(VersionKind.POLICY)) == 4
    assert len(searched) == 1


def test_a_missing_version_names_those_that_exist(registry: Registry, model: Path) -> None:
    with pytest.raises(VersionNotFound, match="existing: none"):
        registry.get(VersionKind.POLICY, 1)
    registry.publish(POLICY, model)
    registry.publish(POLICY, model)
    with pytest.raises(VersionNotFound, match=r"no policy version 9.*existing: 1, 2"):
        registry.get(VersionKind.POLICY, 9)
    for odd in (0, -1):
        with pytest.raises(VersionNotFound):
            registry.get(VersionKind.POLICY, odd)
    assert Registry(Path("nowhere")).numbers(VersionKind.POLICY) == []


def _flip(path: Path) -> None:
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def _cut(path: Path) -> None:
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1])


def _link(path: Path) -> None:
    content = path.read_bytes()
    path.unlink()
    elsewhere = path.parent.parent.parent / f"elsewhere-{path.name}"
    elsewhere.write_bytes(content)
    path.symlink_to(elsewhere)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", [_flip, _cut, _link, Path.unlink])
def test_any_change_to_a_file_is_found_and_named(
    registry: Registry, model: Path, name: str, damage: Callable[[Path], None]
) -> None:
    version = registry.publish(POLICY, model)
    damage(version.path / name)
    with pytest.raises(VersionCorrupt, match=name):
        registry.verify(version)


def test_a_file_that_was_slipped_in_is_found(registry: Registry, model: Path) -> None:
    version = registry.publish(POLICY, model)
    (version.path / "modeling_evil.py").write_text("import os")
    with pytest.raises(VersionCorrupt, match=r"modeling_evil\.py"):
        registry.verify(version)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("pytorch_model.bin", b"a pickle"),
        ("modeling_evil.py", b"import os"),
        ("config.json", b'{"auto_map": {"AutoModel": "modeling_evil.Model"}}'),
        ("model.safetensors.index.json", b'{"weight_map": {"head": "../../elsewhere.safetensors"}}'),
    ],
)
def test_no_manifest_makes_a_file_allowed(registry: Registry, model: Path, name: str, content: bytes) -> None:
    """Whoever can write to the disk can list a file with its digest; that does not make it one a loader may open."""
    version = registry.publish(POLICY, model)
    (version.path / name).unlink(missing_ok=True)
    (version.path / name).write_bytes(content)
    manifest = json.loads((version.path / files.MANIFEST).read_text())
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    body = json.dumps(manifest).encode()
    for own, text in (
        (files.MANIFEST, body),
        (files.MANIFEST_DIGEST, f"{hashlib.sha256(body).hexdigest()}  {files.MANIFEST}\n".encode()),
    ):
        (version.path / own).unlink()
        (version.path / own).write_bytes(text)
    forged = registry.get(VersionKind.POLICY, 1)
    assert name in forged.manifest.files
    with pytest.raises(VersionCorrupt, match=re.escape(name)):
        registry.verify(forged)


def test_a_file_that_the_disk_does_not_give_back_is_named(state_dir: Path, model: Path) -> None:
    registry = Registry(state_dir)
    version = registry.publish(POLICY, model)
    (version.path / "tokenizer.json").chmod(0)
    user = os.geteuid()
    try:
        if user == 0:  # who may read everything
            state_dir.chmod(0o755)
            os.seteuid(65534)
        with pytest.raises(VersionCorrupt, match=r"tokenizer\.json: cannot be read"):
            registry.verify(version)
    finally:
        os.seteuid(user)


def test_a_changed_manifest_is_found_when_it_is_read(registry: Registry, model: Path) -> None:
    version = registry.publish(POLICY.model_copy(update={"metrics": {"eos_share": 0.5}}), model)
    manifest = version.path / files.MANIFEST
    manifest.chmod(0o644)
    manifest.write_text(manifest.read_text().replace("0.5", "0.9"))
    with pytest.raises(VersionCorrupt, match=r"manifest\.json"):
        registry.get(VersionKind.POLICY, 1)
    with pytest.raises(VersionCorrupt, match=r"manifest\.json"):
        registry.verify(version)


def test_one_version_under_another_number_is_found(registry: Registry, model: Path) -> None:
    version = registry.publish(POLICY, model)
    version.path.rename(version.path.with_name("8"))
    with pytest.raises(VersionCorrupt, match="describes policy version 1"):
        registry.get(VersionKind.POLICY, 8)


@pytest.mark.parametrize(
    "name",
    ["pytorch_model.bin", "model.pt", "modeling.py", "tokenizer.json.py", "model.safetensors\n", ".hidden", "a.pkl"],
)
def test_only_known_file_names_get_in(registry: Registry, model: Path, name: str) -> None:
    (model / name).write_text("{}")
    with pytest.raises(PublishRefused, match="may not be in a version"):
        registry.publish(POLICY, model)
    assert registry.numbers(VersionKind.POLICY) == []


def test_links_directories_and_code_do_not_get_in(registry: Registry, model: Path) -> None:
    link = model / "generation_config.json"
    link.symlink_to("/etc/passwd")
    with pytest.raises(PublishRefused, match="not a regular file"):
        registry.publish(POLICY, model)
    link.unlink()
    (model / "inner").mkdir()
    with pytest.raises(PublishRefused, match="not a regular file"):
        registry.publish(POLICY, model)
    (model / "inner").rmdir()
    (model / "config.json").write_text(json.dumps({"text_config": [{"auto_map": {"AutoModel": "evil.Model"}}]}))
    with pytest.raises(PublishRefused, match="auto_map"):
        registry.publish(POLICY, model)
    for odd in ("{", "[" * 100_000, '{"a":' * 400 + "1" + "}" * 400):
        (model / "config.json").write_text(odd)
        with pytest.raises(PublishRefused, match="not JSON"):
            registry.publish(POLICY, model)
    (model / "config.json").unlink()
    with pytest.raises(PublishRefused, match="holds no model"):
        registry.publish(POLICY, model)


def test_an_index_names_weights_of_its_own_directory(registry: Registry, model: Path) -> None:
    index = model / "model.safetensors.index.json"
    elsewhere = model.parent / "elsewhere.safetensors"
    elsewhere.write_bytes(b"weights that no digest covers")
    for wrong in ({}, {"weight_map": {"w": "../elsewhere.safetensors"}}, {"weight_map": {"w": str(elsewhere)}}):
        index.write_text(json.dumps(wrong))
        with pytest.raises(PublishRefused, match=r"index\.json must name weights of its own directory"):
            registry.publish(POLICY, model)
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": {"w": "model.safetensors"}}))
    registry.verify(registry.publish(POLICY, model))


def test_a_run_publishes_once(registry: Registry, model: Path) -> None:
    of_run = POLICY.model_copy(update={"run": "round-5-1"})
    assert [registry.publish(of_run, model).number for _ in range(2)] == [1, 1]
    assert registry.publish(POLICY.model_copy(update={"run": "round-6-0"}), model).number == 2
    assert registry.publish(of_run.model_copy(update={"kind": VersionKind.REWARD_MODEL}), model).number == 1


def test_a_lost_fence_leaves_nothing(registry: Registry, model: Path, tmp_path: Path) -> None:
    def refuse() -> None:
        raise LeaseLost("token 3")

    with pytest.raises(LeaseLost):
        registry.publish(POLICY, model, check_fence=refuse)
    assert registry.numbers(VersionKind.POLICY) == []
    assert list((tmp_path / "state" / "policies").iterdir()) == []


def _publish_and_die(state: Path, model: Path) -> None:
    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    Registry(state).publish(POLICY, model, check_fence=die)


def test_a_publisher_killed_between_manifest_and_rename_leaves_no_version(
    registry: Registry, model: Path, tmp_path: Path
) -> None:
    publisher = multiprocessing.get_context("spawn").Process(target=_publish_and_die, args=(tmp_path / "state", model))
    publisher.start()
    publisher.join(60)
    assert publisher.exitcode == -signal.SIGKILL
    (orphan,) = (tmp_path / "state" / "policies").glob(".tmp-*")
    assert (orphan / files.MANIFEST).exists(), "it died as late as it could"
    assert registry.numbers(VersionKind.POLICY) == []
    assert registry.sweep(dry_run=True) == [orphan] and orphan.exists()
    assert registry.sweep() == [orphan] and not orphan.exists()
    assert registry.publish(POLICY, model).number == 1


def test_what_a_living_publisher_writes_is_no_orphan(registry: Registry, model: Path, tmp_path: Path) -> None:
    held: list[bool] = []

    def look() -> None:
        held.extend(files.is_locked(path) for path in (tmp_path / "state" / "policies").glob(".tmp-*"))

    registry.publish(POLICY, model, check_fence=look)
    assert held == [True]
    abandoned = tmp_path / "state" / "policies" / ".tmp-0123"
    abandoned.mkdir()
    assert not files.is_locked(abandoned)
    assert registry.sweep() == [abandoned]


def _publish_many(state: Path, model: Path, begin: float, count: int) -> None:
    time.sleep(max(0.0, begin - time.time()))
    for _ in range(count):
        Registry(state).publish(POLICY, model)


def test_publishers_in_a_race_get_numbers_of_their_own(registry: Registry, model: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    arguments = (tmp_path / "state", model, time.time() + 3, 5)
    racers = [context.Process(target=_publish_many, args=arguments) for _ in range(3)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(60)
        assert racer.exitcode == 0
    versions: list[Version] = registry.list(VersionKind.POLICY)
    assert [version.number for version in versions] == list(range(1, 16))
    for version in versions:
        registry.verify(version)


def test_a_disk_that_refuses_is_an_error_that_names_the_source(registry: Registry, model: Path, tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file where the state directory should be")
    with pytest.raises(PublishRefused, match="cannot publish"):
        registry.publish(POLICY, model)


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "release.json"
    files.replace_atomically(target, b"one")
    files.replace_atomically(target, b"two")
    assert target.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [target]


def test_a_file_that_the_disk_has_no_room_for_leaves_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "release.json"
    files.replace_atomically(target, b"one")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            files.replace_atomically(target, b"three")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == [target] and target.read_bytes() == b"one"
