"""`proxy` in front of a real nginx, driven by curl and wrk."""

from __future__ import annotations

import hashlib
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import servers
from proxy_support import Proxy
from support import PATIENCE, pattern

pytestmark = [pytest.mark.peers, pytest.mark.posix("nginx is started as Debian has it")]

BIG = pattern(servers.FILE_BYTES)
SMALL = pattern(200)


@pytest.fixture(scope="module")
def nginx() -> Iterator[servers.Address]:
    try:
        servers.need("nginx", "curl", "wrk")
        with servers.nginx(BIG, SMALL) as (address, _):
            yield address
    except servers.NotInstalledError as missing:
        pytest.skip(str(missing))


def curl(proxy: Proxy, *arguments: str) -> list[str]:
    """A command that fetches the big file; further arguments may say otherwise."""
    host, port = proxy.address
    limit = str(2 * PATIENCE)
    command = [servers.path_of("curl"), "--silent", "--show-error", "--fail", "--max-time", limit]
    return [*command, *arguments, f"http://{host}:{port}/big"]


def test_curl_gets_a_file_of_20_mebibytes(backend: str, nginx: servers.Address) -> None:
    with Proxy(backend, nginx) as proxy:
        got = subprocess.run(
            env=servers.ENVIRONMENT, args=curl(proxy), capture_output=True, timeout=4 * PATIENCE
        )
        assert (got.returncode, got.stderr) == (0, b"")
        assert hashlib.sha256(got.stdout).digest() == hashlib.sha256(BIG).digest()
        assert proxy.end() == (0, "", "")


def test_several_curls_at_once_one_of_them_slow(
    backend: str, nginx: servers.Address, tmp_path: Path
) -> None:
    with Proxy(backend, nginx) as proxy:
        limits = [[], [], [], ["--limit-rate", "8M"]]
        processes = [
            subprocess.Popen(
                env=servers.ENVIRONMENT,
                args=curl(proxy, "--output", str(tmp_path / str(number)), *limit),
                stdin=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
            for number, limit in enumerate(limits)
        ]
        try:
            for process in processes:
                _, errors = process.communicate(timeout=4 * PATIENCE)
                assert (process.returncode, errors) == (0, b"")
        finally:
            for process in processes:
                process.kill()
                process.communicate()
        for number in range(len(limits)):
            assert (tmp_path / str(number)).read_bytes() == BIG


def test_the_answer_to_a_request_that_is_too_large_arrives(
    backend: str, nginx: servers.Address, tmp_path: Path
) -> None:
    """nginx answers 413 and closes while curl is still sending."""
    upload = tmp_path / "upload"
    upload.write_bytes(BIG)
    with Proxy(backend, nginx) as proxy:
        # Without Expect, curl sends at once.
        options = ["--header", "Expect:", "--data-binary", f"@{upload}"]
        options += ["--write-out", "%{http_code}", "--output", "/dev/null"]
        got = subprocess.run(
            env=servers.ENVIRONMENT,
            args=curl(proxy, *options),
            capture_output=True,
            text=True,
            timeout=4 * PATIENCE,
        )
        assert got.stdout == "413", got
        assert proxy.end()[:2] == (0, "")


@pytest.mark.parametrize("path", ["small", "big"])
def test_wrk(backend: str, nginx: servers.Address, path: str) -> None:
    with Proxy(backend, nginx) as proxy:
        host, port = proxy.address
        connections = {"small": "50", "big": "8"}[path]
        ended = subprocess.run(
            env=servers.ENVIRONMENT,
            args=[servers.path_of("wrk"), "-t", "1", "-c", connections, "-d", "2s"]
            + [f"http://{host}:{port}/{path}"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=4 * PATIENCE,
        )
        assert ended.returncode == 0, ended
        counted = re.search(r"(\d+) requests in", ended.stdout)
        assert counted is not None, ended.stdout
        assert int(counted[1]) > 0
        for word in ("Socket errors", "Non-2xx"):
            assert word not in ended.stdout, ended.stdout
        assert proxy.end() == (0, "", "")


def test_nginx_killed_in_the_middle_ends_curl(backend: str) -> None:
    try:
        servers.need("curl")
        with servers.nginx(BIG, SMALL) as (address, server), Proxy(backend, address) as proxy:
            with subprocess.Popen(
                env=servers.ENVIRONMENT,
                args=curl(proxy, "--limit-rate", "1M"),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            ) as process:
                assert process.stdout is not None
                process.stdout.read(100_000)  # it is in the middle of the file
                server.kill()
                rest, errors = process.communicate(timeout=4 * PATIENCE)
            # CURLE_PARTIAL_FILE or CURLE_RECV_ERROR: it was not told that all was well.
            assert process.returncode in (18, 56), errors
            assert len(rest) < len(BIG)
            assert proxy.end()[0] == 0
    except servers.NotInstalledError as missing:
        pytest.skip(str(missing))
