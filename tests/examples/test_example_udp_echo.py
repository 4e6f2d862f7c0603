"""examples/udp_echo.py, driven by socat and nc."""

from __future__ import annotations

import pytest
from example_support import Example, line_from, run, say, start
from support import ENDING_SIGNALS, PATIENCE, pattern, stdlib_datagram


@pytest.mark.parametrize("number", ENDING_SIGNALS, ids=lambda number: number.name)
def test_socat_gets_its_datagram_back(backend: str, number: int) -> None:
    with Example("udp_echo.py", backend) as example:
        # -T: udp has no end of the stream; it ends when nothing has come for this long.
        command = ["socat", "-T", "0.3", "-", f"UDP:{example.host}:{example.port}"]
        assert run(command, b"hello\n") == b"hello\n"
        example.ends_in_order(number)


def test_nc_gets_each_datagram_back(backend: str) -> None:
    with Example("udp_echo.py", backend) as example:
        with start(["nc", "-u", example.host, str(example.port)]) as client:
            for count in range(20):
                line = b"datagram %d\n" % count
                say(client, line)
                assert line_from(client) == line
            client.kill()


def test_the_longest_and_the_empty_datagram(backend: str) -> None:
    with Example("udp_echo.py", backend) as example:
        peers = [stdlib_datagram() for _ in range(3)]
        for peer in peers:
            peer.settimeout(PATIENCE)
            for data in (b"", pattern(65507), b"x"):
                peer.sendto(data, example.address)
                assert peer.recvfrom(65536) == (data, example.address)
