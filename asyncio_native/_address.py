"""Socket addresses: the stdlib's tuples and paths to and from the C library's `an_address`.

Nothing here resolves a name, because that would block: hosts are numeric.
"""

from __future__ import annotations

import os
import socket
import sys
from typing import Any, TypeAlias

from ._arguments import integer
from ._interpreter import FREE_THREADED
from ._memory import address_of, memory
from ._native import ffi, lib

Address: TypeAlias = (
    tuple[str, int]
    | tuple[str, int, int]
    | tuple[str, int, int, int]
    | str
    | bytes
    | os.PathLike[str]
    | os.PathLike[bytes]
)
"""What a call takes: `(host, port)`, for AF_INET6 also with flow info and scope id, or a path."""

_AF_INET = int(socket.AF_INET)
_AF_INET6 = int(socket.AF_INET6)
_AF_UNIX = int(getattr(socket, "AF_UNIX", 1))  # Windows has the family, its Python not the name

_ADDRESS = ffi.typeof("an_address *")
_CHARS = ffi.typeof("char[]")
_SIZE = ffi.typeof("size_t *")
_STORAGE = ffi.offsetof("an_address", "storage")
_LENGTH = ffi.offsetof("an_address", "length")
_FLOW_MAX = 2**20 - 1
_SCOPE_MAX = 2**32 - 1

_CACHE_LIMIT = 4096
"""Addresses kept: each is about 400 bytes, and a server talks with few peers at a time."""
_inet_cache: dict[tuple[str, int], Any] = {}


def _forget() -> None:
    """In a forked child: a thread that is not here may have locked the dict."""
    global _inet_cache  # noqa: PLW0603
    _inet_cache = {}


if FREE_THREADED and hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def encode(family: int, address: Any) -> Any:
    """An address of a socket of that family as an `an_address *`, never changed again.

    Raises TypeError for another form than the family's, ValueError for a host that is a name and
    for numbers out of range.
    """
    if family == _AF_INET:
        # The types are looked at first, as 80.0 and True find 80 and 1 in a dict.
        if type(address) is tuple and len(address) == 2:  # noqa: SIM102
            if type(address[0]) is str and type(address[1]) is int:
                return _inet_cache.get(address) or _remember(address)
        return _encode_ip(family, address, (2,))
    if family == _AF_INET6:
        return _encode_ip(family, address, (2, 3, 4))
    if family == _AF_UNIX:
        return _encode_path(address)
    raise ValueError("addresses are for AF_INET, AF_INET6 and AF_UNIX sockets only")


def _remember(address: tuple[str, int]) -> Any:
    """Encodes an AF_INET address and keeps it: datagrams go to the same peers again and again."""
    encoded = _encode_ip(_AF_INET, address, (2,))
    if len(_inet_cache) >= _CACHE_LIMIT:
        _inet_cache.clear()
    _inet_cache[address] = encoded
    return encoded


def _shape(family: int) -> str:
    return "(host, port)" if family == _AF_INET else "(host, port[, flowinfo[, scope_id]])"


def _encode_ip(family: int, address: Any, parts: tuple[int, ...]) -> Any:
    if not isinstance(address, tuple):
        raise TypeError(
            f"the address must be a tuple {_shape(family)}, not {type(address).__name__}"
        )
    if len(address) not in parts:
        raise TypeError(f"the address must be {_shape(family)}, not of {len(address)} parts")
    host, port, flow, scope = (*address, 0, 0)[:4]
    if not isinstance(host, str):
        raise TypeError(f"the host must be a str, not {type(host).__name__}")
    port = integer(port, "the port number", 0, 65535)
    flow = integer(flow, "flowinfo", 0, _FLOW_MAX)
    scope = integer(scope, "scope_id", 0, _SCOPE_MAX)
    numeric = host
    if not host:
        numeric = "0.0.0.0" if family == _AF_INET else "::"
    elif host == "<broadcast>" and family == _AF_INET:
        numeric = "255.255.255.255"
    encoded = ffi.new(_ADDRESS)
    if (
        not numeric.isascii()
        or "\0" in numeric
        or lib.an_address_ip(encoded, family, numeric.encode("ascii"), port, flow, scope)
    ):
        version = "IPv4" if family == _AF_INET else "IPv6"
        raise ValueError(
            f"{host!r} is not a numeric {version} address (a name is not resolved here, because "
            "that would block; socket.getaddrinfo does it)"
        )
    return encoded


def _encode_path(address: Any) -> Any:
    if not isinstance(address, (str, bytes, os.PathLike)):
        raise TypeError(f"the address must be a path, not {type(address).__name__}")
    path = os.fsencode(address)
    if b"\0" in path and not path.startswith(b"\0"):
        raise ValueError("the path has a zero byte in it")
    encoded = ffi.new(_ADDRESS)
    if error := lib.an_address_path(encoded, path, len(path)):
        if error == lib.AN_EINVAL:
            raise ValueError(f"the path is too long for AF_UNIX: {address!r}")
        raise ValueError("this system has no AF_UNIX sockets")
    return encoded


def decode(family: int, pointer: int) -> Any:
    """The `an_address` at that memory address as the stdlib shows it; None when it is empty.

    The two IP families are read from sockaddr_in and sockaddr_in6 here, whose fields behind the
    family stand at the same places on every system: each datagram and connection brings one.
    """
    start = pointer + _STORAGE
    length = int.from_bytes(memory[pointer + _LENGTH : pointer + _LENGTH + 4], sys.byteorder)
    if not length:
        return None
    if family == _AF_INET and length >= 16:
        raw: bytes = memory[start : start + 8]
        return socket.inet_ntoa(raw[4:8]), raw[2] << 8 | raw[3]
    if family == _AF_INET6 and length >= 28:
        raw = memory[start : start + 28]
        flow = int.from_bytes(raw[4:8], "big") & _FLOW_MAX
        scope = int.from_bytes(raw[24:28], sys.byteorder)
        return socket.inet_ntop(_AF_INET6, raw[8:24]), raw[2] << 8 | raw[3], flow, scope
    if family == _AF_UNIX:
        return _decode_path(pointer)
    raw = memory[start : start + length]
    return raw


def _decode_path(pointer: int) -> str | bytes:
    path = ffi.new(_CHARS, lib.AN_HOST_SIZE)
    length = ffi.new(_SIZE)
    if lib.an_address_format_path(ffi.cast(_ADDRESS, pointer), path, length):
        return ""
    name: bytes = ffi.buffer(path)[: length[0]]
    # An abstract name is no path and may hold any bytes.
    return name if name.startswith(b"\0") else os.fsdecode(name)


class AddressSlot:
    """Memory for an address that a C call fills in."""

    __slots__ = ("pointer",)

    def __init__(self) -> None:
        self.pointer = ffi.new(_ADDRESS)

    def decode(self, family: int) -> Any:
        """What is in it."""
        return decode(family, address_of(self.pointer))
