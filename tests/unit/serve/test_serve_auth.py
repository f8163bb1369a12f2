"""Keys, scopes and rates at the door: the real dependencies on a small app, over a real Redis."""

import itertools
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from fastapi import FastAPI
from httpx2 import ASGITransport, AsyncClient, Response
from redis.asyncio import Redis
from starlette.middleware import Middleware

from feedback.embedded import start_or_join
from feedback.principals import ApiKey, KeyStore, Scope
from feedback.settings import FeedbackSettings
from serve.auth import (
    Access,
    CompletionsPrincipal,
    FeedbackPrincipal,
    NotLoopback,
    OperatorPrincipal,
    Rates,
    is_loopback,
    require_keys,
)
from serve.error_response import add_error_handlers
from serve.metrics import Metrics
from serve.middleware import RequestObserver

UNKNOWN = "ilk_" + "A" * 43


@dataclass
class Parts:
    """What the dependencies need of the services."""

    access: Access
    rates: Rates


class Door:
    """An app with a route for each scope, and the store its keys are in."""

    def __init__(self, redis_url: str, state: Path, *, loopback: bool = True) -> None:
        self.keys = KeyStore.connect(redis_url, FeedbackSettings())
        self.metrics = Metrics()
        self.access = Access(self.keys, loopback=loopback, memory=state / "api-keys.json")
        self.rates = Rates(self.keys, self.metrics)
        app = FastAPI(middleware=[Middleware(RequestObserver, metrics=self.metrics)])
        add_error_handlers(app)
        app.state.services = Parts(self.access, self.rates)

        @app.get("/completions")
        async def completions(principal: CompletionsPrincipal) -> str:
            return principal

        @app.get("/feedback")
        async def feedback(principal: FeedbackPrincipal) -> str:
            return principal

        @app.get("/operator")
        async def operator(principal: OperatorPrincipal) -> str:
            return principal

        self.http = AsyncClient(transport=ASGITransport(app=app), base_url="http://127.0.0.1")

    async def key(self, *scopes: Scope, requests: int | None = None, tokens: int | None = None) -> tuple[str, ApiKey]:
        """A new key of alice's; of all scopes where none is given."""
        return await self.keys.create(
            "alice", scopes or tuple(Scope), requests_per_minute=requests, tokens_per_minute=tokens
        )

    async def get(self, key: str | None = None, path: str = "/completions") -> Response:
        return await self.http.get(path, headers={} if key is None else {"authorization": f"Bearer {key}"})

    async def close(self) -> None:
        await self.http.aclose()
        await self.keys.close()


@pytest.fixture
async def door(redis_url: str, tmp_path: Path) -> AsyncIterator[Door]:
    door = Door(redis_url, tmp_path)
    await door.access.refresh()
    yield door
    await door.close()


@pytest.fixture
async def closed(redis_url: str, tmp_path: Path) -> AsyncIterator[Door]:
    door = Door(redis_url, tmp_path, loopback=False)
    yield door
    await door.close()


@pytest.fixture
async def client(redis_url: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(redis_url) as redis:
        yield redis


def refused(answer: Response, status: int, kind: str, code: str | None) -> None:
    assert answer.status_code == status, answer.text
    assert (answer.json()["error"]["type"], answer.json()["error"]["code"]) == (kind, code)
    assert "ilk_A" not in answer.text


def unauthenticated(answer: Response) -> None:
    refused(answer, 401, "authentication_error", "invalid_api_key")
    assert answer.headers["www-authenticate"] == "Bearer"


async def commands(client: Redis) -> int:
    return int((await client.info("stats"))["total_commands_processed"])


async def test_without_keys_loopback_is_open_and_everyone_is_local(door: Door) -> None:
    for path, key in itertools.product(("/completions", "/feedback", "/operator"), (None, "none", UNKNOWN)):
        answer = await door.get(key, path)
        assert (answer.status_code, answer.json()) == (200, "local")


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost", "LOCALHOST:1", "[::1]:8000", "127.9.9.9"])
async def test_an_open_server_answers_to_loopbacks_names(door: Door, host: str) -> None:
    assert (await door.http.get("/operator", headers={"host": host})).status_code == 200


@pytest.mark.parametrize(
    "host", ["example.org", "127.0.0.1.example.org", "10.0.0.1:8000", "localhost@example.org", "[::1", "", "0.0.0.0"]
)
async def test_an_open_server_answers_to_no_other_name(door: Door, host: str) -> None:
    refused(await door.http.get("/operator", headers={"host": host}), 403, "permission_error", None)


async def test_with_a_key_any_name_will_do(closed: Door) -> None:
    key, _ = await closed.key()
    headers = {"host": "example.org", "authorization": f"bearer  {key} "}
    assert (await closed.http.get("/completions", headers=headers)).json() == "alice"


async def test_beyond_loopback_nobody_gets_in_without_a_key(closed: Door) -> None:
    unauthenticated(await closed.get())
    unauthenticated(await closed.get(UNKNOWN))


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer ", f"Basic {UNKNOWN}", UNKNOWN, f"Bearer {UNKNOWN}x", "Bearer é", f"Bearer {UNKNOWN}"],
)
async def test_what_is_no_key_gets_nobody_in(closed: Door, header: str) -> None:
    await closed.key()
    unauthenticated(await closed.http.get("/completions", headers=[(b"authorization", header.encode("latin-1"))]))


