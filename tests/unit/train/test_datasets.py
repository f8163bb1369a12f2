from collections import Counter
from itertools import count

import pytest
from byte_encoding import ENCODER, EOS, TOKENIZER, ids
from hypothesis import given
from hypothesis import strategies as st

from feedback.labelers import PRIOR_WEIGHT
from feedback.records import Candidate, Comparison, Demonstration, PooledPrompt, Prompt
from feedback.removal import position
from feedback.store import LogEntry
from train.batches import RankedPrompt
from train.encoding import Encoder
from train.errors import DatasetUnusable
from train.rounds.datasets import Asked, Dataset, Judged, build, capped, ppo_prompts, split, with_replay
from train.settings import WorkerSettings

SETTINGS = WorkerSettings(held_out_fraction=0.25)
_numbers = count(1)


def comparison(text: str = "hi", *answers: str, principal: str = "ann", labeler: str = "L-1") -> Comparison:
    answers = answers or ("good", "bad")
    return Comparison(
        id=f"cmp_{next(_numbers)}",
        created=0.0,
        principal=principal,
        labeler=labeler,
        prompt=Prompt(text=text),
        source="outside",
        candidates=tuple(Candidate(text=answer) for answer in answers),
        ranking=tuple((place,) for place in range(len(answers))),
    )


def log(*records: Comparison | Demonstration) -> list[LogEntry]:
    return [LogEntry(f"{1000 + place}-0", record) for place, record in enumerate(records)]


def judged(stream_id: str, group: str = "g", principal: str = "ann") -> Judged:
    return Judged(stream_id, (principal,), RankedPrompt((2,), ((3,), (4,)), ((0, 1),), group=group))


# --- which comparisons count


def entries(**counts: int) -> list[tuple[str, Comparison]]:
    """Comparisons of several principals, in turns."""
    turns = [(place, principal) for principal, amount in counts.items() for place in range(amount)]
    return [
        (f"{place}-{number}", comparison(f"{place}", principal=principal))
        for number, (place, principal) in enumerate(sorted(turns))
    ]


def kept_of(compared: list[tuple[str, Comparison]]) -> Counter[str]:
    return Counter(record.principal for _, record in capped(compared, 0.005, 100))


def test_a_small_log_a_single_principal_and_equals_are_not_capped() -> None:
    assert kept_of(entries(ann=90, bob=10)) == {"ann": 90, "bob": 10}
    assert kept_of(entries(ann=200)) == {"ann": 200}
    assert kept_of(entries(ann=200, bob=200, eve=200)) == {"ann": 200, "bob": 200, "eve": 200}


def test_beyond_the_minimum_nobody_dominates() -> None:
    crowd = {f"p{i}": 1 for i in range(400)}
    kept = kept_of(entries(flood=1600, **crowd))
    assert kept["flood"] == 10, "0.5 % of 2 000"
    assert kept.total() == 410
    assert kept_of(entries(ann=300, bob=30)) == {"ann": 165, "bob": 30}, "few principals: an equal share"


def test_the_cap_never_takes_the_log_below_the_minimum() -> None:
    crowd = {f"p{i}": 1 for i in range(50)}
    kept = kept_of(entries(flood=950, **crowd))
    assert (kept["flood"], kept.total()) == (50, 100)


def test_what_is_kept_of_a_flood_is_of_all_times_in_order_and_stays() -> None:
    everything = entries(ann=300, bob=30)
    kept = capped(everything, 0.005, 100)
    assert [one for one in everything if one in kept] == kept
    places = [int(record.prompt.text or "") for _, record in kept if record.principal == "ann"]
    assert 30 < sum(place < 150 for place in places) < 135
    later = capped([*everything, *entries(eve=400)], 0.005, 100)
    assert {one for one, _ in kept} <= {one for one, _ in later}, "allowances grow with the log; nothing is swapped"


