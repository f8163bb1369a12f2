"""What the worker is connected to."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from deploy.registry import Lease, ReleaseStore
from feedback.settings import FeedbackSettings
from feedback.store import FeedbackStore
from train.settings import WorkerSettings


@dataclass(frozen=True)
class Stores:
    """The worker's connections."""

    feedback: FeedbackStore
    releases: ReleaseStore
    lease: Lease

    @classmethod
    def connect(cls, url: str, state: Path, worker: WorkerSettings, feedback: FeedbackSettings) -> Self:
        """Connections to the Redis at ``url``; made when first used."""
        return cls(
            FeedbackStore.connect(url, feedback),
            ReleaseStore.connect(url, state),
            Lease.connect(url, worker.lease_seconds),
        )

    async def close(self) -> None:
        """Close them."""
        await self.feedback.close()
        await self.releases.close()
        await self.lease.close()
