"""A completion port inside asyncio: `await` its operations, on one thread with all else of asyncio.

python examples/inside_asyncio.py --port 5555
nc 127.0.0.1 5555

An echo server of coroutines that also uses what asyncio has: tasks, a timeout around several
operations, signal handlers, a task that reports. `Bridge` is all that it takes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import socket
import sys
from typing import Any

import asyncio_native as an

IDLE_SECONDS = 60


class Bridge:
    """Awaits operations of a port: ``data = await bridge(sock.recv())``. Not for multishots."""

    def __init__(self, port: an.CompletionPort) -> None:
        self._port = port
        self._futures: dict[an.Operation | None, asyncio.Future[Any]] = {}
        self._loop = asyncio.get_running_loop()
        # The descriptor polls readable whenever `dequeue_many(timeout=0)` may return something.
        self._loop.add_reader(port.fileno(), self._drain)

    def close(self) -> None:
        """Stops watching the port; call it before the port is closed."""
        self._loop.remove_reader(self._port.fileno())

    async def __call__(self, operation: an.Operation) -> Any:
        """The operation's result, or its exception. Cancelling the task cancels the operation."""
        future = self._futures[operation] = self._loop.create_future()
        try:
            return await future
        except asyncio.CancelledError:
            operation.cancel()  # its completion comes all the same; see `_drain`
            raise

    def _drain(self) -> None:
        # Until nothing is left, so that asyncio need not ask the system again for each batch. It
        # ends: what could start more is woken by these futures only after this function.
        while completions := self._port.dequeue_many(timeout=0):
            for c in completions:
                future = self._futures.pop(c.operation, None)
                if future is None or future.done():  # nobody waits any more
                    if c.accepted:
                        c.accepted.close()
                else:
                    try:
                        future.set_result(c.result())
                    except OSError as error:
                        future.set_exception(error)


async def echo(bridge: Bridge, sock: an.AsyncSocket) -> None:
    """One connection."""
    with sock, contextlib.suppress(OSError):  # a TimeoutError is one, too
        while True:
            # asyncio's own time limit, here for a receive and a send together.
            async with asyncio.timeout(IDLE_SECONDS):
                data = await bridge(sock.recv())
                if not data:
                    return
                # Waiting for the send is the flow control: who does not read is not read from.
                await bridge(sock.send(data))


async def serve(port: an.CompletionPort, bridge: Bridge, listener: an.AsyncSocket) -> None:
    """Accepts until the task is cancelled; that cancels the connections' tasks as well."""
    async with asyncio.TaskGroup() as connections:
        while True:
            try:
                sock, _address = await bridge(listener.accept())
            except OSError as error:  # out of descriptors, or the client is gone already
                print("accept:", error, file=sys.stderr)
                await asyncio.sleep(1)
                continue
            port.associate(sock)
            connections.create_task(echo(bridge, sock))


async def main() -> None:
    """Listens and serves until SIGINT or SIGTERM."""
    parser = argparse.ArgumentParser(description="An echo server of coroutines.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=5555)
    arguments = parser.parse_args()
    with an.CompletionPort() as port:
        listener = an.AsyncSocket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((arguments.host, arguments.port))
        listener.listen()
        port.associate(listener)
        bridge = Bridge(port)
        serving = asyncio.create_task(serve(port, bridge, listener))
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, serving.cancel)
        print("listening on {}:{}".format(*listener.getsockname()), flush=True)
        with contextlib.suppress(asyncio.CancelledError):
            await serving
        bridge.close()


if __name__ == "__main__":
    asyncio.run(main())
