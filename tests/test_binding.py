"""The two bindings: one public API, chosen at import, on the very same core.

The suite runs on either (`ASYNCIO_NATIVE_BINDING=cffi tools/run_tests.py`); here is what compares
them, each in a process of its own, and what only the one in C promises.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import textwrap
import tracemalloc
import weakref
from collections.abc import Callable
from typing import Any

import asyncio_native as an
import pytest
from support import (
    PATIENCE,
    PROGRAM_SECONDS,
    check_python,
    dial,
    drain,
    listening,
    one,
    pair,
    read_exactly,
)

HAS_C = sys.implementation.name == "cpython" and not sysconfig.get_config_var("Py_GIL_DISABLED")
BINDINGS = ("c", "cffi") if HAS_C else ("cffi",)

only_c = pytest.mark.skipif(an.binding != "c", reason="this is about the binding in C")
both = pytest.mark.skipif(not HAS_C, reason="the binding in C is for CPython with its lock")


def run(source: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if k != "ASYNCIO_NATIVE_BINDING"}
    return subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(source)],
        env={**inherited, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PROGRAM_SECONDS + PATIENCE,
    )


def tell(source: str, binding: str) -> Any:
    """What the script prints as JSON under that binding."""
    ended = run(source, ASYNCIO_NATIVE_BINDING=binding)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


# -- the choice ------------------------------------------------------------------------------------


@both
def test_the_binding_in_c_is_taken_unless_told_otherwise() -> None:
    ended = run("import asyncio_native as an; print(an.binding)")
    assert ended.stdout.split() == ["c"], ended.stderr


@pytest.mark.parametrize("binding", BINDINGS)
def test_the_environment_forces_a_binding(binding: str) -> None:
    source = "import asyncio_native as an; print(an.binding)"
    assert run(source, ASYNCIO_NATIVE_BINDING=binding).stdout.split() == [binding]


def test_an_unknown_binding_is_refused_at_import() -> None:
    ended = run("import asyncio_native", ASYNCIO_NATIVE_BINDING="fast")
    assert ended.returncode != 0
    assert "ImportError: ASYNCIO_NATIVE_BINDING is c or cffi, not 'fast'" in ended.stderr


def test_this_process_runs_what_was_asked_for() -> None:
    assert an.binding == (os.environ.get("ASYNCIO_NATIVE_BINDING") or BINDINGS[0])


def test_both_modules_stand_in_one_file_and_export_nothing_else() -> None:
    from asyncio_native import _native

    if an.binding == "c":
        fast = sys.modules["asyncio_native._fast"]
        assert fast.__file__ == _native.__file__
    else:
        assert "asyncio_native._fast" not in sys.modules


def test_the_core_is_not_exported_to_other_libraries() -> None:
    from asyncio_native import _native

    library = ctypes.CDLL(str(_native.__file__))
    assert library.PyInit__native
    for name in ("an_port_open", "an_version", "io_uring_queue_init"):
        with pytest.raises(AttributeError):
            getattr(library, name)


# -- one API ---------------------------------------------------------------------------------------

SHAPE = """
    import inspect, json
    import asyncio_native as an

    def signature(value):
        try:
            parameters = inspect.signature(value).parameters.values()
        except (TypeError, ValueError):
            return None
        return [(p.name, str(p.kind), repr(p.default)) for p in parameters if p.name != "self"]

    shape = {name: str(type(getattr(an, name)).__name__) for name in an.__all__}
    for kind in (an.AsyncSocket, an.CompletionPort, an.Operation, an.Completion):
        shape[kind.__name__] = [kind.__module__, kind.__qualname__, kind.__doc__]
        for name in dir(kind):
            if name.startswith("_"):
                continue
            value = inspect.getattr_static(kind, name)
            called = inspect.isroutine(value) or isinstance(value, classmethod)
            documented = bool(inspect.getdoc(value)) if called else True
            shape[f"{kind.__name__}.{name}"] = [
                called, documented, signature(getattr(kind, name)) if called else None
            ]
    print(json.dumps(shape))
