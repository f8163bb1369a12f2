"""What operators see of versions, people's preferences and the audit log, over a real registry and a real Redis."""

import json
from collections.abc import AsyncIterator, Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, get_args
from xml.etree import ElementTree

import httpx2
import pytest
from fastapi import FastAPI
from httpx2 import ASGITransport, AsyncClient

from deploy import release as transitions
from deploy.arms import ArmFigures
from deploy.errors import TransitionRefused
from deploy.gate import GateCheck, GateReport
from deploy.registry import Registry, ReleaseStore
from deploy.release import Attempt, Release, ReplicaReport
from deploy.settings import DeploySettings
from deploy.versions import Draft, VersionKind
from feedback.records import Candidate, Comparison, new_id
from feedback.settings import FeedbackSettings
from feedback.store import FeedbackStore
from serve.auth import OperatorPrincipal
from serve.error_response import add_error_handlers

# vLLM's own; it is imported inside a test (by serve.services), where warnings are errors.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")


class Operated:
    """The routes, and what stands behind them."""

    def __init__(self, http: AsyncClient, releases: ReleaseStore, feedback: FeedbackStore, state: Path) -> None:
        self.http = http
        self.releases = releases
        self.feedback = feedback
        self.state = state

    async def get(self, path: str) -> Any:
        answer = await self.http.get(f"/v1/release/{path}")
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    async def change(self, transition: Callable[[Release], Release], verb: str) -> Release:
        return await self.releases.change(transition, verb=verb, by="olga", reason="")

    async def canary(self, number: int) -> Release:
        return await self.change(partial(transitions.canary, number=number, fraction=0.1), "canary")


@pytest.fixture
async def operated(redis_url: str, state_dir: Path, tmp_path: Path) -> AsyncIterator[Operated]:
    """Versions 1 (stable), 2 and 3; the third did not pass its gate."""
    from serve import release_views
    from serve.services import Services

    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"weights")
    registry = Registry(state_dir)
    registry.publish(Draft(kind=VersionKind.POLICY), model)
    for parent, passed in ((1, True), (2, False)):
        check = GateCheck(name="eos_share", passed=passed, value=0.9, limit=0.95, sentence="eos_share is 0.9")
        registry.publish(Draft(kind=VersionKind.POLICY, parent=parent, gate=GateReport.of([check])), model)
    releases = ReleaseStore.connect(redis_url, state_dir)
    feedback = FeedbackStore.connect(redis_url, FeedbackSettings())
    parts: dict[str, Any] = dict.fromkeys(field.name for field in fields(Services))
    parts |= {"deploy_settings": DeploySettings(), "registry": registry, "releases": releases, "store": feedback}
    app = FastAPI()
    app.state.services = Services(**parts)
    add_error_handlers(app)
    app.include_router(release_views.router)
    app.dependency_overrides[get_args(OperatorPrincipal)[1].dependency] = lambda: "olga"
    async with AsyncClient(transport=ASGITransport(app), base_url="http://server") as http:
        running = Operated(http, releases, feedback, state_dir)
        await running.change(partial(transitions.first, number=1), "first")
        yield running
    await feedback.close()
    await releases.close()


@pytest.fixture
def judge(operated: Operated, make_comparison: Callable[..., Comparison]) -> Callable[..., Any]:
    """Appends blind comparisons of two versions: so many that the first won, and so many that it lost."""

    async def append(version: int, over: int, wins: int, losses: int = 0) -> list[Comparison]:
        given = []
        for place in range(wins + losses):
            both = tuple(Candidate(completion_id=new_id("cmpl-"), policy_version=v, text="x") for v in (version, over))
            ranking = ((0,), (1,)) if place < wins else ((1,), (0,))
            task = {"source": "task", "task_id": new_id("task_")}
            given.append(make_comparison(candidates=both, ranking=ranking, **task))
            await operated.feedback.append(given[-1])
        return given

    return append


async def test_versions_are_told_with_what_is_known_of_them(operated: Operated) -> None:
    release = await operated.canary(2)
    slower = (90, 50, 5, 5, 0, 0, 0, 0)
    for name, requests in (("a", 10), ("b", 90)):
        figures = ArmFigures(requests=requests, errors=1, timed=50, slower=tuple(n // 2 for n in slower))
        report = ReplicaReport(replica=name, generation=release.generation, live=(1, 2), arms={2: figures})
        await operated.releases.report(report)
    stale = ReplicaReport(replica="c", generation=1, live=(1,), arms={2: ArmFigures(requests=1000)})
    await operated.releases.report(stale)
    told = await operated.get("versions")
    assert [(one["version"], one["role"], one["parent"]) for one in told] == [
        (3, None, 2),
        (2, "canary", 1),
        (1, "stable", None),
    ]
    assert [one["gate"] and one["gate"]["passed"] for one in told] == [False, True, None]
    assert told[0]["traffic"] is None
    assert (told[1]["traffic"]["requests"], told[1]["traffic"]["errors"]) == (100, 2)
    # Of 100 first tokens 50 came within 0.1 s, and 96 within 0.25 s.
    assert (told[1]["traffic"]["first_token_p50"], told[1]["traffic"]["first_token_p95"]) == (0.1, 0.25)
    assert (told[2]["traffic"]["requests"], told[2]["traffic"]["first_token_p50"]) == (0, None)


async def test_the_newest_versions_are_told_and_those_that_serve(operated: Operated) -> None:
    assert [one["version"] for one in await operated.get("versions?count=1")] == [3, 1]
    refused = await operated.http.get("/v1/release/versions?count=0")
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "count"


async def test_a_version_that_cannot_be_believed_is_told_as_such(operated: Operated) -> None:
    manifest = operated.state / "policies/2/manifest.json"
    manifest.chmod(0o600)
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"parent": 3}) + "}")
    damaged = (await operated.get("versions"))[1]
    assert damaged["version"] == 2 and damaged["problem"] and damaged["gate"] is None


