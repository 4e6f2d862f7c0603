"""What a server costs in system calls, counted by strace on a process of its own.

The steady state of a request/reply server on epoll is one receive and one send a message and one
wait a batch, and connections that are idle cost nothing at all.
"""

from __future__ import annotations

import functools
import math
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import asyncio_native as an
import pytest
from support import PATIENCE, dial, read_exactly, start_python

RECEIVES = {"recv", "recvfrom", "recvmsg", "read", "readv"}
SENDS = {"send", "sendto", "sendmsg", "write", "writev"}
WAITS = {"epoll_wait", "epoll_pwait", "epoll_pwait2"}

#: The main thread may wait in slices of this many seconds, so that Ctrl-C is heard.
SLICE_SECONDS = 0.25


@functools.cache
def why_not() -> str:
    """Why system calls cannot be counted here; empty when they can."""
    if not any(backend.name == "epoll" and backend.available for backend in an.backends()):
        return "the counts are those of epoll, which is not available here"
    if shutil.which("strace") is None:
        return "strace is not installed"
    tried = subprocess.run(["strace", "-o", "/dev/null", "true"], capture_output=True, text=True)
    if tried.returncode:
        return f"strace may not trace here: {tried.stderr.strip()}"
    return ""


@pytest.fixture(autouse=True)
def needs_strace() -> None:
    if reason := why_not():
        pytest.skip(reason)


