import math
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from train import pretrain
from train.batches import TokenStream
from train.errors import TrainingDiverged
from train.models import load_policy, load_tokenizer, pretraining_loss
from train.settings import PretrainSettings
from train.tinyworld import tokenizer

VOCABULARY = tokenizer.build()
CONFIG = LlamaConfig(
    vocab_size=len(VOCABULARY),
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=1,
    max_position_embeddings=64,
    tie_word_embeddings=True,
    initializer_range=0.05,
    pad_token_id=0,
    eos_token_id=1,
    bos_token_id=None,
)
SETTINGS = PretrainSettings(steps=60, batch_size=8, sequence_length=16, learning_rate=1e-2, warmup_steps=5)
DOCUMENT = [*VOCABULARY.encode("The capital of Levia is Gelik. Ann went to Levia."), 1]


def _stream() -> TokenStream:
    return TokenStream([DOCUMENT], SETTINGS.sequence_length, seed=0)


def test_a_document_is_learnt_and_the_model_saved(tmp_path: Path) -> None:
    metrics = pretrain.run(SETTINGS, _stream(), VOCABULARY, CONFIG, tmp_path, seed=0)
    policy = load_policy(tmp_path)
    assert metrics["tokens"] == 60 * 8 * 16
    assert metrics["loss"] < math.log(len(VOCABULARY))  # the mean over the last 50 of 60 steps: better than guessing
    with torch.no_grad():
        assert float(pretraining_loss(policy, _stream().take(4))) < 0.3
    assert load_tokenizer(tmp_path).encode("Ann went") == VOCABULARY.encode("Ann went")


def test_the_same_seed_gives_the_same_bits_and_another_gives_others(tmp_path: Path) -> None:
    weights = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.rand(3)  # the caller's random state must not matter
        pretrain.run(
            SETTINGS.model_copy(update={"steps": 5}), _stream(), VOCABULARY, CONFIG, tmp_path / name, seed=seed
        )
        weights.append(torch.cat([w.flatten() for w in load_policy(tmp_path / name).parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.allclose(weights[0], weights[2])


def test_the_callers_random_state_is_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    pretrain.run(SETTINGS.model_copy(update={"steps": 1}), _stream(), VOCABULARY, CONFIG, tmp_path, seed=1)
    assert torch.equal(torch.rand(3), expected)


def test_every_step_is_reported(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    settings = SETTINGS.model_copy(update={"steps": 3})
    pretrain.run(
        settings,
        _stream(),
        VOCABULARY,
        CONFIG,
        tmp_path,
        seed=0,
        progress=lambda stage, done, total, numbers: seen.append((stage, done, total)),
    )
    assert seen == [("pretrain", 1, 3), ("pretrain", 2, 3), ("pretrain", 3, 3)]


def test_a_run_that_diverges_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    settings = SETTINGS.model_copy(update={"learning_rate": 1e30, "warmup_steps": 0})
    with pytest.raises(TrainingDiverged):
        pretrain.run(settings, _stream(), VOCABULARY, CONFIG, out, seed=0)
    assert not out.exists()
