"""Who is asking. Without API keys the server is open, on loopback only, and everyone is one principal."""

import ipaddress
from typing import Annotated

from fastapi import Depends

from serve.errors import ServeError

LOCAL_PRINCIPAL = "local"
"""The principal of a server that is open on loopback."""


class NotLoopback(ServeError):
    """The server was asked to listen beyond this machine without API keys."""


def _principal() -> str:
    return LOCAL_PRINCIPAL


CompletionsPrincipal = Annotated[str, Depends(_principal)]
FeedbackPrincipal = Annotated[str, Depends(_principal)]


def require_loopback(host: str) -> None:
    """Refuse to be open to a network. Raises NotLoopback."""
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise NotLoopback(f"without API keys the server listens on loopback only, and {host} is not loopback")
