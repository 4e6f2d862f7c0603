"""Accepting: clients that die early, and running out of descriptors."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import asyncio_native as an
import pytest
from support import (
    PATIENCE,
    dial,
    drain,
    listening,
    nothing,
    one,
    read_exactly,
    reset,
    settle,
    start_python,
)


def close_accepted(completions: list[an.Completion]) -> None:
    for completion in completions:
        if completion.accepted is not None:
            completion.accepted.close()


@pytest.mark.parametrize("way", ["one-shot", "multishot"])
@pytest.mark.parametrize("moment", ["before accept", "while accepting"])
def test_clients_gone_before_they_were_accepted_do_not_end_accepting(
    port: an.CompletionPort, inet: str, way: str, moment: str
) -> None:
    listener, address = listening(port, inet)
    with listener:
        multishot = way == "multishot"
        if moment == "while accepting":
            listener.accept(multishot=multishot)
            port.dequeue(0)
        for number in range(20):
            client = dial(address)
            if number % 2:
                reset(client)
            else:
                client.close()
        live = dial(address)
        if moment == "before accept":
            listener.accept(multishot=multishot)
        found: an.AsyncSocket | None = None
        for _ in range(30):
            completion = one(port)
            assert completion.kind is an.ACCEPT
            assert completion.more == multishot
            if completion.accepted is not None:
                if completion.address == live.getsockname():
                    found = completion.accepted
                    break
                completion.accepted.close()
            if not multishot:
                listener.accept()
        assert found is not None, "the client that stayed was never accepted"
        with found:
            port.associate(found)
            found.send(b"welcome", quiet=True)
            assert read_exactly(live, 7) == b"welcome"


def test_dead_clients_among_live_ones_never_end_a_multishot_accept(
    port: an.CompletionPort, family: str
) -> None:
    listener, address = listening(port, family)
    chance = random.Random(93821)
    with listener:
        operation = listener.accept(multishot=True)
        for _ in range(30):
            clients = [dial(address) for _ in range(chance.randrange(1, 8))]
            dead = [client for client in clients if chance.random() < 0.5]
            for client in dead:
                reset(client)
            completions = drain(
                port,
                lambda so_far: sum(c.accepted is not None for c in so_far) >= len(clients),
            )
            assert all(c.more and c.operation is operation for c in completions)
            for completion in completions:
                if completion.accepted is not None:
                    # A dead one must not disturb what is started on it either.
                    port.associate(completion.accepted)
                    completion.accepted.send(b"hello", quiet=True)
            for client in clients:
                if client not in dead:
                    assert read_exactly(client, 5) == b"hello"
            close_accepted(completions)
            settle(port, 0)
        assert operation.pending


def test_a_client_that_leaves_its_data_behind_is_accepted_with_it(
    port: an.CompletionPort, family: str
) -> None:
    listener, address = listening(port, family)
    with listener:
        client = dial(address)
        client.sendall(b"left behind")
        client.close()
        listener.accept()
        accepted, _ = one(port).result()
        with accepted:
            port.associate(accepted)
            accepted.recv()
            assert one(port).data == b"left behind"
            accepted.recv()
            assert one(port).data == b""


@pytest.mark.parametrize("way", ["one-shot", "multishot"])
def test_a_burst_of_clients_that_were_there_before_is_accepted_whole(
    port: an.CompletionPort, family: str, way: str
) -> None:
    listener, address = listening(port, family)
    with listener:
        clients = [dial(address) for _ in range(100)]
        nothing(port)  # the event came and nobody wanted it
        completions: list[an.Completion] = []
        if way == "multishot":
            listener.accept(multishot=True)
            completions = drain(port, 100)
        else:
            for _ in range(100):
                listener.accept()
                completions.append(one(port))
        assert all(c.accepted is not None for c in completions)
        if family != "unix":
            assert {c.address for c in completions} == {c.getsockname() for c in clients}
        close_accepted(completions)


# A server with few descriptors in a process of its own: it serves from one endless dequeue, tells
# each completion in a line, and closes a connection whose client has left.
FEW_DESCRIPTORS = """
    import errno, os, resource, sys, threading
    import asyncio_native as an

    port = an.CompletionPort()
    listener = an.AsyncSocket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    port.associate(listener)
    spare = [os.open(os.devnull, os.O_RDONLY) for _ in range(3)]
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    multishot = WAY == "multishot"

    def obey():
        for line in sys.stdin:
            if line == "free\\n":
                while spare:
                    os.close(spare.pop())
            elif line == "accept\\n":
                listener.accept(multishot=multishot)
            elif line == "end\\n":
                port.post("end")

    threading.Thread(target=obey, daemon=True).start()
    print(listener.getsockname()[1], flush=True)
    listener.accept(multishot=multishot)
    # Room for 4 more descriptors: numbers up to `highest` are taken already.
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1 + 4, hard))
    connections = []
    while True:
        completion = port.dequeue(None)
        if completion.kind is an.POST:
            break
        if completion.kind is an.ACCEPT:
            if completion.accepted is not None:
                port.associate(completion.accepted)
                completion.accepted.recv(multishot=True)
                connections.append(completion.accepted)
                print("accepted", completion.more, flush=True)
            else:
                print(errno.errorcode[completion.error], completion.more, flush=True)
        elif completion.kind is an.RECV and not completion.data:
            completion.socket.close()
            if completion.socket in connections:
                connections.remove(completion.socket)
    port.close()
    print("ended", flush=True)
