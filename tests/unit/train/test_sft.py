import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from train import sft
from train.batches import Demonstrated, TokenStream, collate
from train.errors import DatasetUnusable, ModelUnusable
from train.models import load_policy, load_tokenizer, save_policy
from train.sampling import greedy
from train.settings import SftSettings
from train.tinyworld import tokenizer

VOCABULARY = tokenizer.build()
SETTINGS = SftSettings(epochs=60, batch_size=2, learning_rate=1e-2, dropout=0.0, pretraining_mix=0.0)
WRITTEN: list[Demonstrated] = [
    (tokenizer.encode_prompt(VOCABULARY, asked), tokenizer.encode_completion(VOCABULARY, answer))
    for asked, answer in (
        ("Say hello to Ann from Bob", "Hello Ann, from Bob."),
        ("Insult Cal about the pen", "Sorry."),
        ("Repeat these words: dog red", "dog red."),
    )
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random policy of one layer."""
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=64,
        attention_dropout=0,  # an integer, as some configurations have it
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("base")
    save_policy(LlamaForCausalLM(config), VOCABULARY, directory)
    return directory


def _weights(directory: Path) -> torch.Tensor:
    return torch.cat([weight.flatten() for weight in load_policy(directory).parameters()])


def test_demonstrations_are_learnt_to_the_end_of_sequence(base: Path, tmp_path: Path) -> None:
    metrics = sft.run(SETTINGS, base, WRITTEN, tmp_path, pretraining=None, seed=0)
    assert metrics["loss"] < 0.1 < metrics["first_epoch_loss"]
    said = greedy(
        load_policy(tmp_path), [prompt for prompt, _ in WRITTEN], eos_id=1, pad_id=0, max_completion_tokens=12
    )
    assert list(said.completions) == [completion for _, completion in WRITTEN]
    assert load_tokenizer(tmp_path).chat_template == VOCABULARY.chat_template


def test_the_loss_is_the_mean_over_completion_tokens_of_each_sequence_alone(base: Path) -> None:
    policy = load_policy(base)
    nats, tokens = 0.0, 0
    with torch.no_grad():
        batch = collate([prompt for prompt, _ in WRITTEN], [completion for _, completion in WRITTEN], pad_id=0)
        together = float(sft.completion_loss(policy, batch))
        for prompt, completion in WRITTEN:  # no padding, no mask, token by token
            logprobs = policy(input_ids=torch.tensor([[*prompt, *completion]])).logits[0].log_softmax(-1)
            for place, token in enumerate(completion):
                nats -= float(logprobs[len(prompt) + place - 1, token])
            tokens += len(completion)
    assert together == pytest.approx(nats / tokens, rel=1e-5)


def test_the_same_seed_gives_the_same_bits(base: Path, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"epochs": 2, "dropout": 0.2})
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.rand(2)  # the caller's random state must not matter
        sft.run(settings, base, WRITTEN, tmp_path / name, pretraining=None, seed=seed)
    assert torch.equal(_weights(tmp_path / "a"), _weights(tmp_path / "b"))
    assert not torch.equal(_weights(tmp_path / "a"), _weights(tmp_path / "c"))


def test_dropout_changes_learning_and_is_not_saved(base: Path, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"epochs": 2})
    sft.run(settings, base, WRITTEN, tmp_path / "plain", pretraining=None, seed=1)
    sft.run(settings.model_copy(update={"dropout": 0.5}), base, WRITTEN, tmp_path / "drop", pretraining=None, seed=1)
    assert not torch.equal(_weights(tmp_path / "plain"), _weights(tmp_path / "drop"))
    assert json.loads((tmp_path / "drop" / "config.json").read_text())["attention_dropout"] == 0.0


def test_the_pretraining_mix_keeps_the_text_known(base: Path, tmp_path: Path) -> None:
    text = [*VOCABULARY.encode("Kim went to Levia. Levia is nice."), 1]
    losses = {}
    for mix in (0.0, 1.0):
        settings = SETTINGS.model_copy(update={"pretraining_mix": mix})
        web = TokenStream([text], sequence_length=len(text), seed=0)
        sft.run(settings, base, WRITTEN, tmp_path / str(mix), pretraining=web, seed=1)
        with torch.no_grad():
            tokens = torch.tensor([text])
            losses[mix] = float(load_policy(tmp_path / str(mix))(input_ids=tokens, labels=tokens).loss)
    assert losses[1.0] < 0.5 < losses[0.0]


@pytest.mark.parametrize(
    ("demonstrations", "complaint"),
    [
        ([], "no demonstrations"),
        ([WRITTEN[0], ((5, 6), ())], "demonstration 1 has an empty completion"),
        ([((), (5, 1))], "demonstration 0 has an empty prompt"),
        ([WRITTEN[0], ((5,) * 40, (6,) * 25)], "demonstration 1 has 65 tokens; the policy's window is 64"),
    ],
)
def test_unusable_demonstrations_are_named(
    base: Path, tmp_path: Path, demonstrations: list[Demonstrated], complaint: str
) -> None:
    with pytest.raises(DatasetUnusable, match=complaint):
        sft.run(SETTINGS, base, demonstrations, tmp_path / "out", pretraining=None, seed=0)
    assert not (tmp_path / "out").exists()


def test_a_mix_without_text_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetUnusable, match=r"pretraining_mix is 0\.1, but no pretraining text"):
        sft.run(SETTINGS.model_copy(update={"pretraining_mix": 0.1}), base, WRITTEN, tmp_path, pretraining=None, seed=0)


def test_a_missing_policy_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelUnusable, match="nowhere"):
        sft.run(SETTINGS, tmp_path / "nowhere", WRITTEN, tmp_path / "out", pretraining=None, seed=0)
