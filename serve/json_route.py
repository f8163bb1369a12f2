"""Routes that take JSON: who asks, and in which form, is settled before a byte of the body is read."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from serve.auth import Access


class JsonRoute(APIRoute):
    """A route whose body, where it has one, is a pydantic model.

    FastAPI reads the body before it asks the dependencies; left to it, somebody without a key would be told what is
    wrong with a body of up to the limit.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's, after the two checks; they raise as ``Access.key_of`` and ``require_json``."""
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle

        async def checked(request: Request) -> Response:
            access: Access = request.app.state.services.access
            await access.key_of(request)
            require_json(request)
            return await handle(request)

        return checked


def require_json(request: Request) -> None:
    """Raise HTTPException 415 unless the body is said to be JSON: a web page can post anything else unasked."""
    media_type, _, _ = request.headers.get("content-type", "").partition(";")
    if media_type.strip().lower() != "application/json":
        raise HTTPException(415, "the body must be JSON, sent with content-type: application/json")
