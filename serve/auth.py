"""Who is asking, whether they may, and how often.

Every route but the probes takes its principal by one of the dependencies below, which also put the scope it needs
into the OpenAPI document. A key is looked up in Redis when it is first seen; from then on a request costs one
dictionary look-up, because ``Access.watch`` reads the keys in use again every ``REFRESH_SECONDS``, off the request
path. So a revoked key is refused within that time; with Redis away, a key that this server has seen goes on working,
also across a restart.

The server is open, every request being one principal's with all scopes, only while it listens on loopback and no key
was ever made in its Redis. The first key closes it within ``REFRESH_SECONDS``; revoking keys never opens it again, and
losing them with Redis does not while it runs.
"""

import asyncio
import contextlib
import ipaddress
import logging
import os
import time
from collections.abc import Awaitable, Callable
from functools import lru_cache
from pathlib import Path
from typing import Annotated, TypeVar
from urllib.parse import urlsplit

from fastapi import Request, Security
from fastapi.openapi.models import HTTPBearer
from fastapi.security.base import SecurityBase
from prometheus_client import Counter
from pydantic import BaseModel, ConfigDict, ValidationError

from feedback.errors import StoreUnavailable
from feedback.principals import Admission, ApiKey, KeyStore, RateExceeded, Scope, digest
from serve.errors import InvalidKey, KeysUnavailable, NotAllowed, ServeError
from serve.metrics import Metrics

Kept = TypeVar("Kept")

LOCAL_PRINCIPAL = "local"
"""The principal of a server that is open on loopback."""
REFRESH_SECONDS = 5.0
"""How often the keys in use are read again: the longest that a revoked key works while Redis answers."""
RATE_WAIT_SECONDS = 0.5
"""How long a request waits to be counted before it goes through uncounted."""
RATE_PAUSE_SECONDS = 1.0
"""Once Redis has not answered, one request in this time waits for it; the others go through uncounted at once."""

_REFRESH_BATCH = 100
log = logging.getLogger(__name__)


class NotLoopback(ServeError):
    """The server was asked to listen beyond this machine without API keys."""


class _Memory(BaseModel):
    """What a server knew of the keys when Redis last answered; digests, never a key."""

    model_config = ConfigDict(frozen=True)
    any_keys: bool
    known: tuple[ApiKey, ...] = ()


class Access:
    """Which keys this server lets in.

    Args:
        keys: the keys that were made.
        loopback: whether the server listens where only this machine can reach it.
        memory: file in which it remembers what it knew, for a start while Redis is away.
    """

    def __init__(self, keys: KeyStore, *, loopback: bool, memory: Path) -> None:
        self._keys = keys
        self._memory = memory
        self._open: bool | None = None if loopback else False
        """None until Redis has said whether there are keys; never True again once False."""
        self._known: dict[str, ApiKey] = {}
        """Keys in force by digest. Bounded by the keys that were made: others are not remembered."""
        self._remembered: _Memory | None = None

    async def watch(self) -> None:
        """Refresh until cancelled."""
        while True:
            await self.refresh()
            await asyncio.sleep(REFRESH_SECONDS)

    async def refresh(self) -> None:
        """Close an open server where keys have been made, and forget keys that were revoked."""
        try:
            if self._open is not False:
                self._open_or_close(any_keys=await self._keys.any_keys())
            known = list(self._known)
            for start in range(0, len(known), _REFRESH_BATCH):
                batch = known[start : start + _REFRESH_BATCH]
                for sha256, key in zip(batch, await self._keys.in_force(batch), strict=True):
                    if key is None:
                        self._known.pop(sha256, None)
        except StoreUnavailable as error:
            log.warning("API keys cannot be read; those last known count", extra={"why": str(error)})
            if self._remembered is None:
                self._recall()
        else:
            self._remember()

    def _remember(self) -> None:
        now = _Memory(any_keys=not self._open, known=tuple(self._known.values()))
        if now != self._remembered:
            self._remembered = now
            unfinished = self._memory.with_suffix(f".{os.getpid()}")
            unfinished.write_text(now.model_dump_json())
            unfinished.chmod(0o600)
            unfinished.replace(self._memory)

    def _recall(self) -> None:
        try:
            self._remembered = _Memory.model_validate_json(self._memory.read_text())
        except (OSError, ValidationError):
            return  # nothing is known: nobody is let in until Redis answers
        self._known = {key.sha256: key for key in self._remembered.known}
        if self._open is None:
            self._open_or_close(any_keys=self._remembered.any_keys)

    def _open_or_close(self, *, any_keys: bool) -> None:
        if any_keys:
            log.info("API keys are needed: there are some")
        elif self._open is None:
            log.info("open to this machine: no API key was ever made")
        self._open = not any_keys

    async def key_of(self, request: Request) -> ApiKey | None:
        """The key that a request was made with; None where the server is open and everyone is local.

        Raises:
            InvalidKey: There is no key, or none that is in force.
            NotAllowed: The server is open and the request calls it by another name than loopback's.
            KeysUnavailable: Redis is away and this key was not seen before.
        """
        if self._open:
            # A web page can point a name of its own at 127.0.0.1, and then read what comes back.
            if not _names_loopback(request.headers.get("host", "")):
                raise NotAllowed("without API keys only requests to a loopback host are answered; make a key")
            return None
        scheme, _, text = request.headers.get("authorization", "").partition(" ")
        sha256 = digest(text.strip()) if scheme.lower() == "bearer" else None
        if sha256 is not None and sha256 in self._known:
            return self._known[sha256]
        if sha256 is not None:
            return await self._look_up(sha256)
        if self._open is None:
            raise KeysUnavailable("it cannot be checked right now whether an API key is needed; try again")
        raise InvalidKey("an API key is needed: Authorization: Bearer ilk_…")

    async def _look_up(self, sha256: str) -> ApiKey:
        try:
            (key,) = await self._keys.in_force([sha256])
        except StoreUnavailable as error:
            log.warning("an API key cannot be checked", extra={"why": str(error)})
            raise KeysUnavailable("API keys cannot be checked right now; try again") from error
        if key is None:
            raise InvalidKey("that API key is not valid")
        self._known[sha256] = key
        return key


