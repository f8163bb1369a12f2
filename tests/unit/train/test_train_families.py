"""Any Hugging Face causal language model goes through SFT, reward model and PPO to a published version."""

from pathlib import Path

import pytest
import torch
from improved_policies import PROMPTS, RANKED, improve
from tiny_policies import EOS, FAMILIES

from deploy.files import files_to_publish
from deploy.registry import Registry
from deploy.versions import Draft, VersionKind
from train.batches import collate
from train.models import completion_logits, load_policy, load_tokenizer, pad_id_of
from train.reward_model import score_completions
from train.sampling import greedy
from train.scalar_model import load_reward_model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_policy_of_any_family_is_trained_and_published(family: str, tmp_path: Path) -> None:
    figures = improve(tmp_path, family)
    assert figures["sft"]["loss"] < figures["sft"]["first_epoch_loss"]
    assert figures["reward_model"]["held_out_accuracy"] == 1.0
    assert figures["ppo"]["policy_updates"] == 2 and figures["ppo"]["sampler_gap"] < 1e-4
    assert figures["ppo"]["nonfinite_weights"] == 0

    version = Registry(tmp_path / "state").publish(Draft(kind=VersionKind.POLICY), tmp_path / "ppo")
    first, trained = load_policy(tmp_path / "policy"), load_policy(version.path)
    pad_id = pad_id_of(load_tokenizer(version.path))
    assert first.config.to_diff_dict() == trained.config.to_diff_dict()
    assert set(version.manifest.files) == {path.name for path in files_to_publish(tmp_path / "policy")}
    assert not trained.get_input_embeddings().weight.equal(first.get_input_embeddings().weight)
    tied = trained.get_input_embeddings().weight is trained.get_output_embeddings().weight
    assert tied == (family != "untied")

    # With padding on both sides the trained models say what they say without.
    completed = greedy(trained, PROMPTS, eos_id=EOS, pad_id=pad_id, max_completion_tokens=6).completions
    with torch.no_grad():
        padded = completion_logits(trained, collate(PROMPTS, completed, pad_id))
        for row, (prompt, completion) in enumerate(zip(PROMPTS, completed, strict=True)):
            alone = trained(input_ids=torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
            assert torch.allclose(padded[row, : len(completion)], alone, atol=1e-4)
            assert completion == tuple(alone.argmax(1).tolist())
        scorer = load_reward_model(tmp_path / "reward_model")
        answered = [(ranked.prompt_ids, completion) for ranked in RANKED for completion in ranked.completions]
        together = score_completions(scorer, answered, pad_id)
        alone = torch.cat([score_completions(scorer, [one], pad_id) for one in answered])
        assert torch.allclose(together, alone, atol=1e-4)