@contextmanager
def counted(process: subprocess.Popen[str]) -> Iterator[Counter[str]]:
    """Counts the system calls of a process during the block; the result is there behind it.

    Not counted: what the process reads from its standard input and writes to its standard output.
    """
    counts: Counter[str] = Counter()
    with tempfile.NamedTemporaryFile("r", prefix="an-strace-") as trace:
        tracer = subprocess.Popen(
            ["strace", "-f", "-s", "0", "-o", trace.name, "-p", str(process.pid)],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert tracer.stderr is not None
        try:
            line = tracer.stderr.readline()
            if "attached" not in line:
                pytest.skip(f"strace may not attach here: {line.strip()}")
            yield counts
        finally:
            tracer.send_signal(signal.SIGINT)  # detaches; the process goes on
            tracer.wait(PATIENCE)
            tracer.stderr.close()
        for line in trace:
            if (call := re.match(r"\d+ +(\w+)\((\d*)", line)) is None:
                continue
            name, descriptor = call.groups()
            if (name, descriptor) not in {("read", "0"), ("write", "1")}:
                counts[name] += 1


def split(counts: Counter[str]) -> tuple[int, int, int, dict[str, int]]:
    """Receives, sends, waits, and all else."""
    rest = {n: c for n, c in counts.items() if n not in RECEIVES | SENDS | WAITS}
    return (
        sum(counts[name] for name in RECEIVES),
        sum(counts[name] for name in SENDS),
        sum(counts[name] for name in WAITS),
        rest,
    )


@contextmanager
def ended(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()


@contextmanager
def echo_program() -> Iterator[tuple[subprocess.Popen[str], tuple[str, int]]]:
    """The package's own echo server, and its address."""
    command = ["echo", "--host", "127.0.0.1", "--port", "0", "--backend", "epoll"]
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "asyncio_native", *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    with ended(process):
        assert process.stdout is not None
        line = process.stdout.readline()
        listening = re.fullmatch(r"listening on 127\.0\.0\.1:(\d+)\n", line)
        assert listening is not None, line
        yield process, ("127.0.0.1", int(listening[1]))


def exchange(client: socket.socket, count: int, size: int) -> None:
    for number in range(count):
        message = b"%d" % number * size
        client.sendall(message[:size])
        assert read_exactly(client, size) == message[:size]


@pytest.mark.parametrize("size", [1, 100, 4096])
def test_an_echo_server_takes_one_receive_one_send_and_one_wait_for_a_message(size: int) -> None:
    with echo_program() as (process, address):
        client = dial(address)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        exchange(client, 500, size)
        started = time.monotonic()
        with counted(process) as counts:
            exchange(client, 300, size)
        slices = math.ceil((time.monotonic() - started) / SLICE_SECONDS)
        receives, sends, waits, rest = split(counts)
        assert (receives, sends, rest) == (300, 300, {})
        # Each message ends a wait. That of the first may have begun before strace came, and then is
        # not seen, or is begun anew; that behind the last may not have begun yet when it left.
        assert 300 - 1 <= waits <= 300 + 2 + slices


def test_a_connection_is_watched_once_and_closed_without_another_word() -> None:
    with ExitStack() as stack:
        process, address = stack.enter_context(echo_program())
        for _ in range(20):
            with dial(address) as client:
                exchange(client, 1, 10)
                client.shutdown(socket.SHUT_WR)
                assert client.recv(1) == b""
        # The answer to a later connection tells that the server has done with those before it.
        # Neither of these two ends while it is counted.
        exchange(stack.enter_context(dial(address)), 1, 10)
        count = 50
        with counted(process) as counts:
            for _ in range(count):
                with dial(address) as client:
                    exchange(client, 1, 10)
                    client.shutdown(socket.SHUT_WR)
                    assert client.recv(1) == b""
            exchange(stack.enter_context(dial(address)), 1, 10)
        receives, sends, _, rest = split(counts)
    # The second receive finds the end; each accept that found a connection is followed by one that
    # finds none, unless there is another connection by then.
    assert sends == count + 1
    assert receives == 2 * count + 1
    assert rest.pop("close") == count
    assert rest.pop("epoll_ctl") == count + 1
    assert rest.pop("setsockopt") == count + 1  # the program's own: TCP_NODELAY
    assert count < rest.pop("accept4") <= 2 * (count + 1)
    assert set(rest) <= {"mmap", "munmap", "brk"}  # the interpreter's memory


# A server that does one thing for each line of its input, so that batches are the same each time.
# The answer to "processor" is the CPU time used so far, in seconds.
STEPS = """
    import resource, socket, sys, time
    import asyncio_native as an

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    port = an.CompletionPort(concurrency=1)
    listener = an.AsyncSocket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(4096)
    port.associate(listener)
    listener.accept(multishot=True)
    print(listener.getsockname()[1], flush=True)
    multishot = WAY == "multishot"
    connections = []
    for line in sys.stdin:
        command, number = line.split()
        left = int(number)
        answer = "done"
        if command == "rest":
            assert not port.dequeue_many(timeout=left)
            left = 0
        elif command == "processor":
            answer = time.process_time()
        while left:
            for completion in port.dequeue_many(timeout=15):
                sock = completion.socket
                if completion.kind is an.ACCEPT:
                    sock = completion.result()[0]
                    port.associate(sock)
                    connections.append(sock)
                else:
                    sock.send(completion.result(), quiet=True)
                if not (multishot and completion.kind is an.RECV):
                    sock.recv(multishot=multishot)
                left -= 1
        print(answer, flush=True)
"""


class Steps:
    """The server that goes step by step."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        assert process.stdout is not None
        self.address = ("127.0.0.1", int(process.stdout.readline()))

    def step(self, command: str, number: int = 0) -> str:
        """Tells it one step, waits until it is done; returns its answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{command} {number}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline().strip()
        assert answer, "the server is gone"
        return answer

    def processor_seconds(self) -> float:
        """The CPU time that the server has used so far."""
        return float(self.step("processor"))

    def clients(self, count: int) -> list[socket.socket]:
        """Connected clients, accepted by the server."""
        made: list[socket.socket] = []
        while len(made) < count:
            group = min(count - len(made), 1000)
            made += [dial(self.address) for _ in range(group)]
            self.step("accept", group)
        return made

    def rounds(self, active: list[socket.socket], count: int) -> None:
        """In each round every active client has sent when the server looks."""
        for number in range(count):
            for client in active:
                client.sendall(b"round %04d" % number)
            self.step("serve", len(active))
            for client in active:
                assert read_exactly(client, 10) == b"round %04d" % number

    def seconds_for_rounds(self, active: list[socket.socket], count: int) -> float:
        """The CPU time of so many rounds."""
        before = self.processor_seconds()
        self.rounds(active, count)
        return self.processor_seconds() - before


@contextmanager
def steps(way: str) -> Iterator[Steps]:
    with ended(start_python(f"    WAY = {way!r}\n{STEPS}", "epoll")) as process:
        yield Steps(process)


@pytest.mark.parametrize("way", ["multishot", "one-shot"])
def test_a_batch_takes_one_wait_and_each_message_one_receive_and_one_send(way: str) -> None:
    with steps(way) as server:
        active = server.clients(10)
        server.rounds(active, 50)
        with counted(server.process) as counts:
            server.rounds(active, 30)
        receives, sends, waits, rest = split(counts)
        assert (receives, sends, waits, rest) == (300, 300, 30, {})


# Answers each datagram; a line of its input tells how many to answer.
DATAGRAMS = """
    import socket, sys
    import asyncio_native as an

    port = an.CompletionPort(concurrency=1)
    sock = an.AsyncSocket(type=socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 0))
    port.associate(sock)
    sock.recvfrom(multishot=True)
    print(sock.getsockname()[1], flush=True)
    for line in sys.stdin:
        command, number = line.split()
        left = int(number)
        while left:
            for completion in port.dequeue_many(timeout=15):
                data, address = completion.result()
                sock.sendto(data, address, quiet=True)
                left -= 1
        print("done", flush=True)
"""


def test_a_datagram_takes_one_receive_and_one_send_of_the_cheaper_kind() -> None:
    with ended(start_python(DATAGRAMS, "epoll")) as process:
        server = Steps(process)
        with socket.socket(type=socket.SOCK_DGRAM) as client:
            client.settimeout(PATIENCE)
            client.connect(server.address)

            def rounds(count: int) -> None:
                for number in range(count):
                    for part in range(10):
                        client.send(b"%d.%d" % (number, part))
                    server.step("serve", 10)
                    for part in range(10):
                        assert client.recv(20) == b"%d.%d" % (number, part)

            rounds(50)
            with counted(process) as counts:
                rounds(30)
    waits = sum(counts.pop(name, 0) for name in WAITS)
    # A batch's last receive finds that there is no more. It may have come before the answers: then
    # the first datagrams of the next round cost one more.
    assert counts.pop("sendto") == 300
    assert 300 + 30 <= counts.pop("recvfrom") <= 300 + 2 * 30
    assert waits <= 2 * 30
    assert not counts


@pytest.mark.slow
def test_ten_thousand_idle_connections_cost_no_system_calls_and_no_time() -> None:
    resource = pytest.importorskip("resource", reason="no descriptor limits on this system")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    idle = 10_000
    if hard < idle + 200:
        pytest.skip(f"needs {idle + 200} descriptors a process, the hard limit is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        with steps("multishot") as server:
            active = server.clients(10)
            server.rounds(active, 50)
            seconds_alone = min(server.seconds_for_rounds(active, 100) for _ in range(3))
            with counted(server.process) as alone:
                server.rounds(active, 30)

            sleepers = server.clients(idle)
            assert len(sleepers) == idle
            server.rounds(active, 50)
            seconds_beside = min(server.seconds_for_rounds(active, 100) for _ in range(3))
            with counted(server.process) as beside:
                server.rounds(active, 30)
            assert beside == alone
            # 100 rounds of 10 take some 10 ms, several times that where others use the caches;
            # touching 10,000 sockets a round would take seconds.
            assert seconds_beside <= 2 * seconds_alone + 0.1

            before = server.processor_seconds()
            with counted(server.process) as resting:
                server.step("rest", 1)
            used = server.processor_seconds() - before
            receives, sends, waits, rest = split(resting)
            assert (receives, sends, rest) == (0, 0, {})
            assert waits <= 1 / SLICE_SECONDS + 3
            assert used < 0.05
            for client in sleepers[::1000]:  # idle, not dead
                server.rounds([client], 1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
