"""The benchmark's one command works: builds, runs, checks every byte, judges. No figure is judged.

Without peers, and with an environment that is this one, so that nothing is fetched.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = [
    pytest.mark.posix("the load generator is a program for Linux"),
    pytest.mark.slow,
    pytest.mark.timeout(240),
]

SCENARIOS = ["echo-64x50", "echo-256k", "cycles", "udp", "fanout", "memory"]
PYTHON_SERVERS = ["native-epoll-1", "native-io_uring-plain-1"]
# The step `extensions` of .ci has it installed.
CYTHON_SERVERS = ["cython-epoll-1"] if importlib.util.find_spec("cython_echo") else []
C_SERVERS = ["c-epoll", "c-io_uring", "capi-epoll-1", "capi-io_uring-1"]
NATIVE_SERVERS = [*C_SERVERS, *CYTHON_SERVERS, *PYTHON_SERVERS]
DATAGRAM_SERVERS = ["c-udp", *PYTHON_SERVERS[:1]]


def why_not() -> str:
    """Why the benchmark cannot run here; empty when it can."""
    if not sys.platform.startswith("linux"):
        return "the benchmark reads Linux' /proc"
    for command in ("cmake", "taskset", "cc"):
        if shutil.which(command) is None:
            return f"{command} is not installed"
    if not (ROOT / "bench" / "__main__.py").exists():
        return "the folder bench is not here"
    import asyncio_native as an

    if not all(b.available for b in an.backends() if b.name in ("epoll", "io_uring")):
        return "it measures epoll and io_uring, and one of them does not work here"
    return ""


def run_bench(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    return subprocess.run(
        [sys.executable, "-m", "bench", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        timeout=230,
    )


@pytest.fixture(autouse=True)
def needs_the_tools() -> None:
    if reason := why_not():
        pytest.skip(reason)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of one quick run of everything that is the project's own."""
    if reason := why_not():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("bench")
    ended = run_bench(
        *("--quick", "--no-peers", "--this-python", "--folder", str(folder)),
        *("--output", str(folder / "results.json")),
        *(*SCENARIOS, *NATIVE_SERVERS, *DATAGRAM_SERVERS[:1]),
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "### Goals" in ended.stdout
    return folder / "results.json"


def test_every_server_is_measured_in_every_scenario_that_it_can_play(results: Path) -> None:
    medians = json.loads(results.read_text())["medians"]
    assert set(medians) == set(SCENARIOS)
    assert set(medians["echo-64x50"]) == set(NATIVE_SERVERS)
    assert all(figures["cpu_us"]["median"] > 0 for figures in medians["echo-64x50"].values())
    assert set(medians["udp"]) == set(DATAGRAM_SERVERS)
    assert all("native-epoll-1" in servers for servers in medians.values())


def test_the_results_say_where_and_of_what(results: Path) -> None:
    recorded = json.loads(results.read_text())
    assert recorded["machine"]["kernel"] == os.uname().release
    assert recorded["python"] == platform.python_version()
    assert "asyncio-native" in recorded["packages"]
    assert recorded["quick"] is True


def test_the_results_can_be_drawn(results: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        pytest.skip("matplotlib is not installed (extra `bench`)")
    for sheet in ("echo", "more"):
        drawn = results.with_name(f"results-{sheet}.svg")
        assert "<svg" in drawn.read_text()[:2000]


def test_names_that_are_not_known_are_refused() -> None:
    ended = run_bench("echo-64x51")
    assert ended.returncode == 2
    assert "echo-64x51" in ended.stderr