def test_corrections_count_against_the_cap_as_comparisons_do() -> None:
    crowd = [comparison(f"q{number}", principal=f"p{number}") for number in range(200)]
    flood = [
        Demonstration(
            id=f"dem_{number}",
            created=0.0,
            principal="flood",
            labeler="L-2",
            prompt=Prompt(text=f"c{number}"),
            completion="this",
            corrects=Candidate(text="that"),
        )
        for number in range(600)
    ]
    settings = SETTINGS.model_copy(update={"min_comparisons_for_cap": 100})
    dataset = build(log(*crowd, *flood), [], ENCODER, settings)
    learnt = [one for one in (*dataset.training, *dataset.held_out) if one.principal == "flood"]
    assert len(learnt) <= 4, "0.5 % of 800, as of one who compares"
    assert (dataset.counts["largest_principal"], dataset.counts["principal_allowance"]) == (4, 4)
    assert dataset.counts["over_cap"] == 596
    assert len(dataset.demonstrations) == 600, "what sets the zero of the scale is no evidence of what people prefer"
    small = build(log(*crowd[:30], *flood[:30]), [], ENCODER, settings)
    assert len(small.training) + len(small.held_out) == 60, "a small log is used whole"


# --- who is trusted how far


def crowd() -> list[Comparison]:
    """Four careful labelers and one who inverts, all on the same 40 pairs; the inverter alone on 40 more."""
    said = []
    for number in range(40):
        careful = [comparison(f"q{number}", "good", "bad", labeler=f"L-{who}") for who in range(4)]
        inverted = comparison(f"q{number}", "good", "bad", labeler="inverts")
        alone = comparison(f"own {number}", "good", "bad", labeler="inverts")
        said += [*careful, *(one.model_copy(update={"ranking": ((1,), (0,))}) for one in (inverted, alone))]
    return said


def weights_of(dataset: Dataset) -> dict[str, set[float]]:
    found: dict[str, set[float]] = {}
    for one in dataset.training:
        found.setdefault(one.ranked.labeler, set()).add(one.ranked.weight)
    return found


def test_comparisons_weigh_as_their_labeler_is_trusted() -> None:
    dataset = build(log(*crowd()), [], ENCODER, SETTINGS)
    found = weights_of(dataset)
    assert found.pop("inverts") == {0.0}
    assert all(len(each) == 1 and min(each) > PRIOR_WEIGHT for each in found.values())
    assert {name: dataset.counts[name] for name in ("labelers", "labelers_trusted_less", "labelers_not_trusted")} == {
        "labelers": 5,
        "labelers_trusted_less": 1,
        "labelers_not_trusted": 1,
    }
    assert dataset.counts["comparisons_not_trusted"] == 80
    off = build(log(*crowd()), [], ENCODER, SETTINGS.model_copy(update={"labeler_weights": False}))
    assert set().union(*weights_of(off).values()) == {1.0}
    assert {one.ranked.group for one in off.training} == {one.ranked.group for one in dataset.training}


def test_labelers_nobody_checks_weigh_the_same() -> None:
    alone = [comparison(f"q{number}", labeler=f"L-{number % 7}") for number in range(70)]
    dataset = build(log(*alone), [], ENCODER, SETTINGS)
    everything = set().union(*weights_of(dataset).values())
    assert max(everything) - min(everything) < 1e-9
    assert (dataset.counts["labelers"], dataset.counts["labelers_trusted_less"]) == (7, 0)


def test_controls_measure_labelers_and_are_not_learnt_from() -> None:
    asked = [comparison(f"q{number}", labeler=f"L-{number % 2}") for number in range(60)]
    known = [
        comparison(f"golden {number}", labeler="operator").model_copy(update={"metadata": {"golden": "true"}})
        for number in range(20)
    ]
    shown = {"source": "task", "metadata": {}}
    checks = [
        one.model_copy(update=shown | {"id": f"{one.id}-0", "labeler": "L-0", "task_id": one.id}) for one in known
    ]
    wrong = {"labeler": "L-1", "ranking": ((1,), (0,))}
    checks += [one.model_copy(update=wrong | {"id": f"{one.id}-1", "task_id": f"{one.id}-1"}) for one in checks]
    dataset = build(log(*asked, *known, *checks), [], ENCODER, SETTINGS)
    assert len(dataset.training) + len(dataset.held_out) == 60
    assert (dataset.counts["golden"], dataset.counts["superseded"]) == (60, 0)
    found = weights_of(dataset)
    assert min(found["L-0"]) > PRIOR_WEIGHT and found["L-1"] == {0.0}
    prompts = [*dataset.prompt_ids, *dataset.held_out_prompt_ids]
    assert not any("golden" in TOKENIZER.decode(list(prompt)) for prompt in prompts)
    assert {one.prompt_ids for one in dataset.anchors_ranked} == {ids(f"golden {number}") for number in range(20)}


