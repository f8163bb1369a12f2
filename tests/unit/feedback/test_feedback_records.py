import hashlib
import itertools
import json
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import JsonValue, ValidationError

from feedback.errors import CorruptRecord
from feedback.records import (
    BlindTask,
    Candidate,
    Choice,
    Comparison,
    Demonstration,
    Erasure,
    Prompt,
    StoredCompletion,
    content_digest,
    decode,
    encode,
    marks_of,
    name_digest,
    new_id,
    pack,
    ranking_problem,
    unpack,
)

FROG = Prompt(text="tell me about a frog")


def comparison(texts: list[str], ranking: list[list[int]], labeler: str = "L-1") -> Comparison:
    return Comparison(
        id=new_id("cmp_"),
        created=1.5,
        principal="alice",
        labeler=labeler,
        prompt=FROG,
        source="outside",
        candidates=tuple(Candidate(text=text) for text in texts),
        ranking=tuple(tuple(group) for group in ranking),
    )


@st.composite
def rankings(draw: st.DrawFn) -> list[list[int]]:
    """Any ranking of 2 to 9 candidates: a permutation, cut into groups."""
    order = draw(st.integers(2, 9).flatmap(lambda k: st.permutations(range(k))))
    cuts = draw(st.lists(st.booleans(), min_size=len(order) - 1, max_size=len(order) - 1))
    ranking = [[order[0]]]
    for index, cut in zip(order[1:], cuts, strict=True):
        if cut:
            ranking.append([index])
        else:
            ranking[-1].append(index)
    return ranking


@given(rankings())
def test_pairs_are_exactly_those_the_ranking_tells_apart(ranking: list[list[int]]) -> None:
    k = sum(len(group) for group in ranking)
    pairs = list(comparison([str(i) for i in range(k)], ranking).pairs())
    group_of = {index: place for place, group in enumerate(ranking) for index in group}
    assert len(pairs) == len(set(pairs))
    for one, other in itertools.combinations(range(k), 2):
        found = {(one, other), (other, one)} & set(pairs)
        if group_of[one] == group_of[other]:
            assert not found
        else:
            better, worse = sorted((one, other), key=lambda index: group_of[index])
            assert found == {(better, worse)}


def test_pairs_of_a_ranking_worked_by_hand() -> None:
    assert list(comparison(["a", "b", "c", "d"], [[1], [0, 2], [3]]).pairs()) == [
        (1, 0),
        (1, 2),
        (1, 3),
        (0, 3),
        (2, 3),
    ]


@pytest.mark.parametrize(
    ("ranking", "says"),
    [
        (((0, 1), ()), "groups must not be empty"),
        (((0,), (2,)), "names [2], but the candidates are 0 to 1"),
        (((0,), (-1,)), "names [-1]"),
        (((0,), (0, 1)), "names [0] more than once"),
        (((0,),), "leaves out [1]"),
        ((), "leaves out [0, 1]"),
    ],
)
def test_a_bad_ranking_is_refused_saying_why(ranking: tuple[tuple[int, ...], ...], says: str) -> None:
    assert says in (ranking_problem(ranking, 2) or "")
    with pytest.raises(ValidationError, match="ranking"):
        comparison(["a", "b"], [list(group) for group in ranking])


@given(rankings())
def test_a_good_ranking_has_no_problem_and_a_damaged_one_has(ranking: list[list[int]]) -> None:
    good = tuple(tuple(group) for group in ranking)
    k = sum(len(group) for group in good)
    assert ranking_problem(good, k) is None
    assert ranking_problem(good, k + 1) is not None
    assert ranking_problem((*good, good[0]), k) is not None


@pytest.mark.parametrize("k", [1, 10])
def test_a_comparison_has_2_to_9_candidates(k: int) -> None:
    with pytest.raises(ValidationError, match="candidates"):
        comparison([str(i) for i in range(k)], [list(range(k))])


@given(rankings(), st.text())
def test_decode_gives_back_what_encode_took(ranking: list[list[int]], text: str) -> None:
    first = comparison([text] * sum(len(group) for group in ranking), ranking)
    assert decode(*encode(first)) == first
    if text:
        second = Demonstration(
            id="demo_1", created=1.0, principal="a", labeler="a", prompt=Prompt(text=text), completion=text
        )
        assert decode(*encode(second)) == second


@given(st.data())
def test_every_flipped_bit_is_noticed(data: st.DataObject) -> None:
    body, sha256 = encode(comparison(["a frog", "a toad"], [[1], [0]]))
    at = data.draw(st.integers(0, len(body) - 1))
    flipped = bytearray(body)
    flipped[at] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(CorruptRecord, match="sha256"):
        decode(bytes(flipped), sha256)


def test_a_record_of_another_schema_is_corrupt_even_with_the_right_digest() -> None:
    body = b'{"kind": "comparison", "id": "cmp_1"}'
    with pytest.raises(CorruptRecord, match="schema"):
        decode(body, hashlib.sha256(body).hexdigest())


