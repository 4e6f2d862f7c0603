"""README.md is true: its code runs on every backend, its commands and links name what is there."""

from __future__ import annotations

import contextlib
import errno
import re
import select
import shlex
import signal
import socket
import subprocess
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

import asyncio_native as an
import pytest
import readme
from capi_support import compile_cython, load, needs_cython
from support import PATIENCE, check_python, dial, read_exactly, read_to_end, start_python

ROOT = readme.README.parent


def test_every_python_block_is_run_by_a_test_here() -> None:
    first, *rest = readme.blocks("python")
    assert "while True:" in first
    assert len(rest) >= 7
    assert not any("while True:" in block for block in rest)
    assert readme.README.read_text("utf-8").count("```python") == 1 + len(rest)


@contextlib.contextmanager
def first_block(backend: str, number: int = 0) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The README's first program on that port (0: one that the system chooses), and which it is."""
    source = readme.blocks("python")[0]
    address = '("127.0.0.1", 5555)'
    assert source.count(address) == 1
    source = source.replace(address, f'("127.0.0.1", {number})').replace(
        "while True:", "print(listener.getsockname()[1], flush=True)\n\nwhile True:"
    )
    server = start_python(source, backend)
    try:
        assert server.stdout is not None
        ready, _, _ = select.select([server.stdout], [], [], PATIENCE)
        assert ready, "the server does not say that it listens"
        yield server, int(server.stdout.readline() or check_failed(server))
    finally:
        if server.poll() is None:
            server.kill()
        server.communicate()


def check_failed(server: subprocess.Popen[str]) -> NoReturn:
    """Fails with what a server said that ended before it listened."""
    _, errors = server.communicate(timeout=PATIENCE)
    pytest.fail(errors)


@pytest.mark.posix("waits for a pipe by select, and ends the server by SIGINT")
def test_the_first_block_is_an_echo_server(backend: str) -> None:
    with first_block(backend) as (server, number):
        peers = [dial(("127.0.0.1", number)) for _ in range(3)]
        for count, peer in enumerate(peers, start=1):
            peer.sendall(b"x" * 100_000 * count)
        for count, peer in enumerate(peers, start=1):
            assert read_exactly(peer, 100_000 * count) == b"x" * 100_000 * count
        for peer in peers:
            peer.sendall(b"the end")
            peer.shutdown(socket.SHUT_WR)
            assert read_to_end(peer) == b"the end"
        server.send_signal(signal.SIGINT)
        _, errors = server.communicate(timeout=PATIENCE)
        assert errors.rstrip().endswith("KeyboardInterrupt")


@pytest.mark.posix("waits for a pipe by select, and ends the server by SIGINT")
def test_the_first_block_takes_its_address_again_while_a_connection_is_in_time_wait(
    backend: str,
) -> None:
    with first_block(backend) as (server, number):
        peer = dial(("127.0.0.1", number))
        peer.sendall(b"x")
        assert read_exactly(peer, 1) == b"x"
        server.send_signal(signal.SIGINT)  # the side that ends first keeps the pair of addresses
        server.communicate(timeout=PATIENCE)
        assert read_to_end(peer) == b""
        peer.close()
    with socket.socket() as plain, pytest.raises(OSError) as refusal:
        plain.bind(("127.0.0.1", number))
    assert refusal.value.errno == errno.EADDRINUSE
    with first_block(backend, number) as (_, again):
        assert again == number


@pytest.mark.posix("one block watches the port by its descriptor, which Windows has not")
def test_the_other_blocks_are_one_program(backend: str) -> None:
    program = "\n".join(readme.blocks("python")[1:])
    assert check_python(f"# ruff: noqa\n{program}", backend) == "cancelled\nnothing came\n"


def test_the_c_block_is_the_example() -> None:
    assert readme.blocks("c") == [(ROOT / "examples" / "c_echo" / "echo.c").read_text("utf-8")]


@needs_cython
def test_the_cython_block_is_a_module(port: an.CompletionPort, tmp_path: Path) -> None:
    (block,) = readme.blocks("cython")
    source = tmp_path / "draining.pyx"
    source.write_text(block, "utf-8")
    draining = load(compile_cython(source, tmp_path))
    for number in range(100):
        port.post(number)
    assert [c.state for c in draining.drain(port)] == list(range(100))
    assert draining.drain(port) == []


@pytest.mark.posix("the README's commands are read by sh")
def test_the_commands_are_two_lines_with_environments_of_their_own() -> None:
    commands = readme.commands()
    assert list(commands) == ["c10k", "test"]
    lines = [line for block in readme.blocks("sh") for line in block.splitlines()]
    assert lines == list(commands.values())
    for name, command in commands.items():
        checked = subprocess.run(["sh", "-n", "-c", command], capture_output=True, text=True)
        assert (checked.returncode, checked.stderr) == (0, "")
        programs = [shlex.split(part) for part in command.split("&&")]
        assert programs[0] == ["python3", "-m", "venv", f".venv-{name}"]
        assert all(program[0].startswith(f".venv-{name}/bin/") for program in programs[1:])
    files = shlex.split(commands["test"].rsplit("&&", 1)[1])[1:]
    assert files == ["tools/run_tests.py"]
    assert (ROOT / files[0]).is_file()


def test_links_lead_to_what_is_in_the_project() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", readme.README.read_text("utf-8"))
    assert len(links) >= 5
    for link in links:
        assert "://" in link or Path(ROOT, link).exists(), link


def test_the_support_table_is_true() -> None:
    text = readme.README.read_text("utf-8")
    rows = re.findall(r"^\| [^|]+ \| (\w+) \| ([^|]+) \|$", text, re.MULTILINE)
    rows = [row for row in rows if row[0] != "backend"]
    assert {name for name, _ in rows} == {backend.name for backend in an.backends()}
    available = {backend.name for backend in an.backends() if backend.available}
    for name, state in rows:
        if name in available:
            # kqueue is there on Linux in builds for tests, on a stand-in.
            assert state.startswith(("tested", "compiled, logic tested")), name


def test_the_version_is_the_same_everywhere() -> None:
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    assert f'\nversion = "{version("asyncio-native")}"\n' in project
    assert f"## [{version('asyncio-native')}]" in (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert an.__version__ == version("asyncio-native")
