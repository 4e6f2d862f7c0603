"""`python -m asyncio_native proxy`, between clients and targets that are not ours."""

from __future__ import annotations

import contextlib
import importlib
import selectors
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from asyncio_native.cli.proxy import Proxy as InProcess
from asyncio_native.cli.system import raise_descriptor_limit
from cli_support import (
    IN_USE,
    Echo,
    assert_one_line_error,
    assert_usage_error,
    descriptors,
    limit_descriptors,
    linux_limits,
    memory_of,
    processor_seconds,
    run_cli,
    unchosen_address,
)
from proxy_support import TELL, Proxy, asks_statistics, at
from support import (
    ENDING_SIGNALS,
    PATIENCE,
    SOON_SECONDS,
    WINE,
    eventually,
    expect_reset,
    keep,
    pattern,
    read_exactly,
    read_to_end,
    refusing_address,
    reset,
    send_signal,
    stdlib_listener,
    why_not,
)

#: A backend that is not of this system.
ELSEWHERE = "epoll" if sys.platform == "win32" else "iocp"

MEBIBYTE = 1 << 20


def installed(tool: str, package: str) -> str:
    """The tool's path; skips the test where it is not installed."""
    path = shutil.which(tool)
    if path is None:
        pytest.skip(f"{tool} is not installed (Debian package {package})")
    return path


def accepted(listener: socket.socket) -> socket.socket:
    """The target's side of the next connection."""
    return keep(listener.accept()[0])


def connected(proxy: Proxy, listener: socket.socket) -> tuple[socket.socket, socket.socket]:
    """A client of the proxy and the target's side of it."""
    client = proxy.dial()
    return client, accepted(listener)


def send_until_refused(peer: socket.socket, top: int) -> int:
    """Sends until nothing more is taken for half a second; how many bytes were."""
    peer.setblocking(False)
    sent = 0
    with selectors.DefaultSelector() as selector:
        selector.register(peer, selectors.EVENT_WRITE)
        while sent < top and selector.select(0.5):
            sent += peer.send(pattern(65_536, sent))
    peer.settimeout(PATIENCE)
    return sent


def readable(peer: socket.socket) -> int:
    """Bytes that have arrived and were not read; tcp(7), SIOCINQ."""
    fcntl, termios = importlib.import_module("fcntl"), importlib.import_module("termios")
    count: int = struct.unpack("i", fcntl.ioctl(peer.fileno(), termios.FIONREAD, bytes(4)))[0]
    return count


@contextlib.contextmanager
def sending(peer: socket.socket, data: bytes, *, end: bool = True) -> Iterator[None]:
    """Sends the data from another thread, and half-closes after it."""

    def work() -> None:
        with contextlib.suppress(OSError):  # the test compares what arrives
            peer.sendall(data)
            if end:
                peer.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def memory(proxy: Proxy) -> int:
    return memory_of(proxy.process.pid)


# -- listening and the target's name --------------------------------------------------------------


def test_the_first_line_says_where_it_listens(backend: str) -> None:
    with Proxy(backend, stdlib_listener().getsockname()) as proxy:
        assert proxy.line == f"listening on 127.0.0.1:{proxy.address[1]}\n"
        assert proxy.address[1] > 0
        assert proxy.end() == (0, "", "")


def test_a_named_port_is_used(backend: str) -> None:
    where = at(unchosen_address())
    with Proxy(backend, "127.0.0.1:9", listen=where) as proxy:
        assert proxy.line == f"listening on {where}\n"


def test_ipv6_on_both_sides(backend: str) -> None:
    if reason := why_not("ipv6"):
        pytest.skip(reason)
    listener = stdlib_listener("ipv6")
    with Proxy(backend, listener.getsockname(), listen="[::1]:0") as proxy:
        assert proxy.line == f"listening on [::1]:{proxy.address[1]}\n"
        client, target = connected(proxy, listener)
        client.sendall(b"six")
        assert read_exactly(target, 3) == b"six"


