"""Comparisons among one version's own completions."""

from tiny_policies import EOS, tokenizer

from feedback.records import Candidate, Comparison, Prompt
from feedback.store import LogEntry
from train.batches import RankedPrompt
from train.encoding import Encoder
from train.rounds.datasets import Dataset, Judged
from train.rounds.own_completions import among_held_out, comparisons_among


def compared(*candidates: tuple[tuple[int, ...], int], ranking: tuple[tuple[int, ...], ...]) -> Comparison:
    return Comparison(
        id="cmp_1",
        created=1.0,
        principal="alice",
        labeler="L",
        prompt=Prompt(text="w2 w3", token_ids=(2, 3), tokenizer="digest"),
        source="choices",
        candidates=tuple(Candidate(text="", token_ids=ids, policy_version=version) for ids, version in candidates),
        ranking=ranking,
    )


def test_only_the_versions_own_completions_and_their_order_are_kept() -> None:
    mixed = compared(((4,), 7), ((5,), 6), ((6,), 7), ((7,), 7), ranking=((3,), (1,), (0, 2)))
    alone = compared(((4,), 7), ((5,), 6), ranking=((0,), (1,)))
    too_long = compared(((4,) * 40, 7), ((5,), 7), ranking=((0,), (1,)))
    (found,) = comparisons_among([mixed, alone, too_long], 7, Encoder(tokenizer(), "digest", 30, 6))
    assert found.prompt_ids == (2, 3)
    assert found.completions == ((4, EOS), (6, EOS), (7, EOS))
    assert sorted(found.pairs) == [(2, 0), (2, 1)]
    assert (found.labeler, found.group) == ("L", mixed.prompt.key())


def test_of_a_log_those_of_held_out_prompts_alone_and_in_force() -> None:
    own = compared(((4,), 7), ((5,), 7), ranking=((0,), (1,)))
    learnt, held_out = (own.model_copy(update={"prompt": Prompt(text=text)}) for text in ("w2", "w3"))
    changed = held_out.model_copy(update={"ranking": ((1,), (0,))})
    records = [learnt, held_out, changed]
    log = [LogEntry(f"{place}-0", one.model_copy(update={"id": str(place)})) for place, one in enumerate(records)]
    measured = Judged("1-0", ("alice",), RankedPrompt((2,), ((3,), (4,)), ((0, 1),), group=held_out.prompt.key()))
    dataset = Dataset((), (measured,), (), (), (), ())
    (found,) = among_held_out(log, dataset, 7, Encoder(tokenizer(), "digest", 30, 6))
    assert (found.group, found.pairs) == (held_out.prompt.key(), ((1, 0),))
