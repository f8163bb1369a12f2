"""Who may use the server: API keys, what each of them may do, and how often.

A key is ``ilk_`` and 256 random bits. Redis holds its SHA-256 only, so neither the database nor its backups let
anybody in; a digest of that much randomness needs no salt and no slow hash. A key never changes: it is made, and
it may be revoked, for good.

Rates are counted in fixed windows of one minute (the caller's clock, in unix time) per principal, not per key:
however many keys a principal has, they draw on one count, and each key's own limit is held against it. So at most
``limit`` requests pass in a window, and at most twice that in any sixty seconds. Tokens are known only when they have
been sampled: a request is admitted while the window's tokens are below the limit, and what is then under way may
exceed it, by at most what the admitted requests sample.
"""

import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from redis.asyncio import Redis

from feedback import keys
from feedback.errors import FeedbackError, KeyNotFound, KeyRefused
from feedback.redis_store import RedisStore
from feedback.settings import FeedbackSettings

ID_CHARS = 12
"""Hex digits of a key's SHA-256 that name it to people; they let nobody in."""
PRINCIPAL_RULE = "has at most 64 letters, digits and . _ @ - and begins with a letter or digit"
WINDOW_SECONDS = 60

_KEY = re.compile(r"ilk_[A-Za-z0-9_-]{43}")
_ID = re.compile(r"[0-9a-f]{4,64}")
_ADMIT = Path(__file__).with_name("admit.lua").read_text()
_Reply = Any  # redis-py types replies as bytes | str, whichever decode_responses chose; here they are bytes
_log = logging.getLogger(__name__)


class Scope(StrEnum):
    """What a key may be used for."""

    COMPLETIONS = "completions"
    FEEDBACK = "feedback"
    OPERATOR = "operator"


class ApiKey(BaseModel):
    """An API key as the server knows it: everything but the key itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="of the key's text")
    principal: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$",
        description=f"who holds it; the name {PRINCIPAL_RULE}",
    )
    scopes: frozenset[Scope] = Field(min_length=1)
    requests_per_minute: int | None = Field(None, gt=0, le=10**9, description="None: as many as the server can take")
    tokens_per_minute: int | None = Field(None, gt=0, le=10**9, description="None: as many as the server can take")
    created: int = Field(description="unix seconds")
    revoked: int | None = Field(None, description="unix seconds; None while the key is in force")

    @property
    def id(self) -> str:
        """What people call the key: the beginning of its digest."""
        return self.sha256[:ID_CHARS]

    @property
    def rated(self) -> bool:
        """True where the key has a rate to keep."""
        return self.requests_per_minute is not None or self.tokens_per_minute is not None


@dataclass(frozen=True)
class Allowance:
    """One rate of a key, and what is left of it in this window."""

    limit: int
    remaining: int


@dataclass(frozen=True)
class Admission:
    """What a key's rates look like after a request; None where it has no such rate."""

    requests: Allowance | None
    tokens: Allowance | None
    reset_seconds: int
    """Until the window ends and everything is allowed again: 1 to 60."""


class RateExceeded(FeedbackError):
    """A key's rate is used up for this window. The request was not counted."""

    def __init__(self, message: str, admission: Admission) -> None:
        super().__init__(message)
        self.admission = admission

    @property
    def retry_after_seconds(self) -> int:
        """When a request will be admitted again: 1 to 60."""
        return self.admission.reset_seconds


def digest(key_text: str) -> str | None:
    """SHA-256 of a key in hex; None where the text cannot be a key."""
    return hashlib.sha256(key_text.encode()).hexdigest() if _KEY.fullmatch(key_text) else None


