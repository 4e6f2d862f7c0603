"""Guarantee 8: Ctrl-C interrupts dequeue within 0.3 s, also with other threads dequeuing; another
signal runs its handler and the wait goes on with the time left; no SIGPIPE."""

from __future__ import annotations

import signal

import pytest
from support import PATIENCE, check_python, start_python

pytestmark = [
    pytest.mark.posix(
        "sends itself signals by os.kill, which terminates on Windows; for Ctrl-C see windows_traps"
    )
]

INTERRUPT = """
    import os, signal, sys, threading, time
    import asyncio_native as an
    from support import pair, PATIENCE

    signal.signal(signal.SIGINT, signal.default_int_handler)
    port = an.CompletionPort()
    sock, peer = pair(port)
    sock.recv(multishot=True)

    def other():
        try:
            while True:
                port.dequeue(timeout=PATIENCE)
        except an.PortClosedError:
            pass

    others = [threading.Thread(target=other) for _ in range({others})]

    {order}
    sent = []

    def interrupt():
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    # The best of five: a busy machine must not fail what the library does in time.
    delays = []
    for _ in range(5):
        killer = threading.Timer(0.15, interrupt)
        try:
            killer.start()  # here, as on a crowded machine the signal may come before the wait
            {wait}
        except KeyboardInterrupt:
            delays.append(time.monotonic() - sent[-1])
        else:
            sys.exit("not interrupted")
        killer.join()
    print(min(delays))
    peer.sendall(b"still works")
    {after}
    port.close()
    for thread in others:
        thread.join(PATIENCE)
"""

ALONE = {"others": 0, "order": "pass", "after": "assert port.dequeue(PATIENCE).data"}
AMONG = {"others": 3, "after": "pass"}
FIRST = "[thread.start() for thread in others]; time.sleep(0.1)"


@pytest.mark.parametrize(
    "wait", ["port.dequeue()", "port.dequeue(timeout=PATIENCE)", "port.dequeue_many()"]
)
def test_ctrl_c_interrupts_dequeue(backend: str, wait: str) -> None:
    output = check_python(INTERRUPT.format(wait=wait, **ALONE), backend)
    assert float(output) < 0.3


@pytest.mark.parametrize("wait", ["port.dequeue()", "port.dequeue_many(timeout=PATIENCE)"])
def test_ctrl_c_interrupts_dequeue_beside_other_threads(backend: str, wait: str) -> None:
    """The others wait already, so the main thread is a follower."""
    output = check_python(INTERRUPT.format(wait=wait, order=FIRST, **AMONG), backend)
    assert float(output) < 0.3


def test_ctrl_c_interrupts_dequeue_of_the_first_of_many(backend: str) -> None:
    """The main thread waits already when the others come."""
    order = "threading.Timer(0.05, lambda: [thread.start() for thread in others]).start()"
    output = check_python(INTERRUPT.format(wait="port.dequeue()", order=order, **AMONG), backend)
    assert float(output) < 0.3


