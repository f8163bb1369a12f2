"""``python -m feedback keys`` as an operator runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from feedback.principals import KeyStore, Scope
from feedback.settings import FeedbackSettings

NO_REDIS = "redis://127.0.0.1:1"


def keys(redis_url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("INSTRUCTLOOP_")}
    command = [sys.executable, "-m", "feedback", "keys", *arguments, "--redis-url", redis_url]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def listed(redis_url: str) -> list[dict[str, Any]]:
    done = keys(redis_url, "list", "--json")
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


async def test_a_key_from_its_making_to_its_end(redis_url: str) -> None:
    wanted = ["--principal", "alice", "--scopes", "feedback, completions", "--requests-per-minute", "60"]
    done = keys(redis_url, "create", *wanted)
    assert done.returncode == 0, done.stderr
    text = done.stdout.removesuffix("\n")  # alone on standard output: KEY=$(… keys create …)
    store = KeyStore.connect(redis_url, FeedbackSettings())
    key = await store.find(text)
    assert key is not None
    assert (key.principal, key.scopes, key.requests_per_minute, key.tokens_per_minute) == (
        "alice",
        frozenset({Scope.FEEDBACK, Scope.COMPLETIONS}),
        60,
        None,
    )
    assert key.id in done.stderr and text not in done.stderr

    (shown,) = listed(redis_url)
    assert shown["created"].endswith("+00:00")
    assert shown == {
        "id": key.id,
        "principal": "alice",
        "scopes": ["completions", "feedback"],
        "requests_per_minute": 60,
        "tokens_per_minute": None,
        "created": shown["created"],
        "revoked": None,
    }
    table = keys(redis_url, "list").stdout
    for part in (key.id, "alice", "completions", "60 requests"):
        assert part in table
    assert text.removeprefix("ilk_") not in table

    assert keys(redis_url, "revoke", key.id[:6]).stdout == f"key {key.id} of alice is revoked\n"
    assert await store.find(text) is None
    await store.close()
    again = json.loads(keys(redis_url, "revoke", key.id, "--json").stdout)
    assert again["revoked"] is not None
    assert listed(redis_url) == [again]


def test_json_holds_the_key_once(redis_url: str) -> None:
    done = keys(redis_url, "create", "--principal", "bob", "--scopes", "operator", "--tokens-per-minute", "9", "--json")
    made = json.loads(done.stdout)
    assert made.pop("key").startswith("ilk_")
    assert (made["principal"], made["scopes"], made["tokens_per_minute"]) == ("bob", ["operator"], 9)
    assert listed(redis_url) == [made]


async def test_refusals_exit_1(redis_url: str) -> None:
    unfit = keys(redis_url, "create", "--principal", "a:b", "--scopes", "feedback")
    assert (unfit.returncode, unfit.stdout) == (1, "")
    assert "64 letters" in unfit.stderr
    unknown = keys(redis_url, "revoke", "abcdef")
    assert (unknown.returncode, unknown.stdout) == (1, "")
    assert "no key has that id" in unknown.stderr
    store = KeyStore.connect(redis_url, FeedbackSettings())
    assert not await store.any_keys()
    await store.close()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["create", "--principal", "alice", "--scopes", "everything"], "scopes are"),
        (["create", "--principal", "alice", "--scopes", ""], "scopes are"),
        (["create", "--principal", "alice"], "--scopes"),
        (["create", "--principal", "alice", "--scopes", "feedback", "--requests-per-minute", "0"], "per-minute"),
        (["revoke"], "ID"),
        (["lend"], "lend"),
    ],
)
def test_usage_errors_exit_2_before_redis_is_asked(arguments: list[str], said: str) -> None:
    done = keys(NO_REDIS, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr


def test_without_redis_nothing_is_made() -> None:
    gone = keys(NO_REDIS, "create", "--principal", "alice", "--scopes", "feedback")
    assert (gone.returncode, gone.stdout) == (1, "")
    assert "Redis at redis://127.0.0.1 cannot serve" in gone.stderr


def test_the_state_directorys_own_redis_keeps_keys(state_dir: Path) -> None:
    command = [sys.executable, "-m", "feedback", "keys"]
    made = [*command, "create", "--principal", "alice", "--scopes", "feedback", "--json", "--state", str(state_dir)]
    key = json.loads(subprocess.run(made, capture_output=True, text=True, check=True).stdout)
    shown = subprocess.run(
        [*command, "list", "--json", "--state", str(state_dir)], capture_output=True, text=True, check=True
    ).stdout
    assert [each["id"] for each in json.loads(shown)] == [key["id"]]