def test_ipv4_clients_of_an_ipv6_target(backend: str) -> None:
    if reason := why_not("ipv6"):
        pytest.skip(reason)
    listener = stdlib_listener("ipv6")
    with Proxy(backend, listener.getsockname()) as proxy:
        client, target = connected(proxy, listener)
        target.sendall(b"hello")
        assert read_exactly(client, 5) == b"hello"


@pytest.mark.parametrize("family", ["ipv4", "ipv6"])
def test_each_address_of_a_named_target_is_tried(backend: str, family: str) -> None:
    if reason := why_not(family):
        pytest.skip(reason)
    listener = stdlib_listener(family)
    host, port = listener.getsockname()[:2]
    if host not in {found[4][0] for found in socket.getaddrinfo("localhost", port)}:
        pytest.skip(f"localhost is not {host} on this machine")
    with Proxy(backend, f"localhost:{port}", listen="localhost:0") as proxy:
        client, target = connected(proxy, listener)
        client.sendall(b"by name")
        assert read_exactly(target, 7) == b"by name"
        assert proxy.end() == (0, "", "")


# -- forwarding -----------------------------------------------------------------------------------


def test_requests_and_replies_one_after_the_other(backend: str) -> None:
    listener = stdlib_listener()
    with Proxy(backend, listener.getsockname()) as proxy:
        client, target = connected(proxy, listener)
        # Sizes on both sides of where short messages end and where bulk begins.
        for size in [1, 100, 16_383, 16_384, 16_385, 1, 65_535, 65_536, 65_537, 200_000, 3, 16_384]:
            for _ in range(5):
                client.sendall(pattern(size, size))
                assert read_exactly(target, size) == pattern(size, size)
                target.sendall(pattern(size, 1))
                assert read_exactly(client, size) == pattern(size, 1)
        assert proxy.end() == (0, "", "")


def test_the_target_may_speak_first(backend: str) -> None:
    listener = stdlib_listener()
    with Proxy(backend, listener.getsockname()) as proxy:
        client, target = connected(proxy, listener)
        target.sendall(b"220 ready")
        assert read_exactly(client, 9) == b"220 ready"


def test_bulk_in_both_directions_at_once(backend: str) -> None:
    there, back = pattern(24 * MEBIBYTE), pattern(24 * MEBIBYTE, 77)
    listener = stdlib_listener()
    with Proxy(backend, listener.getsockname()) as proxy:
        client, target = connected(proxy, listener)
        got: list[bytes] = []
        reader = threading.Thread(target=lambda: got.append(read_to_end(target)))
        with sending(client, there), sending(target, back):
            reader.start()
            assert read_to_end(client) == back
            reader.join()
        assert got == [there]


def test_bulk_that_trickles_in_between_short_messages_keeps_its_order(backend: str) -> None:
    whole = pattern(3 * MEBIBYTE)
    sizes = [1, 16_384, 40, 300_000, 16_384, 16_384, 7, 90_000]
    listener = stdlib_listener()
    with Proxy(backend, listener.getsockname()) as proxy:
        client, target = connected(proxy, listener)
        target.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)

        def send() -> None:
            begin = turn = 0
            while begin < len(whole):
                size = sizes[turn % len(sizes)]
                client.sendall(whole[begin : begin + size])
                begin, turn = begin + size, turn + 1
            client.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        try:
            assert read_to_end(target) == whole
        finally:
            sender.join()


def test_many_clients_at_once(backend: str) -> None:
    with Echo(backend) as echo, Proxy(backend, echo.address) as proxy:
        peers = [proxy.dial() for _ in range(200)]
        for turn in range(3):
            for number, peer in enumerate(peers):
                peer.sendall(pattern(2000, number + turn))
            for number, peer in enumerate(peers):
                assert read_exactly(peer, 2000) == pattern(2000, number + turn)
        assert proxy.end() == (0, "", "")


# -- ends -----------------------------------------------------------------------------------------


def test_a_client_that_half_closes_gets_its_whole_reply(backend: str) -> None:
    request, reply = pattern(100_000), pattern(4 * MEBIBYTE, 5)
    listener = stdlib_listener()
    with Proxy(backend, listener.getsockname()) as proxy:
        client, target = connected(proxy, listener)
        with sending(client, request):
            assert read_to_end(target) == request
        with sending(target, reply):
            assert read_to_end(client) == reply
        proxy.await_no_connections()