def test_ctrl_c_without_a_handler_of_its_own_ends_the_program(backend: str) -> None:
    process = start_python(
        """
        import asyncio_native as an
        from support import pair
        with an.CompletionPort() as port:
            sock, peer = pair(port)
            sock.recv(multishot=True)
            try:
                print("waiting", flush=True)
                port.dequeue()
            except KeyboardInterrupt:
                print("interrupted", flush=True)
        """,
        backend,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
        process.wait()
    assert output == "interrupted\n"
    assert errors == ""
    assert process.returncode == 0


def test_another_signal_runs_its_handler_and_the_wait_goes_on(backend: str) -> None:
    check_python(
        """
        import signal, time
        import asyncio_native as an
        ran = []
        signal.signal(signal.SIGALRM, lambda *_: ran.append(time.monotonic()))
        for call in ("dequeue", "dequeue_many"):
            with an.CompletionPort() as port:
                ran.clear()
                signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
                began = time.monotonic()
                assert not getattr(port, call)(timeout=1.0)
                took = time.monotonic() - began
                signal.setitimer(signal.ITIMER_REAL, 0)
                assert 1.0 <= took < 4.0, took  # a wait that began anew would never end
                assert len(ran) >= 3, ran
                assert ran[0] - began < 0.9, "the handler ran during the wait"
        """,
        backend,
    )


def test_a_handler_runs_during_a_wait_for_ever(backend: str) -> None:
    check_python(
        """
        import signal
        import asyncio_native as an
        with an.CompletionPort() as port:
            signal.signal(signal.SIGALRM, lambda *_: port.post("from the handler"))
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            assert port.dequeue().state == "from the handler"
        """,
        backend,
    )


def test_a_handler_runs_while_other_threads_dequeue(backend: str) -> None:
    check_python(
        """
        import signal, threading, time
        import asyncio_native as an
        from support import PATIENCE
        with an.CompletionPort() as port:
            ran = []
            signal.signal(signal.SIGALRM, lambda *_: ran.append(time.monotonic()))
            others = [threading.Thread(target=port.dequeue, args=(3,)) for _ in range(3)]
            for thread in others:
                thread.start()
            signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
            began = time.monotonic()
            assert port.dequeue(timeout=1.5) is None
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert ran and ran[0] - began < 1.0
            for thread in others:
                thread.join(PATIENCE)
        """,
        backend,
    )


def test_a_signal_during_work_loses_nothing(backend: str) -> None:
    check_python(
        """
        import signal
        import asyncio_native as an
        from support import PATIENCE, pair, pattern, pump, settle
        ran = []
        signal.signal(signal.SIGALRM, lambda *_: ran.append(1))
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
        with an.CompletionPort() as port:
            for family in ("ipv4", "unix"):
                sock, peer = pair(port, family, small=True)
                operation = sock.send(pattern(4 << 20))
                data, completions = pump(port, peer, 4 << 20, 2 * PATIENCE)
                completions += settle(port)
                assert data == pattern(4 << 20)
                assert [c.operation for c in completions] == [operation]
                assert completions[0].result() == 4 << 20
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert ran
        """,
        backend,
    )


def test_a_handler_that_raises_ends_dequeue_with_its_exception(backend: str) -> None:
    check_python(
        """
        import signal
        import asyncio_native as an
        from support import PATIENCE, one, pair

        class Raised(Exception):
            pass

        def handler(*_):
            raise Raised("by the handler")

        signal.signal(signal.SIGALRM, handler)
        with an.CompletionPort() as port:
            sock, peer = pair(port)
            sock.recv(multishot=True)
            for timeout in (None, PATIENCE, PATIENCE):
                try:
                    # Here, as on a crowded machine the signal may come before the wait.
                    signal.setitimer(signal.ITIMER_REAL, 0.1)
                    port.dequeue(timeout)
                except Raised as raised:
                    assert str(raised) == "by the handler"
                else:
                    raise SystemExit("did not raise")
                peer.sendall(b"x")
                completion = one(port)
                assert completion.data == b"x" and completion.more
        """,
        backend,
    )


@pytest.mark.slow
def test_a_handler_that_raises_loses_no_completion(backend: str) -> None:
    """The exception and the completions race; whatever the moment, each post arrives once."""
    check_python(
        """
        import random, signal, threading, time
        import asyncio_native as an

        class Raised(Exception):
            pass

        armed = False

        def handler(*_):
            if armed:
                raise Raised

        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.0011, 0.0011)
        total = 20_000
        seen = []
        raised = 0
        with an.CompletionPort() as port:
            def post():
                for number in range(total):
                    port.post(number)
            poster = threading.Thread(target=post)
            poster.start()
            # The timer goes on while others have the processors: on a busy machine it strikes
            # nearly every call. What is left then is dequeued undisturbed.
            struck_until = time.monotonic() + 20
            while len(seen) < total:
                if time.monotonic() > struck_until:
                    struck_until = float("inf")
                    signal.setitimer(signal.ITIMER_REAL, 0)
                    assert len(seen) > 50  # there was progress all the same
                # Only the call itself may be interrupted: `armed` shuts out the rest. A result that
                # is already on its way to `batch` when the handler raises would be Python's loss,
                # so one completion is taken at a time and the next is looked at after an exception.
                before = port.in_flight
                batch = None
                try:
                    armed = True
                    try:
                        batch = port.dequeue_many(1 + len(seen) % 50, 0.5)
                    finally:
                        armed = False
                except Raised:
                    raised += 1
                    armed = False
                if batch is None:
                    continue
                seen += [c.state for c in batch]
                if not batch and not poster.is_alive() and port.in_flight == 0:
                    break
            poster.join()
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(len(seen), raised)
        # The interpreter may run the handler between the return of the call and the assignment,
        # where no library can help; that is rare, a library that drops batches loses many.
        assert seen == sorted(set(seen))
        assert total - len(seen) <= raised * 50
        """,
        backend,
    )


SIGPIPE = """
    import select, signal
    import asyncio_native as an
    from support import PATIENCE, pair, settle, drain, reset
    import tempfile
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a SIGPIPE would end this process
    file = tempfile.TemporaryFile()
    file.write(bytes(100_000))
    file.flush()
    with an.CompletionPort() as port:
        sock, peer = pair(port, "{family}", small=True)
        peer.close() if "{how}" == "close" else reset(peer)
        assert select.select([sock.fileno()], [], [], PATIENCE)[0]
        for _ in range(5):
            {start}
        completions = settle(port)
        assert completions
        assert any(c.error for c in completions), completions
        sock.close()
"""


@pytest.mark.parametrize(
    "start",
    [
        "sock.send(b'x' * 1000)",
        "sock.sendv([b'x', b'y'])",
        "sock.send(b'x', quiet=True)",
        "sock.sendfile(file)",
        "sock.send(bytes(1 << 20))",
    ],
)
@pytest.mark.parametrize(("family", "how"), [("unix", "close"), ("ipv4", "reset")])
def test_a_dead_peer_never_raises_sigpipe(backend: str, start: str, family: str, how: str) -> None:
    check_python(SIGPIPE.format(start=start, family=family, how=how), backend)


def test_the_library_leaves_the_signal_dispositions_alone(backend: str) -> None:
    check_python(
        """
        import signal
        before = {number: signal.getsignal(number) for number in signal.valid_signals()}
        import asyncio_native as an
        with an.CompletionPort() as port:
            port.post()
            port.dequeue()
            assert signal.set_wakeup_fd(-1) == -1
        assert before == {number: signal.getsignal(number) for number in signal.valid_signals()}
        """,
        backend,
    )
