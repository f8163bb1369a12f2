"""Moving the release over HTTP: what an operator's page and scripts do, with a real registry and a real Redis."""

from collections.abc import AsyncIterator
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, get_args

import httpx2
import pytest
from any_key import AnyKey
from fastapi import FastAPI
from httpx2 import ASGITransport, AsyncClient

from deploy import release as transitions
from deploy.gate import GateCheck, GateReport
from deploy.guard import Guard
from deploy.registry import Registry, ReleaseStore
from deploy.release import ReplicaReport
from deploy.settings import DeploySettings
from deploy.versions import Draft, VersionKind
from feedback.settings import FeedbackSettings
from feedback.store import FeedbackStore
from serve.auth import OperatorPrincipal
from serve.error_response import add_error_handlers

# vLLM's own; it is imported inside a test (by serve.services), where warnings are errors.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")


@pytest.fixture
async def releases(redis_url: str, state_dir: Path, tmp_path: Path) -> AsyncIterator[ReleaseStore]:
    """Version 1 is stable, version 2 passed its gate, version 3 did not."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"weights")
    registry = Registry(state_dir)
    registry.publish(Draft(kind=VersionKind.POLICY), model)
    for passed in (True, False):
        check = GateCheck(name="eos_share", passed=passed, value=0.9, limit=0.95, sentence="eos_share is 0.9")
        registry.publish(Draft(kind=VersionKind.POLICY, parent=1, gate=GateReport.of([check])), model)
    store = ReleaseStore.connect(redis_url, state_dir)
    await store.change(partial(transitions.first, number=1), verb="first", by="test", reason="")
    yield store
    await store.close()


@pytest.fixture
async def http(releases: ReleaseStore, redis_url: str, state_dir: Path) -> AsyncIterator[AsyncClient]:
    from serve import release_routes
    from serve.services import Services

    store = FeedbackStore.connect(redis_url, FeedbackSettings())
    parts: dict[str, Any] = dict.fromkeys(field.name for field in fields(Services))
    parts |= {"deploy_settings": DeploySettings(), "registry": Registry(state_dir), "releases": releases}
    parts |= {"store": store, "access": AnyKey(), "guard": Guard("a", releases, store, DeploySettings())}
    app = FastAPI()
    app.state.services = Services(**parts)
    add_error_handlers(app)
    app.include_router(release_routes.router)
    app.dependency_overrides[get_args(OperatorPrincipal)[1].dependency] = lambda: "olga"
    async with AsyncClient(transport=ASGITransport(app), base_url="http://server") as client:
        yield client
    await store.close()


def refusal(answer: httpx2.Response, status: int) -> str:
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}
    return str(answer.json()["error"]["message"])


async def post(http: AsyncClient, verb: str, generation: object, **body: object) -> httpx2.Response:
    headers = {} if generation is None else {"If-Match": str(generation)}
    return await http.post(f"/v1/release/{verb}", json=body, headers=headers)


async def test_the_whole_way_there_and_back(http: AsyncClient, releases: ReleaseStore) -> None:
    now = await http.get("/v1/release")
    assert (now.json()["stable"], now.json()["canary"], now.json()["verdict"]) == (1, None, None)
    began = await post(http, "canary", now.headers["ETag"], version=2, fraction=0.1, reason="a try")
    assert (began.status_code, began.json()["canary"], began.json()["by"]) == (200, 2, "olga")
    assert began.headers["ETag"] == '"2"'
    assert "undecided" in (await http.get("/v1/release")).json()["verdict"]["said"]
    assert "undecided" in refusal(await post(http, "promote", 2), 409)
    promoted = await post(http, "promote", 2, override="olga knows")
    assert (promoted.json()["stable"], promoted.json()["previous"], promoted.json()["canary"]) == (2, 1, None)
    returned = await post(http, "rollback", 3, reason="it shouts")
    assert (returned.json()["stable"], returned.json()["generation"]) == (1, 4)
    said = [(one.verb, one.by, one.outcome.split(":")[0]) for one in await releases.history()]
    assert said[:4] == [
        ("rollback", "olga", "accepted"),
        ("promote", "olga", "accepted"),
        ("promote", "olga", "refused"),
        ("canary", "olga", "accepted"),
    ]
    assert (await releases.history())[1].reason.endswith("override: olga knows")


async def test_a_stale_generation_is_412_and_changes_nothing(http: AsyncClient, releases: ReleaseStore) -> None:
    assert (await post(http, "canary", 1, version=2, fraction=0.1)).status_code == 200
    for verb, body in (("canary", {"version": 2, "fraction": 0.2}), ("promote", {"override": "x"}), ("rollback", {})):
        assert "generation 2, not 1" in refusal(await post(http, verb, 1, **body), 412)
    assert (await releases.read()).generation == 2


async def test_of_two_operators_one_is_told_that_the_release_moved_on(http: AsyncClient) -> None:
    first = await post(http, "canary", 1, version=2, fraction=0.1)
    second = await post(http, "canary", 1, version=3, fraction=0.1, override="mine")
    assert (first.status_code, second.status_code) == (200, 412)


@pytest.mark.parametrize("generation", [None, "", "*", "one", '"1", "2"', 'W/"1"', "-1"])
async def test_a_change_must_name_one_generation(http: AsyncClient, generation: str | None) -> None:
    answer = await post(http, "canary", generation, version=2, fraction=0.1)
    message = refusal(answer, 428 if generation is None else 400)
    assert "If-Match" in message


async def test_what_the_gate_refused_gets_no_traffic(http: AsyncClient) -> None:
    assert "eos_share is 0.9" in refusal(await post(http, "canary", 1, version=3, fraction=0.1), 409)
    assert "no policy version 9" in refusal(await post(http, "canary", 1, version=9, fraction=0.1), 409)
    assert "fraction" in refusal(await post(http, "canary", 1, version=2, fraction=0.6), 400)
    assert "neither a canary" in refusal(await post(http, "rollback", 1), 409)


async def test_a_damaged_version_gets_no_traffic_whatever_the_operator_says(http: AsyncClient, state_dir: Path) -> None:
    weights = state_dir / "policies/2/model.safetensors"
    weights.chmod(0o600)
    weights.write_bytes(b"wejghts")
    refused = await post(http, "canary", 1, version=2, fraction=0.1, override="go on")
    assert "sha256" in refusal(refused, 409)


async def test_servers_are_shown_with_how_far_they_are(http: AsyncClient, releases: ReleaseStore) -> None:
    await releases.report(ReplicaReport(replica="a", generation=1, live=(1,)))
    await releases.report(ReplicaReport(replica="b", generation=0, live=()))
    shown = (await http.get("/v1/release")).json()["replicas"]
    assert [(one["replica"], one["converged"]) for one in shown] == [("a", True), ("b", False)]
