"""examples/tls.py, driven by curl and openssl s_client."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from example_support import EXAMPLES, Example, run, say, start
from support import ENDING_SIGNALS, PATIENCE, eventually, reset

#: What the example leaves to a client for its request.
REQUEST_SECONDS = 10.0


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Arguments that name a self-signed certificate for 127.0.0.1 and its key."""
    folder = tmp_path_factory.mktemp("certificate")
    certificate, key = str(folder / "cert.pem"), str(folder / "key.pem")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += [
        "-subj",
        "/CN=localhost",
        "-addext",
        "subjectAltName=IP:127.0.0.1",
        "-out",
        certificate,
        "-keyout",
        key,
    ]
    run(command)
    return "--certificate", certificate, "--key", key


def s_client(example: Example, *arguments: str) -> list[str]:
    return ["openssl", "s_client", "-connect", f"{example.host}:{example.port}", *arguments]


@pytest.mark.parametrize("number", ENDING_SIGNALS, ids=lambda number: number.name)
def test_curl(backend: str, certificate: tuple[str, ...], number: int) -> None:
    with Example("tls.py", backend, *certificate) as example:
        url = example.url("/", "https")
        assert run(["curl", "-sS", "-k", url]) == b"hello over TLSv1.3\n"
        trusting = ["curl", "-sS", "--cacert", certificate[1]]
        assert run([*trusting, url]) == b"hello over TLSv1.3\n"
        assert run([*trusting, "--tls-max", "1.2", url]) == b"hello over TLSv1.2\n"
        shown = ["-o", "/dev/null", "-w", "%{http_code} %{size_download}"]
        for path, expected in {
            "/zeros/0": b"200 0",
            "/zeros/1": b"200 1",
            "/zeros/20000000": b"200 20000000",
            "/zeros/many": b"404 0",
            "/other": b"404 0",
        }.items():
            assert run([*trusting, *shown, example.url(path, "https")]) == expected
        run(["curl", "-sS", url], status=60)  # not trusted: curl refuses it
        example.ends_in_order(number)


@pytest.mark.parametrize(("content", "words"), [(None, "No such file"), ("no certificate", "PEM")])
def test_a_certificate_that_cannot_be_used_is_one_line(
    tmp_path: Path, content: str | None, words: str
) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    if content is not None:
        certificate.write_text(content)
        key.write_text(content)
    command = [sys.executable, "-P", str(EXAMPLES / "tls.py"), "--port", "0"]
    ended = subprocess.run(
        [*command, "--certificate", str(certificate), "--key", str(key)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert (ended.returncode, ended.stdout) == (1, "")
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"tls.py: {certificate} with {key}: ")
    assert words in line


def test_curl_with_many_connections(backend: str, certificate: tuple[str, ...]) -> None:
    with Example("tls.py", backend, *certificate) as example:
        command = ["curl", "-sS", "-k", "--parallel", "--parallel-immediate", "--no-keepalive"]
        command += [example.url("/zeros/300000", "https")] * 12
        assert run(command) == bytes(12 * 300_000)


@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
def test_s_client(backend: str, certificate: tuple[str, ...], version: str) -> None:
    with Example("tls.py", backend, *certificate) as example:
        command = s_client(example, "-quiet", version, "-CAfile", certificate[1])
        command += ["-verify_return_error"]
        # Status 0: the stream ended with close_notify, and was not just cut.
        reply = run(command, b"GET / HTTP/1.0\r\n\r\n")
        assert reply.startswith(b"HTTP/1.1 200 OK\r\n")
        assert reply.endswith(b"\r\n\r\nhello over TLSv1.%d\n" % (3 if version[-1] == "3" else 2))


def test_those_who_fail_in_the_middle_are_let_go(
    backend: str, certificate: tuple[str, ...]
) -> None:
    with Example("tls.py", backend, *certificate) as example:
        before = example.descriptors()
        # A version that is refused, no request at all, a request that is too long, no TLS.
        run(s_client(example, "-tls1_1", "-cipher", "ALL@SECLEVEL=0"), status=1)
        run(s_client(example), status=0)
        with start(s_client(example, "-quiet")) as flooding:
            say(flooding, b"x" * 50_000)
            flooding.wait(REQUEST_SECONDS / 2)  # it is still open: the server ends it, and early
        run(["curl", "-sS", example.url("/")], status=None)
        client = example.dial()
        client.sendall(b"\x16\x03\x01")
        reset(client)
        eventually(lambda: example.descriptors() == before)
        assert run(["curl", "-sS", "-k", example.url("/", "https")]) == b"hello over TLSv1.3\n"


def test_a_slow_reader_holds_up_nobody_else(
    backend: str, certificate: tuple[str, ...], tmp_path: Path
) -> None:
    with Example("tls.py", backend, *certificate) as example:
        path = "/zeros/50000000"
        slow = ["curl", "-sS", "-k", "--limit-rate", "100k", "--max-time", "1", "-o", "/dev/null"]
        run([*slow, example.url(path, "https")], status=28)
        assert run(["curl", "-sS", "-k", example.url("/", "https")]) == b"hello over TLSv1.3\n"