"""


@both
def test_names_signatures_and_documentation_are_the_same() -> None:
    shapes = [tell(SHAPE, binding) for binding in BINDINGS]
    assert shapes[0] == shapes[1]
    assert [name for name, _, _ in shapes[0]["AsyncSocket.send"][2]] == ["data", "quiet", "timeout"]


ERRORS = r"""
    import array, decimal, io, json, os, socket, tempfile
    import asyncio_native as an

    port = an.CompletionPort()
    other = an.CompletionPort()
    ours, theirs = socket.socketpair()
    stream = an.AsyncSocket.adopt(ours)
    port.associate(stream)
    datagram = an.AsyncSocket(socket.AF_INET, socket.SOCK_DGRAM)
    port.associate(datagram)
    datagram6 = an.AsyncSocket(socket.AF_INET6, socket.SOCK_DGRAM)
    loose = an.AsyncSocket()
    gone = an.AsyncSocket()
    port.associate(gone)
    gone.close()
    never = an.AsyncSocket()
    never.close()
    ended = an.CompletionPort()
    left = an.AsyncSocket()
    ended.associate(left)
    ended.close()
    read_only = memoryview(b"data")
    strided = memoryview(bytearray(10))[::2]
    file = tempfile.TemporaryFile()
    done = port.timer(0)
    assert port.dequeue(5).operation is done
    here = ("127.0.0.1", 9)

    class Odd:
        def __index__(self):
            return 5
        def __bool__(self):
            raise ZeroDivisionError("no truth")

    calls = []
    for sock in ("stream", "datagram", "loose", "gone", "never", "left"):
        calls += [f"{sock}.{call}" for call in (
            "recv()", "recv(0)", "recv(-5)", "recv(2**63)", "recv('5')", "recv(5.0)", "recv(None)",
            "recv(1, 2)", "recv(size=5)", "recv(5, max_bytes=6)", "recv(timeout=-1)",
            "recv(timeout='5')", "recv(timeout=float('nan'))", "recv(timeout=b'5')",
            "recv(timeout=[])", "recv(timeout=-1e300)", "recv(timeout=10**400)",
            "recv(pause_above=-1)", "recv(pause_above='x')", "recv(multishot=Odd())",
            "recv_into(b'read only')", "recv_into(read_only)", "recv_into(bytearray())",
            "recv_into(strided)", "recv_into('text')", "recv_into(5)", "recv_into()",
            "recv_into(None)", "recvfrom(0)", "recvfrom(2.5)", "recvfrom_into(bytearray())",
            "send()", "send('text')", "send(5)", "send(None)", "send(strided)", "send([1])",
            "send(b'x', True)", "send(b'x', quiet=Odd())", "send(b'x', timeout=-0.5)",
            "send('text', quiet=True)", "send(strided, quiet=True)", "send(b'x', loud=True)",
            "send(b'x', data=b'y')", "send(b'x', quiet=True, timeout='1')",
            "sendv()", "sendv(5)", "sendv('text')", "sendv(b'x')", "sendv(bytearray(2))",
            "sendv(read_only)", "sendv([b'x', 'y'])", "sendv([strided])", "sendv([5], quiet=True)",
            "sendto(b'x')", "sendto(b'x', here[:1])", "sendto(b'x', 'host')",
            "sendto(b'x', ('name', 5))", "sendto(b'x', ('127.0.0.1', 70000))",
            "sendto(b'x', ('127.0.0.1', '5'))", "sendto('x', here)", "sendto(b'x', (b'h', 5))",
            "sendto(b'x', here, quiet=True, timeout=-1)", "sendto(b'x', ('::1', 5))",
            "sendfile()", "sendfile('name')", "sendfile(-1)", "sendfile(file, -1)",
            "sendfile(file, 0, -1)", "sendfile(file, 0, 1.5)", "sendfile(file, 2**63)",
            "sendfile(file, 0, 5, 6)", "sendfile(object())",
            "sendfile(io.BytesIO(b'x'))", "bind('127.0.0.1', 5555)", "connect('127.0.0.1')",
            "disconnect(5)",
            "disconnect(timeout=-1)", "connect()", "connect(5)", "connect(('name', 5))",
            "connect(here, 5)", "connect(here, timeout=-1)", "accept(True)", "accept(timeout=-1)",
            "cancel(5)", "close(True)", "close(flush=Odd())", "cancel()", "state", "port is port",
        )]
    for sock in ("loose", "gone", "never", "left"):
        calls += [f"{sock}.{call}" for call in (
            "accept()", "recv_into(bytearray(5))", "send(b'x')", "send(b'x', quiet=True)",
            "send(bytearray(5))", "send(bytearray(5), quiet=True)", "sendv([b'x'])",
            "sendv([b'x'], quiet=True)", "sendv([])", "sendfile(file)", "disconnect()",
            "connect(here)", "unsent", "closed", "fileno() > 0", "family", "getsockname()",
        )]
    calls += [
        "datagram.accept()", "datagram.disconnect()", "datagram.sendfile(file)",
        "datagram.sendv([b'x'] * 100)", "stream.recvfrom()", "stream.recvfrom_into(bytearray(5))",
        "stream.sendto(b'x', here)", "stream.sendto(b'x', '/path')", "datagram6.sendto(b'x', here)",
        "port.associate(5)", "port.associate(None)", "port.associate()", "port.associate(ours)",
        "other.associate(stream)", "ended.associate(loose)", "port.associate(never)",
        "port.associate(left)", "ended.post(5)", "ended.timer(1)", "ended.dequeue(0)",
        "ended.dequeue_many(5, 0)", "ended.in_flight", "ended.closed", "ended.fileno()",
        "ended.statistics()", "port.post(1, 2)", "port.post(value=5)", "port.timer()",
        "port.timer(-1)", "port.timer('1')", "port.timer(None)", "port.timer(float('nan'))",
        "port.timer(1, 2, 3)", "port.dequeue('1')", "port.dequeue(-1)", "port.dequeue_many(0)",
        "port.dequeue_many(-1)", "port.dequeue_many(1.5)", "port.dequeue_many(5, -1)",
        "port.dequeue_many(0.5)", "port.dequeue_many(10**30, 0)", "port.dequeue_many(Odd(), 0)",
        "port.dequeue(decimal.Decimal(0))", "done.pause()", "done.resume()", "done.cancel()",
        "done.pending", "done.cancel(5)",
    ]
    results = {}
    for call in calls:
        try:
            value = eval(call)
        except Exception as error:
            results[call] = [type(error).__name__, str(error), getattr(error, "errno", None)]
        else:
            shown = repr(value) if isinstance(value, (int, str)) else ""
            results[call] = [type(value).__name__, shown]
        stream.cancel(), datagram.cancel()
        while port.dequeue_many(256, 0):
            pass
    print(json.dumps(results))
