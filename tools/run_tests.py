"""Runs the test suite against the installed package and ends with the counts for each backend.

    python tools/run_tests.py [--installed] [--side-by-side] [ARGUMENT OF PYTEST ...]

Paths among the arguments count from the project's root. With ``--installed`` it refuses to run if
``asyncio_native`` comes from anywhere but this interpreter's own site-packages (an editable
install, a folder on PYTHONPATH). With ``--side-by-side`` each backend's tests run in a process of
their own, and those without a backend in one more, all at once: the tests mostly wait. What
they say is printed at the end.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

TOOLS = Path(__file__).resolve().parent
ROOT = TOOLS.parent

# A checkout holds the package's sources without the compiled extension: they must hide the
# installed package neither here nor in the programs that tests start.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() not in (TOOLS, ROOT)]
os.environ["PYTHONSAFEPATH"] = "1"
# Programs are tested as users start them: a buffer keeps what could not be written.
os.environ.pop("PYTHONUNBUFFERED", None)

import asyncio_native  # noqa: E402
import pytest  # noqa: E402

SANITIZERS = os.environ.get("ASYNCIO_NATIVE_SANITIZE", "")

# Tests that measure the process itself, by module and by a part of the test's name: a sanitizer
# keeps freed memory and makes system calls of its own.
MEASURING = (
    ("test_system_calls", ""),
    ("test_binding", "interpreter_lock"),
    ("test_11_no_growth", "memory"),
    ("test_growth_traps", "memory"),
    ("test_growth_traps", "for_long_leave_nothing"),
    ("test_timer", "grow_memory"),
    ("test_cli_echo", "costs_a_bounded_amount"),
    ("test_cli_proxy", "cost_a_few_mebibytes"),
    ("test_cli_proxy", "do_not_add_up"),
    ("test_cli_proxy", "who_does_not_read_stops_the_sender"),
    ("test_example_http_server", "costs_little"),
    ("test_example_many_ports", "costs_little"),
)


class SkipMeasuring:
    """A pytest plugin: skips what cannot be measured while the extension runs under sanitizers."""

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Marks those tests, with the reason."""
        reason = (
            f"measures memory or system calls, which are not the program's own under {SANITIZERS}"
        )
        for item in items:
            if any(item.path.stem == module and part in item.name for module, part in MEASURING):
                item.add_marker(pytest.mark.skip(reason=reason))


class Share:
    """A pytest plugin: of all tests, those of a backend, or those without one."""

    def __init__(self, with_backend: bool) -> None:
        self._with_backend = with_backend

    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        """Deselects the others."""
        others = [item for item in items if bool(backend_of(item)) != self._with_backend]
        items[:] = [item for item in items if bool(backend_of(item)) == self._with_backend]
        config.hook.pytest_deselected(items=others)


def backend_of(item: pytest.Item) -> str:
    """The backend that a test runs on, or an empty string."""
    parameters = getattr(item, "callspec", None)
    backend: str = parameters.params.get("backend", "") if parameters else ""
    return backend


class BackendCounts:
    """A pytest plugin: how many tests of each backend passed, failed and were skipped."""

    def __init__(self) -> None:
        self._backend_of: dict[str, str] = {}
        self._counts: dict[str, Counter[str]] = {}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Remembers the backend of each test that is going to run."""
        for item in session.items:
            self._backend_of[item.nodeid] = backend_of(item)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Counts a test by its call, or by its set-up or tear-down where that decides."""
        if report.when != "call" and report.passed:
            return
        counts = self._counts.setdefault(self._backend_of.get(report.nodeid, ""), Counter())
        outcome: str = report.outcome
        if hasattr(report, "wasxfail"):
            outcome = "expected to fail"
        elif report.failed and report.when != "call":
            outcome = "errors"
        counts[outcome] += 1

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Prints a line for each backend."""
        terminalreporter.section("counts for each backend")
        for backend in sorted(self._counts, key=lambda name: (not name, name)):
            counts = self._counts[backend]
            shown = ", ".join(f"{number} {outcome}" for outcome, number in sorted(counts.items()))
            terminalreporter.write_line(f"{backend or 'without a backend'}: {shown}")


# They share the processors, and so may have to wait longer than one process alone (seconds).
PATIENT = {"ASYNCIO_NATIVE_TEST_PATIENCE": "30", "ASYNCIO_NATIVE_TEST_TIMEOUT": "120"}


def shares() -> list[tuple[str, str]]:
    """What each process of ``--side-by-side`` is given: its flag, and its backends."""
    names = [backend.name for backend in asyncio_native.backends() if backend.available]
    if wanted := os.environ.get("ASYNCIO_NATIVE_TEST_BACKENDS"):
        names = wanted.split(",")
    return [*(("--with-backend", name) for name in names), ("--without-backend", names[0])]


def run_side_by_side(arguments: list[str]) -> int:
    """Starts this program for each backend and for the rest; returns the first bad status.

    Interrupted, it ends all of them and prints what they said so far.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    running: list[tuple[subprocess.Popen[bytes], Path]] = []
    statuses = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for flag, backend in shares():
                output = Path(folder, flag + backend)
                with output.open("wb") as file:
                    process = subprocess.Popen(
                        [sys.executable, __file__, flag, *arguments],
                        env=PATIENT | os.environ | {"ASYNCIO_NATIVE_TEST_BACKENDS": backend},
                        stdout=file,
                        stderr=subprocess.STDOUT,
                    )
                running.append((process, output))
            for process, _ in running:
                statuses.append(process.wait())
        finally:
            for process, output in running:
                if process.poll() is None:
                    process.terminate()
                    process.wait()
                print(output.read_text(errors="replace"), flush=True)
    # A share may be empty by the arguments, all of them may not.
    none = int(pytest.ExitCode.NO_TESTS_COLLECTED)
    return next((status for status in statuses if status not in (0, none)), min(statuses))


def main(arguments: list[str]) -> int:
    """Runs pytest and returns its exit status."""
    flags = {"--installed", "--side-by-side", "--with-backend", "--without-backend"}
    given = flags.intersection(arguments)
    arguments = [argument for argument in arguments if argument not in flags]
    package = Path(asyncio_native.__file__).resolve().parent
    if "--installed" in given and not package.is_relative_to(Path(sys.prefix).resolve()):
        print(f"asyncio_native is not installed in {sys.prefix}: it is {package}")
        return 2
    print(f"asyncio_native of {package}", flush=True)
    if "--side-by-side" in given:
        return run_side_by_side(arguments)
    os.chdir(ROOT)
    plugins: list[object] = [BackendCounts()]
    if SANITIZERS:
        plugins.append(SkipMeasuring())
    if given & {"--with-backend", "--without-backend"}:
        plugins.append(Share("--with-backend" in given))
    return int(pytest.main(arguments, plugins=plugins))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
