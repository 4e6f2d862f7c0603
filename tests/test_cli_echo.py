"""`python -m asyncio_native echo`, driven by clients that are not ours."""

from __future__ import annotations

import selectors
import shutil
import socket
import subprocess
import threading
import time

import pytest
from cli_support import (
    IN_USE,
    Echo,
    assert_one_line_error,
    descriptors,
    limit_descriptors,
    linux_limits,
    memory_of,
    run_cli,
    unchosen_address,
)
from support import (
    ENDING_SIGNALS,
    PATIENCE,
    SOON_SECONDS,
    pattern,
    read_exactly,
    read_to_end,
    reset,
    why_not,
)

MEBIBYTE = 1 << 20


def installed(tool: str, package: str) -> str:
    """The tool's path; skips the test where it is not installed."""
    path = shutil.which(tool)
    if path is None:
        pytest.skip(f"{tool} is not installed (Debian package {package})")
    return path


def echo_through(command: list[str], data: bytes) -> bytes:
    """What a program writes that gets `data` as its input."""
    ended = subprocess.run(command, input=data, capture_output=True, timeout=PATIENCE)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


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


def test_the_first_line_says_where_it_listens(backend: str) -> None:
    with Echo(backend) as echo:
        host, port = echo.address
        assert host == "127.0.0.1"
        assert port > 0
        assert echo.line == f"listening on 127.0.0.1:{port}\n"
        assert echo.end() == (0, "", "")


def test_a_named_port_is_used() -> None:
    port = unchosen_address()[1]
    with Echo("auto", "--port", str(port)) as echo:
        assert echo.line == f"listening on 127.0.0.1:{port}\n"


def test_a_host_name_is_resolved() -> None:
    with Echo("auto", "--host", "localhost") as echo, echo.dial() as peer:
        peer.sendall(b"by name")
        assert read_exactly(peer, 7) == b"by name"


@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_ipv6(backend: str, host: str) -> None:
    if reason := why_not("ipv6"):
        pytest.skip(reason)
    with Echo(backend, "--host", host) as echo, echo.dial() as peer:
        assert echo.line == f"listening on [::1]:{echo.address[1]}\n"
        peer.sendall(b"six")
        assert read_exactly(peer, 3) == b"six"


def test_requests_and_replies_one_after_the_other(backend: str) -> None:
    with Echo(backend) as echo, echo.dial() as peer:
        for number in range(200):
            message = pattern(1 + number * 37, number)
            peer.sendall(message)
            assert read_exactly(peer, len(message)) == message


def test_many_clients_at_once(backend: str) -> None:
    with Echo(backend) as echo:
        peers = [echo.dial() for _ in range(100)]
        for number, peer in enumerate(peers):
            peer.sendall(pattern(1000, number))
        for number, peer in enumerate(peers):
            assert read_exactly(peer, 1000) == pattern(1000, number)


def test_a_peer_that_sends_and_half_closes_gets_its_whole_reply(backend: str) -> None:
    data = pattern(100_000)
    with Echo(backend) as echo, echo.dial() as peer:
        peer.sendall(data)
        peer.shutdown(socket.SHUT_WR)
        assert read_to_end(peer) == data


def test_a_peer_that_half_closes_before_it_reads_several_mebibytes(backend: str) -> None:
    data = pattern(16 * MEBIBYTE)
    with Echo(backend) as echo, echo.dial() as peer:

        def send() -> None:
            peer.sendall(data)
            peer.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        try:
            got = read_to_end(peer)
        finally:
            sender.join()
        assert got == data


def test_a_client_that_floods_and_never_reads_costs_a_bounded_amount(backend: str) -> None:
    with Echo(backend) as echo:
        before = memory_of(echo.process.pid)
        flooder = echo.dial()
        top = 256 * MEBIBYTE
        sent = send_until_refused(flooder, top)
        after = memory_of(echo.process.pid)
        # Most of it lies in the kernel's buffers of both sides.
        assert sent < top // 2
        assert after - before < 8 * MEBIBYTE

        # Others are served meanwhile, and the flooder gets all that it sent once it reads.
        with echo.dial() as other:
            other.sendall(b"still there?")
            assert read_exactly(other, 12) == b"still there?"
        flooder.shutdown(socket.SHUT_WR)
        assert len(read_to_end(flooder)) == sent
        assert echo.end() == (0, "", "")


def test_a_peer_that_resets_in_the_middle_harms_nobody(backend: str) -> None:
    with Echo(backend) as echo:
        for _ in range(20):
            peer = echo.dial()
            peer.sendall(pattern(300_000))
            reset(peer)
        with echo.dial() as other:
            other.sendall(b"alive")
            assert read_exactly(other, 5) == b"alive"
        assert echo.end() == (0, "", "")


