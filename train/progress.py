"""How a running stage tells its caller how far it is; the command line draws it, tests ignore it."""

from collections.abc import Callable

Progress = Callable[[str, int, int, dict[str, float]], None]
"""Called as ``progress(stage, done, total, numbers)`` after each step."""


def silent(stage: str, done: int, total: int, numbers: dict[str, float]) -> None:
    """A progress that shows nothing."""