def test_a_target_that_half_closes_is_still_sent_to(backend: str) -> None:
    data = pattern(4 * MEBIBYTE)
    listener = stdlib_listener()
    with Proxy(backend, listener.getsockname()) as proxy:
        client, target = connected(proxy, listener)
        target.shutdown(socket.SHUT_WR)
        assert read_to_end(client) == b""
        with sending(client, data):
            assert read_to_end(target) == data
        proxy.await_no_connections()


@pytest.mark.parametrize("closer", ["client", "target"])
def test_a_close_is_passed_on(backend: str, closer: str) -> None:
    listener = stdlib_listener()
    with Proxy(backend, listener.getsockname()) as proxy:
        client, target = connected(proxy, listener)
        ours, theirs = (client, target) if closer == "client" else (target, client)
        ours.sendall(b"last words")
        ours.close()
        assert read_to_end(theirs) == b"last words"
        theirs.close()
        proxy.await_no_connections()


@pytest.mark.parametrize("resetter", ["client", "target"])
def test_a_reset_is_passed_on_as_a_reset(backend: str, resetter: str) -> None:
    listener = stdlib_listener()
    with Proxy(backend, listener.getsockname()) as proxy:
        client, target = connected(proxy, listener)
        client.sendall(b"x")
        target.sendall(b"y")
        assert read_exactly(target, 1) + read_exactly(client, 1) == b"xy"
        ours, theirs = (client, target) if resetter == "client" else (target, client)
        reset(ours)
        expect_reset(theirs)
        proxy.await_no_connections()


@pytest.mark.parametrize("first", ["client", "target"])
def test_ends_that_neither_read_nor_are_received_from_may_reset(backend: str, first: str) -> None:
    """With both directions stopped only the failure of what waits to be sent tells the end."""
    listener = stdlib_listener()
    with Proxy(backend, listener.getsockname()) as proxy:
        client, target = connected(proxy, listener)
        send_until_refused(client, 256 * MEBIBYTE)
        send_until_refused(target, 256 * MEBIBYTE)
        for peer in (client, target) if first == "client" else (target, client):
            reset(peer)
        proxy.await_no_connections()
        assert proxy.end() == (0, "", "")


@asks_statistics
def test_clients_that_reset_in_the_middle_harm_nobody(backend: str) -> None:
    with Echo(backend) as echo, Proxy(backend, echo.address) as proxy:
        steady = proxy.dial()
        for number in range(40):
            client = proxy.dial()
            client.sendall(pattern(300_000))
            if number % 2:
                read_exactly(client, 1000)
            reset(client)
            steady.sendall(b"still here")
            assert read_exactly(steady, 10) == b"still here"
        eventually(lambda: proxy.statistics()["connections now"] == "1")
        assert proxy.end() == (0, "", "")


def test_an_answer_sent_before_the_target_broke_off_arrives(backend: str) -> None:
    """As an HTTP server does with a request that is too large: it answers and closes unread."""
    answer = pattern(10_000)
    listener = stdlib_listener()
    with Proxy(backend, listener.getsockname()) as proxy:
        client, target = connected(proxy, listener)
        with sending(client, pattern(32 * MEBIBYTE), end=False):
            read_exactly(target, 1000)
            target.sendall(answer)
            target.close()  # with a reset, as much was left unread
            assert read_exactly(client, len(answer)) == answer
            with contextlib.suppress(ConnectionResetError):
                assert client.recv(1) == b""
            proxy.await_no_connections()


@asks_statistics
def test_a_slow_reader_still_gets_what_came_before_the_target_broke_off(backend: str) -> None:
    listener = stdlib_listener()
    with Proxy(backend, listener.getsockname()) as proxy:
        client, target = connected(proxy, listener)
        client.sendall(b"left unread")
        eventually(lambda: proxy.statistics()["bytes from clients"] == "11")
        send_until_refused(target, 256 * MEBIBYTE)
        there = readable(client)
        reset(target)
        # Sending to the target fails, while what it had sent is still to be received from it.
        for count in range(12, 20):
            client.sendall(b"x")
            eventually(lambda: int(proxy.statistics()["bytes from clients"]) >= count)
        got = bytearray()
        with contextlib.suppress(ConnectionResetError):
            while piece := client.recv(MEBIBYTE):
                got += piece
        # Not all: a reset takes with it what has not reached the client's system.
        assert len(got) > there
        assert got == pattern(len(got))
        proxy.await_no_connections()


