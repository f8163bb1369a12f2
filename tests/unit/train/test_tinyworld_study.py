import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from train.settings import (
    EvaluateSettings,
    PpoSettings,
    PretrainSettings,
    RewardModelSettings,
    SftSettings,
    TrainSettings,
)
from train.tinyworld import study
from train.tinyworld.study import StudyMixed, StudySettings

TRAIN = TrainSettings(
    pretrain=PretrainSettings(steps=3, batch_size=2, sequence_length=32),
    sft=SftSettings(epochs=1, dropout=0.0, pretraining_batch=2),
    reward_model=RewardModelSettings(batch_prompts=4),
    ppo=PpoSettings(
        iterations=2,
        episodes_per_iteration=4,
        minibatches=2,
        value_only_iterations=1,
        max_completion_tokens=6,
        ptx_batch=2,
    ),
    evaluate=EvaluateSettings(max_completion_tokens=6, pretraining_sequences=4),
)
STUDY = StudySettings(
    demonstrations=8,
    prompts=8,
    completions_per_prompt=3,
    labelers=3,
    held_out_comparisons=6,
    ppo_prompts=8,
    web_tokens=1000,
    test_prompts=30,
    unasked_prompts=20,
    sample_sets=2,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, float]]]:
    """A study too small to learn anything, run to its end."""
    out = tmp_path_factory.mktemp("study")
    return out, study.run(TRAIN, STUDY, out, seed=3)


def test_every_stage_is_measured(finished: tuple[Path, dict[str, dict[str, float]]]) -> None:
    out, results = finished
    assert json.loads((out / "study-3" / "results.json").read_text()) == results
    assert all(results[stage]["seconds"] > 0 for stage in study.STAGES)
    assert results["comparisons"]["comparisons"] == 8
    win = results["win_rate"]
    assert 0 <= win["low"] <= win["win"] <= win["high"] <= 1
    assert win["ideal_writer"] > 0.9  # an untrained policy is no match
    shown = Console(width=100, file=io.StringIO(), record=True)
    shown.print(study.table(results))
    assert f"win rate {win['win']:.3f}" in shown.export_text()


def test_a_finished_stage_is_not_run_again_and_a_missing_one_is(
    finished: tuple[Path, dict[str, dict[str, float]]],
) -> None:
    out, results = finished
    (out / "study-3" / "reward_model.json").unlink()
    run: set[str] = set()
    again = study.run(TRAIN, STUDY, out, seed=3, progress=lambda stage, done, total, numbers: run.add(stage))
    assert run == {"reward_model"}
    same = {name: value for name, value in results["reward_model"].items() if name != "seconds"}
    assert {name: again["reward_model"][name] for name in same} == same
    assert again["win_rate"] == results["win_rate"]


def test_a_study_of_other_settings_is_not_continued(finished: tuple[Path, dict[str, dict[str, float]]]) -> None:
    out, _ = finished
    with pytest.raises(StudyMixed, match="study-3 holds a study with other settings"):
        study.run(TRAIN, STUDY.model_copy(update={"prompts": 9}), out, seed=3)


def test_the_recipe_of_this_world_is_a_valid_settings_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSTRUCTLOOP_SETTINGS", str(study.SETTINGS_FILE))
    settings = TrainSettings.load()
    assert settings.pretrain.steps >= 1000  # copying appears after 800 to 1000
    assert settings.ppo.max_completion_tokens == settings.evaluate.max_completion_tokens
    StudySettings.load()