# --- split


def test_few_principals_are_split_by_prompt() -> None:
    everything = [judged(f"{i}-0", group=f"g{i % 100}", principal=f"p{i % 2}") for i in range(400)]
    training, held_out = split(everything, 0.25)
    assert len(training) + len(held_out) == 400
    assert {one.ranked.group for one in training}.isdisjoint(one.ranked.group for one in held_out)
    assert 10 <= len({one.ranked.group for one in held_out}) <= 40
    assert split(everything[::-1], 0.25)[1] == held_out[::-1], "a side depends on the prompt alone"


def test_many_principals_are_split_by_principal_and_shared_prompts_are_not_measured_on() -> None:
    everything = [judged(f"{i}-0", group=f"own {i}", principal=f"p{i % 50}") for i in range(500)]
    everything += [judged(f"{500 + i}-0", group="shared", principal=f"p{i}") for i in range(50)]
    training, held_out = split(everything, 0.25)
    assert {one.principal for one in training}.isdisjoint(one.principal for one in held_out)
    assert "shared" in {one.ranked.group for one in training}
    assert "shared" not in {one.ranked.group for one in held_out}
    assert 5 <= len({one.principal for one in held_out}) <= 22


def test_where_the_split_by_principal_leaves_nothing_to_measure_on_it_is_by_prompt() -> None:
    many = [judged(f"{i}-0", group=f"own {i}", principal=f"p{i}") for i in range(100)]
    learning, measured = (sorted({one.principal for one in side}) for side in split(many, 0.25))
    everything = [judged(f"{i}-0", group=f"g{i % 100}", principal=learning[i % 12]) for i in range(400)]
    training, held_out = split(everything, 0.25)
    assert {one.ranked.group for one in training}.isdisjoint(one.ranked.group for one in held_out)
    assert 10 <= len({one.ranked.group for one in held_out}) <= 40
    tie = Judged("400-0", (measured[0],), RankedPrompt((2,), ((3,), (4,)), (), group="tie"))
    assert any(one.ranked.pairs for one in split([*everything, tie], 0.25)[1])


# --- refit


def test_a_refit_sees_everything_fresh_and_as_much_of_the_first_again() -> None:
    old = [judged(f"{i}-0", group=f"old {i}") for i in range(100)]
    fresh = [judged(f"{1000 + i}-0", group=f"new {i}") for i in range(30)]
    seen = [ranked.group for ranked in with_replay([*old, *fresh], "99-0", seed=1)]
    assert seen[:30] == [f"new {i}" for i in range(30)]
    assert len(seen) == len(set(seen)) == 60
    assert seen == [ranked.group for ranked in with_replay([*old, *fresh], "99-0", seed=1)]
    assert seen != [ranked.group for ranked in with_replay([*old, *fresh], "99-0", seed=2)]
    assert len(with_replay([*old[:5], *fresh], "99-0", seed=1)) == 35, "not more than there are"


# --- prompts


def asked_by(*prompts: tuple[str, tuple[int, ...]]) -> list[Asked]:
    return [Asked((principal,), prompt_ids) for principal, prompt_ids in prompts]


@given(st.lists(st.tuples(st.sampled_from("ab"), st.tuples(st.integers(0, 9))), max_size=60), st.integers(1, 5))
def test_ppo_prompts_are_distinct_and_bounded_where_principals_share(
    asked: list[tuple[str, tuple[int, ...]]], most: int
) -> None:
    settings = SETTINGS.model_copy(update={"max_prompts_per_principal": most})
    prompts = [one.prompt_ids for one in ppo_prompts(asked_by(*asked), settings)]
    assert len(prompts) == len(set(prompts))
    principals = {principal for principal, _ in asked}
    if len(principals) < 2:
        assert set(prompts) == {ids for _, ids in asked}
    else:
        assert len(prompts) <= most * len(principals)
        assert asked[-1][1] in prompts, "the newest is never the one left out"