@pytest.mark.parametrize("held", Scope)
@pytest.mark.parametrize("needed", Scope)
async def test_a_key_is_good_for_its_scopes_only(closed: Door, held: Scope, needed: Scope) -> None:
    key, _ = await closed.key(held)
    answer = await closed.get(key, f"/{needed}")
    if held == needed:
        assert (answer.status_code, answer.json()) == (200, "alice")
    else:
        refused(answer, 403, "permission_error", None)
        assert needed in answer.json()["error"]["message"]


async def test_the_first_key_closes_an_open_server(door: Door) -> None:
    key, _ = await door.key()
    await door.access.refresh()
    unauthenticated(await door.get())
    assert (await door.get(key)).json() == "alice"


async def test_a_revoked_key_is_refused_after_the_refresh(closed: Door) -> None:
    (key, kept), (other, _) = await closed.key(), await closed.key()
    assert (await closed.get(key)).status_code == (await closed.get(other)).status_code == 200
    await closed.keys.revoke(kept.id)
    assert (await closed.get(key)).status_code == 200
    await closed.access.refresh()
    unauthenticated(await closed.get(key))
    assert (await closed.get(other)).status_code == 200


async def test_revoking_the_last_key_opens_nothing(door: Door, redis_url: str, tmp_path: Path) -> None:
    _, kept = await door.key()
    await door.keys.revoke(kept.id)
    restarted = Door(redis_url, tmp_path)
    for each in (door, restarted):
        await each.access.refresh()
        unauthenticated(await each.get())
    await restarted.close()


async def test_losing_all_keys_opens_no_running_server(door: Door, client: Redis) -> None:
    key, _ = await door.key()
    await door.access.refresh()
    assert (await door.get(key)).status_code == 200
    await client.flushall()
    await door.access.refresh()
    unauthenticated(await door.get())
    unauthenticated(await door.get(key))


async def test_a_known_key_without_rates_costs_no_round_trip(closed: Door, client: Redis) -> None:
    key, _ = await closed.key()
    await closed.get(key)
    await commands(client)  # connects
    before = await commands(client)
    for _ in range(5):
        answer = await closed.get(key)
    assert not [name for name in answer.headers if name.startswith("x-ratelimit")]
    for junk in (None, "junk", "ilk_junk"):
        await closed.get(junk)
    assert await commands(client) == before + 1  # the INFO itself


async def test_an_open_server_asks_redis_nothing(door: Door, client: Redis) -> None:
    await commands(client)
    before = await commands(client)
    for _ in range(5):
        await door.get()
    assert await commands(client) == before + 1


def rate_headers(answer: Response) -> dict[str, str]:
    return {name: value for name, value in answer.headers.items() if name.startswith("x-ratelimit-")}


def seconds_left(window: str) -> int:
    assert window.endswith("s")
    return int(window[:-1])


async def test_answers_tell_what_is_left(closed: Door) -> None:
    key, _ = await closed.key(requests=10, tokens=100)
    told = rate_headers(await closed.get(key))
    resets = {seconds_left(told.pop(f"x-ratelimit-reset-{what}")) for what in ("requests", "tokens")}
    assert len(resets) == 1 and resets <= set(range(1, 61))
    assert told == {
        "x-ratelimit-limit-requests": "10",
        "x-ratelimit-remaining-requests": "9",
        "x-ratelimit-limit-tokens": "100",
        "x-ratelimit-remaining-tokens": "100",
    }
    only_tokens, _ = await closed.key(tokens=50)
    assert sorted(rate_headers(await closed.get(only_tokens))) == [
        "x-ratelimit-limit-tokens",
        "x-ratelimit-remaining-tokens",
        "x-ratelimit-reset-tokens",
    ]


async def test_the_request_over_the_rate_is_told_when_to_come_back(closed: Door) -> None:
    key, _ = await closed.key(Scope.COMPLETIONS, requests=2)
    refused(await closed.get(key, "/operator"), 403, "permission_error", None)  # counts as nothing
    while 60 - time.time() % 60 < 5:  # all in one minute
        time.sleep(1)
    assert [(await closed.get(key)).status_code for _ in range(2)] == [200, 200]
    answer = await closed.get(key)
    refused(answer, 429, "rate_limit_error", "rate_limit_exceeded")
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert answer.headers["x-ratelimit-remaining-requests"] == "0"
    assert seconds_left(answer.headers["x-ratelimit-reset-requests"]) == int(answer.headers["retry-after"])


