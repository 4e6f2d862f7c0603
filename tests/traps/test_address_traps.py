"""Addresses: scoped IPv6, abstract names and paths, compared with what the stdlib says."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import asyncio_native as an
import pytest
from support import dial, keep, one, read_exactly, socket_path, why_not


def stdlib_name(sock: an.AsyncSocket, *, peer: bool = False) -> Any:
    """What the stdlib says about the same socket."""
    with socket.fromfd(sock.fileno(), sock.family, sock.type) as same:
        return same.getpeername() if peer else same.getsockname()


def exchange(port: an.CompletionPort, listening_on: Any, family: int, **bind: Any) -> None:
    """Two AsyncSockets connect over the address and send something both ways."""
    listener = an.AsyncSocket(family)
    client = an.AsyncSocket(family)
    with listener, client:
        listener.bind(listening_on)
        listener.listen()
        port.associate(listener)
        port.associate(client)
        if "client" in bind:
            client.bind(bind["client"])
        assert listener.getsockname() == stdlib_name(listener)
        accepting = listener.accept()
        connecting = client.connect(listener.getsockname())
        completions = {c.operation: c for c in (one(port), one(port))}
        completions[connecting].result()
        accepted, address = completions[accepting].result()
        with accepted:
            port.associate(accepted)
            assert address == stdlib_name(accepted, peer=True)
            assert address == stdlib_name(client)
            assert client.getpeername() == stdlib_name(client, peer=True)
            assert accepted.getpeername() == address
            for source, target in ((client, accepted), (accepted, client)):
                source.send(b"over it", quiet=True)
                target.recv()
                assert one(port).data == b"over it"


def link_local_address() -> tuple[str, int]:
    """A link-local address of this machine with its interface's number, or skips."""
    table = Path("/proc/net/if_inet6")
    lines = table.read_text().splitlines() if table.exists() else []
    for line in lines:
        digits, index, _, scope, _, _ = line.split()
        if scope == "20":  # IPV6_ADDR_LINKLOCAL
            host = socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits))
            return host, int(index, 16)
    pytest.skip("no interface of this machine has a link-local IPv6 address")


def need_ipv6() -> None:
    if reason := why_not("ipv6"):
        pytest.skip(reason)


def test_an_ipv6_address_may_have_two_three_or_four_parts(port: an.CompletionPort) -> None:
    need_ipv6()
    for rest in ((), (0,), (0, 0)):
        with an.AsyncSocket(socket.AF_INET6) as listener, an.AsyncSocket(socket.AF_INET6) as client:
            listener.bind(("::1", 0, *rest))
            listener.listen()
            port.associate(listener)
            port.associate(client)
            name = listener.getsockname()
            assert name == stdlib_name(listener)
            assert name[2:] == (0, 0)
            listener.accept()
            client.connect((name[0], name[1], *rest))
            for completion in (one(port), one(port)):
                assert completion.error == 0
                if completion.accepted is not None:
                    completion.accepted.close()


def test_ipv6_loopback_with_scope_zero_connects_and_names_both_ends(
    port: an.CompletionPort,
) -> None:
    need_ipv6()
    exchange(port, ("::1", 0, 0, 0), socket.AF_INET6)


def test_a_link_local_connection_keeps_its_scope(port: an.CompletionPort) -> None:
    need_ipv6()
    host, scope = link_local_address()
    exchange(port, (host, 0, 0, scope), socket.AF_INET6)


def test_a_link_local_datagrams_sender_has_its_scope(port: an.CompletionPort) -> None:
    need_ipv6()
    host, scope = link_local_address()
    sock = an.AsyncSocket(socket.AF_INET6, socket.SOCK_DGRAM)
    with sock:
        sock.bind((host, 0, 0, scope))
        port.associate(sock)
        peer = keep(socket.socket(socket.AF_INET6, socket.SOCK_DGRAM))
        peer.bind((host, 0, 0, scope))
        peer.sendto(b"ping", sock.getsockname())
        sock.recvfrom()
        data, address = one(port).result()
        assert data == b"ping"
        assert address == peer.getsockname()
        assert address[3] == scope
        sock.sendto(b"pong", address, quiet=True)
        assert peer.recv(100) == b"pong"


