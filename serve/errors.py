"""Everything that can go wrong in ``serve``, under one root; ``error_response.py`` turns it into HTTP."""


class ServeError(Exception):
    """Root of this package's errors."""


class EngineFailed(ServeError):
    """An engine did not start, died, or does not reproduce its version's canary prompts."""


class NotServing(ServeError):
    """No engine is live yet, or none any more; try again."""


class ModelNotFound(ServeError):
    """The named model is not live; the message names those that are."""


class InvalidRequest(ServeError):
    """The request cannot be served as it stands. ``param`` names the field at fault."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class NotFound(ServeError):
    """There is no such thing for this principal."""


class BodyTooLarge(ServeError):
    """The request body is over the limit."""
