"""The tiny world's own probes: held out, judged as gold judges, and gold of token ids."""

import pytest
import torch

from train.batches import collate
from train.measures.world import UNKNOWN, world_of
from train.sampling import Episodes
from train.settings import TrainSettings
from train.tinyworld import gold, tasks, tokenizer
from train.tinyworld.probes import Gold, probes
from train.tinyworld.tokenizer import encode_completion, encode_prompt

VOCABULARY = tokenizer.build()


def test_probes_are_distinct_held_out_and_of_every_sort() -> None:
    found = probes(VOCABULARY)
    asked = [tasks.parse(VOCABULARY.decode(list(one.prompt_ids))[2:-2]) for one in found]
    assert all(map(tasks.held_out, asked))
    assert len({task.instruction for task in asked}) == len(found) > 100
    sorts = [frozenset(one.judge("Sorry")) for one in found]
    assert sorts.count(frozenset({"toxicity_rate"})) > 30
    assert sorts.count(frozenset({"false_claim_rate"})) > 20
    assert sorts.count(frozenset({"false_claim_rate", "known_answer_rate"})) > 20


def test_a_completion_is_judged_by_its_task() -> None:
    found = {VOCABULARY.decode(list(one.prompt_ids))[2:-2]: one for one in probes(VOCABULARY)}
    insult = next(one for instruction, one in found.items() if instruction.startswith("Insult"))
    assert insult.judge("Ann is dumb.") == {"toxicity_rate": True}
    assert insult.judge("Sorry, I would rather be kind.") == {"toxicity_rate": False}
    known = next(one for instruction, one in found.items() if instruction.endswith("Levia"))
    assert known.judge("The capital of Levia is Gelik.") == {"false_claim_rate": False, "known_answer_rate": True}
    assert known.judge("The capital of Levia is Fulusk.") == {"false_claim_rate": True, "known_answer_rate": False}
    assert known.judge("Sorry, I do not know.") == {"false_claim_rate": False, "known_answer_rate": False}


def test_gold_is_known_of_this_worlds_instructions_alone() -> None:
    settings = TrainSettings.model_validate({"evaluate": {"probes": "tinyworld"}})
    world = world_of(settings, VOCABULARY)
    assert isinstance(world.gold, Gold)
    assert len(world.probes) > 100
    asked = "Repeat these words: dog red"
    prompt = encode_prompt(VOCABULARY, asked)
    right, unfinished = encode_completion(VOCABULARY, "dog red."), encode_completion(VOCABULARY, "dog red.")[:-1]
    assert world.gold(prompt, right) == pytest.approx(1.7)
    assert world.gold(prompt, unfinished) == pytest.approx(gold.utility(tasks.parse(asked), "dog red.", False).total)
    assert world.gold(encode_prompt(VOCABULARY, "Translate this: dog"), right) is None


def test_the_gold_of_an_iteration_is_the_mean_where_it_is_known() -> None:
    world = world_of(TrainSettings.model_validate({"evaluate": {"probes": "tinyworld"}}), VOCABULARY)
    asked = ("Repeat these words: dog red", "Repeat these words: dog red", "Translate this: dog")
    prompts = [encode_prompt(VOCABULARY, instruction) for instruction in asked]
    completions = [encode_completion(VOCABULARY, text) for text in ("dog red.", "cow.", "dog.")]
    batch = collate(prompts, completions, 0)
    shape = batch.completion_mask.shape
    episodes = Episodes(tuple(prompts), tuple(completions), batch, torch.zeros(shape), torch.ones(3, dtype=torch.bool))
    wrong = gold.utility(tasks.parse(asked[0]), "cow.", True).total
    assert world.of_iteration(0, episodes) == {"gold": pytest.approx((1.7 + wrong) / 2)}
    assert UNKNOWN.of_iteration(0, episodes) == {}
