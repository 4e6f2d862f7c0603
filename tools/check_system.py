"""Checks asyncio-native on this very system and writes a report for a bug report.

    python3 tools/check_system.py [--quick] [--backend NAME ...] [--report FILE]

For what only a real Windows, macOS, FreeBSD, OpenBSD, NetBSD or DragonFly can tell: the project's
own tests run the iocp backend under Wine, and kqueue on Linux, on a stand-in for it. It needs a C
compiler, Python 3.11 or later with its headers and a way to PyPI; with CMake it runs the C tests as
well. It builds in a temporary folder, runs the C tests, the whole test suite and c10k on each
backend that works here, and changes nothing else. It takes half an hour; ``--quick`` leaves out the
slow tests.

Read the report before you send it: it names this machine's system and folders.

What nobody knows before such a report, as code was written from manual pages and kernel sources:

- Edges: that EV_CLEAR makes one for each arrival, for an end behind data, a reset, a refused
  connect, an acknowledgement that makes room, a connection on a listener that was watched before
  it listened; and what AF_UNIX makes of all that. A missing one is a test that hangs.
- What is said of a socket that was never connected (nothing, the code assumes), and of one that
  was shut down in both directions (macOS: EINVAL from getpeername and setsockopt).
- accept: a connection that died in the queue (ECONNABORTED; macOS: one without an address), and
  no descriptors left (macOS drops the connection; the code lets that happen once an episode).
- Sends: ENOBUFS of local datagrams (tried again by a timer) and of the internet's (reported),
  macOS' EPROTOTYPE, more than INT_MAX bytes (macOS refuses them, the code never asks), an AF_UNIX
  listener whose backlog is full (refused at once; on Linux the connect waits).
- sendfile: the count that comes with EAGAIN and EINTR, files and sockets that it refuses.
- SIGPIPE: that SO_NOSIGPIPE holds on accepted sockets, and for sendfile.
- EVFILT_USER: that many triggers before a wait are one event, and none is lost.
- EVFILT_TIMER and the timeout of kevent: never early, how late; on a machine that slept.
- fork: that the child has no kqueue, and its close harms none of the parent's registrations.
- The kqueue's own descriptor watched by poll, select and another kqueue (``fileno()``).
- Limits: kern.maxfilesperproc, kern.ipc.somaxconn, kern.kq_calloutmax.
- The tests: those that read memory and descriptors from /proc are skipped or fail elsewhere.
- Speed.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parent.parent

# Of a step that went well, and of one that failed.
LINES_SHOWN, LINES_OF_FAILURE = 12, 400

BUILD_SECONDS, SUITE_SECONDS, LOAD_SECONDS = 900, 3600, 600


class Report:
    """What was run and what came of it, on the screen in short and in the file in full."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self.failed: list[str] = []

    def write(self, text: str) -> None:
        """A line for the file and the screen."""
        print(text, flush=True)
        self._file.write(text + "\n")
        self._file.flush()

    def run(
        self,
        name: str,
        command: Sequence[object],
        seconds: float,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> str | None:
        """Runs a step; returns its output, or None where it failed or took too long."""
        words = [str(word) for word in command]
        settings = dict(environment or {})
        shown = " ".join([*(f"{key}={value}" for key, value in settings.items()), *words])
        self.write(f"=== {name}\n$ {shown}")
        began = time.monotonic()
        output, verdict = _run(words, seconds, {**os.environ, **settings}, folder)
        lines = output.splitlines()
        count = LINES_SHOWN if verdict == "passed" else LINES_OF_FAILURE
        self._file.writelines(f"    {line}\n" for line in lines[-count:])
        if verdict != "passed":
            self.failed.append(name)
        elif lines:
            print(f"    {lines[-1]}")
        self.write(f"=== {name}: {verdict} in {time.monotonic() - began:.0f} s\n")
        return output if verdict == "passed" else None


def _run(
    command: list[str], seconds: float, environment: dict[str, str], folder: Path | None
) -> tuple[str, str]:
    """The output of a program and what became of it; it is ended with all that it started."""
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
        cwd=folder,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=seconds)
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as ended:
            _kill_all_of(process)
            if isinstance(ended, KeyboardInterrupt):
                raise
            output, _ = process.communicate()
            return output, f"FAILED (over its limit of {seconds:.0f} s)"
    return output, "passed" if process.returncode == 0 else f"FAILED ({process.returncode})"


def _kill_all_of(process: subprocess.Popen[str]) -> None:
    """Ends a program and all that it started."""
    if sys.platform == "win32":
        tree = ["taskkill", "/F", "/T", "/PID", str(process.pid)]
        subprocess.run(tree, check=False, capture_output=True)
    else:
        os.killpg(process.pid, signal.SIGKILL)


