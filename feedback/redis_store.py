"""What every store of this package shares: how it connects, how long it waits, and the one error it raises."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Self
from urllib.parse import urlsplit

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from feedback.errors import StoreUnavailable
from feedback.settings import FeedbackSettings, SettingsError


class RedisStore:
    """A store in Redis. Make one per process with ``connect``; every method may raise StoreUnavailable."""

    def __init__(self, client: Redis, settings: FeedbackSettings, where: str) -> None:
        self._redis = client
        self._settings = settings
        self._where = where

    @classmethod
    def connect(cls, url: str, settings: FeedbackSettings) -> Self:
        """A store on the Redis at ``url`` (unix://, redis:// or rediss://); connects when first used."""
        seconds = settings.socket_timeout_seconds
        try:
            pool = BlockingConnectionPool.from_url(
                url,
                max_connections=settings.max_connections,
                timeout=seconds,
                socket_timeout=seconds,
                socket_connect_timeout=seconds,
                retry=Retry(NoBackoff(), 0),
                protocol=2,
            )
        except ValueError as error:
            raise SettingsError(f"settings: redis_url: {error}") from error
        parts = urlsplit(url)
        return cls(Redis.from_pool(pool), settings, f"{parts.scheme}://{parts.hostname or ''}{parts.path}")

    async def close(self) -> None:
        """Let the connections go."""
        await self._redis.aclose()

    @asynccontextmanager
    async def _answering(self) -> AsyncIterator[None]:
        """Bounds what is done inside to the socket timeout and turns Redis's errors into StoreUnavailable."""
        try:
            async with asyncio.timeout(self._settings.socket_timeout_seconds):
                yield
        except TimeoutError as error:
            seconds = self._settings.socket_timeout_seconds
            raise StoreUnavailable(f"Redis at {self._where} did not answer within {seconds:g} s") from error
        except (RedisError, OSError) as error:
            raise self._unavailable(error) from error

    def _unavailable(self, error: Exception) -> StoreUnavailable:
        return StoreUnavailable(f"Redis at {self._where} cannot serve: {error}")
