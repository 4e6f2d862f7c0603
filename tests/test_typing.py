"""The types that users see: `mypy --strict` passes on all of the API and refuses its misuse."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import asyncio_native as an
import pytest

PACKAGE = Path(an.__file__).parent

MISUSE = """\
import asyncio_native as an
port = an.CompletionPort()
sock = an.AsyncSocket()
an.CompletionPort(5)
an.CompletionPort("epoll", 1)
an.AsyncSocket.adopt("descriptor")
port.dequeue("1")
port.dequeue().data
port.dequeue_many(1.5)
port.associate("socket")
port.timer("1")
port.in_flight = 5
sock.send("text")
sock.send(b"x", True)
sock.sendv(5)
sock.sendto(b"x")
sock.recv("1")
sock.recv_into(b"read-only" if port else 5)
sock.recv(pause=True)
sock.connect(5)
sock.connect(("127.0.0.1", "80"))
sock.bind(None)
sock.close(True)
sock.sendfile("name")
sock.recv().cancelled
port.dequeue_many()[0].accepted.recv()
an.no_such_name
"""


def mypy(*paths: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ)
    environment.pop("MYPYPATH", None)
    if PACKAGE.parent.name != "site-packages":
        environment["MYPYPATH"] = str(PACKAGE.parent)  # installed in place
    return subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file=", *map(str, paths)],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that both runs share, with the type checker's cache."""
    return tmp_path_factory.mktemp("mypy")


def test_the_package_says_that_it_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_file_that_uses_all_of_the_api_passes_strict(folder: Path) -> None:
    checked = mypy(Path(__file__).with_name("typing_all.py"), folder=folder)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_misuse_is_refused_line_by_line(folder: Path) -> None:
    path = folder / "misuse.py"
    path.write_text(MISUSE)
    checked = mypy(path, folder=folder)
    refused = {
        int(line.split(":")[1]) for line in checked.stdout.splitlines() if ": error:" in line
    }
    lines = MISUSE.splitlines()
    missed = [lines[number - 1] for number in range(4, len(lines) + 1) if number not in refused]
    assert not missed, checked.stdout
    assert not refused & {1, 2, 3}, checked.stdout


def test_typing_all_uses_every_public_name() -> None:
    text = Path(__file__).with_name("typing_all.py").read_text()
    for kind in (an.AsyncSocket, an.CompletionPort, an.Operation, an.Completion):
        for name in dir(kind):
            if not name.startswith("_"):
                assert f".{name}" in text, f"{kind.__name__}.{name} is not used"