class Rates:
    """Keeps the rates of keys. With Redis away requests go through uncounted, because completions must go on."""

    def __init__(self, keys: KeyStore, metrics: Metrics) -> None:
        self._keys = keys
        self._uncounted = Counter(
            "instructloop_rates_uncounted", "Requests and spendings not counted: Redis away", registry=metrics.registry
        )
        self._token_rated: set[str] = set()
        self._paused_until = 0.0

    async def admit(self, key: ApiKey) -> Admission | None:
        """Count one request; None where the key has no rates or they cannot be kept now. Raises RateExceeded."""
        if key.requests_per_minute is None and key.tokens_per_minute is None:
            return None
        if key.tokens_per_minute is not None:
            self._token_rated.add(key.principal)
        return await self._counted(lambda: self._keys.admit(key))

    def counts_tokens(self, principal: str) -> bool:
        """True where ``spend`` matters: this server has seen a key of the principal's that has a token rate."""
        return principal in self._token_rated

    async def spend(self, principal: str, tokens: int) -> None:
        """Count sampled tokens of a principal, whichever of its keys they were sampled for. Never raises."""
        await self._counted(lambda: self._keys.spend(principal, tokens))

    async def _counted(self, count: Callable[[], Awaitable[Kept]]) -> Kept | None:
        if (now := time.monotonic()) >= self._paused_until:
            if self._paused_until:
                self._paused_until = now + RATE_PAUSE_SECONDS
            try:
                async with asyncio.timeout(RATE_WAIT_SECONDS):
                    kept = await count()
            except (StoreUnavailable, TimeoutError) as error:
                self._paused_until = time.monotonic() + RATE_PAUSE_SECONDS
                log.warning("rates cannot be kept", extra={"why": str(error) or "Redis is slow"})
            except RateExceeded:
                self._paused_until = 0.0
                raise
            else:
                self._paused_until = 0.0
                return kept
        self._uncounted.inc()
        return None


class _KeyScheme(SecurityBase):
    """The dependency behind the principals: authenticates, checks the scope, counts, and yields the name."""

    def __init__(self, scope: Scope) -> None:
        self.model = HTTPBearer(description="An API key: python -m feedback keys create", bearerFormat="ilk_…")
        self.scheme_name = "api_key"
        self._scope = scope

    async def __call__(self, request: Request) -> str:
        access: Access = request.app.state.services.access
        rates: Rates = request.app.state.services.rates
        request.scope["instructloop.key"] = key = await access.key_of(request)
        if key is None:
            return LOCAL_PRINCIPAL
        require_scope(request, self._scope)
        try:
            admission = await rates.admit(key)
        except RateExceeded as error:
            request.scope["instructloop.headers"] = rate_headers(error.admission)
            raise
        if admission is not None:
            request.scope["instructloop.headers"] = rate_headers(admission)
        return key.principal


CompletionsPrincipal = Annotated[str, Security(_KeyScheme(Scope.COMPLETIONS), scopes=[Scope.COMPLETIONS])]
FeedbackPrincipal = Annotated[str, Security(_KeyScheme(Scope.FEEDBACK), scopes=[Scope.FEEDBACK])]
OperatorPrincipal = Annotated[str, Security(_KeyScheme(Scope.OPERATOR), scopes=[Scope.OPERATOR])]


def require_scope(request: Request, scope: Scope) -> None:
    """Refuse an authenticated request whose key lacks a scope. Raises NotAllowed."""
    key: ApiKey | None = request.scope["instructloop.key"]
    if key is not None and scope not in key.scopes:
        raise NotAllowed(f"this needs an API key with the scope {scope}")


def rate_headers(admission: Admission) -> list[tuple[bytes, bytes]]:
    """OpenAI's ``x-ratelimit-*`` headers, for the rates that the key has."""
    headers = []
    for what, allowance in (("requests", admission.requests), ("tokens", admission.tokens)):
        if allowance is not None:
            told = {
                "limit": allowance.limit,
                "remaining": allowance.remaining,
                "reset": f"{admission.reset_seconds}s",
            }
            headers += [(f"x-ratelimit-{name}-{what}".encode(), str(value).encode()) for name, value in told.items()]
    return headers


async def require_keys(host: str, keys: KeyStore) -> None:
    """Refuse to listen beyond this machine before a key was made. Raises NotLoopback.

    Where Redis does not answer the server may start: beyond loopback it lets nobody in without a key.
    """
    if not is_loopback(host):
        with contextlib.suppress(StoreUnavailable):
            if not await keys.any_keys():
                raise NotLoopback(
                    f"without API keys the server listens on loopback only, and {host} is not loopback; make one:"
                    " python -m feedback keys create --principal NAME --scopes completions,feedback"
                )


def is_loopback(host: str) -> bool:
    """True for a name or address that only this machine can reach."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@lru_cache(maxsize=64)
def _names_loopback(host_header: str) -> bool:
    try:
        return is_loopback(urlsplit(f"//{host_header}").hostname or "")
    except ValueError:
        return False
