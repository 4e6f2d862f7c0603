"""Real servers of other projects, each started in a temporary folder on a port of the loopback.

Each is a context manager that gives the address when the server answers, and ends it by its own
handle. Nothing of the system's own services is used or changed. What is not installed raises
`NotInstalledError`, whose text says which package has it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

Address = tuple[str, int]

START_SECONDS = 20.0
"""For a server to answer."""

END_SECONDS = 10.0
"""For a server to end when it is told to."""

ATTEMPTS = 3
"""A port that was free a moment ago may be taken when the server binds it."""

FOLDERS = ("/usr/sbin", "/usr/local/sbin", "/usr/lib/postgresql/*/bin", "/usr/libexec/postgresql*")
"""Where servers may be that are not on the PATH; of several versions the last one is taken."""

ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
"""For programs of others: a sanitizer's runtime is preloaded for our own code, not for theirs."""

FILE_BYTES = 20 << 20
"""The size of nginx' big file."""


class NotInstalledError(Exception):
    """A program is not installed."""


def program(name: str, package: str) -> str:
    """The path of an installed program."""
    if found := shutil.which(name):
        return found
    for pattern in FOLDERS:
        candidates = sorted(Path("/").glob(f"{pattern.lstrip('/')}/{name}"))
        if candidates:
            return str(candidates[-1])
    raise NotInstalledError(f"{name} is not installed (Debian package {package})")


def need(*names: str) -> None:
    """Raises `NotInstalledError` with all that is not installed."""
    reasons = []
    for name in names:
        try:
            program(name, PACKAGES[name])
        except NotInstalledError as missing:
            reasons.append(str(missing))
    if reasons:
        raise NotInstalledError("; ".join(reasons))


PACKAGES = {
    "redis-server": "redis-server",
    "redis-cli": "redis-tools",
    "redis-benchmark": "redis-tools",
    "nginx": "nginx-light",
    "curl": "curl",
    "wrk": "wrk",
    "postgres": "postgresql",
    "initdb": "postgresql",
    "psql": "postgresql",
    "pgbench": "postgresql",
    "setpriv": "util-linux",
    "socat": "socat",
    "haproxy": "haproxy",
}


def path_of(name: str) -> str:
    """The path of one of the programs used here."""
    return program(name, PACKAGES[name])


