"""``python -m serve`` with one change: each comparison is an EVALSHA of its own, on a connection of its own."""

from unittest.mock import patch

from feedback_appends import NaiveStore

from serve import __main__ as command
from serve.settings import ServeSettings


def main() -> None:
    """Serve until SIGTERM; takes the arguments that ``python -m serve`` takes."""
    command.prepare_engine_environment(ServeSettings.load())
    # Imported here: vLLM reads its environment on import.
    import serve.app

    with patch.object(serve.app, "FeedbackStore", NaiveStore):
        command.app()


if __name__ == "__main__":
    main()
