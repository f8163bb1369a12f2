"""From records to token ids; an encoder of a published policy needs its tokenizer and configuration alone."""

from pathlib import Path

import pytest
from byte_encoding import ENCODER, EOS, ids
from tiny_policies import FAMILIES, WINDOW, saved_policy

from deploy.registry import Registry
from deploy.versions import Draft, Version, VersionKind
from feedback.records import Candidate, Prompt
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


def test_what_the_serving_tokenizer_recorded_is_taken_as_it_is() -> None:
    prompt = Prompt(text="other text", token_ids=(7, 8), tokenizer="same")
    assert ENCODER.prompt(prompt) == (7, 8)
    ended = Candidate(text="x", token_ids=(9, EOS), finish_reason="stop")
    open_ended = Candidate(text="x", token_ids=(9,), finish_reason="stop")
    cut_off = Candidate(text="x", token_ids=(9,), finish_reason="length")
    assert ENCODER.candidate(prompt, ended) == (9, EOS)
    assert ENCODER.candidate(prompt, open_ended) == (9, EOS), "engines may leave the EOS out"
    assert ENCODER.candidate(prompt, cut_off) == (9,), "no EOS is made up for a completion that never ended"


def test_another_tokenizer_s_ids_are_not_used() -> None:
    prompt = Prompt(text="hi", token_ids=(7, 8), tokenizer="another")
    assert ENCODER.prompt(prompt) == ids("hi")
    assert ENCODER.candidate(prompt, Candidate(text="yo", token_ids=(9,))) == (*ids("yo"), EOS)
    with pytest.raises(Unencodable):
        ENCODER.prompt(Prompt(token_ids=(7, 8), tokenizer="another"))


def test_chats_go_through_the_chat_template() -> None:
    prompt = Prompt(messages=({"role": "user", "content": "hi"},))
    assert ENCODER.prompt(prompt) == ids("# hi\n>")
    written = ENCODER.written(prompt, "yo")
    assert written == (*ids(" yo"), EOS), "what the template writes after the prompt, up to its EOS"
    with pytest.raises(Unencodable, match="no pirate"):
        ENCODER.prompt(Prompt(messages=({"role": "pirate", "content": "hi"},)))


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
