"""Addresses: the stdlib's tuples with numeric hosts, and paths for AF_UNIX."""

from __future__ import annotations

import socket
import sys
from typing import Any

import asyncio_native as an
import pytest
from support import (
    datagram,
    dial,
    drain,
    family_number,
    keep,
    listening,
    nothing,
    one,
    socket_path,
    stdlib_datagram,
    stdlib_listener,
    why_not,
)

linux_only = pytest.mark.skipif(
    sys.platform != "linux", reason="abstract AF_UNIX names exist on Linux only"
)


@pytest.fixture
def stream(port: an.CompletionPort) -> an.AsyncSocket:
    sock = an.AsyncSocket()
    port.associate(sock)
    return sock


@pytest.fixture
def gram(port: an.CompletionPort) -> an.AsyncSocket:
    return datagram(port)[0]


@linux_only
@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.10.99", "127.100.0.255", "127.255.255.254"])
def test_every_part_of_a_peers_address_is_shown(port: an.CompletionPort, host: str) -> None:
    listener, address = listening(port)
    listener.accept()
    sock, datagrams = datagram(port)
    sock.recvfrom()
    with socket.socket(type=socket.SOCK_DGRAM) as peer, socket.socket() as client:
        peer.bind((host, 0))
        peer.sendto(b"x", datagrams)
        assert one(port).address == peer.getsockname()
        client.bind((host, 0))
        client.connect(address)
        completion = one(port)
        assert completion.address == client.getsockname()
        assert completion.accepted is not None
        assert completion.accepted.getpeername() == completion.address
        completion.accepted.close()


NOT_NUMERIC = ["localhost", "example.com", "127.0.0", "127.0.0.1.1", "256.0.0.1", "::1", "a b", "1"]


@pytest.mark.parametrize("host", NOT_NUMERIC)
def test_a_name_raises(port: an.CompletionPort, stream: an.AsyncSocket, host: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 (the text is free)
        stream.connect((host, 80))
    assert port.in_flight == 0
    nothing(port)
    with an.AsyncSocket() as sock, pytest.raises(ValueError):  # noqa: PT011
        sock.bind((host, 0))


def test_a_name_raises_for_a_datagram(port: an.CompletionPort, gram: an.AsyncSocket) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        gram.sendto(b"x", ("localhost", 80))
    with pytest.raises(ValueError):  # noqa: PT011
        gram.sendto(b"x", ("localhost", 80), quiet=True)
    assert port.in_flight == 0


def test_a_name_raises_on_ipv6(port: an.CompletionPort) -> None:
    if reason := why_not("ipv6"):
        pytest.skip(reason)
    sock = an.AsyncSocket(socket.AF_INET6)
    port.associate(sock)
    for host in ("localhost", "127.0.0.1", ":::1", "::1%no_such_interface"):
        with pytest.raises(ValueError):  # noqa: PT011
            sock.connect((host, 80))
    assert port.in_flight == 0


@pytest.mark.parametrize("number", [-1, 65536, 1 << 32, 1 << 80])
def test_a_port_number_out_of_range_raises(
    port: an.CompletionPort, stream: an.AsyncSocket, number: int
) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        stream.connect(("127.0.0.1", number))
    assert port.in_flight == 0


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        None,
        80,
        ("127.0.0.1", "80"),
        (127, 80),
        ("127.0.0.1", 80.0),
        ("127.0.0.1", None),
    ],
)
def test_a_wrong_type_raises(port: an.CompletionPort, stream: an.AsyncSocket, address: Any) -> None:
    with pytest.raises(TypeError):
        stream.connect(address)
    with an.AsyncSocket() as sock, pytest.raises(TypeError):
        sock.bind(address)
    assert port.in_flight == 0


@pytest.mark.parametrize("address", [(), ("127.0.0.1",), ("127.0.0.1", 80, 0, 0)])
def test_a_wrong_number_of_parts_raises(
    port: an.CompletionPort, stream: an.AsyncSocket, address: Any
) -> None:
    with pytest.raises((TypeError, ValueError)):
        stream.connect(address)
    assert port.in_flight == 0


@pytest.mark.parametrize("address", [("::1", 80, 0), ("::1", 80), ("::1", 80, 0, 0)])
def test_ipv6_addresses_have_two_to_four_parts(port: an.CompletionPort, address: Any) -> None:
    if reason := why_not("ipv6"):
        pytest.skip(reason)
    listener = stdlib_listener("ipv6")
    number = listener.getsockname()[1]
    sock = an.AsyncSocket(socket.AF_INET6)
    port.associate(sock)
    sock.connect((address[0], number, *address[2:]))
    assert one(port).result() is None
    assert sock.getpeername() == listener.getsockname()


def test_internet_addresses_look_as_in_the_stdlib(port: an.CompletionPort, inet: str) -> None:
    listener, address = listening(port, inet)
    with socket.socket(family_number(inet)) as stdlib:
        stdlib.bind((address[0], 0))
        assert len(address) == len(stdlib.getsockname())
    listener.accept()
    client = dial(address)
    accepted, client_address = one(port).result()
    assert client_address == client.getsockname()
    assert accepted.getpeername() == client.getsockname()
    assert accepted.getsockname() == client.getpeername()
    accepted.close()


def _link_local() -> tuple[str, int] | None:
    """A link-local IPv6 address of this machine and its scope id."""
    try:
        with open("/proc/net/if_inet6") as table:
            lines = table.read().split("\n")
    except OSError:
        return None
    for line in filter(None, lines):
        digits, index, _, scope, *_ = line.split()
        if scope == "20":
            host = socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits))
            return host, int(index, 16)
    return None


