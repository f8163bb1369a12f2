import json
from pathlib import Path

import pytest

from train.models import load_policy, load_tokenizer
from train.settings import PretrainSettings
from train.tinyworld import base_model as base
from train.tinyworld import corpus, tokenizer

VOCABULARY = tokenizer.build()
SETTINGS = PretrainSettings(steps=2, batch_size=2, sequence_length=32)


def test_the_base_model_is_trained_once(tmp_path: Path) -> None:
    steps: list[int] = []

    def count(stage: str, done: int, total: int, numbers: dict[str, float]) -> None:
        steps.append(done)

    first = base.base_model(tmp_path, SETTINGS, seed=0, progress=count)
    assert steps == [1, 2]
    assert base.base_model(tmp_path, SETTINGS, seed=0, progress=count) == first
    assert steps == [1, 2]
    assert json.loads((first / base.METRICS_FILE).read_text())["tokens"] == 2 * 2 * 32
    assert [path.name for path in tmp_path.iterdir()] == [first.name]


def test_another_seed_or_recipe_is_another_model(tmp_path: Path) -> None:
    longer = SETTINGS.model_copy(update={"steps": 3})
    made = {
        base.base_model(tmp_path, settings, seed=seed) for settings, seed in ((SETTINGS, 0), (SETTINGS, 1), (longer, 0))
    }
    assert len(made) == 3


def test_the_model_is_one_that_vllm_serves_on_a_cpu(tmp_path: Path) -> None:
    policy = load_policy(base.base_model(tmp_path, SETTINGS, seed=0))
    assert policy.config.head_dim == 32  # vLLM's CPU attention takes 32, 64, 80, 96, … only
    assert policy.config.hidden_size == policy.config.head_dim * policy.config.num_attention_heads
    assert 0.42e6 < sum(weight.numel() for weight in policy.parameters()) < 0.45e6
    assert load_tokenizer(base.base_model(tmp_path, SETTINGS, seed=0)).chat_template == tokenizer.CHAT_TEMPLATE


def test_web_text_is_the_corpus_with_an_end_after_each_document() -> None:
    stream = base.web_text(VOCABULARY, tokens=5000, sequence_length=50, seed=7)
    assert 5000 <= stream.tokens < 5000 + 200_000  # a thousand documents at a time
    decoded = VOCABULARY.decode(stream.take(60).flatten())
    known = {document for document, _ in zip(corpus.documents(7), range(5000), strict=False)}
    assert all(document in known for document in decoded.split("<eos>")[:-1])


@pytest.mark.parametrize("seed", [base.HELD_OUT_TEXT, 0])
def test_web_text_is_seeded(seed: int) -> None:
    one, other = (base.web_text(VOCABULARY, 100, 20, seed).take(4) for _ in range(2))
    assert one.equal(other)
    assert not one.equal(base.web_text(VOCABULARY, 100, 20, seed + 1).take(4))
