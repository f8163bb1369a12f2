"""The server's sockets, under uvicorn and uvloop without the app: connections come in fast, and none when it ends."""

import asyncio
import socket

import pytest
import uvicorn
import uvloop
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from serve.listening import listeners

WAITING = 400


def test_connections_that_wait_are_taken_many_in_a_turn_of_the_loop() -> None:
    asked = 0

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal asked
        asked += 1
        await PlainTextResponse("here")(scope, receive, send)

    async def turns_until_all_are_asked() -> int:
        config = uvicorn.Config(answer, port=0, lifespan="off", log_config=None, access_log=False)
        server, sockets = uvicorn.Server(config), listeners(config)
        address = sockets[0].getsockname()
        serving = asyncio.create_task(server.serve(sockets))
        while not server.started:
            await asyncio.sleep(0.01)
        # These calls block: the loop stands still while its queue fills, as it does in a long turn.
        clients = [socket.create_connection(address) for _ in range(WAITING)]
        for client in clients:
            client.sendall(b"GET / HTTP/1.1\r\nhost: here\r\nconnection: close\r\n\r\n")
        turns = 0
        while asked < WAITING:
            turns += 1
            await asyncio.sleep(0)
        for client in clients:
            assert (await asyncio.to_thread(client.recv, 100)).startswith(b"HTTP/1.1 200")
            client.close()
        server.should_exit = True
        await serving
        with pytest.raises(ConnectionRefusedError):  # no copy of the socket is left to fill a queue that nobody reads
            socket.create_connection(address)
        return turns

    assert uvloop.run(turns_until_all_are_asked()) < WAITING / 4
