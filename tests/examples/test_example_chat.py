"""examples/chat.py, driven by nc."""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import Iterator

import pytest
from example_support import Example, line_from, say, start
from support import ENDING_SIGNALS, dial, eventually, read_to_end


@contextlib.contextmanager
def chatter(example: Example) -> Iterator[subprocess.Popen[bytes]]:
    """nc in the room, after it has been told that it has come."""
    with start(["nc", "-N", example.host, str(example.port)]) as client:
        try:
            assert b" has come, we are " in line_from(client)
            yield client
        finally:
            client.kill()


@pytest.mark.parametrize("number", ENDING_SIGNALS, ids=lambda number: number.name)
def test_a_line_goes_to_all_others(backend: str, number: int) -> None:
    with Example("chat.py", backend) as example:
        with chatter(example) as one, chatter(example) as two, chatter(example) as three:
            assert line_from(one).endswith(b" has come, we are 2\n")
            assert line_from(one).endswith(b" has come, we are 3\n")
            assert line_from(two).endswith(b" has come, we are 3\n")
            say(two, b"half a line, ")
            say(two, b"and the rest\nand another\n")
            for other in (one, three):
                assert line_from(other).endswith(b": half a line, and the rest\n")
                assert line_from(other).endswith(b": and another\n")
            say(one, b"hello two\n")
            assert line_from(two).endswith(b": hello two\n")  # and not what it said itself
            assert three.stdin is not None
            three.stdin.close()
            assert line_from(two).endswith(b" has left\n")
            example.ends_in_order(number)


def test_a_reader_that_is_too_slow_is_dropped_and_the_others_go_on(backend: str) -> None:
    with Example("chat.py", backend) as example:
        with chatter(example) as talker, chatter(example) as listener:
            line_from(talker)
            slow = dial(example.address, receive_buffer=16384)
            name = "{}:{}".format(*slow.getsockname()).encode()
            come = b"* %b has come, we are 3\n" % name
            assert (line_from(talker), line_from(listener)) == (come, come)
            line = b"x" * 1000 + b"\n"
            dropped = b"* %b was too slow\n" % name
            # In step with the listener, so that it is never behind itself. Some megabytes fit into
            # the system's buffers before the room has to keep anything for the slow one.
            for _ in range(1000):
                say(talker, line * 32)
                for _ in range(32):
                    heard = line_from(listener)
                    if heard == dropped:
                        break
                    assert heard.endswith(b": " + line)
                if heard == dropped:
                    break
            assert heard == dropped
            assert line_from(talker) == dropped
            say(listener, b"who was that?\n")
            assert line_from(talker).endswith(b": who was that?\n")
            # It was told, too: what had reached it can be read, then it is over.
            with contextlib.suppress(ConnectionResetError):
                read_to_end(slow)


def test_a_line_without_end_is_dropped(backend: str) -> None:
    with Example("chat.py", backend) as example:
        flooder = example.dial()
        with contextlib.suppress(ConnectionError):
            flooder.sendall(b"x" * 100_000)
        flooder.settimeout(0.1)

        def ended() -> bool:
            try:
                return not flooder.recv(65536)
            except TimeoutError:
                return False
            except ConnectionError:
                return True

        eventually(ended)
        with chatter(example) as client:
            say(client, b"alone\n")


@pytest.mark.posix("counts descriptors one by one; on Windows other handles come and go with them")
def test_descriptors_of_those_who_left_are_free(backend: str) -> None:
    with Example("chat.py", backend) as example:
        before = example.descriptors()
        peers = [example.dial() for _ in range(50)]
        eventually(lambda: example.descriptors() == before + 50)
        for peer in peers[:25]:
            peer.shutdown(socket.SHUT_WR)
        for peer in peers[25:]:
            peer.close()
        eventually(lambda: example.descriptors() == before)
