"""The C interface out of the installed package: the table, and handles and completions that cross.

tests/capi/probe.pyx is the C side: compiled by Cython against the package's headers and .pxd, it
starts operations of its own on Python's ports and dequeues from them without the interpreter lock.
"""

from __future__ import annotations

import contextlib
import ctypes
import dis
import gc
import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import textwrap
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import asyncio_native as an
import capi_table
import pytest
from capi_support import (
    LIMITED_API,
    SOURCES,
    compile_c,
    compile_cython,
    load,
    needs_compiler,
    needs_cython,
    why_not,
)
from support import (
    PATIENCE,
    PROGRAM_SECONDS,
    check_python,
    dial,
    drain,
    listening,
    nothing,
    one,
    pair,
    read_exactly,
    read_to_end,
    settle,
)

ROOT = Path(__file__).resolve().parent.parent

#: The table's order with AN_CAPI_ABI 1. It only grows, at its end; who must change anything else
#: gives AN_CAPI_ABI another number and begins a new list.
RECORDED = (SOURCES / "table.txt").read_text("utf-8").split()

#: Bytes of the structures that extensions have compiled in, on 64-bit systems, with that number.
RECORDED_SIZES = {
    "an_operation": 128,
    "an_address": 136,
    "an_buffer": 16,
    "an_completion": 72,
    "an_backend_description": 176,
    "an_port_options": 16,
    "an_statistics": 464,
    "an_socket_statistics": 16,
}
RECORDED_ABI = 1


@pytest.fixture(scope="session")
def built_probe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    if reason := why_not(cython=True):
        pytest.skip(reason)
    return load(compile_cython(SOURCES / "probe.pyx", tmp_path_factory.mktemp("probe")))


@pytest.fixture
def probe(built_probe: Any) -> Iterator[Any]:
    """The C side. What it allocated for operations was given back after the test."""
    before = built_probe.alive()
    yield built_probe
    assert built_probe.alive() == before


# -- the table -------------------------------------------------------------------------------------


def test_the_table_has_every_public_function_of_the_header() -> None:
    header = (ROOT / "csrc" / "include" / "asyncio_native.h").read_text("utf-8")
    declared = re.findall(r"^[\w ]+[ *](an_\w+)\(", header, re.MULTILINE)
    declared.remove("an_operation_marked")  # inline
    placed = [function.name for function in capi_table.table()]
    assert len(declared) > 50
    assert sorted(placed) == sorted(set(placed))
    assert set(declared) == {name for name in placed if not name.startswith("an_py_")}


def test_the_table_has_grown_at_its_end_only() -> None:
    header = (ROOT / "csrc" / "include" / "asyncio_native_capi.h").read_text("utf-8")
    (structure,) = re.findall(r"^struct an_capi \{(.*?)^\};", header, re.DOTALL | re.MULTILINE)
    members = re.findall(r"\(\*(\w+)\)\(", structure)
    assert members == [function.name for function in capi_table.table()]
    assert members[: len(RECORDED)] == RECORDED
    assert f"#define AN_CAPI_ABI {RECORDED_ABI} " in header
    assert members == RECORDED, "new functions are to be added to the recorded list"


def test_what_follows_from_the_headers_is_written() -> None:
    # But for its form, for which lint has a tool.
    spaces = re.compile(r"\s+")
    header = spaces.sub("", capi_table.TABLE_HEADER.read_text("utf-8"))
    assert spaces.sub("", capi_table.header_text()) == header
    installed = Path(an.get_include()).parent / capi_table.PXD.name
    assert installed.read_text("utf-8") == capi_table.pxd_text()


def test_the_installed_headers_are_those_of_the_sources() -> None:
    for name in ("asyncio_native.h", "asyncio_native_capi.h"):
        source = (ROOT / "csrc" / "include" / name).read_text("utf-8")
        installed = Path(an.get_include(), name).read_text("utf-8")
        assert installed == source.replace("@VERSION@", an.__version__)
        assert "@" not in installed


class Table(ctypes.Structure):
    """`struct an_capi`, as far as it has names here."""

    _fields_ = (
        ("abi", ctypes.c_uint32),
        ("count", ctypes.c_uint32),
        ("version", ctypes.c_char_p),
        *((name, ctypes.c_void_p) for name in RECORDED),
    )