@pytest.mark.parametrize("down", [1, 2])
def test_the_addresses_of_a_target_are_tried_one_after_the_other(backend: str, down: int) -> None:
    listener = stdlib_listener()
    addresses = [*(refusing_address() for _ in range(down)), listener.getsockname()]
    targets = [(int(socket.AF_INET), address) for address in addresses]
    proxy = InProcess((int(socket.AF_INET), ("127.0.0.1", 0)), targets, backend, None, 10.0)
    thread = threading.Thread(target=proxy.run)
    thread.start()
    try:
        client = keep(socket.create_connection(proxy.address, timeout=PATIENCE))
        client.sendall(b"the last one")
        target = accepted(listener)
        assert read_exactly(target, 12) == b"the last one"
        assert "connects failed     0" in proxy.statistics_text()
    finally:
        proxy.stop()
        thread.join()
        proxy.close()


@asks_statistics
def test_a_target_that_is_down_gives_the_client_an_end_and_may_come_back(backend: str) -> None:
    # Bound all the time, so that nobody else is given the port: the server only begins to listen.
    server = keep(socket.socket())
    server.bind(("127.0.0.1", 0))
    with Proxy(backend, server.getsockname()) as proxy:
        begun = time.monotonic()
        for _ in range(3):
            with pytest.raises(ConnectionResetError):
                proxy.dial().recv(1)
        assert time.monotonic() - begun < SOON_SECONDS
        statistics = proxy.statistics()
        assert statistics["connects failed"] == "3"
        assert statistics["connections now"] == "0"
        assert proxy.told.count("\n") == 1
        assert proxy.told.startswith("asyncio-native: connecting to the target failed")
        assert "refused" in proxy.told
        server.listen()
        client, target = connected(proxy, server)
        client.sendall(b"back")
        assert read_exactly(target, 4) == b"back"
        assert proxy.end() == (0, "", "")


@asks_statistics
def test_a_target_that_does_not_answer_is_given_up(backend: str) -> None:
    full = stdlib_listener(backlog=0)
    fillers = []
    with selectors.DefaultSelector() as selector:
        # Linux leaves further handshakes without an answer once the backlog is full.
        for _ in range(8):
            filler = keep(socket.socket())
            fillers.append(filler)
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
            selector.register(filler, selectors.EVENT_WRITE)
        eventually(lambda: selector.select(0.2))
        if len(selector.select(0)) == len(fillers):
            pytest.skip("this system answers more connections than the backlog has room for")
    with Proxy(backend, full.getsockname(), "--connect-timeout", "0.4") as proxy:
        begun = time.perf_counter()
        expect_reset(proxy.dial())
        assert 0.4 <= time.perf_counter() - begun < 0.4 + SOON_SECONDS
        assert proxy.statistics()["connects failed"] == "1"
        assert "timed out" in proxy.told


def test_a_target_killed_in_the_middle_ends_its_clients(backend: str) -> None:
    with Echo(backend) as echo, Proxy(backend, echo.address) as proxy:
        quiet = [proxy.dial() for _ in range(20)]
        for peer in quiet:
            peer.sendall(b"x")
            assert read_exactly(peer, 1) == b"x"
        busy = [proxy.dial() for _ in range(5)]
        with contextlib.ExitStack() as stack:
            for peer in busy:
                stack.enter_context(sending(peer, pattern(64 * MEBIBYTE), end=False))
                read_exactly(peer, 100_000)
            echo.process.kill()
            begun = time.monotonic()
            for peer in quiet + busy:
                with contextlib.suppress(ConnectionResetError):
                    read_to_end(peer)
            assert time.monotonic() - begun < SOON_SECONDS
        for peer in quiet + busy:
            peer.close()
        proxy.await_no_connections()
        # The reset may be there before the client is told that it is connected.
        with contextlib.suppress(ConnectionResetError):
            expect_reset(proxy.dial())
        assert proxy.end()[0] == 0