"""

#: What the interpreter itself says of a wrong call differs between functions in Python and in C.
OF_THE_INTERPRETER = ("argument", "takes", "requires", "object is not iterable", "doesn't apply")


@both
def test_errors_and_their_texts_are_the_same() -> None:
    c, cffi = (tell(ERRORS, binding) for binding in BINDINGS)
    assert c.keys() == cffi.keys()
    differing = {}
    for call in c:
        same = c[call] == cffi[call]
        worded = c[call][0] == cffi[call][0] == "TypeError" and all(
            any(word in text[1] for word in OF_THE_INTERPRETER) for text in (c[call], cffi[call])
        )
        if not same and not worded:
            differing[call] = (c[call], cffi[call])
    assert not differing


ATTRIBUTES = """
    import json, socket
    import asyncio_native as an

    port = an.CompletionPort()
    told = []

    def tell(completion):
        names = ("error", "transferred", "data", "address", "truncated", "more", "state")
        values = [repr(getattr(completion, name)) for name in names]
        socket_of = completion.socket.state if completion.socket is not None else None
        told.append([
            completion.kind.name, values, socket_of, repr(type(completion.operation)),
            repr(type(completion.accepted)), repr(completion).split(" socket=")[0],
        ])
        return completion

    def one():
        return tell(port.dequeue(10))

    def by_kind(count):
        # Completions of both directions come in any order.
        completions = sorted((port.dequeue(10) for _ in range(count)), key=lambda c: c.kind)
        return [tell(c) for c in completions]

    listener = an.AsyncSocket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    port.associate(listener, "listener")
    listener.accept()
    client = an.AsyncSocket()
    port.associate(client, "client")
    client.connect(listener.getsockname())
    accepted, connected = (port.dequeue(10), port.dequeue(10))
    if accepted.kind is not an.ACCEPT:
        accepted, connected = connected, accepted
    assert connected.result() is None
    assert accepted.address == client.getsockname() and accepted.result() == (
        accepted.accepted, accepted.address)
    server = accepted.accepted
    assert type(server) is an.AsyncSocket and server.port is None and server.state is None
    port.associate(server, "server")
    server.recv(multishot=True)
    sent = [b"bytes", bytearray(b"array"), memoryview(b"view")]
    for data in sent:
        client.send(data)
    client.sendv([*sent, b""])
    client.send(b"")
    results = [c.result() for c in by_kind(6)]
    assert results[:-5] == [b"".join(sent) * 2] and results[-5:] == [5, 5, 4, 14, 0]
    client.send(b"quiet", quiet=True)
    assert one().result() == b"quiet"
    client.disconnect()
    assert [c.kind for c in by_kind(2)] == [an.RECV, an.DISCONNECT]
    buffer = bytearray(8)
    client.recv_into(buffer)
    server.send(b"into")
    assert [c.result() for c in by_kind(2)] == [4, 4]
    assert buffer == b"into" + bytes(4)
    port.post("state")
    assert one().result() == "state"
    port.timer(0, "later")
    assert one().result() is None
    operation = port.timer(60)
    assert operation.pending and operation.cancel() and not operation.cancel()
    try:
        one().result()
    except an.OperationCancelledError:
        assert not operation.pending
    client.recv(timeout=0)
    try:
        one().result()
    except TimeoutError:
        pass
    udp = an.AsyncSocket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind(("127.0.0.1", 0))
    port.associate(udp, "udp")
    udp.sendto(b"first", udp.getsockname(), quiet=True)
    udp.recvfrom(multishot=True)
    completion = port.dequeue(10)
    assert completion.result() == (b"first", udp.getsockname())
    udp.sendto(b"again", completion.address)
    results = [c.result() for c in (port.dequeue(10), port.dequeue(10))]
    assert sorted(results, key=str) == [(b"again", udp.getsockname()), 5]
    udp.cancel()
    one()
    udp.recvfrom_into(buffer)
    udp.sendto(b"longer than the buffer", udp.getsockname(), quiet=True)
    completion = port.dequeue(10)
    assert completion.truncated and completion.result() == (8, udp.getsockname())
    print(json.dumps(told))
