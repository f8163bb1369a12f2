"""The operator's commands, as an operator runs them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from deploy.__main__ import app
from deploy.gate import GateCheck, GateReport
from deploy.registry import Registry
from deploy.versions import Draft, VersionKind

Operate = Callable[..., Result]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(b"weights")
    return directory


@pytest.fixture
def registry(state_dir: Path) -> Registry:
    return Registry(state_dir)


@pytest.fixture
def operate(state_dir: Path, redis_url: str) -> Operate:
    def run(*arguments: str) -> Result:
        return CliRunner().invoke(app, ["--state", str(state_dir), "--redis-url", redis_url, *arguments])

    return run


@pytest.fixture
def trial(operate: Operate, registry: Registry, model: Path) -> None:
    """Version 1 stable, version 2 passed its gate, version 3 failed it."""
    assert operate("import", str(model)).exit_code == 0
    for passed in (True, False):
        check = GateCheck(name="eos_share", passed=passed, value=0.9, limit=0.95, sentence="eos_share is 0.9")
        metrics = {"eos_share": 0.96 if passed else 0.9}
        draft = Draft(kind=VersionKind.POLICY, parent=1, gate=GateReport.of([check]), metrics=metrics)
        registry.publish(draft, model)


def found(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_the_first_import_becomes_stable_and_later_ones_do_not(operate: Operate, model: Path) -> None:
    assert found(operate("import", str(model), "--json"))["version"] == 1
    assert found(operate("import", str(model), "--json"))["version"] == 2
    release = found(operate("status", "--json"))["release"]
    assert (release["stable"], release["generation"]) == (1, 1)
    assert found(operate("import", str(model), "--reward-model", "--json"))["version"] == 1
    assert [row["version"] for row in found(operate("list", "--json"))] == [1, 2]
    assert [row["version"] for row in found(operate("list", "--reward-model", "--json"))] == [1]


def test_a_bad_import_is_refused_and_leaves_nothing(operate: Operate, model: Path) -> None:
    (model / "run.py").write_text("")
    for arguments in ([], ["--dry-run"]):
        result = operate("import", str(model), *arguments)
        assert result.exit_code == 1
        assert "refused: run.py" in result.stderr
    assert found(operate("list", "--json")) == []


@pytest.mark.usefixtures("trial")
def test_a_trial_from_canary_to_rollback(operate: Operate) -> None:
    assert "version 2 serves 10%" in operate("canary", "2", "--fraction", "0.1", "--reason", "try it").stdout
    status = found(operate("status", "--json"))
    assert (status["release"]["canary"], status["verdict"]["decision"]) == (2, "undecided")
    refused = operate("promote")
    assert (refused.exit_code, "undecided" in refused.stderr) == (1, True)
    assert found(operate("promote", "--override", "demo", "--json"))["stable"] == 2
    assert found(operate("rollback", "--json"))["stable"] == 1
    history = found(operate("history", "--json"))
    assert [(a["verb"], a["outcome"] == "accepted") for a in history[:4]] == [
        ("rollback", True),
        ("promote", True),
        ("promote", False),
        ("canary", True),
    ]
    assert history[1]["reason"].endswith("override: demo")
    assert "@" in history[0]["by"]
    text = operate("history", "--count", "2").stdout
    assert (text.count("accepted"), text.count("refused")) == (2, 0), "the two newest"


@pytest.mark.usefixtures("trial")
def test_refusals_exit_1_with_the_reason_and_misuse_exits_2(operate: Operate) -> None:
    for arguments, why in [
        (("canary", "3", "--fraction", "0.1"), "eos_share is 0.9"),
        (("canary", "1", "--fraction", "0.1"), "stable version"),
        (("canary", "9", "--fraction", "0.1"), "existing: 1, 2, 3"),
        (("canary", "2", "--fraction", "0.7"), "at most 0.5"),
        (("promote",), "no canary"),
        (("rollback",), "neither a canary"),
        (("rollback", "--expect", "5"), "not 5"),
        (("show", "9"), "existing: 1, 2, 3"),
    ]:
        result = operate(*arguments)
        assert result.exit_code == 1, arguments
        assert why in result.stderr
    for misuse in (("canary", "two", "--fraction", "0.1"), ("canary", "2"), ("nonsense",), ("history", "--count", "0")):
        assert operate(*misuse).exit_code == 2


@pytest.mark.usefixtures("trial")
def test_a_dry_run_changes_nothing(operate: Operate) -> None:
    before = found(operate("status", "--json"))
    would = operate("canary", "2", "--fraction", "0.1", "--dry-run")
    assert would.stdout.startswith("would be")
    assert operate("canary", "3", "--fraction", "0.1", "--dry-run").exit_code == 1
    assert operate("rollback", "--dry-run", "--expect", "7").exit_code == 1
    assert found(operate("status", "--json")) == before


@pytest.mark.usefixtures("trial")
def test_a_change_may_insist_on_what_the_operator_saw(operate: Operate) -> None:
    assert operate("canary", "2", "--fraction", "0.1", "--expect", "1").exit_code == 0
    assert operate("rollback", "--expect", "1").exit_code == 1
    assert operate("rollback", "--expect", "2").exit_code == 0


@pytest.mark.usefixtures("trial")
def test_show_and_diff_tell_versions_apart(operate: Operate) -> None:
    shown = found(operate("show", "3", "--json"))
    assert (shown["lineage"], shown["gate"]["passed"]) == ([3, 1], False)
    text = operate("show", "3").stdout
    assert "FAILED: eos_share is 0.9" in text and "3 <- 1" in text
    assert found(operate("diff", "2", "3", "--json")) == {"metrics.eos_share": {"a": 0.96, "b": 0.9}}
    assert "metrics.eos_share" in operate("diff", "2", "3").stdout


@pytest.mark.usefixtures("trial")
def test_verify_names_what_changed_and_list_goes_on(operate: Operate, state_dir: Path) -> None:
    assert operate("verify").exit_code == 0
    weights = state_dir / "policies" / "2" / "model.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(b"Weights")
    result = operate("verify")
    assert result.exit_code == 1
    assert "version 1: every file is as published" in result.stdout
    assert "model.safetensors: sha256" in result.stdout
    assert operate("verify", "1", "3").exit_code == 0
    manifest = state_dir / "policies" / "3" / "manifest.json"
    manifest.chmod(0o644)
    manifest.write_text("{}")
    assert "manifest.json" in found(operate("list", "--json"))[2]["corrupt"]
    assert "sha256" in operate("list").stdout


def test_gc_removes_orphans_only(operate: Operate, model: Path, state_dir: Path) -> None:
    operate("import", str(model))
    assert operate("gc").stdout.strip() == "nothing to remove"
    orphan = state_dir / "policies" / ".tmp-99"
    orphan.mkdir()
    assert found(operate("gc", "--dry-run", "--json")) == [str(orphan)]
    assert orphan.exists()
    assert "removed" in operate("gc").stdout
    assert not orphan.exists()
    assert found(operate("list", "--json"))[0]["version"] == 1


def test_a_redis_that_is_away_is_said_plainly(state_dir: Path) -> None:
    result = CliRunner().invoke(app, ["--state", str(state_dir), "--redis-url", "redis://127.0.0.1:1", "status"])
    assert result.exit_code == 1
    assert "Redis does not answer" in result.stderr


def test_a_settings_mistake_is_a_usage_error(operate: Operate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSTRUCTLOOP_DEPLOY__GATE__MAX_KL", "-1")
    result = operate("list")
    assert result.exit_code == 2
    assert "deploy.gate.max_kl" in result.stderr


@pytest.mark.usefixtures("trial")
def test_a_key_that_is_none_refuses_every_command_that_needs_it(
    operate: Operate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INSTRUCTLOOP_DEPLOY__SIGNING__TRUSTED_KEYS", '["none"]')
    for arguments in (("list",), ("verify",), ("show", "2"), ("diff", "1", "2"), ("canary", "2", "--fraction", "0.1")):
        result = operate(*arguments)
        assert (result.exit_code, result.stderr[:17]) == (1, "refused: each of "), arguments
