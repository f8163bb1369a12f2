"""API keys and rate windows, on a real Redis and a clock that the test sets."""

import asyncio
import hashlib
from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from feedback.errors import KeyNotFound, KeyRefused, StoreUnavailable
from feedback.principals import Admission, Allowance, ApiKey, KeyStore, RateExceeded, Scope, digest
from feedback.settings import FeedbackSettings


class Clock:
    """Unix seconds, as the test says; ten seconds into a minute at first."""

    now = 6_000_010.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def keys(redis_url: str, clock: Clock) -> AsyncIterator[KeyStore]:
    store = KeyStore.connect(redis_url, FeedbackSettings())
    store.clock = clock
    yield store
    await store.close()


@pytest.fixture
async def client(redis_url: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(redis_url) as redis:
        yield redis


async def made(
    keys: KeyStore, principal: str = "alice", requests: int | None = None, tokens: int | None = None
) -> ApiKey:
    _, key = await keys.create(principal, [Scope.COMPLETIONS], requests_per_minute=requests, tokens_per_minute=tokens)
    return key


async def test_a_key_is_found_by_its_text_and_by_nothing_near_it(keys: KeyStore, clock: Clock) -> None:
    text, key = await keys.create("alice", [Scope.FEEDBACK, Scope.OPERATOR], requests_per_minute=7, tokens_per_minute=9)
    assert await keys.find(text) == key
    assert (key.principal, sorted(key.scopes)) == ("alice", ["feedback", "operator"])
    assert (key.requests_per_minute, key.tokens_per_minute) == (7, 9)
    assert (key.created, key.revoked) == (int(clock.now), None)
    assert text.startswith("ilk_") and len(text) == 47  # 4 + 43 characters of base64 hold 256 bits
    for other in (text[:-1], text + "A", text.swapcase(), key.sha256, "", "ilk_" + "A" * 43, f" {text}", "ilk_é"):
        assert await keys.find(other) is None


async def test_two_keys_share_nothing(keys: KeyStore) -> None:
    (one, first), (other, second) = [await keys.create("alice", [Scope.FEEDBACK]) for _ in range(2)]
    assert one != other and first.id != second.id


async def test_redis_never_holds_a_key(keys: KeyStore, client: Redis) -> None:
    text, key = await keys.create("alice", [Scope.COMPLETIONS])
    assert key.sha256 == hashlib.sha256(text.encode()).hexdigest()
    held = repr(
        [await client.keys(), await client.hgetall(f"auth:key:{key.sha256}"), await client.smembers("auth:keys")]
    )
    assert held.count(key.sha256) == 3
    assert text.removeprefix("ilk_") not in held


@pytest.mark.parametrize("principal", ["", "a:b", "a b", "-a", ".a", "a" * 65, "é", "a\n", "a/b", "*"])
async def test_unfit_principals_are_refused(keys: KeyStore, principal: str) -> None:
    with pytest.raises(KeyRefused, match="64 letters"):
        await keys.create(principal, [Scope.FEEDBACK])
    assert not await keys.any_keys()


@pytest.mark.parametrize("principal", ["a", "0", "a" * 64, "Ann.B_c-d@example.org"])
async def test_fit_principals_are_not(keys: KeyStore, principal: str) -> None:
    text, _ = await keys.create(principal, [Scope.FEEDBACK])
    found = await keys.find(text)
    assert found is not None and found.principal == principal


async def test_a_key_needs_a_scope_and_positive_rates(keys: KeyStore) -> None:
    with pytest.raises(KeyRefused, match="scopes"):
        await keys.create("alice", [])
    with pytest.raises(KeyRefused, match="requests_per_minute"):
        await keys.create("alice", [Scope.FEEDBACK], requests_per_minute=0)
    with pytest.raises(KeyRefused, match="tokens_per_minute"):
        await keys.create("alice", [Scope.FEEDBACK], tokens_per_minute=-1)


async def test_a_revoked_key_lets_nobody_in_and_stays_listed(keys: KeyStore, clock: Clock) -> None:
    text, key = await keys.create("alice", [Scope.FEEDBACK])
    other = await made(keys, "bob")
    clock.now += 100
    assert (await keys.revoke(key.id)).revoked == int(clock.now)
    assert await keys.find(text) is None
    clock.now += 100
    assert (await keys.revoke(key.id)).revoked == int(clock.now) - 100
    assert {(k.id, k.revoked) for k in await keys.all()} == {(key.id, int(clock.now) - 100), (other.id, None)}
    assert await keys.in_force([key.sha256, other.sha256, "0" * 64]) == [None, other, None]


async def test_any_keys_stays_true_when_all_are_revoked(keys: KeyStore) -> None:
    assert not await keys.any_keys()
    key = await made(keys)
    assert await keys.any_keys()
    await keys.revoke(key.id)
    assert await keys.any_keys()


async def test_a_key_is_revoked_by_a_beginning_that_names_it_alone(keys: KeyStore, client: Redis) -> None:
    key = await made(keys)
    twin = key.sha256[:12] + ("1" if key.sha256[12] == "0" else "0") + key.sha256[13:]
    for said in ("", key.id[:3], key.id.upper() + "Z", "*", "zzzz", "[0-9]*"):
        with pytest.raises(KeyNotFound, match="no key has that id"):
            await keys.revoke(said)
    await client.hset(
        f"auth:key:{twin}", items=["sha256", twin, "principal", "bob", "scopes", "feedback", "created", 1]
    )
    await client.sadd("auth:keys", twin)
    with pytest.raises(KeyNotFound, match="give more digits"):
        await keys.revoke(key.id[:4])
    assert (await keys.revoke(key.sha256[:13])).principal == "alice"
    assert [k.revoked is None for k in await keys.all()] == [True, False]  # the twin was made first


@pytest.mark.parametrize(
    "damage",
    [
        ["scopes", "everything"],
        ["principal", "a:b"],
        ["principal", b"alic\xe5"],
        ["sha256", "0" * 64],
        ["created", "soon"],
        ["more", "yes"],
        [b"scop\xe5s", "unheard of"],
    ],
)
async def test_a_damaged_key_lets_nobody_in(
    keys: KeyStore, client: Redis, damage: list[str | bytes], caplog: pytest.LogCaptureFixture
) -> None:
    text, key = await keys.create("alice", [Scope.FEEDBACK])
    other, sound = await keys.create("bob", [Scope.FEEDBACK])
    await client.hset(f"auth:key:{key.sha256}", items=damage)
    assert await keys.find(text) is None
    assert await keys.find(other) == sound
    assert await keys.all() == [sound]
    assert str(damage[1]) not in caplog.text


async def test_the_request_after_the_last_allowed_is_refused(keys: KeyStore, clock: Clock) -> None:
    key = await made(keys, requests=3)
    told = [await keys.admit(key) for _ in range(3)]
    assert [admission.requests for admission in told] == [Allowance(3, 2), Allowance(3, 1), Allowance(3, 0)]
    assert {(admission.tokens, admission.reset_seconds) for admission in told} == {(None, 50)}
    for _ in range(2):  # a refusal is not counted and changes nothing
        with pytest.raises(RateExceeded, match="3 requests a minute") as refused:
            await keys.admit(key)
        assert refused.value.admission == Admission(Allowance(3, 0), None, 50)
        assert refused.value.retry_after_seconds == 50


@pytest.mark.parametrize(("second", "reset"), [(0.0, 60), (0.4, 60), (59.0, 1), (59.999, 1)])
async def test_a_window_ends_with_its_minute(keys: KeyStore, clock: Clock, second: float, reset: int) -> None:
    key = await made(keys, requests=1)
    clock.now = 6_000_000 + second
    assert (await keys.admit(key)).reset_seconds == reset
    with pytest.raises(RateExceeded):
        await keys.admit(key)
    clock.now += reset
    assert (await keys.admit(key)).requests == Allowance(1, 0)


async def test_tokens_are_held_against_what_was_spent(keys: KeyStore, clock: Clock) -> None:
    key = await made(keys, tokens=100)
    assert (await keys.admit(key)).tokens == Allowance(100, 100)
    await keys.spend("alice", 99)
    assert (await keys.admit(key)).tokens == Allowance(100, 1)  # below the limit: whatever this one samples is let be
    await keys.spend("alice", 50)
    with pytest.raises(RateExceeded, match="100 tokens a minute") as refused:
        await keys.admit(key)
    assert refused.value.admission.tokens == Allowance(100, 0)
    clock.now += 60
    assert (await keys.admit(key)).tokens == Allowance(100, 100)


async def test_a_request_refused_for_its_tokens_uses_up_no_request(keys: KeyStore) -> None:
    key = await made(keys, requests=2, tokens=10)
    await keys.admit(key)
    await keys.spend("alice", 10)
    with pytest.raises(RateExceeded, match="tokens") as refused:
        await keys.admit(key)
    assert refused.value.admission.requests == Allowance(2, 1)


async def test_more_keys_give_a_principal_no_more_requests(keys: KeyStore) -> None:
    first, second, wide = await made(keys, requests=2), await made(keys, requests=2), await made(keys, requests=4)
    stranger, free = await made(keys, "bob", requests=1), await made(keys)
    await keys.admit(first)
    await keys.admit(second)
    for key in (first, second):
        with pytest.raises(RateExceeded):
            await keys.admit(key)
    assert (await keys.admit(wide)).requests == Allowance(4, 1)
    assert (await keys.admit(stranger)).requests == Allowance(1, 0)
    assert await keys.admit(free) == Admission(None, None, 50)


async def test_callers_at_the_same_time_are_admitted_no_more_often(
    keys: KeyStore, redis_url: str, clock: Clock
) -> None:
    key = await made(keys, requests=20)
    replica = KeyStore.connect(redis_url, FeedbackSettings())
    replica.clock = clock
    answers = await asyncio.gather(*(store.admit(key) for store in (keys, replica) * 15), return_exceptions=True)
    await replica.close()
    assert sorted(a.requests.remaining for a in answers if isinstance(a, Admission) and a.requests) == list(range(20))
    assert sum(isinstance(answer, RateExceeded) for answer in answers) == 10


async def test_windows_expire(keys: KeyStore, client: Redis) -> None:
    key = await made(keys, requests=5, tokens=5)
    await keys.admit(key)
    await keys.spend("alice", 1)
    windows = [name async for name in client.scan_iter("rl:*")]
    assert sorted(windows) == [b"rl:alice:requests:100000", b"rl:alice:tokens:100000"]
    assert [60 < await client.ttl(name) <= 120 for name in windows] == [True, True]


async def test_a_restarted_redis_has_the_script_again(keys: KeyStore, client: Redis) -> None:
    key = await made(keys, requests=2)
    await keys.admit(key)
    await client.script_flush()
    assert (await keys.admit(key)).requests == Allowance(2, 0)


async def test_without_redis_everything_says_so() -> None:
    keys = KeyStore.connect("redis://127.0.0.1:1", FeedbackSettings())
    key = ApiKey(sha256="0" * 64, principal="alice", scopes=frozenset(Scope), created=1, requests_per_minute=1)
    for act in (keys.find("ilk_" + "A" * 43), keys.any_keys(), keys.all(), keys.admit(key), keys.spend("alice", 1)):
        with pytest.raises(StoreUnavailable):
            await act
    await keys.close()


def test_only_what_can_be_a_key_has_a_digest() -> None:
    assert digest("ilk_" + "A" * 43) == hashlib.sha256(b"ilk_" + b"A" * 43).hexdigest()
    for text in (
        "",
        "ilk_",
        "A" * 47,
        "ilk_" + "A" * 42,
        "ilk_" + "A" * 44,
        "ilk_" + "A" * 42 + "\n",
        "sk-" + "A" * 44,
    ):
        assert digest(text) is None
