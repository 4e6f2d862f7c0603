"""Signals in the middle of every wait and every call (EINTR).

The tests run in processes of their own: they use the interval timer and the handlers.
"""

from __future__ import annotations

import signal

import pytest
from support import check_python

pytestmark = pytest.mark.skipif(
    not hasattr(signal, "setitimer"), reason="this system has no interval timer"
)

STORM = """
    import os, signal, socket, threading, time
    import asyncio_native as an
    from support import PATIENCE, dial, drain, listening, one, pair, pattern, read_exactly

    signals = 0

    def count(number, frame):
        global signals
        signals += 1

    signal.signal(signal.SIGALRM, count)
    port = an.CompletionPort()

    def storm(on):
        signal.setitimer(signal.ITIMER_REAL, *((0.0005, 0.0005) if on else (0, 0)))
"""


@pytest.mark.parametrize("way", ["multishot", "one-shot"])
def test_ten_mebibytes_echo_whole_through_a_storm_of_signals(backend: str, way: str) -> None:
    check_python(
        STORM
        + f"""
    multishot = {way == "multishot"}
    size = 10 << 20
    data = pattern(size)
    listener, address = listening(port)
    listener.accept(multishot=True)
    got = bytearray()

    def talk():
        # Signals come to any thread that does not block them; Python's handler runs in the main.
        peer = dial(address)
        sender = threading.Thread(target=peer.sendall, args=(data,))
        sender.start()
        got.extend(read_exactly(peer, size))
        sender.join()
        peer.close()

    talker = threading.Thread(target=talk)
    talker.start()
    storm(True)
    at_start = signals
    ended = False
    while not ended:
        for completion in port.dequeue_many(timeout=None):
            if completion.kind is an.ACCEPT:
                accepted, _ = completion.result()
                port.associate(accepted)
                accepted.recv(multishot=multishot)
            elif completion.kind is an.RECV:
                if completion.result():
                    completion.socket.send(completion.data, quiet=True)
                    if not multishot:
                        completion.socket.recv()
                else:
                    completion.socket.close(flush=True)
                    ended = True
            else:
                raise AssertionError(completion)
    talker.join()
    # Short work may be done before many came; keep waiting under the storm.
    deadline = time.monotonic() + PATIENCE
    while signals - at_start < 100 and time.monotonic() < deadline:
        assert port.dequeue(0.05) is None
    storm(False)
    assert bytes(got) == data
    assert signals - at_start >= 100
    listener.close()
    port.close()
""",
        backend,
    )


def test_a_wait_under_a_storm_of_signals_takes_its_whole_time(backend: str) -> None:
    check_python(
        STORM
        + """
    storm(True)
    for call in (port.dequeue, lambda seconds: port.dequeue_many(timeout=seconds)):
        before = signals
        # On a crowded machine few come in so short a time: those that are due at once are one.
        for _ in range(10):
            at_start = time.monotonic()
            assert not call(0.3)
            took = time.monotonic() - at_start
            assert 0.3 <= took < 3, took
            if signals - before > 20:
                break
        assert signals - before > 20
    storm(False)
    port.close()
""",
        backend,
    )


def test_every_kind_of_operation_survives_a_storm_of_signals(backend: str) -> None:
    check_python(
        STORM
        + """
    import tempfile
    file = tempfile.TemporaryFile()
    file.write(pattern(1 << 20))
    file.flush()
    listener, address = listening(port)
    storm(True)
    before = signals
    deadline = time.monotonic() + 2 * PATIENCE
    rounds = 0
    while (signals - before < 300 or rounds < 20) and time.monotonic() < deadline:
        rounds += 1
        client = an.AsyncSocket()
        port.associate(client)
        listener.accept()
        client.connect(address)
        accepted = [c.result() for c in drain(port, 2)]
        server = next(result for result in accepted if result)[0]
        port.associate(server)
        client.send(pattern(1 << 20), quiet=True)
        client.sendv([b"a", b"b"])
        client.sendfile(file)
        client.disconnect()
        server.recv(multishot=True)
        done = drain(port, lambda so_far: sum(not c.more for c in so_far) >= 4)
        assert not any(c.error for c in done), done
        received = b"".join(c.data for c in done if c.kind is an.RECV)
        assert received == pattern(1 << 20) + b"ab" + pattern(1 << 20)
        one_end = an.AsyncSocket(type=socket.SOCK_DGRAM)
        one_end.bind(("127.0.0.1", 0))
        port.associate(one_end)
        one_end.recvfrom()
        one_end.sendto(b"to myself", one_end.getsockname())
        kinds = {c.kind for c in drain(port, 2) if not c.error}
        assert kinds == {an.RECVFROM, an.SENDTO}
        for sock in (client, server, one_end):
            sock.close()
    storm(False)
    assert rounds >= 20
    listener.close()
    file.close()
    port.close()
""",
        backend,
    )


def test_signals_to_other_threads_do_not_end_their_waits(backend: str) -> None:
    check_python(
        STORM
        + """
    signal.signal(signal.SIGUSR1, count)
    came = []
    ready = threading.Barrier(3)

    def wait_for_one():
        ready.wait(PATIENCE)
        came.append(port.dequeue(None))

    threads = [threading.Thread(target=wait_for_one) for _ in range(2)]
    for thread in threads:
        thread.start()
    ready.wait(PATIENCE)
    for _ in range(200):
        for thread in threads:
            signal.pthread_kill(thread.ident, signal.SIGUSR1)
        time.sleep(0.0005)
    assert came == []
    port.post("one")
    port.post("two")
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert sorted(c.state for c in came) == ["one", "two"]
    assert signals > 0
    port.close()
""",
        backend,
    )


def test_handlers_that_raise_end_the_wait_and_harm_nothing_in_flight(backend: str) -> None:
    check_python(
        STORM
        + """
    import random

    class Interruption(Exception):
        pass

    def interrupt(number, frame):
        raise Interruption

    signal.signal(signal.SIGUSR1, interrupt)
    main = threading.main_thread().ident
    waits = threading.Semaphore(0)

    def disturb():
        chance = random.Random(8)
        for _ in range(200):
            assert waits.acquire(timeout=PATIENCE)
            time.sleep(chance.random() * 0.002)
            signal.pthread_kill(main, signal.SIGUSR1)

    sock, peer = pair(port)
    receiving = sock.recv(multishot=True)
    disturber = threading.Thread(target=disturb)
    disturber.start()
    for number in range(200):
        try:
            waits.release()
            completion = port.dequeue(PATIENCE)
            raise SystemExit(f"not interrupted: {completion}")
        except Interruption:
            pass
        if number % 10 == 0:
            peer.send(b"%d" % number)
            completion = one(port)
            assert completion.operation is receiving
            assert completion.data == b"%d" % number
    disturber.join(PATIENCE)
    port.post("last")
    assert one(port).state == "last"
    assert port.in_flight == 1
    sock.close()
    port.close()
""",
        backend,
    )