"""


@both
def test_completions_have_the_same_attributes() -> None:
    c, cffi = (tell(ATTRIBUTES, binding) for binding in BINDINGS)
    assert c == cffi
    assert len(c) > 8


# -- objects ---------------------------------------------------------------------------------------


def test_what_a_subclass_adds_is_there_and_goes_with_it(backend: str) -> None:
    class Session(an.AsyncSocket):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

    class Port(an.CompletionPort):
        seen = 0

        def dequeue_many(self, max_count: int = 256, timeout: float | None = None) -> Any:
            completions = super().dequeue_many(max_count, timeout)
            self.seen += len(completions)
            return completions

    with Port(backend) as port:
        session = Session("first")
        port.associate(session, session)
        session.recv(timeout=0)
        completion = one(port)
        assert isinstance(completion, an.Completion) and isinstance(port, an.CompletionPort)
        assert completion.socket is session and completion.socket.name == "first"
        assert isinstance(completion.operation, an.Operation)
        assert port.seen == 1 and session.port is port
        session.close()
        gone = weakref.ref(session)
        port.associate(adopted := Session.adopt(socket.socket()))
        assert type(adopted) is Session
        adopted.close()
        del session, completion
        gc.collect()
        assert gone() is None


def test_cycles_through_all_objects_are_collected(backend: str) -> None:
    class State:
        pass

    port = an.CompletionPort(backend)
    listener, address = listening(port)
    state: Any = State()
    port.associate(listener, state)
    state.operation = listener.accept(multishot=True)
    dial(address)
    state.completion = one(port)
    state.completion.accepted.close()
    port.post(state)
    state.timer = port.timer(60, state)
    state.port = port
    references: list[weakref.ref[Any]] = [weakref.ref(thing) for thing in (state, port, listener)]
    with pytest.warns(ResourceWarning, match="unclosed <CompletionPort"):
        del state, port, listener
        gc.collect()
    assert [reference() for reference in references] == [None, None, None]


def test_a_constructor_called_again_is_refused_or_starts_anew(backend: str) -> None:
    with an.CompletionPort(backend) as port:
        if an.binding == "c":
            with pytest.raises(RuntimeError, match="open already"):
                port.__init__(backend)  # type: ignore[misc]
            sock = an.AsyncSocket()
            with pytest.raises(RuntimeError, match="socket already"):
                sock.__init__()  # type: ignore[misc]
            sock.close()
        port.post(5)
        assert one(port).state == 5


def test_what_was_never_opened_raises_and_goes() -> None:
    sock = an.AsyncSocket.__new__(an.AsyncSocket)
    port = an.CompletionPort.__new__(an.CompletionPort)
    assert port.closed
    calls: list[Callable[[], object]] = [sock.close, sock.recv, sock.cancel, sock.fileno]
    for call in [*calls, port.post, port.dequeue]:
        with pytest.raises(AttributeError):
            call()
    assert "finalized" in repr(sock)
    del sock, port
    gc.collect()


@pytest.mark.parametrize("what", ["posts", "one-shot receives", "sends", "datagrams", "refused"])
def test_references_and_memory_do_not_grow(backend: str, what: str) -> None:
    """A reference too many anywhere, once a turn, shows in one of the counts."""
    turns = 1000
    with an.CompletionPort(backend) as port:
        ours, peer = pair(port, "unix")
        udp = an.AsyncSocket(socket.AF_INET, socket.SOCK_DGRAM)
        udp.bind(("127.0.0.1", 0))
        state = object()
        port.associate(udp, state)
        here = udp.getsockname()
        data = b"data" * 10
        buffer = bytearray(8)

        def posts() -> None:
            port.post(state)
            assert one(port).state is state

        def receives() -> None:
            starts: list[Callable[[], object]] = [ours.recv, lambda: ours.recv_into(buffer)]
            for start in starts:
                start()
                peer.sendall(b"12345678")
                assert one(port).transferred == 8

        def sends() -> None:
            ours.send(data, quiet=True)
            ours.send(bytearray(data), quiet=True)
            ours.sendv([data, data], quiet=True)
            ours.send(data)
            ours.send(bytearray(data))
            ours.sendv([data, buffer])
            assert [one(port).result() for _ in range(3)] == [40, 40, 48]
            read_exactly(peer, 40 * 7 + 8)

        def datagrams() -> None:
            udp.sendto(data, here, quiet=True)
            udp.recvfrom()
            arrived = one(port)
            udp.sendto(bytearray(data), arrived.address)
            udp.recvfrom_into(buffer)
            assert sorted(c.transferred for c in drain(port, 2)) == [8, 40]

        def refused() -> None:
            for call in (
                lambda: ours.recvfrom(),
                lambda: ours.send("text"),  # type: ignore[call-overload]
                lambda: ours.recv(0),
                lambda: ours.sendv([data, 5]),  # type: ignore[list-item]
                lambda: udp.sendto(bytearray(2), ("name", 5)),
                lambda: udp.accept(),
                lambda: ours.recv_into(b""),
                lambda: ours.recv(nothing=5),  # type: ignore[call-arg]
                lambda: port.timer(-1),
            ):
                try:
                    call()
                except (ValueError, TypeError):
                    continue
                pytest.fail("it was not refused")

        turn = {
            "posts": posts,
            "one-shot receives": receives,
            "sends": sends,
            "datagrams": datagrams,
            "refused": refused,
        }[what]
        counted = [state, port, ours, udp, data, buffer, an.RECV, an.Operation, an.AsyncSocket]
        if sys.version_info < (3, 12):  # later they are immortal: their count means nothing
            counted += [None, True, b""]
        for _ in range(50):
            turn()
        gc.collect()
        tracemalloc.start()
        try:
            turn()
            gc.collect()
            references = [sys.getrefcount(thing) for thing in counted]
            blocks = sys.getallocatedblocks()
            bytes_before = tracemalloc.get_traced_memory()[0]
            for _ in range(turns):
                turn()
            gc.collect()
            grown = [
                sys.getrefcount(thing) - n for thing, n in zip(counted, references, strict=True)
            ]
            assert max(map(abs, grown)) < turns, grown
            assert sys.getallocatedblocks() - blocks < turns
            assert tracemalloc.get_traced_memory()[0] - bytes_before < turns * 32
        finally:
            tracemalloc.stop()
        ours.close()
        udp.close()


# -- threads ---------------------------------------------------------------------------------------


NO_MEMORY = """
    import _testcapi, os
    import asyncio_native as an
    from support import pair

    with an.CompletionPort() as port:
        listener = an.AsyncSocket()
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port.associate(listener)
        ours, peer = pair(port, "unix")
        cut_short = 0
        for fails_from in range(1, 60):
            listener.accept()
            client = an.AsyncSocket()
            port.associate(client)
            client.connect(listener.getsockname())
            ours.recv()
            ours.send(b"out")
            peer.sendall(b"in" * 300)
            for number in range(20):
                port.post(number)
            expected = 24
            seen = []
            while len(seen) < expected:
                batch = []
                try:
                    _testcapi.set_nomemory(fails_from, fails_from + 1)
                    try:
                        batch = port.dequeue_many(64, 10)
                    finally:
                        _testcapi.remove_mem_hooks()
                except MemoryError:
                    fails_from += 7  # so that it ends
                assert len(batch) <= 64
                seen += batch
                cut_short += len(seen) < expected
            posts = [c.state for c in seen if c.kind is an.POST]
            assert posts == list(range(20)), posts
            kinds = sorted(c.kind for c in seen if c.kind is not an.POST)
            assert kinds == [an.ACCEPT, an.CONNECT, an.RECV, an.SEND]
            assert [c.data for c in seen if c.kind is an.RECV] == [b"in" * 300]
            assert port.in_flight == 0
            for completion in seen:
                if completion.accepted:
                    completion.accepted.close()
            client.close()
            peer.recv(100)
        print(cut_short)
        ours.close()
