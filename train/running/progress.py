"""How a running stage tells its caller how far it is; the command line draws it, tests ignore it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

Progress = Callable[[str, int, int, dict[str, float]], None]
"""Called as ``progress(stage, done, total, numbers)`` after each step."""

_SAID = ("loss", "score", "gold")
"""Numbers worth a place beside a bar."""


def silent(stage: str, done: int, total: int, numbers: dict[str, float]) -> None:
    """A progress that shows nothing."""


@contextmanager
def drawn(console: Console) -> Iterator[Progress]:
    """A progress that draws a bar per stage, with the time it will still take; silent where nobody looks."""
    if not console.is_terminal:
        yield silent
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Bars(TextColumn("{task.description}"), *columns, console=console) as bars:
        rows = {}

        def draw(stage: str, done: int, total: int, numbers: dict[str, float]) -> None:
            if stage not in rows:
                rows[stage] = bars.add_task(stage)
            said = " ".join(f"{name} {numbers[name]:.3g}" for name in _SAID if name in numbers)
            bars.update(rows[stage], completed=done, total=total, description=f"{stage} {said}".strip())

        yield draw
