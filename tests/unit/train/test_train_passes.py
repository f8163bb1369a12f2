"""How sequences are divided into passes, and how they are laid out in one."""

import random
from collections.abc import Iterator
from itertools import combinations, pairwise

import pytest
import torch
from tiny_policies import EOS, FAMILIES, PAD, tiny_policy
from torch import Tensor

from train.batches import COST_OF_FORWARD, TOKENS_PER_FORWARD, collate, passes
from train.models import last_states, token_logits
from train.scalar_model import scalar_model_from

PROMPTS = [(3, 4, 5, 6), (7,), (8, 9)]
COMPLETIONS = [(10, EOS), (11, 12, 13, EOS), (14,)]


def divisions(count: int) -> Iterator[list[tuple[int, int]]]:
    """Every way to cut a row of ``count`` into pieces, as (begin, end)."""
    for cuts in range(count):
        for chosen in combinations(range(1, count), cuts):
            edges = [0, *chosen, count]
            yield list(pairwise(edges))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("most", [2, 64])
def test_no_other_division_of_the_sorted_lengths_costs_less(seed: int, most: int) -> None:
    rng = random.Random(seed)
    lengths = [rng.choice([3, 20, 70, 400]) + rng.randrange(60) for _ in range(9)]

    def cost(groups: list[list[int]]) -> int:
        return sum(len(group) * max(lengths[i] for i in group) + COST_OF_FORWARD["cpu"] for group in groups)

    def allowed(groups: list[list[int]]) -> bool:
        sizes = ((len(group), len(group) * max(lengths[i] for i in group)) for group in groups)
        return all(count == 1 or (count <= most and tokens <= TOKENS_PER_FORWARD["cpu"]) for count, tokens in sizes)

    order = sorted(range(9), key=lengths.__getitem__)
    every = ([order[begin:end] for begin, end in division] for division in divisions(9))
    found = passes(lengths, most, device="cpu")
    assert sorted(i for group in found for i in group) == list(range(9))
    assert allowed(found)
    assert cost(found) == min(cost(groups) for groups in every if allowed(groups))


def test_a_sequence_beyond_the_limit_goes_alone_and_equal_ones_go_together() -> None:
    assert passes([5000, 5, 5000, 5], 64, device="cpu") == [[1, 3], [0], [2]]
    assert passes([128] * 12, 64, device="cpu") == [[0, 1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 11]]
    assert passes([100] * 4, 3, device="cpu") == [[0], [1, 2, 3]]


@pytest.mark.parametrize("processes", [2, 3])
def test_every_process_takes_part_in_every_pass_with_as_many_sequences(processes: int) -> None:
    rng = random.Random(processes)
    lengths = [rng.randrange(1, 300) for _ in range(24)]
    found = passes(lengths, 4, device="cpu", processes=processes)
    assert sorted(i for group in found for i in group) == list(range(24))
    assert len(found) > 3
    for group in found:
        assert len(group) % processes == 0
        for rank in range(processes):
            own = [lengths[i] for i in group[rank::processes]]
            assert len(own) <= 4 and (len(own) == 1 or len(own) * max(own) <= TOKENS_PER_FORWARD["cpu"])


def test_rows_have_no_padding_before_what_is_real() -> None:
    batch = collate(PROMPTS, COMPLETIONS, PAD)
    rows = batch.rows()
    real = [ids[: len(p) + len(c)] for ids, p, c in zip(rows.input_ids.tolist(), PROMPTS, COMPLETIONS, strict=True)]
    assert real == [[*prompt, *completion] for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert rows.input_ids.shape == (3, 6)
    assert rows.predicting.tolist() == [3, 4, 6, 7, 8, 9, 13]
    assert rows.last.tolist() == [5, 10, 14]
    placed = batch.of_tokens(torch.tensor([1.0, 2, 3, 4, 5, 6, 7]))
    assert placed.tolist() == [[1, 2, 0, 0], [3, 4, 5, 6], [7, 0, 0, 0]]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_says_of_rows_what_it_says_of_each_sequence_alone(family: str) -> None:
    policy, batch = tiny_policy(family), collate(PROMPTS, COMPLETIONS, PAD)
    scorer = scalar_model_from(policy)
    pairs = list(zip(PROMPTS, COMPLETIONS, strict=True))
    with torch.no_grad():
        alone = [policy(input_ids=torch.tensor([p + c])).logits[0, len(p) - 1 : -1] for p, c in pairs]
        hidden = [scorer.trunk(input_ids=torch.tensor([p + c])).last_hidden_state[0] for p, c in pairs]
        assert torch.allclose(token_logits(policy, batch, 0.5), 2 * torch.cat(alone), atol=1e-5)
        assert torch.allclose(last_states(scorer.trunk, batch), torch.stack([h[-1] for h in hidden]), atol=1e-5)
        expected = scorer.values(batch)
        for row, (prompt, completion) in enumerate(pairs):
            by_hand = hidden[row][len(prompt) - 1 : -1] @ scorer.head.weight[0]
            assert torch.allclose(expected[row, : len(completion)], by_hand, atol=1e-5)
            assert not expected[row, len(completion) :].any()


def test_only_states_that_predict_a_completion_token_are_unembedded() -> None:
    policy, seen = tiny_policy("untied"), list[tuple[int, ...]]()
    head = policy.get_output_embeddings()
    watched = head.register_forward_hook(lambda _, states, __: seen.append(tuple(states[0].shape)))
    with torch.no_grad():
        token_logits(policy, collate(PROMPTS, COMPLETIONS, PAD))
        ordinary: Tensor = policy(input_ids=torch.tensor([PROMPTS[0]])).logits
    watched.remove()
    assert seen == [(7, 16), (1, 4, 16)]
    assert ordinary.shape[:2] == (1, 4)