"""


@only_c
def test_memory_that_runs_out_while_dequeuing_loses_nothing(backend: str) -> None:
    """Each allocation of a batch fails in turn."""
    if importlib.util.find_spec("_testcapi") is None:
        pytest.skip("this interpreter has no _testcapi, which makes allocations fail")
    assert int(check_python(NO_MEMORY, backend)) > 20


#: A thread that always wants the interpreter, and counts its turns.
BUSY = """
    import socket, sys, threading
    import asyncio_native as an

    INTERVAL, ENOUGH = float(sys.argv[1]), int(sys.argv[2])
    running = True
    turns = 0
    go = threading.Event()

    def burn():
        global turns
        go.wait()
        while running:
            turns += 1
"""

KEEPING = """
    with an.CompletionPort() as port:
        sender, receiver = map(an.AsyncSocket.adopt, socket.socketpair())
        port.associate(sender)
        port.associate(receiver)
        receiver.recv(multishot=True)
        received = rounds = handovers = seen = 0
        busy = threading.Thread(target=burn)
        busy.start()
        sys.setswitchinterval(INTERVAL)
        go.set()
        while rounds < 20 and handovers < ENOUGH:
            rounds += 1
            for _ in range(50):
                sender.send(b"x" * 64, quiet=True)
                if turns != seen:
                    handovers, seen = handovers + 1, turns
                    if handovers == ENOUGH:
                        break
            while handovers < ENOUGH and (batch := port.dequeue_many(64, 0)):
                received += sum(c.transferred for c in batch)
                if turns != seen:
                    handovers, seen = handovers + 1, turns
        running = False
        busy.join()
        assert handovers == ENOUGH or received == 20 * 50 * 64, received
        print(handovers)
