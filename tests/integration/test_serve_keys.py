"""Keys on a real server: every route it has, asked without a key, with the wrong one, and with the right one."""

import asyncio
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from running_server import RunningServer, free_port, start_server

from feedback.embedded import EmbeddedRedis, start_or_join
from feedback.principals import KeyStore, Scope
from feedback.settings import FeedbackSettings
from serve.auth import REFRESH_SECONDS

OPEN = {"/health", "/ready", "/metrics", "/version"}
UNKNOWN = "ilk_" + "A" * 43
COMPARISON = {"prompt": "hi", "completions": ["hello", "go away"], "preferred": 0}


@dataclass
class Guarded:
    """A server without a release, which was open until its first key was made."""

    server: RunningServer
    answers_while_open: set[int] = field(default_factory=set)
    closed_after_seconds: float = 0.0
    made: list[str] = field(default_factory=list)
    """The text of every key made here."""

    def key(self, *scopes: Scope, requests: int | None = None, tokens: int | None = None) -> tuple[str, str]:
        """A new key of alice's and its id."""

        async def create(keys: KeyStore) -> tuple[str, str]:
            text, key = await keys.create("alice", scopes, requests_per_minute=requests, tokens_per_minute=tokens)
            return text, key.id

        text, key_id = asyncio.run(self._with_keys(create))
        self.made.append(text)
        return text, key_id

    def revoke(self, key_id: str) -> None:
        asyncio.run(self._with_keys(lambda keys: keys.revoke(key_id)))

    async def _with_keys(self, act: Any) -> Any:
        keys = KeyStore.connect(self.server.redis_url, FeedbackSettings())
        try:
            return await act(keys)
        finally:
            await keys.close()

    def ask(self, method: str, path: str, key: str | None = None) -> httpx2.Response:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        body: dict[str, str] | None = None if method in ("GET", "DELETE") else {}
        return httpx2.request(method, f"{self.server.url}{path}", headers=headers, timeout=30, json=body)

    def operations(self) -> list[tuple[str, str, list[str]]]:
        """Method, path and needed scopes of everything in the server's own OpenAPI document."""
        paths = httpx2.get(f"{self.server.url}/openapi.json").json()["paths"]
        return [
            (
                method.upper(),
                path.replace("{", "").replace("}", ""),
                [s for need in said.get("security", []) for s in need["api_key"]],
            )
            for path, methods in paths.items()
            for method, said in methods.items()
        ]


def wait_for(what: str, seconds: float, happened: Any) -> float:
    began = time.monotonic()
    while not happened():
        assert time.monotonic() - began < seconds, f"{what} took too long"
        time.sleep(0.1)
    return time.monotonic() - began