def free_address() -> Address:
    """An address of the loopback whose port was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        host, port = probe.getsockname()
    return host, port


def answers(address: Address) -> bool:
    """Whether somebody listens there."""
    with socket.socket() as probe:
        probe.settimeout(1.0)
        # TCP connects a socket with itself if the system chooses that very port for it.
        return probe.connect_ex(address) == 0 and probe.getsockname() != address


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """A temporary folder that every user may enter."""
    with tempfile.TemporaryDirectory(prefix="asyncio-native-peer-") as name:
        os.chmod(name, 0o755)
        yield Path(name)


@contextlib.contextmanager
def running(
    command: Callable[[Address], Sequence[str]], *, end_by: int = signal.SIGTERM
) -> Iterator[tuple[Address, subprocess.Popen[bytes]]]:
    """Runs a server until it is left; gives the address where it answers, and its process."""
    with tempfile.TemporaryFile() as output:
        for _ in range(ATTEMPTS):
            address = free_address()
            process = subprocess.Popen(
                command(address),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=ENVIRONMENT,
            )
            try:
                if _wait_for(process, address):
                    yield address, process
                    return
            finally:
                _end(process, end_by)
        output.seek(0)
        raise AssertionError(f"the server does not start: {output.read().decode()[-2000:]}")


def _wait_for(process: subprocess.Popen[bytes], address: Address) -> bool:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        if answers(address):
            return True
        time.sleep(0.02)
    return False


def _end(process: subprocess.Popen[bytes], number: int) -> None:
    if process.poll() is None:
        process.send_signal(number)
    try:
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextlib.contextmanager
def redis() -> Iterator[tuple[Address, subprocess.Popen[bytes]]]:
    """A redis-server that keeps nothing on disk."""
    need("redis-server", "redis-cli", "redis-benchmark")
    with folder() as place:

        def command(address: Address) -> list[str]:
            host, port = address
            options = {"--bind": host, "--port": str(port), "--dir": str(place)}
            options |= {"--save": "", "--appendonly": "no", "--daemonize": "no"}
            return [path_of("redis-server"), *(word for pair in options.items() for word in pair)]

        with running(command) as started:
            yield started


NGINX_CONFIGURATION = """
daemon off;
master_process off;
error_log stderr;
pid {place}/nginx.pid;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    sendfile on;
    keepalive_requests 1000000;
    client_max_body_size 1k;
    client_body_temp_path {place}/body;
    proxy_temp_path {place}/proxy;
    fastcgi_temp_path {place}/fastcgi;
    uwsgi_temp_path {place}/uwsgi;
    scgi_temp_path {place}/scgi;
    server {{
        listen {host}:{port};
        root {place}/files;
    }}
}}
"""


@contextlib.contextmanager
def nginx(big: bytes, small: bytes) -> Iterator[tuple[Address, subprocess.Popen[bytes]]]:
    """An nginx in one process that serves `big` and `small`."""
    need("nginx")
    with folder() as place:
        (place / "files").mkdir()
        (place / "files" / "big").write_bytes(big)
        (place / "files" / "small").write_bytes(small)
        configuration = place / "nginx.conf"

        def command(address: Address) -> list[str]:
            host, port = address
            text = NGINX_CONFIGURATION.format(place=place, host=host, port=port)
            configuration.write_text(text)
            return [path_of("nginx"), "-e", "stderr", "-p", str(place), "-c", str(configuration)]

        with running(command) as started:
            yield started


@contextlib.contextmanager
def postgresql() -> Iterator[tuple[Address, subprocess.Popen[bytes]]]:
    """A PostgreSQL with a fresh cluster; its superuser is `postgres`, without a password."""
    need("initdb", "postgres", "psql", "pgbench")
    with folder() as place:
        as_user = _unprivileged(place)
        data = place / "data"
        made = subprocess.run(
            [*as_user, path_of("initdb"), "-D", str(data), "-U", "postgres", "-A", "trust", "-N"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            cwd=place,
            env=ENVIRONMENT,
        )
        assert made.returncode == 0, made.stdout + made.stderr

        def command(address: Address) -> list[str]:
            host, port = address
            settings = [f"listen_addresses={host}", f"port={port}", "fsync=off"]
            settings += [f"unix_socket_directories={place}", "max_connections=50"]
            words = [word for setting in settings for word in ("-c", setting)]
            return [*as_user, path_of("postgres"), "-D", str(data), *words]

        with running(command, end_by=signal.SIGINT) as (address, process):  # its fast shutdown
            _wait_until_it_serves(address)
            yield address, process


def _unprivileged(place: Path) -> list[str]:
    """Starts a program as another user than root, whom PostgreSQL refuses; the place is theirs."""
    if os.geteuid() != 0:
        return []
    need("setpriv")
    for user in ("postgres", "nobody"):
        try:
            shutil.chown(place, user)
        except LookupError:
            continue
        # It executes the server in its own place: the process that we end is the server.
        return [path_of("setpriv"), f"--reuid={user}", f"--regid={place.stat().st_gid}"] + [
            "--clear-groups"
        ]
    raise NotInstalledError("no user postgres or nobody, and PostgreSQL refuses to run as root")


def _wait_until_it_serves(address: Address) -> None:
    """It listens before it has started up."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        asked = subprocess.run(
            psql_command(address, "select 1"),
            capture_output=True,
            text=True,
            timeout=START_SECONDS,
            env=ENVIRONMENT,
        )
        if asked.returncode == 0:
            return
        assert time.monotonic() < deadline, asked.stderr
        time.sleep(0.05)


def wait_for_activity(address: Address, words: str) -> None:
    """Waits until a client's statement with these words is running."""
    deadline = time.monotonic() + START_SECONDS
    question = (
        "select count(*) from pg_stat_activity where state = 'active' "
        f"and pid <> pg_backend_pid() and query like '%{words}%'"
    )
    while True:
        asked = subprocess.run(
            psql_command(address, question),
            capture_output=True,
            text=True,
            timeout=START_SECONDS,
            env=ENVIRONMENT,
        )
        if asked.stdout.strip() not in ("", "0"):
            return
        assert time.monotonic() < deadline, asked
        time.sleep(0.05)


def psql_command(address: Address, statement: str) -> list[str]:
    """Runs a statement and prints the bare values."""
    host, port = address
    options = ["-X", "-A", "-t", "-h", host, "-p", str(port), "-U", "postgres"]
    return [path_of("psql"), *options, "-c", statement, "postgres"]