class Entry(ctypes.Structure):
    """`an_completion`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("operation", "socket", "state", "data")),
        *((name, ctypes.c_void_p) for name in ("accepted", "address")),
        ("transferred", ctypes.c_uint64),
        ("error", ctypes.c_int32),
        ("kind", ctypes.c_uint16),
        ("flags", ctypes.c_uint16),
        ("reserved", ctypes.c_void_p),
    )


def package_table() -> Table:
    """The table in the capsule, without any extension: on every system."""
    from asyncio_native import _capi

    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    return Table.from_address(pointer(_capi.table, b"asyncio_native._capi.table") or 0)


@pytest.mark.skipif(sys.implementation.name != "cpython", reason="ctypes.pythonapi is CPython's")
def test_the_table_is_in_the_package_and_its_functions_are_the_librarys(
    port: an.CompletionPort,
) -> None:
    table = package_table()
    assert (table.abi, table.count) == (RECORDED_ABI, len(RECORDED))
    assert table.version.decode() == an.__version__
    assert all(getattr(table, name) for name in RECORDED)
    handle_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object)(table.an_py_port_handle)
    handle = handle_of(port)
    backend = ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_void_p)(table.an_port_backend)
    assert backend(handle).decode() == port.backend
    with pytest.raises(TypeError):
        handle_of(None)

    entry, count = Entry(), ctypes.c_size_t()
    dequeue = ctypes.CFUNCTYPE(
        ctypes.c_int,
        *(ctypes.c_void_p, ctypes.POINTER(Entry), ctypes.c_size_t, ctypes.c_int64),
        ctypes.POINTER(ctypes.c_size_t),
    )(table.an_port_dequeue)
    new = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.py_object, ctypes.POINTER(Entry))(
        table.an_py_completion_new
    )
    port.post("through C")
    assert dequeue(handle, ctypes.byref(entry), 1, int(PATIENCE * 1e9), ctypes.byref(count)) == 0
    assert count.value == 1
    assert new(port, ctypes.byref(entry)).state == "through C"
    with pytest.raises(ValueError, match="has taken this completion already"):
        new(port, ctypes.byref(entry))


def extension(folder: Path, *options: str, **changed: str) -> Path:
    """An extension in C that was compiled against headers in which a text stands for another."""
    include = folder / "include"
    include.mkdir()
    for name in ("asyncio_native.h", "asyncio_native_capi.h"):
        text = Path(an.get_include(), name).read_text("utf-8")
        if name == "asyncio_native_capi.h":
            for old, new in changed.items():
                text, count = re.subn(
                    rf"((?:#define |enum \{{ ){old} (?:= )?)[\w\".]+", rf"\g<1>{new}", text
                )
                assert count == 1, old
        (include / name).write_text(text, "utf-8")
    source = folder / "extension.c"
    shutil.copyfile(SOURCES / source.name, source)
    return compile_c(source, "-Wno-missing-field-initializers", *options, include=str(include))


@needs_compiler
@pytest.mark.parametrize("language", ["c", "c++"])
def test_an_extension_calls_the_library_in_the_package_and_links_nothing(
    tmp_path: Path, language: str
) -> None:
    options = ["-std=c11", *LIMITED_API]
    if language == "c++":
        options = ["-x", "c++", "-std=c++11"]
    # It could not be loaded if it needed a name of the library, which exports none.
    version, abi, count, table, sizes = load(extension(tmp_path, *options)).look()
    assert (version, abi, count) == (an.__version__, RECORDED_ABI, len(RECORDED))
    assert table != 0
    if sys.maxsize > 2**32:
        assert sizes == RECORDED_SIZES


@needs_compiler
def test_an_extension_of_another_interface_number_is_refused_with_what_to_do(
    tmp_path: Path,
) -> None:
    path = extension(tmp_path, AN_CAPI_ABI="2", AN_CAPI_VERSION='"9.0.1"')
    with pytest.raises(ImportError) as caught:
        load(path)
    assert str(caught.value) == (
        f"asyncio_native {an.__version__} is installed, and its C interface has the number 1; this "
        "extension was compiled for number 2, that of asyncio_native 9.0.1: compile it again, or "
        "install that version"
    )


@needs_compiler
def test_an_extension_that_needs_more_functions_is_refused_with_what_to_do(tmp_path: Path) -> None:
    more = str(len(RECORDED) + 1)
    path = extension(tmp_path, AN_CAPI_COUNT=more, AN_CAPI_VERSION='"0.7.0"')
    with pytest.raises(ImportError) as caught:
        load(path)
    assert str(caught.value) == (
        f"asyncio_native {an.__version__} is installed, and its C interface has {len(RECORDED)} "
        f"functions; this extension was compiled for the {more} of asyncio_native 0.7.0: "
        'pip install --upgrade "asyncio-native>=0.7.0"'
    )


@needs_compiler
def test_an_extension_that_needs_fewer_functions_is_served(tmp_path: Path) -> None:
    path = extension(tmp_path, AN_CAPI_COUNT=str(len(RECORDED) - 1))
    assert load(path).look()[2] == len(RECORDED)


# -- handles ---------------------------------------------------------------------------------------


@needs_cython
def test_cython_calls_the_library_in_the_package(probe: Any) -> None:
    assert probe.version() == an.__version__


@needs_cython
def test_a_port_gives_its_handle_and_anything_else_does_not(
    probe: Any, port: an.CompletionPort
) -> None:
    assert probe.port_address(port) == probe.port_address(port) != 0
    for other in (None, object(), an.CompletionPort, 7):
        with pytest.raises(TypeError, match=r"^a CompletionPort is needed, not \w+$"):
            probe.port_address(other)
        with pytest.raises(TypeError, match=r"^an AsyncSocket is needed, not \w+$"):
            probe.socket_address(other)


@needs_cython
def test_what_is_closed_gives_no_handle(probe: Any, backend: str) -> None:
    port = an.CompletionPort(backend)
    sock = an.AsyncSocket()
    other = an.AsyncSocket()
    port.associate(other)
    assert probe.socket_address(sock) != probe.socket_address(other)
    sock.close()
    with pytest.raises(OSError, match="the socket is closed"):
        probe.socket_address(sock)
    port.close()
    with pytest.raises(an.PortClosedError):
        probe.port_address(port)
    with pytest.raises(an.PortClosedError):
        probe.socket_address(other)


@needs_cython
@pytest.mark.posix("forks")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_gets_no_handle(probe: Any, port: an.CompletionPort) -> None:
    sock, _ = pair(port)
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        told = b""
        for look, thing in ((probe.port_address, port), (probe.socket_address, sock)):
            try:
                look(thing)
            except an.PortClosedError:
                told += b"closed "
            except BaseException as error:
                told += repr(error).encode()
        os.write(write_end, told)
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as told_by_child:
        assert told_by_child.read() == b"closed closed "
    os.waitpid(child, 0)


@needs_cython
def test_a_socket_that_c_opened_becomes_an_asyncsocket(probe: Any, port: an.CompletionPort) -> None:
    sock = probe.open_socket(socket.AF_INET, socket.SOCK_STREAM).to_python()
    assert type(sock) is an.AsyncSocket
    assert (sock.family, sock.type, sock.port) == (socket.AF_INET, socket.SOCK_STREAM, None)
    port.associate(sock, state="of Python")
    listener, address = listening(port)
    listener.accept()
    sock.connect(address)
    drain(port, 2)
    assert probe.again(sock) is sock
    sock.close()
    listener.close()


@needs_cython
def test_a_socket_that_c_associated_stays_with_its_port(
    probe: Any, port: an.CompletionPort
) -> None:
    mine, peer = socket.socketpair()
    with peer:
        made = probe.adopt(mine.detach())
        made.associate(port)
        sock = made.to_python()
        assert sock.port is port
        assert sock.state is None
        sock.recv()
        peer.sendall(b"to Python")
        completion = one(port)
        assert completion.result() == b"to Python"
        assert completion.socket is sock
        sock.close()


@needs_cython
def test_a_socket_that_python_cannot_own_stays_with_c(probe: Any, port: an.CompletionPort) -> None:
    with pytest.raises(ValueError, match="a port that Python does not have"):
        probe.on_a_port_of_its_own()
    made = probe.open_socket(socket.AF_INET, socket.SOCK_STREAM)
    made.close()
    with pytest.raises(OSError, match="the socket is closed"):
        made.to_python()


def raise_at(step: int) -> Callable[..., Any]:
    """A trace function that raises at that instruction of the package, as a signal handler may.

    The interpreter runs no handler just before it returns from a function.
    """
    left = step

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.startswith(str(Path(an.__file__).parent)):
            return None
        frame.f_trace_opcodes = True
        name = dis.opname[frame.f_code.co_code[frame.f_lasti]]
        left -= event == "opcode" and not name.startswith("RETURN")
        if left == 0:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    return trace


@needs_cython
@pytest.mark.skipif(
    sys.implementation.name != "cpython" or sys.version_info[:2] == (3, 12),
    reason="CPython traces instructions; 3.12 tells none of a function that it has just entered",
)
def test_a_signal_handler_that_raises_leaves_a_socket_with_c_or_with_python(
    probe: Any, port: an.CompletionPort
) -> None:
    for step in range(1, 500):
        mine, peer = socket.socketpair()
        made = probe.adopt(mine.detach())
        made.associate(port)
        sock = None
        sys.settrace(raise_at(step))
        with contextlib.suppress(KeyboardInterrupt):
            sock = made.to_python()
        sys.settrace(None)
        assert made.is_kept() == (sock is None)
        if sock is not None:
            sock.send(b"of Python", quiet=True)
            sock.close(flush=True)
        else:  # the object that Python had made of it is gone by now, and has closed nothing
            assert made.send_quietly(b"of C") == 0
        del made  # what C has is closed with it, once
        assert read_to_end(peer) == (b"of Python" if sock is not None else b"of C")
        peer.close()
        if sock is not None:
            break
    assert step > 20


@needs_cython
def test_errors_of_the_library_are_the_exceptions_of_python(probe: Any) -> None:
    numbers = probe.numbers()
    with pytest.raises(an.PortClosedError):
        probe.raise_error(numbers["EPORTCLOSED"])
    with pytest.raises(an.OperationCancelledError):
        probe.raise_error(numbers["ECANCELED"])
    with pytest.raises(ConnectionResetError):
        probe.raise_error(numbers["ECONNRESET"])
    with pytest.raises(OSError, match="the socket is closed"):
        probe.raise_error(numbers["EBADF"])


# -- C dequeues what Python started ----------------------------------------------------------------


def fetch(hand: Any, count: int) -> list[Any]:
    """Lets C dequeue until it has so many."""
    shown: list[Any] = []
    for _ in range(1000):
        if len(shown) >= count:
            return shown
        shown += hand.dequeue(PATIENCE / 100)
    raise AssertionError(f"{count} completions did not come: {shown}")


@needs_cython
def test_completions_that_c_dequeues_become_pythons(probe: Any, port: an.CompletionPort) -> None:
    sock, peer = pair(port, state="state")
    hand = probe.Hand(port)
    buffer = bytearray(8)
    receiving = sock.recv_into(buffer)
    sending = sock.send(b"hello")
    port.post("posted")
    timing = port.timer(0, "timed")
    assert read_exactly(peer, 5) == b"hello"
    peer.sendall(b"answer")
    shown = fetch(hand, 4)
    assert all(marked and number is None for _, marked, _, number, *_ in shown)
    assert port.in_flight == 4
    with pytest.raises(BufferError):
        buffer.append(1)  # held until Python has the completion
    completions = [hand.completion(index) for index in range(4)]
    hand.release()
    assert port.in_flight == 0
    buffer.append(1)
    by_kind = {completion.kind: completion for completion in completions}
    assert by_kind[an.POST].state == "posted"
    assert by_kind[an.POST].operation is None
    assert by_kind[an.TIMER].operation is timing
    assert by_kind[an.TIMER].state == "timed"
    received = by_kind[an.RECV]
    assert received.operation is receiving
    assert received.socket is sock
    assert received.state == "state"
    assert received.result() == 6
    assert bytes(buffer[:6]) == b"answer"
    assert by_kind[an.SEND].operation is sending
    assert by_kind[an.SEND].result() == 5
    assert not any(operation.pending for operation in (receiving, sending, timing))
    nothing(port)


@needs_cython
def test_a_completion_is_pythons_once(probe: Any, port: an.CompletionPort) -> None:
    hand = probe.Hand(port)
    port.post("once")
    probe.post(port, 5)
    fetch(hand, 2)
    assert hand.completion(0).state == "once"
    with pytest.raises(ValueError, match="has taken this completion already"):
        hand.completion(0)
    with pytest.raises(ValueError, match="did not start the operation"):
        hand.completion(1)
    hand.release()


@needs_cython
def test_a_completion_of_another_port_is_refused(
    probe: Any, port: an.CompletionPort, backend: str
) -> None:
    with an.CompletionPort(backend) as other:
        hand = probe.Hand(port)
        port.post("mine")
        fetch(hand, 1)
        with pytest.raises(ValueError, match="not of this port"):
            hand.completion_for(other, 0)
        assert hand.completion(0).state == "mine"
        hand.release()


@needs_cython
def test_an_accepted_connection_goes_to_who_takes_it(probe: Any, port: an.CompletionPort) -> None:
    listener, address = listening(port)
    listener.accept(multishot=True)
    clients = [dial(address) for _ in range(2)]
    hand = probe.Hand(port)
    fetch(hand, 2)
    by_python = hand.completion(0).accepted
    by_c = hand.accepted(1)
    rest = hand.completion(1)
    assert hand.accepted(0) is None
    assert rest.accepted is None
    hand.release()
    given = by_c.to_python()
    for number, sock in enumerate((by_python, given)):
        port.associate(sock)
        sock.send(b"%d" % number, quiet=True)
    assert sorted(read_exactly(client, 1) for client in clients) == [b"0", b"1"]
    by_python.close()
    given.close()
    listener.close()
    settle(port)


@needs_cython
def test_a_failure_of_quiet_sends_goes_to_who_sent(probe: Any, port: an.CompletionPort) -> None:
    hand = probe.Hand(port)
    for sends in ("python", "c"):
        sock, _ = pair(port)
        sock.shutdown(socket.SHUT_WR)
        if sends == "python":
            sock.send(b"lost", quiet=True)
        else:
            probe.send_quietly(sock, b"lost")
        ((kind, marked, more, number, error, transferred, _),) = fetch(hand, 1)
        assert (kind, more, number, transferred) == (an.SEND, False, None, 4)
        assert error != 0
        assert marked == (sends == "python")
        if marked:
            completion = hand.completion(0)
            assert completion.operation is None
            assert completion.socket is sock
            assert isinstance(completion.error, int)
        hand.release()
        sock.close()


@needs_cython
@pytest.mark.parametrize("order", ["in order", "backwards"])
def test_completions_of_a_multishot_are_given_in_any_order(
    probe: Any, port: an.CompletionPort, order: str
) -> None:
    assert probe.port_address(port)  # who counts completions for C code counts from here on
    sock, peer = pair(port)
    sock.recv(1, multishot=True)
    peer.sendall(b"abcdef")
    peer.shutdown(socket.SHUT_WR)
    hand = probe.Hand(port)
    shown = fetch(hand, 7)
    assert [more for _, _, more, *_ in shown] == [True] * 6 + [False]
    indexes = list(range(7)) if order == "in order" else list(reversed(range(7)))
    data = {}
    for index in indexes:
        gc.collect()
        completion = hand.completion(index)
        assert completion.socket is sock
        assert completion.operation.kind is an.RECV
        data[index] = completion.data
    assert [data[index] for index in range(7)] == [b"a", b"b", b"c", b"d", b"e", b"f", b""]
    hand.release()
    sock.close()
    assert living_operations() == 1
    del completion
    assert living_operations() == 0


def living_operations() -> int:
    gc.collect()
    return sum(1 for thing in gc.get_objects() if type(thing) is an.Operation)


@needs_cython
@pytest.mark.dequeuing_threads
def test_the_end_of_a_multishot_in_python_waits_for_what_c_has(
    probe: Any, port: an.CompletionPort
) -> None:
    sock, peer = pair(port)
    hand = probe.Hand(port)
    sock.recv(1, multishot=True)
    peer.sendall(b"ab")
    assert len(fetch(hand, 2)) == 2
    peer.shutdown(socket.SHUT_WR)
    end = one(port)
    assert end.data == b""
    assert not end.more
    assert port.in_flight == 0
    del end
    sock.close()
    gc.collect()
    assert [hand.completion(index).data for index in (1, 0)] == [b"b", b"a"]
    hand.release()


@needs_cython
def test_what_c_holds_when_the_port_closes_is_released(probe: Any, backend: str) -> None:
    port = an.CompletionPort(backend)
    listener, address = listening(port)
    sock, peer = pair(port)
    listener.accept(multishot=True)
    sock.recv(multishot=True)
    client = dial(address)
    peer.sendall(b"data")
    hand = probe.Hand(port)
    fetch(hand, 2)
    port.close()
    gc.collect()
    for index in range(2):
        with pytest.raises(an.PortClosedError):
            hand.completion(index)
    hand.release()
    del port, sock, listener
    gc.collect()
    assert read_to_end(client) == b""


@needs_cython
def test_a_flush_that_c_dequeues_shows_nothing(probe: Any, port: an.CompletionPort) -> None:
    sock, peer = pair(port, small=True)
    sock.send(b"x" * (1 << 22), quiet=True)
    assert sock.unsent > 0
    sock.close(flush=True)
    hand = probe.Hand(port)
    reader = threading.Thread(target=read_to_end, args=(peer,))
    reader.start()
    shown = fetch(hand, 1)
    assert shown[0][:2] == (an.SEND, True)
    assert hand.completion(0) is None
    hand.release()
    reader.join()


# -- Python dequeues what C started ----------------------------------------------------------------


@needs_cython
def test_a_handler_takes_completions_of_c_and_python_gets_its_own(
    probe: Any, port: an.CompletionPort
) -> None:
    seen: list[Any] = []
    probe.handle(port, seen)
    sock, peer = pair(port)
    probe.recv(sock, 1)
    probe.post(port, 2)
    probe.timer(port, 3, 0)
    probe.send(sock, 4, b"from C")
    port.post("from Python")
    peer.sendall(b"to C")
    completions = drain(port, lambda found: len(seen) >= 4 and found)
    assert [c.state for c in completions] == ["from Python"]
    assert read_exactly(peer, 6) == b"from C"
    assert sorted((number, kind) for kind, _, _, number, *_ in seen) == [
        (1, an.RECV),
        (2, an.POST),
        (3, an.TIMER),
        (4, an.SEND),
    ]
    assert not any(marked for _, marked, *_ in seen)
    (data,) = [data for kind, *_, data in seen if kind == an.RECV]
    assert data == b"to C"
    assert port.in_flight == 0
    probe.handle_no_more(port)
    sock.close()


@needs_cython
def test_without_a_handler_python_says_so_and_nothing_is_lost(
    probe: Any, port: an.CompletionPort
) -> None:
    port.post("before")
    for number in range(3):
        probe.post(port, number)
    port.post("behind")
    got: list[Any] = []
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"C code .* \(an_py_port_set_handler\)"):
            while completions := port.dequeue_many(timeout=0):
                got += completions
    seen: list[Any] = []
    probe.handle(port, seen)
    completions = got + drain(port, lambda found: len(got) + len(found) >= 2)
    assert [c.state for c in completions] == ["before", "behind"]
    assert [number for _, _, _, number, *_ in seen] == [0, 1, 2]
    nothing(port)


@needs_cython
def test_a_multishot_of_c_goes_through_python(probe: Any, port: an.CompletionPort) -> None:
    seen: list[Any] = []
    probe.handle(port, seen)
    listener, address = listening(port)
    probe.accept(listener, 1, multishot=True)
    for _ in range(3):
        dial(address)
    drain(port, lambda _: len(seen) >= 3)
    listener.close()
    drain(port, lambda _: len(seen) >= 4)
    assert [more for _, _, more, *_ in seen] == [True, True, True, False]
    assert seen[-1][4] == probe.numbers()["ECANCELED"]


@needs_cython
def test_a_quiet_failure_of_cs_socket_is_never_taken_for_pythons(
    probe: Any, port: an.CompletionPort
) -> None:
    seen: list[Any] = []
    probe.handle(port, seen)
    mine, _peer = socket.socketpair()
    made = probe.adopt(mine.detach())
    made.associate(port)
    assert made.shutdown() == 0
    assert made.send_quietly(b"lost") == 0
    drain(port, lambda _: seen)
    ((kind, marked, _, number, error, transferred, _),) = seen
    assert (kind, marked, number, transferred) == (an.SEND, False, None, 4)
    assert error != 0
    _peer.close()


@needs_cython
def test_a_poll_does_not_go_on_for_the_sake_of_c(probe: Any, port: an.CompletionPort) -> None:
    seen: list[Any] = []
    probe.handle(port, seen)
    for number in range(600):
        probe.post(port, number)
    assert port.dequeue_many(max_count=100, timeout=0) == []
    assert 0 < len(seen) <= 200
    drain(port, lambda _: len(seen) == 600)
    assert [number for _, _, _, number, *_ in seen] == list(range(600))


@needs_cython
def test_an_exception_out_of_a_handler_is_unraisable_and_loses_nothing(
    probe: Any, port: an.CompletionPort
) -> None:
    seen: list[Any] = []
    probe.handle_badly(port, seen)
    probe.post(port, 1)
    port.post("behind")
    assert one(port).state == "behind"
    assert [number for _, _, _, number, *_ in seen] == [1]


@needs_cython
def test_a_handler_may_close_the_port(probe: Any, backend: str) -> None:
    port = an.CompletionPort(backend)
    seen: list[Any] = []
    given = (port, seen)
    probe.handle_and_close(port, given)
    sock, _ = pair(port)
    sock.recv()
    for number in range(3):
        probe.post(port, number)
    port.post("behind")
    # What was dequeued before it was closed still comes.
    completions = port.dequeue_many(timeout=PATIENCE)
    assert [c.state for c in completions] == ["behind"]
    assert [s[3] for s in seen] == [0, 1, 2]
    with pytest.raises(an.PortClosedError):
        port.dequeue()
    assert port.in_flight == 0
    sock.close()


@needs_cython
def test_a_handler_may_close_the_port_with_what_an_earlier_call_left(
    probe: Any, backend: str
) -> None:
    port = an.CompletionPort(backend)
    probe.post(port, 0)
    for _ in range(10):
        port.post("behind")
    with pytest.raises(RuntimeError, match="C code"):
        port.dequeue_many(timeout=PATIENCE)
    seen: list[Any] = []
    given = (port, seen)
    probe.handle_and_close(port, given)
    completions = port.dequeue_many(timeout=PATIENCE)
    assert [c.state for c in completions] == ["behind"] * 10
    assert [number for _, _, _, number, *_ in seen] == [0]
    with pytest.raises(an.PortClosedError):
        port.dequeue()


@needs_cython
def test_a_handler_may_dequeue(probe: Any, port: an.CompletionPort) -> None:
    seen: list[Any] = []
    given = (port, seen)
    probe.handle_and_dequeue(port, given)
    for number in range(40):
        probe.post(port, number)
        port.post(number)
    completions = drain(port, lambda found: len(found) + len(seen) >= 80)
    completions += [c for c in seen if isinstance(c, an.Completion)]
    assert sorted(c.state for c in completions) == list(range(40))
    assert sorted(s[3] for s in seen if isinstance(s, tuple)) == list(range(40))


@needs_cython
def test_what_no_handler_took_goes_with_the_port(probe: Any, backend: str) -> None:
    before = probe.alive()
    port = an.CompletionPort(backend)
    listener, address = listening(port)
    probe.accept(listener, 1)
    client = dial(address)
    for _ in range(100):
        try:
            assert port.dequeue_many(timeout=0.1) == []
        except RuntimeError:
            break
    port.close()
    assert read_to_end(client) == b""
    # The operation is C's again, as an_port_close says.
    assert probe.alive() == before + 1
    probe.forget(1)


# -- both at once ----------------------------------------------------------------------------------


@needs_cython
@pytest.mark.dequeuing_threads
def test_python_and_c_share_a_port_in_threads_and_nothing_is_lost(probe: Any, backend: str) -> None:
    """Two threads of each dequeue; both start posts and multishots, and all is counted."""
    total = 400
    taken: list[Any] = []
    seen: list[Any] = []
    faults: list[BaseException] = []
    stop = threading.Event()
    with an.CompletionPort(backend) as port:
        probe.handle(port, seen)
        by_c: list[Any] = []

        def python() -> None:
            try:
                while not stop.is_set():
                    taken.extend(port.dequeue_many(timeout=0.05))
            except BaseException as error:
                faults.append(error)

        def c() -> None:
            try:
                hand = probe.Hand(port)
                while not stop.is_set():
                    shown = hand.dequeue(0.05)
                    for index in reversed(range(len(shown))):
                        if shown[index][1]:
                            taken.append(hand.completion(index))
                        else:
                            by_c.append(shown[index])
                    hand.release()
            except BaseException as error:
                faults.append(error)

        threads = [threading.Thread(target=target) for target in (python, c, python, c)]
        for thread in threads:
            thread.start()
        pairs = [pair(port) for _ in range(8)]
        for sock, _ in pairs:
            sock.recv(1, multishot=True)
        for number in range(total):
            port.post(number)
            probe.post(port, number)
            pairs[number % 8][1].sendall(b"%d" % (number % 8))
        for _, peer in pairs:
            peer.shutdown(socket.SHUT_WR)
        expected = total + total + 8

        def complete() -> bool:
            return len(taken) >= expected and len(seen) + len(by_c) >= total

        waiting = threading.Event()
        for _ in range(int(PATIENCE * 20)):
            if complete() or faults:
                break
            waiting.wait(0.05)
        stop.set()
        for thread in threads:
            thread.join()
        assert not faults
        assert sorted(c.state for c in taken if c.kind is an.POST) == list(range(total))
        assert sorted(s[3] for s in seen + by_c) == list(range(total))
        data = sorted(c.data for c in taken if c.kind is an.RECV)
        assert data == sorted([b"%d" % (n % 8) for n in range(total)] + [b""] * 8)
        assert port.in_flight == 0


@needs_cython
def test_threads_of_c_dequeue_without_the_interpreter_lock(
    probe: Any, port: an.CompletionPort
) -> None:
    """A thread of C waits for ever while Python goes on, and is woken by its post."""
    hand = probe.Hand(port)
    shown: list[Any] = []
    thread = threading.Thread(target=lambda: shown.extend(hand.dequeue(-1)))
    thread.start()
    assert sum(range(100_000)) > 0
    port.post("wake")
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert hand.completion(0).state == "wake"
    hand.release()


@needs_cython
def test_a_blocked_thread_of_c_ends_when_python_closes_the_port(probe: Any, backend: str) -> None:
    port = an.CompletionPort(backend)
    hand = probe.Hand(port)
    caught: list[BaseException] = []

    def wait() -> None:
        try:
            hand.dequeue(-1)
        except an.PortClosedError as error:
            caught.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    port.close()
    thread.join(PATIENCE)
    assert len(caught) == 1


@needs_cython
def test_operations_of_ended_connections_do_not_accumulate(
    probe: Any, port: an.CompletionPort
) -> None:
    """A port that was lent to C gives its multishots back as they end."""
    hand = probe.Hand(port)
    assert probe.port_address(port)
    for _ in range(3):
        for _ in range(30):
            sock, peer = pair(port)
            sock.recv(1, multishot=True)
            peer.sendall(b"ab")
            peer.close()
            shown = fetch(hand, 3)
            for index in reversed(range(len(shown))):
                hand.completion(index)
            hand.release()
            sock.close()
            del sock, peer
        assert living_operations() == 0


def living_references() -> int:
    gc.collect()
    return sum(1 for thing in gc.get_objects() if type(thing) is weakref.ref)


@needs_cython
def test_completions_of_a_lasting_multishot_leave_nothing(
    probe: Any, port: an.CompletionPort
) -> None:
    hand = probe.Hand(port)
    sock, peer = pair(port)
    sock.recv(1, multishot=True)
    before = 0
    for turn in range(100):
        peer.sendall(b"x")
        fetch(hand, 1)
        assert hand.completion(0).data == b"x"
        hand.release()
        if turn == 0:
            before = living_references()
    assert living_references() <= before
    sock.close()


OUT_OF_MEMORY = """
    import socket
    import sys

    import _testcapi
    import asyncio_native as an

    sys.path.insert(0, {folder!r})
    import probe

    with an.CompletionPort({backend!r}) as port:
        hand = probe.Hand(port)
        here, peer = socket.socketpair()
        sock = an.AsyncSocket.adopt(here)
        port.associate(sock)
        sock.recv(4, multishot=True)
        failures = 0
        for fails_from in range(60):
            peer.sendall(b"data")
            port.post(fails_from)
            shown = []
            while len(shown) < 2:
                shown += hand.dequeue(10)
            got = []
            for index in range(2):
                try:
                    _testcapi.set_nomemory(fails_from, fails_from + 1)
                    try:
                        completion = hand.completion(index)
                    finally:
                        _testcapi.remove_mem_hooks()
                except MemoryError:
                    failures += 1
                    assert port.in_flight == 2 - sum(c.kind is an.POST for c in got)
                    completion = hand.completion(index)
                got.append(completion)
            hand.release()
            assert [c.state for c in got if c.kind is an.POST] == [fails_from]
            assert [c.data for c in got if c.kind is an.RECV] == [b"data"]
            assert port.in_flight == 1
        print(failures)
        peer.close()
