from typing import Literal

import pytest

from deploy.arms import ArmFigures
from deploy.guard import decide
from deploy.release import Release, ReplicaReport
from deploy.settings import DeploySettings
from deploy.verdict import TaskDrop, Verdict

TRIAL = Release(stable=1, canary=2, canary_fraction=0.1, generation=5)
FINE = ArmFigures(requests=500, timed=500, completions=500)
FAILING = ArmFigures(requests=500, errors=200, timed=500, completions=500)
AutoPromote = Literal["off", "better", "non_inferior"]


def settings(auto_promote: AutoPromote = "off", *, auto_rollback: bool = True) -> DeploySettings:
    return DeploySettings(auto_promote=auto_promote, auto_rollback=auto_rollback)


def verdict(decision: str, **changes: object) -> Verdict:
    return Verdict.model_validate({"decision": decision, "wins": 30, "comparisons": 40, "ties": 3} | changes)


def server(name: str = "a", **changes: object) -> ReplicaReport:
    report = ReplicaReport(replica=name, generation=5, wanted=5, live=(1, 2), arms={1: FINE, 2: FINE})
    return report.model_copy(update=changes)


def verb(release: Release, found: Verdict, replicas: list[ReplicaReport], given: DeploySettings) -> str | None:
    action = decide(release, found, replicas, given)
    return action.verb if action else None


def test_a_worse_canary_is_dropped_at_once_with_its_figures_as_the_reason() -> None:
    action = decide(TRIAL, verdict("worse", wins=10), [server()], settings())
    assert action is not None and action.verb == "rollback"
    assert "the canary is worse: 40 blind comparisons without a tie (10 for the canary), 3 ties" in action.reason


@pytest.mark.parametrize(
    ("auto_promote", "decision", "expected"),
    [
        ("off", "better", None),
        ("off", "not_worse", None),
        ("better", "better", "promote"),
        ("better", "not_worse", None),
        ("non_inferior", "better", "promote"),
        ("non_inferior", "not_worse", "promote"),
        ("non_inferior", "undecided", None),
        ("non_inferior", "worse", "rollback"),
    ],
)
def test_what_is_promoted_is_the_operators_choice(
    auto_promote: AutoPromote, decision: str, expected: str | None
) -> None:
    assert verb(TRIAL, verdict(decision), [server()], settings(auto_promote)) == expected


def test_a_canary_that_must_be_better_or_is_held_waits_for_the_operator() -> None:
    eager = settings("non_inferior")
    assert verb(TRIAL, verdict("not_worse", must_be_better=True), [], eager) is None
    assert verb(TRIAL, verdict("better", must_be_better=True), [], eager) == "promote"
    assert verb(TRIAL, verdict("better", held=True), [], eager) is None
    down = TaskDrop(task="copy", wins=1, losses=20)
    assert verb(TRIAL, verdict("undecided", tasks_down=(down,)), [], eager) is None


def test_without_a_canary_there_is_nothing_to_decide() -> None:
    assert decide(Release(stable=1, generation=5), Verdict(), [server()], settings("non_inferior")) is None


def test_a_canary_that_runs_badly_is_dropped_before_people_have_spoken() -> None:
    hit = server(arms={1: FINE, 2: FAILING})
    action = decide(TRIAL, verdict("better"), [hit], settings("better"))
    assert action is not None and action.verb == "rollback" and "requests failed: 200 of 500" in action.reason
    assert verb(TRIAL, Verdict(), [server(arms={1: FAILING, 2: FAILING})], settings()) is None


def test_figures_are_summed_over_servers_of_this_generation() -> None:
    few = ArmFigures(requests=30, errors=30)
    one, two = server("a", arms={1: FINE, 2: few}), server("b", arms={1: FINE, 2: few})
    assert verb(TRIAL, Verdict(), [one], settings()) is None, "30 requests are too few"
    assert verb(TRIAL, Verdict(), [one, two], settings()) == "rollback"
    assert verb(TRIAL, Verdict(), [one, two.model_copy(update={"generation": 4})], settings()) is None


def test_a_canary_that_no_server_can_load_is_dropped_with_the_engines_words() -> None:
    why = "version 2 does not reproduce canary prompt 0 of its manifest"
    failed = server("a", live=(1,), failed={2: why})
    action = decide(TRIAL, Verdict(), [failed], settings())
    assert action is not None and action.verb == "rollback" and why in action.reason
    other_failed, other_serves = server("b", live=(1,), failed={2: why}), server("b")
    other_loads = server("b", live=(1,), loading=(2,))
    assert verb(TRIAL, Verdict(), [failed, other_failed], settings()) == "rollback"
    assert verb(TRIAL, Verdict(), [failed, other_serves], settings()) is None, "one machine is ill, not the version"
    assert verb(TRIAL, Verdict(), [failed, other_loads], settings()) is None
    assert verb(TRIAL, Verdict(), [server(live=(1,))], settings()) is None, "nobody has tried yet"
    before = failed.model_copy(update={"wanted": 4})
    assert verb(TRIAL, Verdict(), [before], settings()) is None, "that was another canary's failure"
    assert verb(TRIAL, Verdict(), [failed, before.model_copy(update={"failed": {}})], settings()) is None


def test_nothing_is_rolled_back_where_the_operator_wants_to_do_it() -> None:
    careful = settings("better", auto_rollback=False)
    failed = server("a", live=(1,), failed={2: "bad"})
    assert verb(TRIAL, verdict("worse"), [failed], careful) is None
    assert verb(TRIAL, verdict("better"), [server()], careful) == "promote"
