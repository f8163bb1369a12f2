"""Everything that can go wrong in ``serve``, under one root; ``error_response.py`` turns it into HTTP."""

from typing import Self

from pydantic import ValidationError


class ServeError(Exception):
    """Root of this package's errors."""


class EngineFailed(ServeError):
    """An engine did not start, died, or does not reproduce its version's canary prompts."""


class EngineRefused(ServeError):
    """VLLM refuses a request. ``status`` is its HTTP status, ``param`` the field at fault where it names one."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param

    @property
    def queue_full(self) -> bool:
        """Whether it would take the request later; to a client that is a rate (429), not an outage."""
        return self.status == 503


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

    @classmethod
    def of(cls, error: ValidationError) -> Self:
        """The first field at fault; the value itself stays out of the message."""
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = next((part for part in first["loc"][:1] if isinstance(part, str)), None)  # else a place in a list
        message = str(first["msg"]).removeprefix("Value error, ")
        return cls(f"{field}: {message}" if field else message, field)


class NotFound(ServeError):
    """There is no such thing for this principal."""


class InvalidKey(ServeError):
    """The request has no API key, or one that is not in force."""


class NotAllowed(ServeError):
    """The API key is in force, but not for this."""


class KeysUnavailable(ServeError):
    """Redis does not answer, and this server has not seen the API key before; try again."""
