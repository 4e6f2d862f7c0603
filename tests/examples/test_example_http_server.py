"""examples/http_server.py, driven by curl, wrk and nc."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path

import pytest
from example_support import Example, flood, nc, resident_bytes, run
from support import ENDING_SIGNALS, dial, eventually, pattern, read_to_end, reset

pytestmark = pytest.mark.posix("curl, wrk and nc ask it for a folder with links and a pipe in it")

BIG = pattern(5_000_000)
TOO_LARGE = HTTPStatus(413).phrase  # CPython 3.13 has another one


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of files to serve, beside one that is not to be served."""
    folder = tmp_path_factory.mktemp("http")
    (folder / "secret").write_text("secret\n")
    root = folder / "root"
    (root / "below").mkdir(parents=True)
    (root / "index.html").write_text("<p>the index\n")
    (root / "below" / "index.html").write_text("<p>below\n")
    (root / "a file.txt").write_text("spaces\n")
    (root / "empty").touch()
    (root / "big").write_bytes(BIG)
    (root / "outside").symlink_to(folder / "secret")
    (root / "inside").symlink_to(root / "a file.txt")
    (root / "loop").symlink_to(root / "loop")
    os.mkfifo(root / "pipe")
    return root


@contextlib.contextmanager
def serving(root: Path, backend: str, *arguments: str) -> Iterator[Example]:
    with Example("http_server.py", backend, "--root", str(root), *arguments) as example:
        yield example


def responses(stream: bytes) -> list[tuple[int, bytes]]:
    """Status and body of each response in a stream of them."""
    found = []
    position = 0
    while position < len(stream):
        body = stream.index(b"\r\n\r\n", position) + 4
        head = stream[position:body]
        length = re.search(rb"\r\nContent-Length: (\d+)\r\n", head)
        assert length is not None, head
        position = body + int(length[1])
        assert position <= len(stream), head
        found.append((int(head.split()[1]), stream[body:position]))
    return found


@pytest.mark.parametrize("number", ENDING_SIGNALS, ids=lambda number: number.name)
def test_curl_gets_the_files(backend: str, root: Path, number: int) -> None:
    with serving(root, backend) as example:
        for path, expected in {
            "/": b"<p>the index\n",
            "/?a=b": b"<p>the index\n",
            "/below/": b"<p>below\n",
            "/below/../a%20file.txt": b"spaces\n",
            "/inside": b"spaces\n",
            "/empty": b"",
            "/big": BIG,
        }.items():
            assert run(["curl", "-sSf", "--path-as-is", example.url(path)]) == expected
        example.ends_in_order(number)


def test_curl_gets_the_head_alone(backend: str, root: Path) -> None:
    with serving(root, backend) as example:
        # Both on one connection: a body where none belongs would spoil the second.
        command = ["curl", "-sS", "--head", example.url("/big"), example.url("/nothing")]
        first, second, rest = run(command).split(b"\r\n\r\n")
        assert first.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"\r\nContent-Length: 5000000\r\n" in first
        assert second.startswith(b"HTTP/1.1 404 Not Found\r\n")
        assert rest == b""


def test_curl_keeps_the_connection(backend: str, root: Path) -> None:
    with serving(root, backend) as example:
        command = ["curl", "-sS", "-w", "%{num_connects}\n", example.url("/a%20file.txt")]
        command += [example.url("/empty"), example.url("/nothing"), example.url("/a%20file.txt")]
        assert run(command) == b"spaces\n1\n0\nNot Found\n0\nspaces\n0\n"
        # HTTP/1.0 keeps it only if it says so.
        assert run([*command, "--http1.0"]).count(b"\n1\n") > 1


def test_what_is_not_in_the_folder_is_not_found(backend: str, root: Path) -> None:
    with serving(root, backend) as example:
        for path in (
            "/nothing",
            "/below",  # a folder is no file
            "/index.html/x",
            "/../secret",
            "/..%2fsecret",
            "/%2e%2e/secret",
            "/below/../../secret",
            f"/{root.parent}/secret",
            "/outside",
            "/loop",
            "/pipe",
            "/" + "x" * 1000,
        ):
            command = ["curl", "-sS", "--path-as-is", "-w", "%{http_code}", example.url(path)]
            assert run(command) == b"Not Found\n404", path


def test_what_cannot_be_answered_is_refused(backend: str, root: Path) -> None:
    with serving(root, backend) as example:
        command = ["curl", "-sS", "-w", " %{http_code}"]
        assert run([*command, "-X", "DELETE", example.url("/")]) == b"Method Not Allowed\n 405"
        assert run([*command, "-d", "a=b", example.url("/")]) == b"Method Not Allowed\n 405"
        assert run([*command, example.url("/%00")]) == b"Bad Request\n 400"
        assert run([*command, "-H", "Host:", example.url("/")]) == b"Bad Request\n 400"
        big = ["--data-binary", f"@{root / 'big'}", "-H", "Expect:", example.url("/")]
        assert run([*command, *big]) == f"{TOO_LARGE}\n 413".encode()
        assert responses(nc(example, b"no HTTP at all\r\n\r\n")) == [(400, b"Bad Request\n")]
        assert responses(nc(example, b"GET / HTTP/1.1\r\nx: " + b"x" * 1_000_000))[0][0] == 413


