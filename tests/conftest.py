"""Fixtures of the whole suite: every behaviour runs on every backend that works here.

- `backend`: the name of each available backend, one test run each. The environment variable
  ASYNCIO_NATIVE_TEST_BACKENDS=epoll,poll restricts it, and fails if one of these does not work.
  `@pytest.mark.backends("io_uring")` leaves to a test those that it speaks of; it is deselected
  where there is none of them.
- `port`: an open `CompletionPort(backend)`. It is closed after the test, and nothing may then be
  in flight. ASYNCIO_NATIVE_TEST_CONCURRENCY=1 opens it with that promise, for
  `-m "not dequeuing_threads"`: the mark is on tests in which a second thread dequeues from it.
- `family`: "ipv4", "ipv6" and "unix" in turn; `inet`: the first two.
- After each test the sockets of `support` are closed, and a descriptor that is still open then
  fails the test (`@pytest.mark.leaks_descriptors` lifts that).
- Each test may take 60 s (pytest-timeout; ASYNCIO_NATIVE_TEST_TIMEOUT changes it).
  `@pytest.mark.slow` marks what takes over 2 s; it runs unless deselected with `-m "not slow"`.
- `@pytest.mark.posix(reason)` skips a test elsewhere.
- Where this system's Python has no AF_UNIX (Windows), the tests of that family are deselected.

The helpers for completions, sockets, peers and subprocesses are in `support.py`; test modules
import them by `from support import one, drain, pair`.
"""

from __future__ import annotations

import gc
import os
import socket
import time
from collections.abc import Iterator

import asyncio_native as an
import hypothesis
import pytest
import support

# `--hypothesis-profile=thorough` loads the other one.
for name, examples, steps in (("normal", 100, 40), ("thorough", 1500, 80)):
    hypothesis.settings.register_profile(
        name, max_examples=examples, stateful_step_count=steps, deadline=None, print_blob=True
    )
hypothesis.settings.load_profile("normal")

CONCURRENCY = int(os.environ.get("ASYNCIO_NATIVE_TEST_CONCURRENCY", "0"))
TEST_TIMEOUT_SECONDS = float(os.environ.get("ASYNCIO_NATIVE_TEST_TIMEOUT", "60"))


def usable_backends() -> list[str]:
    available = [backend.name for backend in an.backends() if backend.available]
    wanted = os.environ.get("ASYNCIO_NATIVE_TEST_BACKENDS")
    if not wanted:
        return available
    names = [name.strip() for name in wanted.split(",")]
    missing = [name for name in names if name not in available]
    if missing:
        raise pytest.UsageError(f"ASYNCIO_NATIVE_TEST_BACKENDS: not available: {missing}")
    return names


def pytest_configure(config: pytest.Config) -> None:
    for line in (
        "slow: takes over 2 seconds",
        "backends(*names): speaks of these backends only",
        "dequeuing_threads: more than one thread dequeues from the fixture `port`",
        "leaks_descriptors: may leave descriptors open",
        "posix(reason): needs what POSIX alone has",
        "unix: needs AF_UNIX sockets in this system's Python",
        "peers: needs servers and clients of other projects",
    ):
        config.addinivalue_line("markers", line)
    for line in (
        "error::ResourceWarning",
        # A test's own sockets go with its frame, just before the fixture closes their port.
        "ignore:unclosed <AsyncSocket:ResourceWarning",
        "error::pytest.PytestUnraisableExceptionWarning",
        "error::pytest.PytestUnhandledThreadExceptionWarning",
    ):
        config.addinivalue_line("filterwarnings", line)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    names = set(usable_backends())
    markers = [(item, item.get_closest_marker("backends")) for item in items]
    elsewhere = [item for item, marker in markers if marker and names.isdisjoint(marker.args)]
    if not hasattr(socket, "AF_UNIX"):
        elsewhere += [item for item in items if _of_unix(item)]
    config.hook.pytest_deselected(items=elsewhere)
    gone = set(elsewhere)
    items[:] = [item for item in items if item not in gone]
    for item in items:
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TEST_TIMEOUT_SECONDS))
        if marker := item.get_closest_marker("posix"):
            (reason,) = marker.args
            if os.name != "posix":
                item.add_marker(pytest.mark.skip(reason=reason))
        if item.get_closest_marker("unix") and (reason := support.why_not("unix")):
            item.add_marker(pytest.mark.skip(reason=reason))


def _of_unix(item: pytest.Item) -> bool:
    """Whether a test is about AF_UNIX: it is marked so, or has that family as a parameter."""
    parameters = getattr(item, "callspec", None)
    return item.get_closest_marker("unix") is not None or (
        parameters is not None and parameters.params.get("family") == "unix"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        names = usable_backends()
        if marker := metafunc.definition.get_closest_marker("backends"):
            names = [name for name in names if name in marker.args]
        metafunc.parametrize("backend", names, scope="session")


@pytest.fixture(autouse=True)
def no_leaked_descriptors(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test that leaves descriptors open, and closes the sockets of `support`."""
    before = support.open_descriptors()
    yield
    support.release_kept()
    if request.node.get_closest_marker("leaks_descriptors"):
        return
    deadline = time.monotonic() + 2.0
    while leaked := {n: d for n, d in support.open_descriptors().items() if before.get(n) != d}:
        gc.collect()
        if time.monotonic() > deadline:
            pytest.fail(f"descriptors left open: {leaked}")
        time.sleep(0.01)


@pytest.fixture
def port(backend: str) -> Iterator[an.CompletionPort]:
    """An open port; closed after the test, with nothing in flight."""
    with an.CompletionPort(backend, concurrency=CONCURRENCY) as port:
        yield port
    assert port.in_flight == 0


@pytest.fixture(params=support.FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """The name of an address family whose stream sockets work here."""
    return _checked(request.param)


@pytest.fixture(params=["ipv4", "ipv6"])
def inet(request: pytest.FixtureRequest) -> str:
    """The name of an internet address family that works here."""
    return _checked(request.param)


def _checked(family: str) -> str:
    if reason := support.why_not(family):
        pytest.skip(reason)
    return family