def answers(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/health").status_code == 200
    except httpx2.TransportError:
        return False


@pytest.fixture(scope="module")
def redis() -> Iterator[EmbeddedRedis]:
    state = Path(tempfile.mkdtemp(prefix="il-"))
    with start_or_join(state) as running:
        yield running
    shutil.rmtree(state)


@pytest.fixture(scope="module")
def guarded(redis: EmbeddedRedis) -> Iterator[Guarded]:
    state = Path(tempfile.mkdtemp(prefix="il-"))
    guarded = Guarded(start_server(state, redis.url))
    try:
        wait_for("the start", 120, lambda: answers(guarded.server.url))
        for method, path, _ in guarded.operations():
            guarded.answers_while_open.add(guarded.ask(method, path).status_code)
        guarded.key(*Scope)
        guarded.closed_after_seconds = wait_for(
            "closing", REFRESH_SECONDS + 2, lambda: guarded.ask("GET", "/v1/feedback/comparisons/x").status_code == 401
        )
        yield guarded
    finally:
        guarded.server.process.terminate()
        guarded.server.process.wait(60)
    shutil.rmtree(state)


def test_the_server_was_open_until_its_first_key(guarded: Guarded) -> None:
    assert not guarded.answers_while_open & {401, 403}
    assert guarded.closed_after_seconds < REFRESH_SECONDS + 1


def test_every_route_but_the_probes_names_one_scope(guarded: Guarded) -> None:
    needed = {(method, path): scopes for method, path, scopes in guarded.operations()}
    assert {path for (_, path), scopes in needed.items() if not scopes} == OPEN
    assert {scope for scopes in needed.values() for scope in scopes} <= set(Scope)
    assert all(len(scopes) == 1 for (_, path), scopes in needed.items() if path not in OPEN)
    assert len(needed) > len(OPEN) + 5


def test_every_route_but_the_probes_needs_a_key(guarded: Guarded) -> None:
    for method, path, _ in guarded.operations():
        for key in (None, UNKNOWN, "nonsense"):
            answer = guarded.ask(method, path, key)
            if path in OPEN:
                assert answer.status_code not in (401, 403), path
                continue
            error = answer.json()["error"]
            assert (answer.status_code, error["type"], error["code"]) == (
                401,
                "authentication_error",
                "invalid_api_key",
            ), path
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.headers["x-request-id"]
            assert UNKNOWN not in answer.text


def test_who_asks_and_in_which_form_is_settled_before_the_body_is_read(guarded: Guarded) -> None:
    key, _ = guarded.key(*Scope)
    posting = [path for method, path, _ in guarded.operations() if method == "POST"]
    assert len(posting) >= 6
    for path in posting:
        url = f"{guarded.server.url}{path}"
        assert httpx2.post(url, content=b"{").status_code == 401, path
        authorized = {"authorization": f"Bearer {key}"}
        for media_type in ("text/plain", "application/x-www-form-urlencoded", "application/jsonp", ""):
            refused = httpx2.post(url, headers=authorized | {"content-type": media_type}, content=b"{")
            assert (refused.status_code, refused.json()["error"]["type"]) == (415, "invalid_request_error"), path
        said = authorized | {"content-type": "application/json; charset=utf-8"}
        assert httpx2.post(url, headers=said, content=b"{").status_code == 400, path


def test_every_route_needs_its_own_scope(guarded: Guarded) -> None:
    without = {scope: guarded.key(*(set(Scope) - {scope}))[0] for scope in Scope}
    with_only = {scope: guarded.key(scope)[0] for scope in Scope}
    for method, path, scopes in guarded.operations():
        for scope in scopes:
            answer = guarded.ask(method, path, without[Scope(scope)])
            assert (answer.status_code, answer.json()["error"]["type"]) == (403, "permission_error"), path
            assert guarded.ask(method, path, with_only[Scope(scope)]).status_code not in (401, 403), path


def test_outside_data_needs_the_operators_scope(guarded: Guarded) -> None:
    labeler, operator = guarded.key(Scope.FEEDBACK)[0], guarded.key(Scope.FEEDBACK, Scope.OPERATOR)[0]
    url = f"{guarded.server.url}/v1/feedback/comparisons"
    refused = httpx2.post(url, json=COMPARISON, headers={"authorization": f"Bearer {labeler}"})
    assert (refused.status_code, refused.json()["error"]["type"]) == (403, "permission_error")
    kept = httpx2.post(url, json=COMPARISON, headers={"authorization": f"Bearer {operator}"})
    assert (kept.status_code, kept.json()["labeler"]) == (201, "alice")


def test_a_revoked_key_stops_working(guarded: Guarded) -> None:
    key, key_id = guarded.key(Scope.FEEDBACK)
    path = "/v1/feedback/comparisons/x"
    assert guarded.ask("GET", path, key).status_code == 404
    guarded.revoke(key_id)
    wait_for("revoking", REFRESH_SECONDS + 2, lambda: guarded.ask("GET", path, key).status_code == 401)


def test_openais_client_understands_every_refusal(guarded: Guarded) -> None:
    url = f"{guarded.server.url}/v1"
    while 60 - time.time() % 60 < 10:  # all in one minute
        time.sleep(1)
    rated = guarded.key(Scope.COMPLETIONS, requests=2, tokens=1000)[0]
    raised: list[type[Exception]] = []
    for key in (UNKNOWN, guarded.key(Scope.FEEDBACK)[0], rated, rated, rated):
        with openai.OpenAI(base_url=url, api_key=key, max_retries=0) as client:
            try:
                client.completions.create(model="policy", prompt="hi")
            except openai.APIStatusError as error:
                raised.append(type(error))
                last = error
    assert raised[:2] == [openai.AuthenticationError, openai.PermissionDeniedError]
    assert raised[2:] == [openai.InternalServerError, openai.InternalServerError, openai.RateLimitError]  # no release
    assert last.code == "rate_limit_exceeded"
    told = dict(last.response.headers)
    assert 1 <= int(told["retry-after"]) <= 60
    assert told["x-ratelimit-reset-requests"] == told["x-ratelimit-reset-tokens"] == f"{told['retry-after']}s"
    assert (told["x-ratelimit-limit-requests"], told["x-ratelimit-remaining-requests"]) == ("2", "0")
    assert (told["x-ratelimit-limit-tokens"], told["x-ratelimit-remaining-tokens"]) == ("1000", "1000")


def test_no_key_is_in_the_log_or_in_redis(guarded: Guarded, redis: EmbeddedRedis) -> None:
    planted = guarded.key(*Scope)[0]
    for key in (planted, planted + "x", UNKNOWN):
        guarded.ask("POST", "/v1/feedback/comparisons", key)
        guarded.ask("GET", "/v1/no/such/route", key)
    kept = guarded.server.log.read_bytes()
    assert b"API keys are needed" in kept  # it is the log
    files = [path for path in Path(redis.url.removeprefix("unix://")).parent.rglob("*") if path.is_file()]
    kept += b"".join(path.read_bytes() for path in files)
    assert b"auth:key:" in kept  # and this is what Redis wrote
    assert len(guarded.made) > 8
    assert not [key for key in [*guarded.made, UNKNOWN] if key.removeprefix("ilk_").encode() in kept]


def test_without_keys_only_loopback_is_served(redis_url: str, state_dir: Path) -> None:
    arguments = ["--host", "0.0.0.0", "--port", str(free_port()), "--state", str(state_dir)]
    done = subprocess.run(
        [sys.executable, "-m", "serve", *arguments],
        env={"PATH": "", "INSTRUCTLOOP_REDIS_URL": redis_url},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    assert "0.0.0.0 is not loopback" in done.stderr and "keys create" in done.stderr