class KeyStore(RedisStore):
    """API keys and rate windows in Redis. Make one per process with ``connect``; all may raise StoreUnavailable."""

    clock: Callable[[], float] = staticmethod(time.time)
    """Unix seconds; decides which window a request falls into."""

    def __init__(self, client: Redis, settings: FeedbackSettings, where: str) -> None:
        super().__init__(client, settings, where)
        self._admit = client.register_script(_ADMIT)

    async def create(
        self,
        principal: str,
        scopes: Iterable[Scope],
        *,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
    ) -> tuple[str, ApiKey]:
        """Make a key. Its text is returned here and is nowhere else.

        Raises:
            KeyRefused: The principal's name, the scopes or a rate cannot be used.
        """
        text = f"ilk_{secrets.token_urlsafe(32)}"
        try:
            key = ApiKey(
                sha256=hashlib.sha256(text.encode()).hexdigest(),
                principal=principal,
                scopes=frozenset(scopes),
                requests_per_minute=requests_per_minute,
                tokens_per_minute=tokens_per_minute,
                created=int(self.clock()),
            )
        except ValidationError as error:
            name = str(error.errors()[0]["loc"][0])
            wanted = f"a name {PRINCIPAL_RULE}" if name == "principal" else error.errors()[0]["msg"]
            raise KeyRefused(f"{name}: {wanted}") from error
        async with self._answering(), self._redis.pipeline(transaction=True) as pipe:
            pipe.hset(keys.api_key(key.sha256), items=_encode(key))
            pipe.sadd(keys.API_KEYS, key.sha256)
            await pipe.execute()
        return text, key

    async def all(self) -> list[ApiKey]:
        """Every key ever made, revoked or not, oldest first; damaged ones are logged and left out."""
        async with self._answering():
            members: _Reply = await self._redis.smembers(keys.API_KEYS)
        made = await self._read([member.decode() for member in members])
        return sorted((key for key in made if key is not None), key=lambda key: (key.created, key.sha256))

    async def any_keys(self) -> bool:
        """True once a key has been made, also where all of them are revoked: revoking never opens a server."""
        async with self._answering():
            return bool(await self._redis.exists(keys.API_KEYS))

    async def find(self, key_text: str) -> ApiKey | None:
        """The key of that text; None alike where there is none and where it is revoked."""
        sha256 = digest(key_text)
        return None if sha256 is None else (await self.in_force([sha256]))[0]

    async def in_force(self, digests: Sequence[str]) -> list[ApiKey | None]:
        """For each digest its key; None where there is none, it is damaged, or it is revoked."""
        return [key if key is not None and key.revoked is None else None for key in await self._read(digests)]

    async def revoke(self, key_id: str) -> ApiKey:
        """End a key, for good; one that is revoked already keeps the time of its end.

        Args:
            key_id: Its id, or as much of its beginning (four digits at least) as names one key only.

        Raises:
            KeyNotFound: No key, or more than one, has an id that begins so.
        """
        found = [key for key in await self.all() if key.sha256.startswith(key_id)] if _ID.fullmatch(key_id) else []
        if len(found) != 1:
            many = ", ".join(key.id for key in found)
            raise KeyNotFound(f"these keys begin so: {many}; give more digits" if found else "no key has that id")
        name = keys.api_key(found[0].sha256)
        async with self._answering(), self._redis.pipeline(transaction=True) as pipe:
            pipe.hsetnx(name, "revoked", str(int(self.clock())))
            pipe.hget(name, "revoked")
            _, revoked = await pipe.execute()
        return found[0].model_copy(update={"revoked": int(revoked)})

    async def admit(self, key: ApiKey) -> Admission:
        """Count one request with ``key`` against its principal's window; only a key with a request rate counts.

        Raises:
            RateExceeded: A rate of this key is used up; nothing was counted.
        """
        now = self.clock()
        limits = (key.requests_per_minute, key.tokens_per_minute)
        async with self._answering():
            admitted, requests, tokens = await self._admit(
                keys=[keys.rate(key.principal, kind, _window(now)) for kind in ("requests", "tokens")],
                args=[*("" if limit is None else limit for limit in limits), keys.RATE_TTL_SECONDS],
            )
        admission = Admission(
            requests=_allowance(key.requests_per_minute, requests),
            tokens=_allowance(key.tokens_per_minute, tokens),
            reset_seconds=WINDOW_SECONDS - int(now % WINDOW_SECONDS),
        )
        if not admitted:
            used_up = "tokens" if admission.tokens is not None and admission.tokens.remaining == 0 else "requests"
            limit = key.tokens_per_minute if used_up == "tokens" else key.requests_per_minute
            raise RateExceeded(
                f"the {limit} {used_up} a minute are used up; try again in {admission.reset_seconds} s", admission
            )
        return admission

    async def spend(self, principal: str, tokens: int) -> None:
        """Count tokens that were sampled for a principal, in the window that runs now."""
        name = keys.rate(principal, "tokens", _window(self.clock()))
        async with self._answering(), self._redis.pipeline(transaction=True) as pipe:
            pipe.incrby(name, tokens)
            pipe.expire(name, keys.RATE_TTL_SECONDS)
            await pipe.execute()

    async def _read(self, digests: Sequence[str]) -> list[ApiKey | None]:
        if not digests:
            return []
        async with self._answering(), self._redis.pipeline(transaction=False) as pipe:
            for sha256 in digests:
                pipe.hgetall(keys.api_key(sha256))
            hashes = await pipe.execute()
        return [_decode(sha256, found) for sha256, found in zip(digests, hashes, strict=True)]


def _encode(key: ApiKey) -> list[str]:
    said = key.model_dump(exclude_none=True) | {"scopes": ",".join(sorted(key.scopes))}
    return [text for name, value in said.items() for text in (name, str(value))]


def _decode(sha256: str, found: dict[bytes, bytes]) -> ApiKey | None:
    if not found:
        return None
    fields: dict[str, Any] = {
        name.decode(errors="replace"): value.decode(errors="replace") for name, value in found.items()
    }
    try:
        key = ApiKey.model_validate(fields | {"scopes": fields.get("scopes", "").split(",")})
        # What was read must be what was asked for: a record under another's name is no key.
        if hmac.compare_digest(key.sha256, sha256):
            return key
        problem = "its digest is another"
    except ValidationError as error:
        problem = f"{error.error_count()} fields are wrong"
    _log.error("key %s lets nobody in: %s", sha256[:ID_CHARS], problem)
    return None


def _window(now: float) -> int:
    return int(now // WINDOW_SECONDS)


def _allowance(limit: int | None, used: int) -> Allowance | None:
    return None if limit is None else Allowance(limit, max(0, limit - used))
