"""Collation, buckets and the pretraining stream: exact layouts and invariants."""

import random

import pytest
import torch

from train.batches import TokenStream, collate, length_buckets
from train.errors import DatasetUnusable

PROMPTS = [(3, 4, 5), (6,)]
COMPLETIONS = [(7, 1), (8, 9, 10, 1)]


def test_prompts_are_padded_left_and_completions_right() -> None:
    batch = collate(PROMPTS, COMPLETIONS, pad_id=0)
    assert batch.input_ids.tolist() == [[3, 4, 5, 7, 1, 0, 0], [0, 0, 6, 8, 9, 10, 1]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1]]
    assert batch.completion_mask.tolist() == [[True, True, False, False], [True] * 4]
    assert batch.position_ids[0, :5].tolist() == [0, 1, 2, 3, 4]
    assert batch.position_ids[1, 2:].tolist() == [0, 1, 2, 3, 4]
    assert (batch.prompt_length, batch.last.tolist(), batch.completion_lengths.tolist()) == (3, [4, 6], [2, 4])
    assert batch.completion_ids.tolist() == [[7, 1, 0, 0], [8, 9, 10, 1]]


def test_a_pad_token_that_is_the_eos_hides_no_eos() -> None:
    eos = 1
    batch = collate(PROMPTS, COMPLETIONS, pad_id=eos)
    assert batch.completion_mask.tolist() == collate(PROMPTS, COMPLETIONS, pad_id=0).completion_mask.tolist()
    assert batch.completion_ids[batch.completion_mask].tolist().count(eos) == 2


def test_completions_may_be_absent() -> None:
    batch = collate(PROMPTS, [(), ()], pad_id=0)
    assert batch.input_ids.tolist() == [[3, 4, 5], [0, 0, 6]]
    assert batch.last.tolist() == [2, 2]


@pytest.mark.parametrize(("prompts", "completions"), [([(1,), ()], [(2,), (2,)]), ([], []), ([(1,)], [])])
def test_what_makes_no_batch_is_refused(prompts: list[tuple[int, ...]], completions: list[tuple[int, ...]]) -> None:
    with pytest.raises(DatasetUnusable):
        collate(prompts, completions, pad_id=0)


def test_a_selection_is_the_batch_of_those_sequences() -> None:
    batch = collate(PROMPTS, COMPLETIONS, pad_id=0)
    for row in (0, 1):
        alone, selected = collate([PROMPTS[row]], [COMPLETIONS[row]], pad_id=0), batch.select(torch.tensor([row]))
        assert selected.input_ids.tolist() == alone.input_ids.tolist()
        assert selected.position_ids.tolist() == alone.position_ids.tolist()
        assert selected.completion_mask.tolist() == alone.completion_mask.tolist()
        assert selected.prompt_length == alone.prompt_length


def test_buckets_hold_every_sequence_once_with_little_padding() -> None:
    rng = random.Random(0)
    prompts = [tuple(rng.randrange(2, 9) for _ in range(rng.randrange(1, 30))) for _ in range(40)]
    batch = collate(prompts, [(2, 1)] * 40, pad_id=0)
    seen: list[int] = []
    for rows, part in batch.buckets(8):
        seen += rows.tolist()
        assert len(part) <= 8
        for row, ids, mask in zip(rows.tolist(), part.input_ids, part.attention_mask, strict=True):
            assert tuple(ids[mask.bool()].tolist()) == (*prompts[row], 2, 1)
    assert sorted(seen) == list(range(40))
    padded = sum(part.attention_mask.numel() for _, part in batch.buckets(8))
    assert padded < 0.75 * batch.attention_mask.numel()


def test_length_buckets_follow_the_lengths_and_shuffle_by_seed() -> None:
    lengths = [5, 1, 4, 1, 3, 2]
    assert length_buckets(lengths, 2) == [[1, 3], [5, 4], [2, 0]]
    one, two = (length_buckets(lengths, 2, random.Random(seed)) for seed in (1, 1))
    assert one == two
    shuffles = {str(length_buckets(lengths, 2, random.Random(seed))) for seed in range(20)}
    assert len(shuffles) > 3
    assert sorted(i for group in one for i in group) == list(range(6))


def documents() -> list[list[int]]:
    """Twelve documents of lengths 0 to 11, each token unique, so that order and completeness can be read off."""
    counter = iter(range(1000))
    return [[next(counter) for _ in range(length)] for length in range(12)]


def test_a_stream_passes_over_every_document_whole_and_once_per_pass_in_new_orders() -> None:
    stream = TokenStream(documents(), sequence_length=6, seed=0)
    assert stream.tokens == 66
    passes = [stream.take(11).flatten().tolist() for _ in range(2)]
    assert passes[0] != passes[1]
    for tokens in passes:
        assert sorted(tokens) == list(range(66))
        for document in documents():
            if document:
                start = tokens.index(document[0])
                assert tokens[start : start + len(document)] == document


def test_how_many_rows_are_taken_at_once_does_not_matter() -> None:
    one, other = (TokenStream(documents(), sequence_length=4, seed=7) for _ in range(2))
    assert torch.cat([one.take(3), one.take(1), one.take(40)]).equal(other.take(44))
    assert (
        not TokenStream(documents(), sequence_length=4, seed=8)
        .take(16)
        .equal(TokenStream(documents(), sequence_length=4, seed=7).take(16))
    )


@pytest.mark.parametrize("rows", [0, 1, 7, 16, 40])
def test_a_stream_continues_from_a_position(rows: int) -> None:
    stream = TokenStream(documents(), sequence_length=4, seed=7)
    if rows:
        stream.take(rows)
    position = stream.position()
    following = stream.take(30)
    fresh = TokenStream(documents(), sequence_length=4, seed=7)
    fresh.seek(position)
    assert fresh.take(30).equal(following)
    stream.seek(position)
    assert stream.take(30).equal(following)


def test_a_digest_is_equal_where_the_stream_is() -> None:
    digest = TokenStream(documents(), sequence_length=4, seed=7).digest()
    stream = TokenStream(documents(), sequence_length=4, seed=7)
    stream.take(5)
    assert stream.digest() == digest
    others = [(documents(), 5, 7), (documents(), 4, 8), (documents()[:-1], 4, 7), ([[1], *documents()], 4, 7)]
    assert all(TokenStream(texts, length, seed).digest() != digest for texts, length, seed in others)


def test_a_stream_of_nothing_is_refused() -> None:
    with pytest.raises(DatasetUnusable, match="empty"):
        TokenStream([[], []], sequence_length=4, seed=0)
