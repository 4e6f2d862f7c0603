"""The servers that are measured: a name, the program behind it and the options that make it so."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Family = Literal["c", "capi", "cython", "native", "peer"]

ECHO = frozenset({"echo"})
BUSY = frozenset({"echo", "busy"})
TCP = frozenset({"echo", "busy", "fanout"})
EVERYTHING = TCP | {"udp"}


@dataclass(frozen=True)
class Server:
    """A server with its options; `program` is a file of `bench/c` or `bench/python`."""

    name: str
    family: Family
    program: str
    options: tuple[str, ...] = ()
    roles: frozenset[str] = ECHO
    package: str = ""  # the distribution that it stands on
    environment: tuple[tuple[str, str], ...] = ()
    fault: str = ""  # why its bytes are not checked; it is measured, but nobody's rival

    @property
    def in_python(self) -> bool:
        """Whether it runs in the measured interpreter."""
        return self.program.endswith(".py")

    @property
    def is_plain(self) -> bool:
        """Whether it starts an operation, and dequeues a completion, for everything."""
        return "style=plain" in self.options


def native(backend: str, concurrency: int, style: str = "quiet") -> Server:
    """asyncio_native in Python; a name that ends in -1 promises a single dequeuing thread."""
    plain = style == "plain"
    name = f"native-{backend}{'-plain' if plain else ''}{'-1' if concurrency else ''}"
    options = (f"backend={backend}", f"concurrency={concurrency}", f"style={style}")
    roles = BUSY if plain else EVERYTHING
    return Server(name, "native", "native_server.py", options, roles, "asyncio-native")


def capi(backend: str, concurrency: int, style: str = "quiet") -> Server:
    """A handler in C on asyncio_native's C interface."""
    name = native(backend, concurrency, style).name.replace("native", "capi", 1)
    options = (f"backend={backend}", f"concurrency={concurrency}", f"style={style}")
    return Server(name, "capi", "echo_native", options)


def cython(backend: str) -> Server:
    """The handler in Cython on the installed package, of examples/cython_echo."""
    options = (f"backend={backend}", "concurrency=1")
    return Server(f"cython-{backend}-1", "cython", "cython_server.py", options, ECHO, "cython-echo")


def peer(package: str, roles: frozenset[str] = EVERYTHING) -> Server:
    """An event loop for asyncio, from PyPI."""
    return Server(package, "peer", "loop_server.py", (f"loop={package}",), roles, package)


ZLOOP = peer("zloop", TCP)
ZLOOP_ON_IO_URING = replace(
    ZLOOP,
    name="zloop-io_uring",
    environment=(("ZLOOP_IO_URING", "completion"),),
    fault="zloop 0.0.1 on io_uring gives one connection what another sent",
)


SERVERS = (
    Server("c-epoll", "c", "echo_epoll"),
    Server("c-io_uring", "c", "echo_io_uring"),
    Server("c-udp", "c", "echo_udp", roles=frozenset({"udp"})),
    *(capi(backend, concurrency) for backend in ("epoll", "io_uring") for concurrency in (0, 1)),
    *(cython(backend) for backend in ("epoll", "io_uring")),
    *(native(backend, concurrency) for backend in ("epoll", "io_uring") for concurrency in (0, 1)),
    *(native(backend, 1, "plain") for backend in ("epoll", "io_uring")),
    peer("uvloop"),
    peer("asyncio"),
    peer("blazio"),
    replace(ZLOOP, name="zloop-epoll"),
    ZLOOP_ON_IO_URING,
    peer("rloop"),
    peer("aiofastnet"),
)

#: What is installed from PyPI beside asyncio_native; asyncio is the interpreter's own.
PEER_PACKAGES = tuple(
    dict.fromkeys(s.package for s in SERVERS if s.family == "peer" and s.package != "asyncio")
)


def by_name(name: str) -> Server:
    """The server of that name."""
    return next(server for server in SERVERS if server.name == name)
