"""An encoder for a published policy is made from its tokenizer and configuration alone."""

from pathlib import Path

import pytest
from tiny_policies import FAMILIES, WINDOW, saved_policy

from deploy.registry import Registry
from deploy.versions import Draft, Version, VersionKind
from feedback.records import Prompt
from train.encoding import Unencodable, encoder_of
from train.errors import ModelUnusable
from train.settings import TrainSettings

SETTINGS = TrainSettings.model_validate(
    {"ppo": {"max_completion_tokens": 20}, "evaluate": {"max_completion_tokens": 24}, "sft": {"pretraining_mix": 0.0}}
)


def published(home: Path, family: str = "llama") -> Version:
    return Registry(home / "state").publish(
        Draft(kind=VersionKind.POLICY), saved_policy(home / "policy", family=family)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_window_is_known_without_the_weights(family: str, tmp_path: Path) -> None:
    version = published(tmp_path, family)
    (version.path / "model.safetensors").unlink()
    encoder = encoder_of(version, SETTINGS)
    assert encoder.leaves_room([5] * (WINDOW - 24)) and not encoder.leaves_room([5] * (WINDOW - 23))
    with pytest.raises(Unencodable, match=f"longer than {WINDOW}"):
        encoder.check_fits([5] * WINDOW, [6])
    digest = version.manifest.files["tokenizer.json"].sha256
    assert encoder.prompt(Prompt(text="w2", token_ids=(9,), tokenizer=digest)) == (9,)


def test_a_version_without_a_configuration_is_refused(tmp_path: Path) -> None:
    version = published(tmp_path)
    (version.path / "config.json").write_text("{")
    with pytest.raises(ModelUnusable, match="config"):
        encoder_of(version, SETTINGS)