def test_prompts_that_need_not_be_distinct_keep_the_mix_of_the_asking() -> None:
    asked = asked_by(("ann", (1,)), ("ann", (2,)), ("ann", (1,)), ("ann", (3,)))
    settings = SETTINGS.model_copy(update={"max_prompts_per_principal": 2, "distinct_prompts": False})
    assert [one.prompt_ids for one in ppo_prompts(asked, settings)] == [(1,), (2,), (1,), (3,)]
    shared = ppo_prompts([*asked, *asked_by(("bob", (1,)))], settings)
    assert [(one.principals, one.prompt_ids) for one in shared] == [
        (("ann",), (1,)),
        (("ann",), (3,)),
        (("bob",), (1,)),
    ]


def test_the_bound_is_on_who_asked_not_on_who_judged() -> None:
    settings = SETTINGS.model_copy(update={"max_prompts_per_principal": 2})
    asked = [Asked(("labelers", f"customer {number % 4}"), (number,)) for number in range(40)]
    prompts = [one.prompt_ids[0] for one in ppo_prompts(asked, settings)]
    assert sorted(prompts) == list(range(32, 40)), "the two newest of each customer"


def test_a_template_that_is_filled_in_again_and_again_is_one_prompt() -> None:
    compared = [comparison(f"q{i}") for i in range(40)]
    texts = [*(f"write me a poem about my cat {i}" for i in range(9)), "write me a note"]
    pool = [PooledPrompt(principal="ann", prompt=Prompt(text=text)) for text in texts]
    settings = SETTINGS.model_copy(update={"shared_prefix_tokens": 16, "held_out_fraction": 0.2})
    encoder = Encoder(TOKENIZER, "same", window=60, max_completion_tokens=10)

    def stored(shared_prefix_tokens: int) -> int:
        chosen = settings.model_copy(update={"shared_prefix_tokens": shared_prefix_tokens})
        prompts = build(log(*compared), pool, encoder, chosen).prompt_ids
        return sum(TOKENIZER.decode(list(prompt)).startswith("write me a poem") for prompt in prompts)

    assert (stored(16), stored(64)) == (1, stored(0))
    assert stored(0) > 4, "all but those held out"


def test_the_task_of_a_prompt_is_what_its_metadata_says() -> None:
    def of_task(number: int) -> Comparison:
        named = comparison(f"q{number}")
        return named.model_copy(update={"metadata": {"task": f"t{number % 3}"}}) if number % 4 else named

    dataset = build(log(*map(of_task, range(40))), [], ENCODER, SETTINGS)
    for asked in (*dataset.prompts, *dataset.held_out_prompts):
        number = int(TOKENIZER.decode(list(asked.prompt_ids))[1:])
        assert asked.task == (f"t{number % 3}" if number % 4 else "")
    assert set(dataset.prompt_tasks or ()) == {"t0", "t1", "t2", "other"}
    assert build(log(*(comparison(f"q{i}") for i in range(40))), [], ENCODER, SETTINGS).prompt_tasks is None


def test_a_record_remembers_whose_erasure_takes_it_along() -> None:
    theirs = [
        comparison(f"q{i}", principal="ann").model_copy(update={"prompt": Prompt(text=f"q{i}", asked_by="bob")})
        for i in range(40)
    ]
    dataset = build(log(*theirs), [], ENCODER, SETTINGS)
    judged, asked = (*dataset.training, *dataset.held_out), (*dataset.prompts, *dataset.held_out_prompts)
    assert {one.principals for one in judged} == {one.principals for one in asked} == {("ann", "bob")}