# -- slow readers ---------------------------------------------------------------------------------


@asks_statistics
def test_twenty_clients_that_read_nothing_cost_a_few_mebibytes(backend: str) -> None:
    whole = pattern(20 * MEBIBYTE)
    listener = stdlib_listener()
    with Proxy(backend, listener.getsockname()) as proxy:
        # The first bulk warms up what stays: the pool of the port, the memory of the interpreter.
        client, target = connected(proxy, listener)
        with sending(target, whole):
            assert read_to_end(client) == whole
        before = memory(proxy)
        pairs = [connected(proxy, listener) for _ in range(20)]
        with contextlib.ExitStack() as stack:
            for _, target in pairs:
                stack.enter_context(sending(target, whole))
            seen = -1
            while (now := int(proxy.statistics()["bytes from target"])) != seen:
                seen = now
                time.sleep(0.3)  # until nothing has moved for that long
            assert seen < 15 * len(whole), "nothing has stopped the targets"
            assert memory(proxy) - before < 8 * MEBIBYTE

            # Others are served meanwhile, and each gets all that was sent to it when it reads.
            other, target = connected(proxy, listener)
            other.sendall(b"still there?")
            assert read_exactly(target, 12) == b"still there?"
            for client, _ in pairs:
                assert read_to_end(client) == whole
        assert memory(proxy) - before < 8 * MEBIBYTE
        assert proxy.end() == (0, "", "")


@pytest.mark.parametrize("flooder", ["client", "target"])
def test_who_does_not_read_stops_the_sender_but_not_its_own_sending(
    backend: str, flooder: str
) -> None:
    listener = stdlib_listener()
    with Proxy(backend, listener.getsockname()) as proxy:
        client, target = connected(proxy, listener)
        ours, theirs = (client, target) if flooder == "client" else (target, client)
        before = memory(proxy)
        sent = send_until_refused(ours, 256 * MEBIBYTE)
        assert sent < 128 * MEBIBYTE
        assert memory(proxy) - before < 4 * MEBIBYTE
        for number in range(20):
            theirs.sendall(pattern(50_000, number))
            assert read_exactly(ours, 50_000) == pattern(50_000, number)
        ours.shutdown(socket.SHUT_WR)
        assert len(read_to_end(theirs)) == sent


def test_a_stopped_sender_costs_no_processor_time(backend: str) -> None:
    listener = stdlib_listener()
    with Proxy(backend, listener.getsockname()) as proxy:
        client, _target = connected(proxy, listener)
        send_until_refused(client, 256 * MEBIBYTE)
        before = processor_seconds(proxy.process.pid)
        time.sleep(0.5)
        assert processor_seconds(proxy.process.pid) - before < 0.1


# -- idle connections -----------------------------------------------------------------------------


def test_an_idle_connection_is_closed_on_both_sides(backend: str) -> None:
    listener = stdlib_listener()
    with Proxy(backend, listener.getsockname(), "--idle-timeout", "1") as proxy:
        client, target = connected(proxy, listener)
        begun = time.perf_counter()
        client.sendall(b"x")
        assert read_exactly(target, 1) == b"x"
        assert read_to_end(client) == b""
        assert 1 <= time.perf_counter() - begun < 1 + SOON_SECONDS
        assert read_to_end(target) == b""
        if not WINE:
            statistics = proxy.statistics()
            assert statistics["connections now"] == "0"
            assert statistics["closed as idle"] == "1"


@pytest.mark.parametrize("speaker", ["client", "target"])
def test_one_direction_that_flows_keeps_the_connection(backend: str, speaker: str) -> None:
    listener = stdlib_listener()
    with Proxy(backend, listener.getsockname(), "--idle-timeout", "2") as proxy:
        client, target = connected(proxy, listener)
        ours, theirs = (client, target) if speaker == "client" else (target, client)
        begun = last = time.perf_counter()
        while last - begun < 3:
            time.sleep(0.1)  # the silence between two messages is what is tested
            last = time.perf_counter()
            ours.sendall(b"x")
            assert read_exactly(theirs, 1) == b"x"
        assert read_to_end(theirs) == b""
        assert 2 <= time.perf_counter() - last < 2 + SOON_SECONDS


