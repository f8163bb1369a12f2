"""What the alternative would cost: a minimal streaming reverse proxy, as one would put before vLLM's own server.

``python proxy.py UPSTREAM_URL PORT``. It does nothing but pass on: no keys, no limits, no recording.
"""

import contextlib
import sys
from collections.abc import AsyncIterator

import aiohttp
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

_PASSED_ON = ("content-type", "content-length", "x-request-id")


def create_proxy(upstream: str) -> Starlette:
    """The proxy as an ASGI app."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None), auto_decompress=False
        ) as session:
            app.state.session = session
            yield

    async def forward(request: Request) -> StreamingResponse:
        session: aiohttp.ClientSession = request.app.state.session
        headers = {name: value for name, value in request.headers.items() if name in _PASSED_ON}
        answer = await session.request(
            request.method, upstream + request.url.path, data=await request.body(), headers=headers
        )
        passed = {name: answer.headers[name] for name in _PASSED_ON if name in answer.headers}
        return StreamingResponse(answer.content.iter_any(), answer.status, passed)

    return Starlette(routes=[Route("/{path:path}", forward, methods=["GET", "POST"])], lifespan=lifespan)


if __name__ == "__main__":
    uvicorn.run(create_proxy(sys.argv[1]), port=int(sys.argv[2]), log_level="warning", access_log=False)