"""


class Server:
    """The process with few descriptors; `line()` is its next line."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.address = ("127.0.0.1", int(self.line()))

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def tell(self, command: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()

    def processor_seconds(self) -> float:
        """CPU time used so far, in ticks of 10 ms."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / 100

    def out_of_descriptors(self, more: bool) -> int:
        """Reads lines to the first error; returns how many were accepted before it."""
        for accepted in range(100):
            line = self.line()
            if line != f"accepted {more}":
                assert line == f"EMFILE {more}", line
                return accepted
        raise AssertionError("the limit was never reached")


@contextmanager
def server_with_few_descriptors(backend: str, way: str) -> Iterator[Server]:
    if sys.platform != "linux":
        pytest.skip("reads /proc of the server")
    process = start_python(f"    WAY = {way!r}\n{FEW_DESCRIPTORS}", backend)
    try:
        server = Server(process)
        yield server
        server.tell("end")
        for _ in range(1000):
            if server.line() == "ended":
                break
        assert process.wait(PATIENCE) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            assert stream is not None
            stream.close()


def test_accepting_without_descriptors_reports_once_and_does_not_spin(backend: str) -> None:
    with server_with_few_descriptors(backend, "multishot") as server:
        clients = [dial(server.address) for _ in range(10)]
        accepted = server.out_of_descriptors(more=True)
        assert 1 <= accepted < 10
        before = server.processor_seconds()
        time.sleep(0.6)  # nothing can be awaited: it is about what does not happen
        assert server.processor_seconds() - before < 0.1
        # No second report in this episode: the next line is for the next accepted one.
        clients[0].close()
        assert server.line() == "accepted True"


def test_accepting_goes_on_when_our_own_closes_free_descriptors(backend: str) -> None:
    with server_with_few_descriptors(backend, "multishot") as server:
        clients = [dial(server.address) for _ in range(20)]
        accepted = server.out_of_descriptors(more=True)
        for client in clients:
            client.close()  # each lets the server close one and so take the next
        errors = 0
        while accepted < 20:
            line = server.line()
            assert line in ("accepted True", "EMFILE True"), line
            accepted += line == "accepted True"
            errors += line == "EMFILE True"
        assert errors <= 20, "more than one report an episode"


def test_accepting_goes_on_when_others_free_descriptors(backend: str) -> None:
    """No event tells that a descriptor was closed elsewhere in the process."""
    with server_with_few_descriptors(backend, "multishot") as server:
        clients = [dial(server.address) for _ in range(10)]
        accepted = server.out_of_descriptors(more=True)
        server.tell("free")  # three files of another thread, while it waits in dequeue(None)
        assert [server.line() for _ in range(3)] == ["accepted True"] * 3
        assert server.line() == "EMFILE True"  # the next episode
        assert accepted + 3 < len(clients)


def test_accepting_goes_on_when_the_limit_is_raised(backend: str) -> None:
    resource = pytest.importorskip("resource", reason="no descriptor limits on this system")
    with server_with_few_descriptors(backend, "multishot") as server:
        clients = [dial(server.address) for _ in range(10)]
        accepted = server.out_of_descriptors(more=True)
        hard = resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)[1]
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (min(hard, 256), hard))
        lines = [server.line() for _ in range(len(clients) - accepted)]
        assert lines == ["accepted True"] * (len(clients) - accepted)


def test_a_one_shot_accept_without_descriptors_completes_with_the_error(backend: str) -> None:
    with server_with_few_descriptors(backend, "one-shot") as server:
        clients = [dial(server.address) for _ in range(10)]
        for _ in range(len(clients)):
            line = server.line()
            if line == "EMFILE False":
                break
            assert line == "accepted False"
            server.tell("accept")
        assert line == "EMFILE False"
        server.tell("free")
        server.tell("accept")
        assert server.line() == "accepted False"