def _descriptor_limit() -> str:
    if sys.platform == "win32":
        return "handles, limited by memory"
    import resource

    return str(resource.getrlimit(resource.RLIMIT_NOFILE))


def describe(report: Report) -> None:
    """The system, the interpreter and the tools."""
    version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text("utf-8"), re.M)
    report.write(f"asyncio-native  {version[1] if version else 'of unknown version'}")
    system = platform.uname()  # its node is the machine's name, which is nobody's business
    named = (system.system, system.release, system.version, system.machine, system.processor)
    report.write(f"system          {' '.join(named)}")
    report.write(f"Python          {sys.version.replace(chr(10), ' ')}")
    report.write(f"processors      {os.cpu_count()}")
    report.write(f"descriptors     {_descriptor_limit()}")
    for tool in (os.environ.get("CC", "cc"), "cmake"):
        found = shutil.which(tool)
        told = _run([found, "--version"], 60, dict(os.environ), None)[0] if found else "not found"
        report.write(f"{tool:15} {told.splitlines()[0] if told else 'says nothing'}")
    report.write("")


def check_c(report: Report, work: Path) -> None:
    """The C library and its tests."""
    if shutil.which("cmake") is None:
        report.write("=== C tests: left out, there is no cmake\n")
        return
    build = work / "build"
    configure = ["cmake", "-S", ROOT, "-B", build]
    if report.run("configure", configure, BUILD_SECONDS) is None:
        return
    kind = "RelWithDebInfo"  # some generators ask for it only now
    if (
        report.run("build", ["cmake", "--build", build, "--config", kind], BUILD_SECONDS)
        is not None
    ):
        tests = [
            "ctest",
            "--test-dir",
            build,
            "-C",
            kind,
            "--output-on-failure",
            "--no-tests=error",
        ]
        report.run("C tests", tests, BUILD_SECONDS)


def check_python(report: Report, work: Path, quick: bool, wanted: Sequence[str]) -> None:
    """The extension, the suite and c10k on each backend, or on those wanted."""
    environment = work / "venv"
    python = environment / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if report.run("environment", [sys.executable, "-m", "venv", environment], 300) is None:
        return
    # A copy: a build leaves files in the folder that it builds.
    copy = work / "source"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv*", "build", "*.so"))
    install = [python, "-m", "pip", "install", "--disable-pip-version-check", f"{copy}[test]"]
    if report.run("install", install, BUILD_SECONDS) is None:
        return
    shutil.rmtree(copy / "asyncio_native")  # it would hide the installed package
    program = [python, "-P", "-m", "asyncio_native"]
    told = report.run("backends", [*program, "backends"], 60, folder=work)
    names = re.findall(r"^(\w+) +available", told or "", re.MULTILINE)
    missing = sorted(set(wanted) - set(names)) if names else ["any backend"]
    for name in missing:
        report.write(f"{name} is not available\n")
        report.failed.append(name)
    measures = "not peers and not slow" if quick else "not peers"
    for name in [name for name in names if not wanted or name in wanted]:
        suite = [python, copy / "tools" / "run_tests.py", "--installed", "-q", "-rs"]
        suite += ["-p", "no:cacheprovider", "-m", measures]
        if sys.platform == "win32":  # the tests of the examples wait for pipes as POSIX can
            suite += ["--ignore=tests/examples"]
        restricted = {"ASYNCIO_NATIVE_TEST_BACKENDS": name}
        report.run(f"suite on {name}", suite, SUITE_SECONDS, restricted)
        clients = ["--clients", "1000"] if quick else []
        c10k = [*program, "c10k", "--backend", name, *clients]
        report.run(f"c10k on {name}", c10k, LOAD_SECONDS, folder=work)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs all checks; the status is 1 if one of them failed."""
    parser = argparse.ArgumentParser(description="Checks asyncio-native on this system.")
    parser.add_argument("--quick", action="store_true", help="without the slow tests")
    parser.add_argument("--backend", action="append", default=[], help="only this one; repeatable")
    default = f"asyncio-native-{platform.system()}-{platform.machine()}.txt".lower()
    parser.add_argument("--report", type=Path, default=Path(default), help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    with (
        options.report.open("w", encoding="utf-8") as file,
        tempfile.TemporaryDirectory(prefix="asyncio-native-check.") as folder,
    ):
        report = Report(file)
        describe(report)
        check_c(report, Path(folder))
        check_python(report, Path(folder), options.quick, options.backend)
        report.write("failed: " + (", ".join(report.failed) or "nothing"))
    print(f"the report is in {options.report.resolve()}")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