def test_a_half_closed_connection_becomes_idle_too(backend: str) -> None:
    listener = stdlib_listener()
    with Proxy(backend, listener.getsockname(), "--idle-timeout", "0.5") as proxy:
        client, target = connected(proxy, listener)
        client.shutdown(socket.SHUT_WR)
        assert read_to_end(target) == b""
        assert read_to_end(client) == b""
        proxy.await_no_connections()


def test_a_reader_that_has_stopped_for_good_is_idle(backend: str) -> None:
    listener = stdlib_listener()
    # Four times as long as it takes to find that nothing more is taken.
    with Proxy(backend, listener.getsockname(), "--idle-timeout", "2") as proxy:
        _client, target = connected(proxy, listener)
        send_until_refused(target, 256 * MEBIBYTE)
        # What was not delivered is lost, so this is no orderly end.
        expect_reset(target)
        proxy.await_no_connections()


def test_a_reader_that_is_slow_is_not_idle(backend: str) -> None:
    whole = pattern(20 * MEBIBYTE)
    listener = stdlib_listener()
    with Proxy(backend, listener.getsockname(), "--idle-timeout", "2") as proxy:
        client, target = connected(proxy, listener)
        with sending(target, whole):
            got = bytearray()
            while piece := client.recv(2 * MEBIBYTE):
                got += piece
                time.sleep(0.3)  # it is the slowness that is tested
        assert got == whole


def test_without_the_option_nothing_is_idle(backend: str) -> None:
    listener = stdlib_listener()
    with Proxy(backend, listener.getsockname()) as proxy:
        client, target = connected(proxy, listener)
        time.sleep(0.5)
        client.sendall(b"x")
        assert read_exactly(target, 1) == b"x"
        if not WINE:
            assert proxy.statistics()["closed as idle"] == "0"


# -- many connections and few descriptors ---------------------------------------------------------


@asks_statistics
def test_three_thousand_silent_connections(backend: str) -> None:
    count = 3000
    needed = 2 * count + 200
    if (allowed := raise_descriptor_limit(needed)) < needed:
        pytest.skip(f"a process may open {allowed} files here, the proxy needs {needed}")
    with (
        Echo(backend) as echo,
        Proxy(backend, echo.address, "--idle-timeout", "600") as proxy,
    ):
        before = memory(proxy)
        peers = [proxy.dial() for _ in range(count)]
        eventually(lambda: descriptors(echo.process.pid) > count)
        # A connection counts once its answer has come, which is after the target has taken it.
        eventually(lambda: proxy.statistics()["connections now"] == str(count))
        each = (memory(proxy) - before) / count
        assert each < 16 * 1024
        peers[0].sendall(b"one among many")
        assert read_exactly(peers[0], 14) == b"one among many"
        for peer in peers:
            peer.sendall(b"all")
        for peer in peers:
            assert read_exactly(peer, 3) == b"all"
        for peer in peers:
            peer.close()
        proxy.await_no_connections()
        assert proxy.end() == (0, "", "")


@linux_limits
@pytest.mark.parametrize("room", [-10, 4, 5])  # below zero: what it keeps ready is too much
def test_out_of_descriptors_is_said_once_and_everyone_is_served(backend: str, room: int) -> None:
    with Echo(backend) as echo, Proxy(backend, echo.address) as proxy:
        pid = proxy.process.pid
        proxy.statistics()  # it is serving: what it needs itself is open
        limit = descriptors(pid) + room
        limit_descriptors(pid, limit)
        peers = [proxy.dial() for _ in range(50)]
        for number, peer in enumerate(peers):
            peer.sendall(pattern(100, number))
        # Each is served, the later ones when those before have gone.
        for number, peer in enumerate(peers):
            assert read_exactly(peer, 100) == pattern(100, number)
            peer.close()
        status, output, errors = proxy.end()
        assert (status, output) == (0, "")
        assert errors.count("\n") == 1
        assert errors.startswith("asyncio-native: accepting a connection failed")
        assert "ulimit -n" in errors


