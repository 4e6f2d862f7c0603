"""`python -m asyncio_native backends`, and what all commands have in common."""

from __future__ import annotations

import json
import os
import subprocess
from importlib.metadata import version

import asyncio_native as an
import pytest
from asyncio_native.cli import main
from cli_support import COMMAND, assert_usage_error, run_cli
from support import PROGRAM_SECONDS

ALL_BACKENDS = {"iocp", "io_uring", "epoll", "kqueue", "poll"}


def an_unavailable_backend() -> an.Backend:
    for backend in an.backends():
        if not backend.available:
            return backend
    raise AssertionError("IOCP and kqueue are never found on one system")


def test_each_backend_has_a_line_with_the_verdict() -> None:
    ended = run_cli("backends")
    assert ended.returncode == 0
    assert ended.stderr == ""
    lines = dict(line.split(maxsplit=1) for line in ended.stdout.splitlines())
    assert set(lines) == ALL_BACKENDS
    for backend in an.backends():
        if backend.available:
            assert lines[backend.name] == "available"
        else:
            assert backend.reason
            assert lines[backend.name] == f"not available: {backend.reason}"


def test_json_says_the_same() -> None:
    ended = run_cli("backends", "--json")
    assert ended.returncode == 0
    told = {entry["name"]: entry for entry in json.loads(ended.stdout)}
    assert set(told) == ALL_BACKENDS
    for backend in an.backends():
        assert told[backend.name]["available"] is backend.available
        assert told[backend.name]["reason"] == backend.reason


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "COMMAND"),
        (["nonsense"], "nonsense"),
        (["backends", "--nonsense"], "--nonsense"),
        (["echo", "--port", "65536"], "65536"),
        (["echo", "--port", "-1"], "-1"),
        (["echo", "--port", "http"], "http"),
        (["echo", "--host", ""], "--host"),
        (["echo", "--backend", "select"], "select"),
        (["c10k", "--backend", "select"], "select"),
        (["c10k", "--clients", "0"], "--clients"),
        (["c10k", "--messages", "many"], "many"),
        (["c10k", "--size", "0"], "--size"),
        (["c10k", "--processes", "0"], "--processes"),
        (["c10k", "--timeout", "nan"], "nan"),
        (["c10k", "--timeout", "0"], "--timeout"),
        (["c10k", "extra"], "extra"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(
    arguments: list[str], word: str, capfd: pytest.CaptureFixture[str]
) -> None:
    status = main(arguments)
    output, errors = capfd.readouterr()
    assert_usage_error(subprocess.CompletedProcess(arguments, status, output, errors), word)


def test_wrong_usage_ends_the_process_with_status_2() -> None:
    assert_usage_error(run_cli("nonsense"), "nonsense")


@pytest.mark.skipif(os.name != "posix", reason="a POSIX shell starts it without a descriptor 2")
def test_without_standard_error_the_status_tells_and_nothing_is_written() -> None:
    shell = ["sh", "-c", 'exec "$@" 2>&-', "sh"]
    ended = subprocess.run(
        [*shell, *COMMAND, "nonsense"], stdout=subprocess.PIPE, timeout=PROGRAM_SECONDS
    )
    assert (ended.returncode, ended.stdout) == (2, b"")


@pytest.mark.parametrize("command", ["echo", "c10k"])
def test_a_backend_that_does_not_work_here_is_refused_with_the_reason(command: str) -> None:
    backend = an_unavailable_backend()
    ended = run_cli(command, "--backend", backend.name)
    assert_usage_error(ended, backend.name, backend.reason)


@pytest.mark.parametrize("command", ["echo", "c10k"])
def test_a_backend_named_by_the_environment_is_refused_with_the_reason(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASYNCIO_NATIVE_BACKEND", "nonsense")
    assert_usage_error(run_cli(command), "ASYNCIO_NATIVE_BACKEND", "nonsense")


@pytest.mark.parametrize("arguments", [["--help"], ["backends", "--help"], ["c10k", "--help"]])
def test_help_is_on_standard_output(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 0
    output, errors = capsys.readouterr()
    assert output.startswith("usage: asyncio-native")
    assert errors == ""


def test_the_version_is_told_on_standard_output() -> None:
    ended = run_cli("--version")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == f"asyncio-native {version('asyncio-native')}\n"


@pytest.mark.posix("Windows tells a pipe without a reader as an invalid argument")
@pytest.mark.parametrize("argument", ["backends", "--help", "--version"])
def test_a_reader_that_is_gone_gives_no_traceback(argument: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        ended = subprocess.run(
            [*COMMAND, argument],
            stdin=subprocess.DEVNULL,
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            timeout=PROGRAM_SECONDS,
        )
    finally:
        os.close(writing)
    assert ended.returncode == 1
    assert ended.stderr == ""
