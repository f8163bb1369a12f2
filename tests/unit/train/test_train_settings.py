"""Settings: the tables nest, what cannot work is refused by name, and every field says what it is."""

from pathlib import Path

import pytest
from pydantic import BaseModel

from feedback.settings import SettingsError
from train.settings import TrainSettings


@pytest.fixture(autouse=True)
def _away_from_any_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("INSTRUCTLOOP_SETTINGS", raising=False)


def test_defaults_are_the_papers() -> None:
    settings = TrainSettings.load()
    ppo = settings.ppo
    assert ppo.iterations * ppo.episodes_per_iteration == 256_000
    assert (ppo.episodes_per_iteration // ppo.minibatches, ppo.kl_coef, ppo.clip) == (64, 0.02, 0.2)
    assert ppo.ptx_batch * ppo.minibatches == 8 * ppo.episodes_per_iteration
    assert (settings.sft.epochs, settings.reward_model.epochs, settings.reward_model.batch_prompts) == (16, 1, 64)


def test_the_environment_reaches_into_a_stage_and_wins_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "instructloop.toml").write_text("[train.ppo]\nkl_coef = 0.05\nclip = 0.1\n")
    monkeypatch.setenv("INSTRUCTLOOP_TRAIN__PPO__KL_COEF", "0.07")
    settings = TrainSettings.load()
    assert (settings.ppo.kl_coef, settings.ppo.clip, settings.ppo.gamma) == (0.07, 0.1, 1.0)


@pytest.mark.parametrize(
    ("toml", "complaint"),
    [
        ("[train.ppo]\nepisodes_per_iteration = 10\nminibatches = 4\n", "train.ppo: .*multiple of minibatches"),
        ("[train.ppo]\niterations = 3\nvalue_only_iterations = 3\n", "train.ppo: .*value_only_iterations"),
        ("[train.ppo]\nkl_koef = 0.1\n", "train.ppo.kl_koef"),
        ("[train.sft]\ndropout = 1.5\n", "train.sft.dropout"),
    ],
)
def test_what_cannot_work_is_refused_by_name(tmp_path: Path, toml: str, complaint: str) -> None:
    (tmp_path / "instructloop.toml").write_text(toml)
    with pytest.raises(SettingsError, match=complaint):
        TrainSettings.load()


def described(model: type[BaseModel]) -> int:
    """How many fields ``model`` and the tables in it have; each must say what it is."""
    assert all(field.description for field in model.model_fields.values()), model
    tables = [field.annotation for field in model.model_fields.values()]
    nested = [table for table in tables if isinstance(table, type) and issubclass(table, BaseModel)]
    return len(tables) + sum(described(table) for table in nested)


def test_every_field_is_described() -> None:
    assert described(TrainSettings) > 50