def test_an_ipv6_sockets_ipv4_clients_have_mapped_addresses(port: an.CompletionPort) -> None:
    need_ipv6()
    with an.AsyncSocket(socket.AF_INET6) as listener:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(("::", 0))
        listener.listen()
        port.associate(listener)
        client = dial(("127.0.0.1", listener.getsockname()[1]))
        listener.accept()
        accepted, address = one(port).result()
        with accepted:
            assert address[0] == "::ffff:127.0.0.1"
            assert address[1] == client.getsockname()[1]
            assert address == stdlib_name(accepted, peer=True)


@pytest.mark.parametrize("inner", [b"", b"\0inner", b"\xff\xfe"], ids=["plain", "nul", "bytes"])
@pytest.mark.unix
def test_an_abstract_name_connects_and_reads_back_as_the_stdlib_gives_it(
    port: an.CompletionPort, inner: bytes
) -> None:
    name = b"\0asyncio-native-" + os.urandom(8).hex().encode() + inner
    exchange(port, name, socket.AF_UNIX)


@pytest.mark.unix
def test_an_abstract_name_may_be_given_as_text(port: an.CompletionPort) -> None:
    name = "\0asyncio-native-" + os.urandom(8).hex()
    with an.AsyncSocket(socket.AF_UNIX) as listener:
        listener.bind(name)
        listener.listen()
        port.associate(listener)
        assert listener.getsockname() == name.encode()
        client = dial(name)
        listener.accept()
        accepted, _ = one(port).result()
        with accepted:
            port.associate(accepted)
            accepted.send(b"abstract", quiet=True)
            assert read_exactly(client, 8) == b"abstract"


@pytest.mark.unix
def test_abstract_clients_have_their_names_as_addresses(port: an.CompletionPort) -> None:
    suffix = os.urandom(8).hex().encode()
    exchange(port, b"\0listener-" + suffix, socket.AF_UNIX, client=b"\0client-" + suffix)


@pytest.mark.unix
def test_a_path_connects_and_a_bound_client_has_its_path_as_address(
    port: an.CompletionPort,
) -> None:
    exchange(port, socket_path("listener"), socket.AF_UNIX, client=socket_path("client"))


@pytest.mark.unix
def test_an_unnamed_unix_client_has_an_empty_address(port: an.CompletionPort) -> None:
    exchange(port, socket_path(), socket.AF_UNIX)


@pytest.mark.unix
def test_a_path_that_is_no_text_reads_back_as_the_stdlib_gives_it(
    port: an.CompletionPort,
) -> None:
    exchange(port, os.fsencode(socket_path()) + b"\xff\xfe", socket.AF_UNIX)


@pytest.mark.unix
def test_the_longest_path_works(port: an.CompletionPort) -> None:
    """sun_path has 108 bytes with the closing zero."""
    path = socket_path()
    exchange(port, path + "x" * (107 - len(path)), socket.AF_UNIX)


@pytest.mark.parametrize("start", ["/", "\0"], ids=["path", "abstract"])
@pytest.mark.unix
def test_a_name_that_is_too_long_is_refused_at_the_call(
    port: an.CompletionPort, start: str
) -> None:
    with an.AsyncSocket(socket.AF_UNIX) as sock:
        with pytest.raises((OSError, ValueError)):
            sock.bind(start + "x" * 108)
        port.associate(sock)
        with pytest.raises((OSError, ValueError)):
            sock.connect(start + "x" * 108)
        assert port.in_flight == 0


@pytest.mark.unix
def test_datagrams_between_abstract_names_have_their_sender(port: an.CompletionPort) -> None:
    suffix = os.urandom(8).hex().encode()
    with an.AsyncSocket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(b"\0receiver-" + suffix)
        port.associate(sock)
        named = keep(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        named.bind(b"\0sender-" + suffix)
        unnamed = keep(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        for peer, message in ((named, b"named"), (unnamed, b"unnamed")):
            peer.sendto(message, b"\0receiver-" + suffix)
            sock.recvfrom()
            completion = one(port)
            assert completion.data == message
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as reader:
                reader.bind(b"\0reader-" + suffix)
                peer.sendto(message, reader.getsockname())
                assert completion.address == reader.recvfrom(100)[1]