async def test_the_log_is_told_newest_first_with_what_was_refused(operated: Operated) -> None:
    with pytest.raises(TransitionRefused):
        await operated.change(transitions.promote, "promote")
    told = await operated.get("history")
    assert [(one["verb"], one["outcome"]) for one in told] == [
        ("promote", "refused: there is no canary to promote"),
        ("first", "accepted"),
    ]
    assert told[0]["created"] >= told[1]["created"] > 1.7e9
    assert len(await operated.get("history?count=1")) == 1


async def test_win_rates_of_what_was_released(operated: Operated, judge: Callable[..., Any]) -> None:
    await judge(2, 1, 9, 1)  # before it was the canary: counts for the version, not for the verdict
    await operated.canary(2)
    await judge(2, 1, 3, 1)
    (canary,) = await operated.get("win-rates")
    assert (canary["version"], canary["over"], canary["wins"], canary["losses"]) == (2, 1, 3, 1)
    await operated.change(transitions.promote, "promote")
    (promoted,) = await operated.get("win-rates")
    assert (promoted["wins"], promoted["losses"], promoted["rate"]) == (12, 2, pytest.approx(12 / 14))
    assert 0.5 < promoted["low"] < 12 / 14 < promoted["high"] < 1
    await operated.canary(3)
    told = await operated.get("win-rates")
    assert [(one["version"], one["over"], one["wins"]) for one in told] == [(2, 1, 12), (3, 2, 0)]
    assert (told[1]["rate"], told[1]["low"], told[1]["high"]) == (None, 0, 1)


async def test_an_older_version_that_comes_back_is_told_from_its_own_side(
    operated: Operated, judge: Callable[..., Any]
) -> None:
    await operated.canary(3)
    await operated.change(transitions.promote, "promote")
    await judge(2, 3, 5, 2)
    await operated.canary(2)
    await operated.change(transitions.promote, "promote")
    (told,) = await operated.get("win-rates")
    assert (told["version"], told["over"], told["wins"], told["losses"]) == (2, 3, 5, 2)


def test_only_what_became_stable_by_promotion_is_a_step() -> None:
    from serve.win_rates import steps

    def attempt(at: int, verb: str, stable: int | None, outcome: str = "accepted") -> Attempt:
        return Attempt(stream_id=f"{at}000-0", verb=verb, by="", reason="", outcome=outcome, stable=stable)

    history = [
        attempt(7, "canary", 1),
        attempt(6, "publish", None),
        attempt(5, "rollback", 1),
        attempt(4, "promote", None, "refused: there is no canary to promote"),
        attempt(3, "promote", 2),
        attempt(2, "canary", 1),
        attempt(1, "first", 1),
    ]
    found = steps(history, Release(stable=1, canary=3, changed_at=7.5))
    assert [(one.version, one.over, one.since) for one in found] == [(2, 1, 3.0), (3, 1, 7.5)]


async def svg(answer: httpx2.Response) -> ElementTree.Element:
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("image/svg+xml")
    return ElementTree.fromstring(answer.content)


async def test_plots_are_drawings_and_nothing_else(operated: Operated, judge: Callable[..., Any]) -> None:
    for path in ("canary", "released"):
        answer = await operated.http.get(f"/v1/release/plots/{path}.svg")
        assert answer.status_code == (404 if path == "canary" else 200)
    await operated.canary(2)
    empty = await operated.http.get("/v1/release/plots/canary.svg")
    await judge(2, 1, 12, 4)
    drawn = await operated.http.get("/v1/release/plots/canary.svg")
    assert drawn.content != empty.content
    for answer in (empty, drawn, await operated.http.get("/v1/release/plots/released.svg")):
        tags = {element.tag.rpartition("}")[2] for element in (await svg(answer)).iter()}
        assert not tags & {"script", "foreignObject", "image", "a", "text"}
        assert b"prefers-color-scheme: dark" in answer.content and b"#01020" not in answer.content


async def test_a_plot_is_drawn_anew_only_for_new_evidence(operated: Operated, judge: Callable[..., Any]) -> None:
    await operated.canary(2)
    (*_, last) = await judge(2, 1, 6, 2)
    path = "/v1/release/plots/canary.svg"
    first, again = [(await operated.http.get(path)).content for _ in range(2)]
    assert first == again  # matplotlib gives every drawing ids of its own
    await operated.feedback.append(last.model_copy(update={"id": new_id("cmp_"), "ranking": ((0,), (1,))}))
    assert (await operated.http.get(path)).content != first  # as many comparisons, but one was taken back
