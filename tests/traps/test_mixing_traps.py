"""One client's bytes must never come in another's reply."""

from __future__ import annotations

import random
import time

import asyncio_native as an
import pytest
from support import PATIENCE, dial, listening, reset

CLIENTS = 48
LIVES = 3
SIZES = (1, 4, 100, 1000, 5000, 65535, 65536, 65537, 300_000)


def own_bytes(number: int, size: int) -> bytes:
    """Bytes of which each four name the client, and the place in its stream."""
    return b"".join((number << 20 | place).to_bytes(4, "big") for place in range((size + 3) // 4))[
        :size
    ]


class Client:
    """A stdlib client that sends random pieces of its own bytes and checks what comes back."""

    def __init__(self, number: int, address: object, chance: random.Random) -> None:
        self.number = number
        self.address = address
        self.chance = chance
        self.lives = LIVES
        self.wrong: list[str] = []
        self.live()

    def live(self) -> None:
        self.socket = dial(self.address)
        self.socket.setblocking(False)
        self.stream = own_bytes(self.number * LIVES + self.lives, self.chance.choice(SIZES))
        self.sent = self.got = 0
        # Some leave in the middle, with their bytes still in the server's hands.
        self.leaves_at = len(self.stream) // 2 if self.chance.random() < 0.3 else -1

    def step(self) -> bool:
        """Sends and receives what goes; false when its last life is over."""
        try:
            if self.sent < len(self.stream):
                size = self.chance.randrange(1, 50_000)
                self.sent += self.socket.send(self.stream[self.sent : self.sent + size])
        except BlockingIOError:
            pass
        try:
            while piece := self.socket.recv(self.chance.randrange(1, 100_000)):
                if piece != self.stream[self.got : self.got + len(piece)]:
                    self.wrong.append(f"client {self.number}: wrong bytes at {self.got}")
                    return False
                self.got += len(piece)
            self.wrong.append(f"client {self.number}: the server closed at {self.got}")
            return False
        except BlockingIOError:
            pass
        left = 0 <= self.leaves_at <= self.got
        if left or self.got == len(self.stream):
            if left and self.chance.random() < 0.5 and self.socket.family.name != "AF_UNIX":
                reset(self.socket)
            else:
                self.socket.close()
            self.lives -= 1
            if self.lives == 0:
                return False
            self.live()
        return True


class Echo:
    """An echo server that answers each piece in one of several ways."""

    def __init__(self, port: an.CompletionPort, way: str) -> None:
        self.port = port
        self.way = way
        self.buffers: dict[an.AsyncSocket, bytearray] = {}

    def accepted(self, sock: an.AsyncSocket) -> None:
        self.port.associate(sock)
        if self.way == "multishot, quiet":
            sock.recv(multishot=True)
        else:
            self.buffers[sock] = bytearray(20_000)
            self.receive(sock)

    def receive(self, sock: an.AsyncSocket) -> None:
        if self.way == "into, not quiet":
            sock.recv_into(self.buffers[sock])
        else:
            sock.recv(20_000)

    def handle(self, completion: an.Completion) -> None:
        sock = completion.socket
        assert sock is not None
        if completion.kind is an.ACCEPT:
            self.accepted(completion.result()[0])
        elif completion.kind is an.SEND:
            if completion.error:
                sock.close()
            elif not sock.closed:
                self.receive(sock)
        elif completion.kind is an.RECV and not sock.closed:
            if completion.error or not (completion.transferred or completion.data):
                sock.close()
            elif self.way == "into, not quiet":
                with memoryview(self.buffers[sock]) as view:
                    sock.send(view[: completion.transferred])
            elif self.way == "multishot, quiet":
                assert completion.data
                sock.send(completion.data, quiet=True)
            else:
                # The buffer of a quiet send is free at once: reused here at once, too.
                assert completion.data
                changing = bytearray(completion.data)
                sock.send(changing, quiet=True)
                changing[:] = b"\xff" * len(changing)
                self.receive(sock)


@pytest.mark.parametrize("way", ["multishot, quiet", "one-shot, quiet", "into, not quiet"])
def test_each_client_gets_its_own_bytes_and_no_others(
    port: an.CompletionPort, family: str, way: str
) -> None:
    seed = 645
    chance = random.Random(seed)
    listener, address = listening(port, family)
    listener.accept(multishot=True)
    server = Echo(port, way)
    clients = [Client(number, address, chance) for number in range(CLIENTS)]
    everyone = list(clients)
    deadline = time.monotonic() + 4 * PATIENCE
    while clients:
        assert time.monotonic() < deadline, f"{len(clients)} clients are not done"
        clients = [client for client in clients if client.step()]
        for completion in port.dequeue_many(timeout=0):
            server.handle(completion)
    wrong = [complaint for client in everyone for complaint in client.wrong]
    assert wrong == []
    assert sum(client.lives for client in everyone) == 0
    for sock in list(server.buffers):
        sock.close()
    listener.close()