"""


@needs_cython
@pytest.mark.skipif(an.binding != "c", reason="this is about the binding in C")
def test_memory_that_runs_out_while_a_completion_is_given_loses_nothing(
    built_probe: Any, backend: str
) -> None:
    if importlib.util.find_spec("_testcapi") is None:
        pytest.skip("this interpreter has no _testcapi, which makes allocations fail")
    folder = str(Path(built_probe.__file__).parent)
    source = textwrap.dedent(OUT_OF_MEMORY).format(folder=folder, backend=backend)
    assert int(check_python(source, backend)) >= 5


COLLECTED = """
    import gc
    import sys

    import asyncio_native as an
    from support import pair

    sys.path.insert(0, {folder!r})
    import probe

    class Closer:
        def __init__(self, port):
            self.port = port
            self.itself = self

        def __del__(self):
            self.port.close()

    class Port(an.CompletionPort):
        def _decode(self, address):
            spent = [[] for _ in range(100)]  # a list that was freed would be used again
            gc.set_threshold(gc.get_count()[0] + self.steps)
            try:
                return an.CompletionPort._decode(self, address)  # not an allocation of its own
            finally:
                gc.set_threshold(0)

    def give(steps):
        "Has garbage collected, whose finalizer closes the port, in so many allocations."
        port = Port({backend!r})
        port.steps = steps
        sock, peer = pair(port)
        sock.recv()
        peer.send(b"data")
        hand = probe.Hand(port)
        while not hand.dequeue(5):
            pass
        gc.collect()
        Closer(port)
        try:
            completion = hand.completion(0)
        except an.PortClosedError:
            return "refused"
        finally:
            hand.release()
            gc.collect()
            assert port.closed
            peer.close()
        assert (completion.data, completion.socket, completion.more) == (b"data", sock, False)
        assert completion.operation.socket is sock
        return "given"

    gc.set_threshold(0)
    print(*sorted({{give(steps) for steps in range(10)}}))