"""


def handovers_when_slow(script: str, *calls: str) -> int:
    """How often a busy thread got the interpreter lock while a script went on: when a system call
    without it takes long enough, as strace makes these. Else it gets the lock when it has waited
    for the switch interval, which is long here: some 2000 system calls take a second, and many
    times that on a crowded machine."""
    trace = ["strace", "-f", "-o", "/dev/null", "-e", f"trace={','.join(calls)}"]
    tried = None
    if shutil.which("strace") is not None:
        tried = subprocess.run([*trace, "true"], capture_output=True)
    if tried is None or tried.returncode:
        pytest.skip("strace, which makes system calls slow, is not installed or may not trace here")
    ended = subprocess.run(
        [*trace, sys.executable, "-P", "-c", textwrap.dedent(script), str(PATIENCE / 3), "5"],
        env={**os.environ, "ASYNCIO_NATIVE_BACKEND": "epoll"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PROGRAM_SECONDS,
    )
    assert ended.returncode == 0, ended.stderr
    return int(ended.stdout)


@only_c
def test_small_calls_keep_the_interpreter_lock() -> None:
    # None when tried; with the binding over cffi, which releases the lock at each, 5 are reached.
    assert handovers_when_slow(BUSY + KEEPING, "sendto", "recvfrom", "epoll_wait") < 5


CLOSING = """
    with an.CompletionPort() as port:
        sockets = [an.AsyncSocket() for _ in range(500)]
        for sock in sockets:
            port.associate(sock)
        handovers = seen = 0
        busy = threading.Thread(target=burn)
        busy.start()
        sys.setswitchinterval(INTERVAL)
        go.set()
        for sock in sockets:
            sock.close()
            if turns != seen:
                handovers, seen = handovers + 1, turns
            if handovers == ENOUGH:
                break
        running = False
        busy.join()
        print(handovers)