def test_the_order_of_candidates_does_not_change_who_judged_what() -> None:
    one = comparison(["a", "b"], [[0], [1]])
    assert one.candidates_key() == comparison(["b", "a"], [[0], [1]]).candidates_key()
    assert one.candidates_key() != comparison(["a", "c"], [[0], [1]]).candidates_key()
    assert one.candidates_key() != comparison(["a", "b"], [[0], [1]], labeler="L-2").candidates_key()


def test_content_digest_ignores_only_id_and_time() -> None:
    one = comparison(["a", "b"], [[0], [1]])
    again = one.model_copy(update={"id": "cmp_2", "created": 9.0})
    assert content_digest(one) == content_digest(again)
    assert content_digest(one) != content_digest(one.model_copy(update={"comment": "because"}))


def test_an_erasure_covers_what_the_principal_gave_and_what_was_made_of_its_prompts() -> None:
    erasure = Erasure(id="era_1", created=1.0, principal="root", erased=name_digest("alice"))
    hers = comparison(["a", "b"], [[0], [1]])
    shown = hers.model_copy(update={"principal": "bob", "prompt": Prompt(text="frog", asked_by="alice")})
    his = hers.model_copy(
        update={"principal": "bob", "labeler": "alice", "prompt": Prompt(text="alice", asked_by="bob")}
    )
    assert [erasure.covers(record) for record in (hers, shown, his, erasure)] == [True, True, False, False]
    assert decode(*encode(erasure)) == erasure
    assert "alice" not in erasure.model_dump_json()
    marked = [any(mark in encode(record)[0] for mark in marks_of("alice")) for record in (hers, shown, his)]
    assert marked == [True, True, False]


def test_who_asked_a_prompt_is_no_part_of_what_it_asks() -> None:
    assert FROG.key() == FROG.model_copy(update={"asked_by": "alice"}).key()


def test_prompts_that_ask_the_same_have_the_same_key() -> None:
    chat = Prompt(messages=({"role": "user", "content": "frog"},))
    assert FROG.key() == FROG.model_copy(update={"token_ids": (1, 2), "tokenizer": "x"}).key()
    assert len({FROG.key(), chat.key(), Prompt(token_ids=(1, 2)).key(), Prompt(token_ids=(1, 3)).key()}) == 4
    with pytest.raises(ValidationError, match="not both"):
        Prompt(text="frog", messages=({"role": "user", "content": "frog"},))
    with pytest.raises(ValidationError, match="needs text, messages or token ids"):
        Prompt()


def test_a_stored_completion_names_its_candidates_and_survives_packing() -> None:
    kept = StoredCompletion(
        id="cmpl-1",
        object="text_completion",
        created=1,
        principal="alice",
        model="policy-v3",
        policy_version=3,
        prompts=(FROG, Prompt(text="and a toad")),
        choices=tuple(
            Choice(index=i, prompt_index=i, text=t, token_ids=(5, i), logprobs=(-0.5, -1.25), finish_reason="stop")
            for i, t in enumerate(["green", "brown"])
        ),
    )
    assert kept.candidate(1) == Candidate(
        completion_id="cmpl-1", index=1, policy_version=3, text="brown", token_ids=(5, 1), finish_reason="stop"
    )
    assert kept.prompt_of(1).text == "and a toad"
    with pytest.raises(LookupError, match="no choice 2"):
        kept.candidate(2)
    packed = pack(kept)
    assert unpack(StoredCompletion, packed) == kept
    for damaged in (packed[:-1], packed[:40] + bytes([packed[40] ^ 1]) + packed[41:], b""):
        with pytest.raises(CorruptRecord, match="StoredCompletion"):
            unpack(StoredCompletion, damaged)
    with pytest.raises(CorruptRecord, match="BlindTask"):
        unpack(BlindTask, packed)


def test_a_message_beyond_text_is_kept_and_records_from_before_have_none() -> None:
    message: dict[str, JsonValue] = {"role": "assistant", "content": None, "tool_calls": [{"id": "call_1"}]}
    called = Choice(index=0, text="<call>", token_ids=(5,), logprobs=(-0.5,), finish_reason="stop", message=message)
    plain = called.model_copy(update={"index": 1, "message": None})
    kept = StoredCompletion(
        id="chatcmpl-1",
        object="chat.completion",
        created=1,
        principal="alice",
        model="policy-v3",
        policy_version=3,
        prompts=(Prompt(messages=({"role": "user", "content": "frog"},)),),
        choices=(called, plain),
    )
    assert unpack(StoredCompletion, pack(kept)) == kept
    before = json.loads(kept.model_dump_json())
    for choice in before["choices"]:
        del choice["message"]
    old = unpack(StoredCompletion, zlib.compress(json.dumps(before).encode()))
    assert [choice.message for choice in old.choices] == [None, None]
