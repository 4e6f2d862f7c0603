"""C memory by its address, which is an `int` here."""

from __future__ import annotations

import sys
from typing import Any

from ._native import ffi

_UINTPTR = ffi.typeof("uintptr_t")
_CHARS = ffi.typeof("char *")


def address_of(pointer: Any) -> int:
    """The address that a C pointer holds."""
    return int(ffi.cast(_UINTPTR, pointer))


class _Slices:
    """What `memory` is where an address may be too large for an index."""

    def __getitem__(self, part: slice) -> bytes:
        data: bytes = ffi.buffer(ffi.cast(_CHARS, part.start), part.stop - part.start)[:]
        return data


#: `memory[address:end]` copies C memory into `bytes`. It is one buffer over all of the address
#: space, because slicing that costs a quarter of casting to a pointer and making a buffer first.
memory: Any = ffi.buffer(ffi.cast(_CHARS, 0), sys.maxsize) if sys.maxsize > 2**32 else _Slices()