"""


@only_c
def test_closing_what_cannot_linger_keeps_the_interpreter_lock() -> None:
    assert handovers_when_slow(BUSY + CLOSING, "close", "epoll_ctl", "shutdown") < 5


LINGERING = """
    import socket, struct, threading, time
    import asyncio_native as an

    with socket.create_server(("127.0.0.1", 0)) as server, an.CompletionPort() as port:
        sock = an.AsyncSocket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 1))
        port.associate(sock)
        sock.connect(server.getsockname())
        assert port.dequeue(10).error == 0
        peer, _ = server.accept()
        while not sock.unsent:  # the peer reads nothing
            sock.send(bytes(1 << 20), quiet=True)
        closing = threading.Thread(target=sock.close)
        began = time.monotonic()
        closing.start()
        turns = 0
        while closing.is_alive() and time.monotonic() < began + 30:
            turns += 1
            time.sleep(0.001)
        assert not closing.is_alive()
        print(time.monotonic() - began, turns)
        peer.close()
"""


@only_c
def test_other_threads_run_while_a_close_lingers(backend: str) -> None:
    took, turns = map(float, check_python(LINGERING, backend).split())
    if took < 0.5:
        pytest.skip(f"closing took {took} s: this system does not linger in it")
    assert turns >= 10  # of the 1,000 milliseconds; none while a close keeps the lock