def test_socat(backend: str) -> None:
    socat = installed("socat", "socat")
    data = pattern(3 * MEBIBYTE)
    with Echo(backend) as echo:
        host, port = echo.address
        command = [socat, "-t", str(PATIENCE), "-", f"TCP4:{host}:{port}"]
        assert echo_through(command, data) == data
        assert echo.end() == (0, "", "")


def test_netcat(backend: str) -> None:
    nc = installed("nc", "netcat-openbsd")
    data = pattern(3 * MEBIBYTE)
    with Echo(backend) as echo:
        host, port = echo.address
        assert echo_through([nc, "-N", host, str(port)], data) == data
        assert echo.end() == (0, "", "")


@pytest.mark.parametrize("number", ENDING_SIGNALS)
def test_a_signal_ends_it_cleanly(backend: str, number: int) -> None:
    with Echo(backend) as echo, echo.dial() as peer:
        peer.sendall(b"x")
        assert read_exactly(peer, 1) == b"x"
        begun = time.monotonic()
        assert echo.end(number) == (0, "", "")
        assert time.monotonic() - begun < SOON_SECONDS
        assert read_to_end(peer) == b""


@pytest.mark.parametrize("number", ENDING_SIGNALS)
def test_a_signal_ends_it_under_load(backend: str, number: int) -> None:
    with Echo(backend) as echo:
        peers = [echo.dial() for _ in range(8)]

        def exchange(peer: socket.socket) -> None:
            try:
                while True:
                    peer.sendall(b"more")
                    if not peer.recv(65_536):
                        return
            except OSError:
                return  # the server ends with our message half way

        threads = [threading.Thread(target=exchange, args=(peer,)) for peer in peers]
        for thread in threads:
            thread.start()
        try:
            begun = time.monotonic()
            assert echo.end(number) == (0, "", "")
            assert time.monotonic() - begun < SOON_SECONDS
        finally:
            for thread in threads:
                thread.join()


def test_a_port_in_use_is_one_line_and_status_1(backend: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = str(holder.getsockname()[1])
        ended = run_cli("echo", "--port", port, "--backend", backend)
    assert_one_line_error(ended, 1, f"127.0.0.1:{port}", IN_USE)


@pytest.mark.parametrize(
    "host",
    [
        "192.0.2.1",  # reserved for documentation: no machine has it
        "a..b",  # no name can be written so
    ],
)
def test_a_bad_host_is_one_line_and_status_1(host: str) -> None:
    assert_one_line_error(run_cli("echo", "--host", host, "--port", "0"), 1, host)


def test_a_port_is_free_again_at_once() -> None:
    where = ("--port", str(unchosen_address()[1]))
    with Echo("auto", *where) as first:
        peer = first.dial()
        peer.sendall(b"x")
        assert read_exactly(peer, 1) == b"x"
        assert first.end()[0] == 0  # the server closes first: its side stays in TIME_WAIT
    with Echo("auto", *where) as second:
        assert second.address == first.address


@linux_limits
def test_out_of_descriptors_is_said_once_and_the_server_goes_on(backend: str) -> None:
    with Echo(backend) as echo:
        pid = echo.process.pid
        limit = descriptors(pid) + 4
        limit_descriptors(pid, limit)
        peers = [echo.dial() for _ in range(12)]
        for number, peer in enumerate(peers):
            peer.sendall(pattern(100, number))
        # Each is served, the later ones when those before have gone.
        for number, peer in enumerate(peers):
            assert read_exactly(peer, 100) == pattern(100, number)
            peer.close()
        status, output, errors = echo.end()
        assert (status, output) == (0, "")
        assert errors.count("\n") == 1
        assert errors.startswith("asyncio-native: accepting a connection failed")
        assert "ulimit -n" in errors


@linux_limits
def test_it_goes_on_when_nobody_reads_what_it_reports(backend: str) -> None:
    with Echo(backend) as echo:
        assert echo.process.stderr is not None
        echo.process.stderr.close()
        pid = echo.process.pid
        limit = descriptors(pid) + 4
        limit_descriptors(pid, limit)
        peers = [echo.dial() for _ in range(12)]
        for number, peer in enumerate(peers):
            peer.sendall(pattern(100, number))
        for number, peer in enumerate(peers):
            assert read_exactly(peer, 100) == pattern(100, number)
            peer.close()
        echo.process.terminate()
        assert echo.process.wait(PATIENCE) == 0
        echo.process.stderr = None
