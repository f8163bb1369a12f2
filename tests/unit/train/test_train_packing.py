"""Scores behind a shared prompt against each sequence alone, without padding: values, gradients, work, and refusal."""

import logging
import random

import pytest
import torch
from tiny_policies import FAMILIES, PAD, WINDOW, tiny_policy
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel, OpenAIGPTConfig, OpenAIGPTModel

from train import packing
from train.batches import Answered
from train.packing import packed_scores, similar
from train.scalar_model import ScalarModel, scalar_model_from

SAME = (3, 4)
RAGGED: list[Answered] = [
    ((3,), (5, 6, 7)),
    ((4, 5, 6, 7, 8, 9), (2,)),
    ((3,), (5,)),
    ((3, 3, 3), SAME),
    ((4, 5, 6, 7, 8, 9), (9, 8, 7, 6, 5, 4, 3, 2)),
    ((3, 3, 3), SAME),
    ((3,), (5, 6, 7, 8, 9)),
    ((10,), (3, 3)),  # the only one of its prompt
    ((4, 5, 6, 7, 8, 9), (2, 2)),
    ((3, 3, 3), (3,)),
    ((3, 3, 3), ()),  # the score of the prompt itself
]


def one_by_one(model: ScalarModel, answered: list[Answered]) -> Tensor:
    """Each sequence in a forward of its own, which needs neither mask nor positions."""
    hidden = [model.trunk(input_ids=torch.tensor([[*p, *c]])).last_hidden_state[0, -1] for p, c in answered]
    return model.numbers(torch.stack(hidden))


def gradients(model: ScalarModel, scores: Tensor) -> list[Tensor]:
    weights = torch.randn(scores.shape, generator=torch.Generator().manual_seed(0))
    return list(torch.autograd.grad((scores * weights).sum(), list(model.parameters())))


@pytest.mark.parametrize("tokens", [1, 16, 1024])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_and_gradients_are_those_of_each_sequence_alone(
    family: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "TOKENS_PER_FORWARD", {"cpu": tokens})
    model = scalar_model_from(tiny_policy(family), torch.Generator().manual_seed(0), heads=2)
    model.shift.copy_(torch.tensor([0.5, -1.0]))
    packed, alone = packed_scores(model, RAGGED, PAD), one_by_one(model, RAGGED)
    assert model.shares_prompts
    assert packed.shape == (len(RAGGED), 2)
    assert torch.allclose(packed, alone, atol=1e-5)
    for found, expected in zip(gradients(model, packed), gradients(model, alone), strict=True):
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_beyond_the_window_reaches_no_position(family: str) -> None:
    model = scalar_model_from(tiny_policy(family))
    rng = random.Random(0)
    shapes = [(WINDOW - 2, 2), (WINDOW - 2, 1), (4, WINDOW - 4), (4, 30)]
    prompts = {length: tuple(rng.randrange(2, 16) for _ in range(length)) for length, _ in shapes}
    answered = [(prompts[length], tuple(rng.randrange(2, 16) for _ in range(rest))) for length, rest in shapes]
    with torch.no_grad():
        assert torch.allclose(packed_scores(model, answered, PAD), one_by_one(model, answered), atol=1e-5)
    assert model.shares_prompts


def test_what_stands_on_the_padding_does_not_matter() -> None:
    model = scalar_model_from(tiny_policy())
    with torch.no_grad():
        assert packed_scores(model, RAGGED, PAD).equal(packed_scores(model, RAGGED, 7))


def test_a_prompt_is_read_once_for_all_its_completions() -> None:
    model = scalar_model_from(tiny_policy())
    prompt = tuple(range(2, 16)) * 2
    answered = [(prompt, (2, 3, i)) for i in range(4, 10)]
    packed_scores(model, answered, PAD)  # the trial is over
    read: list[int] = []

    def count(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        read.append(arguments[0].numel())

    with model.trunk.get_input_embeddings().register_forward_pre_hook(count):
        packed_scores(model, answered, PAD)
    assert read == [len(prompt), 6 * 3]


def test_a_model_that_keeps_no_keys_reads_every_prompt_anew_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    config = OpenAIGPTConfig(vocab_size=16, n_positions=WINDOW, n_embd=16, n_layer=1, n_head=2)
    model = ScalarModel(OpenAIGPTModel(config).eval())
    with torch.no_grad():
        found = packed_scores(model, RAGGED, PAD)
        assert torch.allclose(found, one_by_one(model, RAGGED), atol=1e-5)
    assert model.shares_prompts is False
    assert [record.levelno for record in caplog.records if "OpenAIGPTModel" in record.message] == [logging.WARNING]


def test_a_model_whose_keys_depend_on_what_follows_is_found_out(caplog: pytest.LogCaptureFixture) -> None:
    # Beyond the window it was made for, dynamic NTK scaling turns the keys of a prompt by the length of the whole.
    torch.manual_seed(0)
    scaled = {"rope_type": "dynamic", "factor": 8.0, "rope_theta": 10.0}
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = LlamaConfig(
        vocab_size=16, max_position_embeddings=8, rope_parameters=scaled, initializer_range=0.5, **shape
    )
    model = ScalarModel(LlamaModel(config).eval())
    answered = [((2, 3, 4, 5, 6, 7), (8,) * rest) for rest in (7, 8)]
    with torch.no_grad():
        packed_scores(model, answered, PAD)
    assert model.shares_prompts is False
    assert "LlamaModel (llama) scores differ" in caplog.text


def test_similar_ones_stand_together_as_many_as_fit() -> None:
    sizes = [(3, 1), (9, 1), (1, 2), (3, 4), (1, 1), (20, 20)]
    groups = similar(sizes, lambda count, first, second: count * (first + second) <= 12)
    assert groups == [[4, 2], [0], [3], [1], [5]]
    assert similar([], lambda *_: True) == []
