"""Several heads on one trunk: their mean is the score, and one head can say it; older files are still read."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_policies import saved_policy, tiny_policy, tokenizer

from train.batches import collate
from train.errors import ModelUnusable
from train.models import HEAD_FILE
from train.scalar_model import ScalarModel, load_reward_model, save_reward_model, scalar_model_from

BATCH = collate([(3, 4, 5), (6,)], [(7, 1), (8, 9, 10, 1)], 0)


def ensemble() -> ScalarModel:
    model = scalar_model_from(tiny_policy(), torch.Generator().manual_seed(0), heads=3)
    with torch.no_grad():
        model.head.bias.copy_(torch.tensor([0.5, -1.0, 2.0]))
        model.shift.copy_(torch.tensor([0.25, 3.0, -4.0]))
    return model


@torch.no_grad()
def test_each_head_speaks_for_itself_and_the_score_is_their_mean() -> None:
    model = ensemble()
    scores = model.scores(BATCH)
    assert scores.shape == (2, 3)
    for head in range(3):
        alone = ScalarModel(model.trunk)
        alone.head.weight.copy_(model.head.weight[[head]])
        alone.head.bias.copy_(model.head.bias[[head]])
        alone.shift.copy_(model.shift[[head]])
        assert torch.allclose(alone.score(BATCH), scores[:, head], atol=1e-6)
    assert torch.allclose(model.score(BATCH), scores.sum(1) / 3, atol=1e-6)


@torch.no_grad()
def test_merged_is_one_head_that_says_the_mean_everywhere() -> None:
    model = ensemble()
    merged = model.merged()
    assert merged.heads == 1
    assert torch.allclose(merged.score(BATCH), model.score(BATCH), atol=1e-6)
    assert torch.allclose(merged.values(BATCH), model.values(BATCH), atol=1e-6)
    before = model.score(BATCH)
    merged.trunk.get_input_embeddings().weight.add_(1)
    merged.scale(2.0)
    assert model.score(BATCH).equal(before), "a copy"


@torch.no_grad()
def test_all_heads_are_saved_and_scaled(tmp_path: Path) -> None:
    model = ensemble()
    save_reward_model(model, tokenizer(), tmp_path)
    loaded = load_reward_model(tmp_path)
    assert loaded.scores(BATCH).equal(model.scores(BATCH))
    loaded.scale(0.5)
    assert torch.allclose(loaded.scores(BATCH), 0.5 * model.scores(BATCH), atol=1e-6)


@torch.no_grad()
def test_a_file_from_before_there_were_ensembles_is_read(tmp_path: Path) -> None:
    model = scalar_model_from(tiny_policy())
    model.shift.fill_(1.5)
    save_reward_model(model, tokenizer(), tmp_path)
    head = load_file(tmp_path / HEAD_FILE)
    save_file({**head, "shift": torch.tensor(1.5)}, tmp_path / HEAD_FILE)
    assert load_reward_model(tmp_path).score(BATCH).equal(model.score(BATCH))


def test_a_head_file_that_is_none_says_so(tmp_path: Path) -> None:
    save_file({"weight": torch.tensor(1.0)}, saved_policy(tmp_path) / HEAD_FILE)
    with pytest.raises(ModelUnusable, match="scalar head"):
        load_reward_model(tmp_path)