@linux_limits
def test_out_of_descriptors_does_not_spin(backend: str) -> None:
    with Echo(backend) as echo, Proxy(backend, echo.address) as proxy:
        pid = proxy.process.pid
        proxy.statistics()
        limit = descriptors(pid) + 6
        limit_descriptors(pid, limit)
        peers = [proxy.dial() for _ in range(40)]
        peers[0].sendall(b"x")
        assert read_exactly(peers[0], 1) == b"x"
        before = processor_seconds(pid)
        time.sleep(0.5)
        assert processor_seconds(pid) - before < 0.1


@asks_statistics
def test_connections_that_come_and_go_do_not_add_up(backend: str) -> None:
    with Echo(backend) as echo, Proxy(backend, echo.address, "--idle-timeout", "600") as proxy:

        def come_and_go(count: int) -> None:
            for number in range(count):
                with socket.create_connection(proxy.address, timeout=PATIENCE) as client:
                    client.sendall(b"hello")
                    assert read_exactly(client, 5) == b"hello"
                    if number % 3 == 0:
                        reset(client)

        come_and_go(600)
        proxy.await_no_connections()
        opened, before = descriptors(proxy.process.pid), memory(proxy)
        come_and_go(1500)
        proxy.await_no_connections()
        # What the system still had to do with a closed socket keeps its descriptor a little longer.
        eventually(lambda: descriptors(proxy.process.pid) == opened)
        assert memory(proxy) - before < MEBIBYTE
        assert proxy.statistics()["connections total"] == "2100"


# -- clients and targets of others ----------------------------------------------------------------


def answers(address: tuple[str, int]) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(address) == 0


@pytest.mark.parametrize("client", ["socat", "nc"])
def test_programs_of_others_on_both_sides(backend: str, client: str) -> None:
    socat = installed("socat", "socat")
    data = pattern(3 * MEBIBYTE)
    target = unchosen_address()
    server = subprocess.Popen(
        [socat, f"TCP4-LISTEN:{target[1]},bind=127.0.0.1,fork,reuseaddr", "EXEC:cat"],
        stdin=subprocess.DEVNULL,
    )
    try:
        eventually(lambda: answers(target))
        with Proxy(backend, target) as proxy:
            host, port = proxy.address
            command = {
                "socat": [socat, "-t", str(PATIENCE), "-", f"TCP4:{host}:{port}"],
                "nc": [installed("nc", "netcat-openbsd"), "-N", host, str(port)],
            }[client]
            ended = subprocess.run(command, input=data, capture_output=True, timeout=PATIENCE)
            assert (ended.returncode, ended.stdout == data) == (0, True), ended.stderr
            assert proxy.end() == (0, "", "")
    finally:
        server.terminate()
        server.wait()


# -- signals, statistics, wrong usage -------------------------------------------------------------


@pytest.mark.parametrize("number", ENDING_SIGNALS)
def test_a_signal_ends_it_cleanly(backend: str, number: int) -> None:
    listener = stdlib_listener()
    with Proxy(backend, listener.getsockname()) as proxy:
        client, target = connected(proxy, listener)
        begun = time.monotonic()
        assert proxy.end(number) == (0, "", "")
        assert time.monotonic() - begun < SOON_SECONDS
        assert read_to_end(client) == b""
        assert read_to_end(target) == b""


@pytest.mark.parametrize("number", ENDING_SIGNALS)
def test_a_signal_ends_it_under_load(backend: str, number: int) -> None:
    with Echo(backend) as echo, Proxy(backend, echo.address) as proxy:
        peers = [proxy.dial() for _ in range(8)]
        for peer in peers:
            peer.sendall(b"begun")
            assert read_exactly(peer, 5) == b"begun"

        def exchange(peer: socket.socket) -> None:
            with contextlib.suppress(OSError):  # the proxy ends with our message half way
                while True:
                    peer.sendall(bytes(100_000))
                    if not peer.recv(65_536):
                        return

        threads = [threading.Thread(target=exchange, args=(peer,)) for peer in peers]
        for thread in threads:
            thread.start()
        try:
            begun = time.monotonic()
            assert proxy.end(number) == (0, "", "")
            assert time.monotonic() - begun < SOON_SECONDS
        finally:
            for thread in threads:
                thread.join()


