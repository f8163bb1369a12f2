from pathlib import Path

import pytest

from feedback.settings import FeedbackSettings, LoopSettings, SettingsError


@pytest.fixture
def toml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "instructloop.toml"
    path.write_text('state = "/toml"\n[feedback]\nmax_connections = 3\ntask_ttl_seconds = 30\n[serve]\nport = 1\n')
    monkeypatch.setenv("INSTRUCTLOOP_SETTINGS", str(path))
    return path


def test_command_line_beats_environment_beats_toml_beats_default(toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert FeedbackSettings.load().max_connections == 3
    assert FeedbackSettings.load().task_ttl_seconds == 30
    assert FeedbackSettings.load().socket_timeout_seconds == 1.0
    monkeypatch.setenv("INSTRUCTLOOP_FEEDBACK__MAX_CONNECTIONS", "5")
    assert FeedbackSettings.load().max_connections == 5
    assert FeedbackSettings.load(max_connections=7).max_connections == 7
    assert FeedbackSettings.load(max_connections=None).max_connections == 5


def test_the_top_level_is_read_past_the_tables(toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert LoopSettings.load().state == Path("/toml")
    assert LoopSettings.load().redis_url is None
    monkeypatch.setenv("INSTRUCTLOOP_STATE", "/environment")
    monkeypatch.setenv("INSTRUCTLOOP_REDIS_URL", "redis://elsewhere")
    assert LoopSettings.load() == LoopSettings(state=Path("/environment"), redis_url="redis://elsewhere")
    assert LoopSettings.load(state=Path("/line")).state == Path("/line")


def test_without_a_file_the_one_in_the_working_directory_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("INSTRUCTLOOP_SETTINGS", raising=False)
    monkeypatch.chdir(tmp_path)
    assert FeedbackSettings.load().max_connections == 32
    (tmp_path / "instructloop.toml").write_text("[feedback]\nmax_connections = 4\n")
    assert FeedbackSettings.load().max_connections == 4


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[feedback]\nmax_conections = 3\n", r"feedback\.max_conections"),
        ("[feedback]\nmax_connections = 0\n", r"feedback\.max_connections: .*greater than 0"),
        ("[feedbck]\nmax_connections = 3\n", r"unknown table \[feedbck\]"),
        ("feedback = 3\n", r"\[feedback\] must be a table"),
        ("[feedback\n", "instructloop.toml"),
    ],
)
def test_a_mistake_in_the_file_is_named(toml: Path, text: str, says: str) -> None:
    toml.write_text(text)
    with pytest.raises(SettingsError, match=says):
        FeedbackSettings.load()


def test_a_mistake_at_the_top_of_the_file_is_named(toml: Path) -> None:
    toml.write_text('stat = "x"\n')
    with pytest.raises(SettingsError, match=r"top level\.stat"):
        LoopSettings.load()


def test_a_mistake_in_the_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSTRUCTLOOP_FEEDBACK__MAX_CONECTIONS", "3")
    with pytest.raises(SettingsError, match="INSTRUCTLOOP_FEEDBACK__MAX_CONECTIONS"):
        FeedbackSettings.load()


def test_a_settings_file_that_is_not_there_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSTRUCTLOOP_SETTINGS", str(tmp_path / "none.toml"))
    with pytest.raises(SettingsError, match=r"none\.toml, which does not exist"):
        FeedbackSettings.load()