def test_prompts_with_personal_data_are_measured_on_but_not_trained_on() -> None:
    compared = [comparison(f"mail q{i}@a.example" if i % 2 else f"q{i}") for i in range(80)]
    pool = [PooledPrompt(principal="ann", prompt=Prompt(text=f"call (415) 555-01{i}")) for i in range(10, 40)]
    dataset = build(log(*compared), pool, ENCODER, SETTINGS)
    trained_on = [*dataset.prompt_ids, *(one.ranked.prompt_ids for one in dataset.training)]
    texts = {TOKENIZER.decode(list(prompt)) for prompt in trained_on}
    assert not any("@" in text or "call" in text for text in texts) and len(texts) > 20
    assert any("@" in TOKENIZER.decode(list(prompt)) for prompt in dataset.held_out_prompt_ids)
    mailed = 40 - sum("@" in TOKENIZER.decode(list(prompt)) for prompt in dataset.held_out_prompt_ids)
    assert dataset.counts["personal_data"] > mailed
    kept = build(log(*compared), pool, ENCODER, SETTINGS.model_copy(update={"leave_out_personal_data": False}))
    assert "personal_data" not in kept.counts and len(kept.training) == len(dataset.training) + mailed


# --- the whole


def test_a_dataset_of_a_mixed_log() -> None:
    compared = [comparison(f"q{i}", "good", "meh", "bad") for i in range(40)]
    tied = comparison("tie").model_copy(update={"ranking": ((0, 1),)})
    too_long = comparison("x" * 60)
    shown = Demonstration(
        id="dem_1", created=0.0, principal="ann", labeler="L-1", prompt=Prompt(text="show"), completion="so"
    )
    original = Candidate(text="wrong")
    correcting = shown.model_copy(update={"id": "dem_2", "prompt": Prompt(text="fix"), "corrects": original})
    texts = [*(f"pool {i}" for i in range(20)), "y" * 35, "q1"]
    pool = [PooledPrompt(principal="ann", prompt=Prompt(text=text)) for text in texts]
    dataset = build(log(*compared, compared[0], tied, too_long, shown, correcting), pool, ENCODER, SETTINGS)

    assert dataset.counts["superseded"] == 1
    assert dataset.counts["unencodable"] == 1
    assert set(dataset.demonstrated) == {(ids("show"), (*ids("so"), EOS)), (ids("fix"), (*ids("so"), EOS))}
    everything = [one.ranked for one in (*dataset.training, *dataset.held_out)]
    by_prompt = {ranked.prompt_ids: ranked for ranked in everything}
    assert len(everything) == 42
    assert by_prompt[ids("q7")].pairs == ((0, 1), (0, 2), (1, 2))
    assert by_prompt[ids("q7")].completions[2] == (*ids("bad"), EOS)
    assert by_prompt[ids("tie")].pairs == ()
    assert by_prompt[ids("fix")].completions == ((*ids("so"), EOS), (*ids("wrong"), EOS))
    assert by_prompt[ids("fix")].pairs == ((0, 1),)

    prompts, held_out = dataset.prompt_ids, dataset.held_out_prompt_ids
    assert set(prompts).isdisjoint(held_out)
    assert {ranked.prompt_ids for ranked in dataset.held_out_ranked} == set(held_out)
    assert any(prompt in prompts for prompt in map(ids, (f"pool {i}" for i in range(20))))
    assert ids("y" * 35) not in prompts, "it fits the window, but leaves no room to complete it"
    assert [position(one.stream_id) for one in dataset.training] == sorted(
        position(one.stream_id) for one in dataset.training
    )


def test_of_many_stored_prompts_the_newest_are_sampled_from() -> None:
    compared = [comparison(f"q{i}", principal="ann") for i in range(40)]
    pool = [PooledPrompt(principal="bob", prompt=Prompt(text=f"pool {i}")) for i in range(40)]  # the newest first
    few = SETTINGS.model_copy(update={"max_prompts_per_principal": 5})
    prompts = build(log(*compared), pool, ENCODER, few).prompt_ids
    of_bob = [i for i in range(40) if ids(f"pool {i}") in prompts]
    assert len(of_bob) == 5 and max(of_bob) < 12, "but for those held out, the first five"


def test_a_log_without_pairs_is_refused_with_what_to_do() -> None:
    with pytest.raises(DatasetUnusable, match="more are needed"):
        build([], [], ENCODER, SETTINGS)
    with pytest.raises(DatasetUnusable, match="of several prompts"):
        build(log(comparison("only one prompt")), [], ENCODER, SETTINGS)