@asks_statistics
def test_the_statistics_count(backend: str) -> None:
    listener = stdlib_listener()
    with Proxy(backend, listener.getsockname()) as proxy:
        first, first_target = connected(proxy, listener)
        second, second_target = connected(proxy, listener)
        for client, target in ((first, first_target), (second, second_target)):
            client.sendall(bytes(1000))
            assert read_exactly(target, 1000) == bytes(1000)
            target.sendall(bytes(70_000))
            assert read_exactly(client, 70_000) == bytes(70_000)
        first.close()
        first_target.close()
        eventually(lambda: proxy.statistics()["connections now"] == "1")
        statistics = proxy.statistics()
        assert 0 <= float(statistics.pop("uptime").removesuffix(" s")) < 60
        assert statistics == {
            "connections now": "1",
            "connections total": "2",
            "connects failed": "0",
            "closed as idle": "0",
            "bytes from clients": "2000",
            "bytes from target": "140000",
        }
        assert proxy.end() == (0, "", "")


@asks_statistics
def test_it_goes_on_when_nobody_reads_what_it_tells(backend: str) -> None:
    listener = stdlib_listener()
    with Proxy(backend, listener.getsockname()) as proxy:
        assert proxy.process.stderr is not None
        proxy.process.stderr.close()
        client, target = connected(proxy, listener)
        for _ in range(3):
            send_signal(proxy.process, TELL)
            client.sendall(b"go on")
            assert read_exactly(target, 5) == b"go on"
        send_signal(proxy.process, ENDING_SIGNALS[-1])
        assert proxy.process.wait(PATIENCE) == 0
        proxy.process.stderr = None


def test_a_port_in_use_is_one_line_and_status_1(backend: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        where = at(holder.getsockname())
        ended = run_cli("proxy", where, "127.0.0.1:9", "--backend", backend)
    assert_one_line_error(ended, 1, where, IN_USE)


def test_a_port_is_free_again_at_once() -> None:
    listener, where = stdlib_listener(), at(unchosen_address())
    with Proxy("auto", listener.getsockname(), listen=where) as proxy:
        _client, _target = connected(proxy, listener)
        assert proxy.end()[0] == 0  # the proxy closes first: its side stays in TIME_WAIT
    with Proxy("auto", listener.getsockname(), listen=where) as second:
        assert second.address == proxy.address


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "required"),
        (["127.0.0.1:0"], "TARGET_HOST:PORT"),
        (["127.0.0.1", "127.0.0.1:9"], "HOST:PORT"),
        ([":5000", "127.0.0.1:9"], "HOST:PORT"),
        (["127.0.0.1:0", "127.0.0.1:0"], "from 1 to 65535"),
        (["127.0.0.1:0", "127.0.0.1:65536"], "from 1 to 65535"),
        (["127.0.0.1:0", "127.0.0.1:http"], "whole number"),
        (["::1:0", "127.0.0.1:9"], "brackets"),
        (["127.0.0.1:0", "127.0.0.1:9", "--idle-timeout", "0"], "--idle-timeout"),
        (["127.0.0.1:0", "127.0.0.1:9", "--connect-timeout", "nan"], "--connect-timeout"),
        (["127.0.0.1:0", "127.0.0.1:9", "--backend", ELSEWHERE], ELSEWHERE),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(arguments: list[str], word: str) -> None:
    assert_usage_error(run_cli("proxy", *arguments), word)


@pytest.mark.parametrize(
    ("listen", "target", "name"),
    [
        ("192.0.2.1:0", "127.0.0.1:9", "192.0.2.1"),  # for documentation: no machine has it
        ("a..b:0", "127.0.0.1:9", "a..b"),  # no name can be written so
        ("127.0.0.1:0", "a..b:9", "a..b"),
    ],
)
def test_a_bad_host_is_one_line_and_status_1(listen: str, target: str, name: str) -> None:
    assert_one_line_error(run_cli("proxy", listen, target), 1, name)
