"""examples/thread_pool.py, driven by nc."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor

import pytest
from example_support import Example, nc
from support import ENDING_SIGNALS, dial, pattern


def hashed(line: bytes) -> str:
    return hashlib.pbkdf2_hmac("sha256", line, b"salt", 200_000).hex()


@pytest.mark.slow
@pytest.mark.parametrize("number", ENDING_SIGNALS, ids=lambda number: number.name)
def test_lines_are_answered_in_order_by_several_threads(backend: str, number: int) -> None:
    with Example("thread_pool.py", backend, "--threads", "4") as example:
        questions = [[f"line {line} of {client}" for line in range(4)] for client in range(4)]
        with ThreadPoolExecutor(4) as clients:
            replies = list(
                clients.map(
                    lambda lines: nc(example, "".join(f"{line}\n" for line in lines).encode()),
                    questions,
                )
            )
        threads = set()
        for lines, reply in zip(questions, replies, strict=True):
            answers = [answer.split() for answer in reply.decode().splitlines()]
            assert [answer[0] for answer in answers] == [hashed(line.encode()) for line in lines]
            threads |= {answer[1] for answer in answers}
        assert 2 <= len(threads) <= 4
        example.ends_in_order(number)


def test_a_signal_ends_it_in_the_middle_of_work(backend: str) -> None:
    with Example("thread_pool.py", backend, "--threads", "2") as example:
        clients = [example.dial() for _ in range(4)]
        for client in clients:
            # Hours of work; one line a turn, so that the end gets its turn as well.
            client.sendall(b"\n" * 100_000)
        for client in clients:
            assert client.recv(1)
        example.ends_in_order()


def test_who_does_not_read_and_who_sends_no_line_hold_no_thread(backend: str) -> None:
    with Example("thread_pool.py", backend, "--threads", "1") as example:
        silent = [example.dial() for _ in range(10)]
        for client in silent:
            client.sendall(b"no end")
        endless = dial(example.address)
        endless.setblocking(False)
        endless.send(pattern(8000).replace(b"\n", b" "))
        assert nc(example, b"question\n").split()[0] == hashed(b"question").encode()