def test_an_ipv6_scope_is_kept(port: an.CompletionPort) -> None:
    found = _link_local()
    if found is None:
        pytest.skip("this machine has no link-local IPv6 address, so no scope to keep")
    host, scope = found
    sock = an.AsyncSocket(socket.AF_INET6, socket.SOCK_DGRAM)
    sock.bind((host, 0, 0, scope))
    assert sock.getsockname()[3] == scope
    port.associate(sock)
    sock.recvfrom()
    peer = keep(socket.socket(socket.AF_INET6, socket.SOCK_DGRAM))
    peer.bind((host, 0, 0, scope))
    peer.sendto(b"x", sock.getsockname())
    data, address = one(port).result()
    assert data == b"x"
    assert address[1:] == peer.getsockname()[1:]
    assert address[3] == scope


def test_a_scope_id_reaches_the_system() -> None:
    if reason := why_not("ipv6"):
        pytest.skip(reason)
    with an.AsyncSocket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        with pytest.raises(OSError):  # no interface has this number
            sock.bind(("fe80::1", 0, 0, 999999))


def test_ipv6_flow_info_out_of_range_raises(port: an.CompletionPort) -> None:
    if reason := why_not("ipv6"):
        pytest.skip(reason)
    sock = an.AsyncSocket(socket.AF_INET6)
    port.associate(sock)
    for address in (("::1", 80, -1, 0), ("::1", 80, 0, -1), ("::1", 80, 1 << 20, 0)):
        with pytest.raises(ValueError):  # noqa: PT011
            sock.connect(address)


def test_datagram_addresses_look_as_in_the_stdlib(port: an.CompletionPort, inet: str) -> None:
    sock, address = datagram(port, inet)
    peer = stdlib_datagram(inet)
    sock.recvfrom()
    peer.sendto(b"x", address)
    assert one(port).address == peer.getsockname()
    sock.sendto(b"y", peer.getsockname())
    assert peer.recvfrom(10) == (b"y", address)


@pytest.mark.parametrize("form", ["str", "bytes"])
def test_unix_paths_are_text_or_bytes(port: an.CompletionPort, form: str) -> None:
    if reason := why_not("unix"):
        pytest.skip(reason)
    path = socket_path()
    listener = an.AsyncSocket(socket.AF_UNIX)
    listener.bind(path if form == "str" else path.encode())
    listener.listen()
    assert listener.getsockname() == path
    port.associate(listener)
    client = an.AsyncSocket(socket.AF_UNIX)
    port.associate(client)
    client.connect(path if form == "str" else path.encode())
    listener.accept()
    results = {c.kind: c.result() for c in drain(port, 2)}
    accepted, address = results[an.ACCEPT]
    assert client.getpeername() == path
    assert address == "", "an unnamed client, as the stdlib says it"
    accepted.close()


def test_unix_paths_need_not_be_ascii(port: an.CompletionPort) -> None:
    if reason := why_not("unix"):
        pytest.skip(reason)
    path = socket_path("Straße")
    listener = an.AsyncSocket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    port.associate(listener)
    listener.accept()
    dial(path)
    accepted, _ = one(port).result()
    assert accepted.getsockname() == path
    accepted.close()


@linux_only
def test_abstract_names_work_as_in_the_stdlib(port: an.CompletionPort) -> None:
    listener = an.AsyncSocket(socket.AF_UNIX)
    listener.bind("")  # the system chooses an abstract name
    listener.listen()
    name: Any = listener.getsockname()
    assert isinstance(name, bytes)
    assert name.startswith(b"\0")
    port.associate(listener)
    listener.accept()
    client = an.AsyncSocket(socket.AF_UNIX)
    port.associate(client)
    client.connect(name)
    results = {c.kind: c.result() for c in drain(port, 2)}
    assert client.getpeername() == name
    results[an.ACCEPT][0].close()


@linux_only
def test_an_abstract_name_with_zero_bytes_is_whole(port: an.CompletionPort) -> None:
    name = b"\0asyncio-native\0with\0zeros" + str(id(port)).encode()
    listener = an.AsyncSocket(socket.AF_UNIX)
    listener.bind(name)
    assert listener.getsockname() == name
    listener.close()


def test_a_unix_path_too_long_raises(port: an.CompletionPort) -> None:
    if reason := why_not("unix"):
        pytest.skip(reason)
    sock = an.AsyncSocket(socket.AF_UNIX)
    port.associate(sock)
    with pytest.raises((ValueError, OSError)):
        sock.connect("/tmp/" + "x" * 200)
    assert port.in_flight == 0
    nothing(port)


def test_a_unix_path_with_a_zero_byte_raises(port: an.CompletionPort) -> None:
    if reason := why_not("unix"):
        pytest.skip(reason)
    sock = an.AsyncSocket(socket.AF_UNIX)
    port.associate(sock)
    with pytest.raises(ValueError):  # noqa: PT011
        sock.connect("/tmp/a\0b")
    assert port.in_flight == 0


@pytest.mark.parametrize("address", [("127.0.0.1", 80), None, 5])
def test_a_unix_socket_takes_paths_only(port: an.CompletionPort, address: Any) -> None:
    if reason := why_not("unix"):
        pytest.skip(reason)
    sock = an.AsyncSocket(socket.AF_UNIX)
    port.associate(sock)
    with pytest.raises(TypeError):
        sock.connect(address)
    assert port.in_flight == 0
