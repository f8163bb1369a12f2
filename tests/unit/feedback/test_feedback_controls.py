from itertools import count
from typing import Any

from feedback.controls import in_force, is_check, is_golden
from feedback.labelers import assess, candidate_keys, golden_answers
from feedback.records import Candidate, Comparison, Prompt

_numbers = count(1)


def said(*texts: str, ranking: tuple[tuple[int, ...], ...] = ((0,), (1,)), ids: bool = True, **more: Any) -> Comparison:
    candidates = tuple(
        Candidate(text=text, completion_id=f"cmpl-{text}" if ids else None, policy_version=1 if ids else None)
        for text in texts or ("a", "b")
    )
    return Comparison.model_validate(
        {
            "id": f"cmp_{next(_numbers)}",
            "created": 1.0,
            "principal": "alice",
            "labeler": "L-1",
            "prompt": Prompt(text="frog"),
            "source": "task",
            "task_id": "task_1",
            "candidates": candidates,
            "ranking": ranking,
        }
        | more
    )


def outside(**more: Any) -> Comparison:
    return said(ids=False, source="outside", task_id=None, **more)


def test_the_latest_of_one_task_is_in_force_and_stands_where_it_was_made() -> None:
    first, other, again = said(), said(labeler="L-2"), said(ranking=((1,), (0,)))
    assert in_force([first, other, again]).ordinary == (other, again)


def test_a_repeat_replaces_nothing_but_an_earlier_judgement_of_itself() -> None:
    first, repeat = said("a", "b"), said("b", "a", task_id="task_2")
    second_thought = said("b", "a", task_id="task_2", ranking=((1,), (0,)))
    found = in_force([first, repeat, second_thought])
    assert found.ordinary == (first,)
    assert [(one.first, one.again) for one in found.repeats] == [(first, second_thought)]
    changed_mind = said("a", "b", ranking=((0, 1),))
    found = in_force([first, repeat, changed_mind])
    assert found.ordinary == (changed_mind,)
    assert [(one.first, one.again) for one in found.repeats] == [(changed_mind, repeat)]
    assert in_force([first, said("b", "a", task_id="task_2", labeler="L-2")]).repeats == (), "another labeler"


def test_candidates_named_outright_are_no_repeat() -> None:
    first, named = said(), said(source="candidates", task_id=None, ranking=((1,), (0,)))
    repeat = said(task_id="task_2")
    found = in_force([first, named, repeat])
    assert found.ordinary == (named,)
    assert [(one.first, one.again) for one in found.repeats] == [(named, repeat)]


def test_golden_answers_are_an_operators_and_checks_are_labelers() -> None:
    golden = outside(metadata={"golden": "true"}, labeler="operator")
    check, own = said(ids=False), said(ids=False, labeler="operator")
    plain = [outside(), outside(metadata={"golden": "yes"}, labeler="L-2"), said(metadata={"golden": "true"})]
    assert is_golden(golden) and is_check(check)
    assert not any(is_golden(one) or is_check(one) for one in plain)
    found = in_force([golden, check, own, plain[1], plain[2]])
    assert (found.golden, found.checks, found.ordinary) == ((golden,), (check, own), (plain[1], plain[2]))
    withdrawn = outside(labeler="operator")
    assert in_force([golden, withdrawn]).golden == ()


def test_golden_answers_of_a_ranking_with_a_tie() -> None:
    golden = outside(candidates=tuple(Candidate(text=text) for text in "xyz"), ranking=((1,), (0, 2)))
    answers = golden_answers([golden])
    x, y, z = candidate_keys(golden)
    assert answers == {frozenset((x, y)): y, frozenset((y, z)): y, frozenset((x, z)): None}
    wrong = said("x", "y", ids=False)
    right = said("y", "z", ids=False, task_id="task_2")
    share = assess([wrong, right], golden=answers).labelers["L-1"].golden
    assert share is not None and (share.value, share.n) == (0.5, 2)


def test_self_agreement_by_hand() -> None:
    same = (
        said("a", "b", "c", ranking=((0,), (1,), (2,))),
        said("c", "b", "a", task_id="t2", ranking=((2,), (1,), (0,))),
    )
    # Of a, b, c the second time c is best: a over b stands, the two others are turned round.
    turned = said("a", "b", "c", labeler="L-2", ranking=((0,), (1,), (2,)))
    other = said("c", "b", "a", labeler="L-2", task_id="t2", ranking=((0,), (2,), (1,)))
    found = in_force([*same, turned, other])
    report = assess(found.ordinary, repeats=found.repeats).labelers
    shares = {name: one.repeats for name, one in report.items()}
    assert shares["L-1"] is not None and (shares["L-1"].value, shares["L-1"].n) == (1, 2)
    assert shares["L-2"] is not None and abs(shares["L-2"].value - 1 / 3) < 1e-9
    assert assess([turned]).labelers["L-2"].repeats is None
