"""TensorBoard files of a round: every stage's numbers against its step, in ``state/runs/<run>/tensorboard``."""

from pathlib import Path
from types import TracebackType
from typing import Self

from torch.utils.tensorboard import SummaryWriter

FOLDER = "tensorboard"


class Board:
    """Writes what it is told as a ``Progress``; a context manager, so that everything is on disk at the end.

    A round that is resumed adds a file; steps it does again have the same numbers again.
    """

    def __init__(self, run: Path) -> None:
        self._writer = SummaryWriter(str(run / FOLDER), flush_secs=10)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()

    def __call__(self, stage: str, done: int, total: int, numbers: dict[str, float]) -> None:
        """Write the numbers of one step as ``<stage>/<name>``."""
        for name, number in numbers.items():
            self._writer.add_scalar(f"{stage}/{name}", number, done)