async def test_spent_tokens_hold_the_next_request_back(closed: Door) -> None:
    key, _ = await closed.key(tokens=10)
    free, _ = await closed.key()
    await closed.get(free)
    assert not closed.rates.counts_tokens("alice")
    await closed.get(key)
    assert closed.rates.counts_tokens("alice") and not closed.rates.counts_tokens("bob")
    while 60 - time.time() % 60 < 5:
        time.sleep(1)
    await closed.rates.spend("alice", 10)
    refused(await closed.get(key), 429, "rate_limit_error", "rate_limit_exceeded")
    assert (await closed.get(free)).status_code == 200


async def test_with_redis_away_known_keys_go_on(state_dir: Path) -> None:
    redis = start_or_join(state_dir)
    door = Door(redis.url, state_dir, loopback=False)
    (known, _), (rated, _), (unseen, _) = await door.key(), await door.key(requests=1), await door.key()
    assert [(await door.get(key)).status_code for key in (known, rated)] == [200, 200]
    redis.close()
    await door.access.refresh()
    assert [(await door.get(key)).status_code for key in (known, rated, rated)] == [200, 200, 200]
    await door.rates.spend("alice", 1)  # raises nothing
    assert b"instructloop_rates_uncounted_total 3.0" in door.metrics.page()
    answer = await door.get(unseen)
    refused(answer, 503, "overloaded_error", "keys_unavailable")
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    unauthenticated(await door.get("junk"))
    await door.close()


async def test_rates_are_kept_again_once_redis_is_back(state_dir: Path) -> None:
    redis = start_or_join(state_dir)
    door = Door(redis.url, state_dir, loopback=False)
    key, _ = await door.key(requests=1000)
    await door.get(key)
    redis.close()
    assert rate_headers(await door.get(key)) == {}
    with start_or_join(state_dir):
        deadline = time.monotonic() + 10
        while not rate_headers(await door.get(key)):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert rate_headers(await door.get(key))
    await door.close()


async def test_a_silent_redis_holds_few_requests_up(closed: Door, client: Redis) -> None:
    key, _ = await closed.key(requests=1000)
    await closed.get(key)
    await client.client_pause(1500)
    waits = []
    for _ in range(20):
        began = time.perf_counter()
        assert (await closed.get(key)).status_code == 200
        waits.append(time.perf_counter() - began)
    assert 0.4 < waits[0] < 0.8
    assert max(waits[1:]) < 0.1


async def test_before_redis_has_ever_answered_nobody_gets_in(tmp_path: Path) -> None:
    door = Door("redis://127.0.0.1:1", tmp_path)
    await door.access.refresh()
    for key in (None, "junk", UNKNOWN):
        refused(await door.get(key), 503, "overloaded_error", "keys_unavailable")
    await door.close()


async def test_a_server_restarted_while_redis_is_away_knows_what_it_knew(door: Door, tmp_path: Path) -> None:
    async def after_a_restart() -> Door:
        await door.access.refresh()
        again = Door("redis://127.0.0.1:1", tmp_path)
        await again.access.refresh()
        return again

    still_open = await after_a_restart()
    assert (await still_open.get()).json() == "local"
    (seen, _), (unseen, _) = await door.key(), await door.key()
    await door.access.refresh()
    await door.get(seen)
    closed = await after_a_restart()
    unauthenticated(await closed.get())
    assert (await closed.get(seen)).json() == "alice"
    refused(await closed.get(unseen), 503, "overloaded_error", "keys_unavailable")
    remembered = tmp_path / "api-keys.json"
    assert remembered.stat().st_mode & 0o777 == 0o600
    assert seen not in remembered.read_text()
    await still_open.close()
    await closed.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.10", "::1", "localhost"])
async def test_loopback_needs_no_keys(redis_url: str, host: str) -> None:
    assert is_loopback(host)
    keys = KeyStore.connect(redis_url, FeedbackSettings())
    await require_keys(host, keys)
    await keys.close()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "192.168.1.5", "example.org", ""])
async def test_beyond_loopback_a_key_must_have_been_made(redis_url: str, host: str) -> None:
    assert not is_loopback(host)
    keys = KeyStore.connect(redis_url, FeedbackSettings())
    with pytest.raises(NotLoopback, match="keys create"):
        await require_keys(host, keys)
    await keys.create("alice", [Scope.FEEDBACK])
    await require_keys(host, keys)
    await keys.close()


async def test_beyond_loopback_the_server_may_start_while_redis_is_away() -> None:
    keys = KeyStore.connect("redis://127.0.0.1:1", FeedbackSettings())
    await require_keys("0.0.0.0", keys)
    await keys.close()