def test_who_still_sends_gets_the_answer_and_no_reset(backend: str, root: Path) -> None:
    with serving(root, backend) as example:
        before = example.descriptors()
        client = example.dial()
        client.sendall(
            b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9999999\r\n\r\n" + BIG[:300_000]
        )
        assert responses(read_to_end(client)) == [(413, f"{TOO_LARGE}\n".encode())]
        for _ in range(5):
            client.sendall(b"more of the body" * 1000)
        client.close()
        eventually(lambda: example.descriptors() == before)


def test_a_wish_to_upgrade_is_passed_over(backend: str, root: Path) -> None:
    with serving(root, backend) as example:
        command = ["curl", "-sS", "--http2", "-w", "%{http_code} %{http_version}"]
        assert run([*command, example.url("/")]) == b"<p>the index\n200 1.1"


def test_pipelined_requests_are_answered_in_their_order(backend: str, root: Path) -> None:
    paths = {
        "/": (200, b"<p>the index\n"),
        "/nothing": (404, b"Not Found\n"),
        "/big": (200, BIG),
        "/empty": (200, b""),
        "/a%20file.txt": (200, b"spaces\n"),
    }
    requests = [*paths, "/", "/nothing"] * 4 + ["/a%20file.txt"] * 1000 + ["/big", "/empty"]
    stream = "".join(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n" for path in requests).encode()
    # What comes after the last request that is answered is ignored.
    stream += b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" + b"GET /\0" * 100
    with serving(root, backend) as example:
        answers = responses(nc(example, stream))
        assert answers == [paths[path] for path in requests] + [paths["/"]]


def test_a_request_may_come_byte_by_byte(backend: str, root: Path) -> None:
    with serving(root, backend) as example:
        client = example.dial()
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in b"GET /below/?x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n":
            client.sendall(bytes([byte]))
            time.sleep(0.001)  # so that most of them come alone
        assert responses(read_to_end(client)) == [(200, b"<p>below\n")]


@pytest.mark.slow
def test_wrk(backend: str, root: Path) -> None:
    with serving(root, backend) as example:
        before = example.descriptors()
        for path in ("/", "/big"):
            report = run(
                ["wrk", "-t1", "-c20", "-d1s", "--timeout", "20s", example.url(path)]
            ).decode()
            requests = re.search(r"(\d+) requests in", report)
            assert requests is not None, report
            assert int(requests[1]) > 10, report
            assert "Non-2xx" not in report
            assert "Socket errors" not in report
        eventually(lambda: example.descriptors() == before)


def test_a_client_that_dribbles_its_request_is_dropped(backend: str, root: Path) -> None:
    seconds = 0.5
    with serving(root, backend, "--request-seconds", str(seconds)) as example:
        idle = example.dial()  # between two requests one may be silent for longer
        idle.sendall(b"GET /empty HTTP/1.1\r\nHost: x\r\n\r\n")
        assert responses(idle.recv(65536)) == [(200, b"")]
        began = time.monotonic()
        client = example.dial()
        client.sendall(b"GET / HTTP/1.1\r\n")
        client.settimeout(seconds / 10)

        def dropped() -> bool:
            try:
                client.sendall(b"x: y\r\n")
                return client.recv(1) == b""
            except TimeoutError:
                return False
            except ConnectionError:
                return True

        eventually(dropped)
        assert time.monotonic() - began > seconds * 0.9
        idle.sendall(b"GET /empty HTTP/1.1\r\nHost: x\r\n\r\n")
        assert responses(idle.recv(65536)) == [(200, b"")]


def test_who_does_not_read_costs_little_and_holds_up_nobody(backend: str, root: Path) -> None:
    with serving(root, backend) as example:
        resident = resident_bytes(example.process.pid)
        asking = b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n" * 100
        for _ in range(10):
            client = dial(example.address, receive_buffer=16384)
            client.sendall(b"GET /big HTTP/1.1\r\nHost: x\r\n\r\n" * 100)
        flood([dial(example.address, receive_buffer=16384)], asking)
        assert run(["curl", "-sSf", example.url("/")]) == b"<p>the index\n"
        assert resident_bytes(example.process.pid) - resident < 20_000_000


def test_clients_that_leave_in_the_middle_leave_nothing_behind(backend: str, root: Path) -> None:
    with serving(root, backend) as example:
        before = example.descriptors()
        for count in range(20):
            client = dial(example.address, receive_buffer=16384)
            client.sendall(b"GET /big HTTP/1.1\r\nHost: x\r\n\r\n")
            assert client.recv(1) == b"H"
            client.close() if count % 2 else reset(client)
        eventually(lambda: example.descriptors() == before)
        assert run(["curl", "-sSf", example.url("/")]) == b"<p>the index\n"