"""


@needs_cython
@pytest.mark.skipif(an.binding != "c", reason="this is about the binding in C")
def test_garbage_that_closes_the_port_while_a_completion_is_given_does_no_harm(
    built_probe: Any, backend: str
) -> None:
    folder = str(Path(built_probe.__file__).parent)
    source = textwrap.dedent(COLLECTED).format(folder=folder, backend=backend)
    outcomes = check_python(source, backend).split()
    # From 3.12 on garbage is collected between instructions of Python, and not where one allocates.
    assert outcomes == ["given", "refused"] or (sys.version_info >= (3, 12) and outcomes)


SCRIPT = """
    import asyncio_native as an
    import sys
    sys.path.insert(0, {folder!r})
    import probe
    port = an.CompletionPort()
    probe.handle(port, seen := [])
    probe.post(port, 1)
    port.post("at exit")
    hand = probe.Hand(port)
    print(len(hand.dequeue(5)))
"""


@needs_cython
def test_the_interpreter_ends_with_completions_in_the_hands_of_c(built_probe: Any) -> None:
    folder = str(Path(built_probe.__file__).parent)
    ended = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", "-c", textwrap.dedent(SCRIPT).format(folder=folder)],
        capture_output=True,
        text=True,
        timeout=PROGRAM_SECONDS + PATIENCE,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "2\n", "")
