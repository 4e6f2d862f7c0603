"""Checks of arguments, and their conversion to what the C interface takes."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from operator import index
from typing import Any

from ._native import ffi, lib

FOREVER_NS = lib.AN_FOREVER
SIZE_MAX = 2**63 - 1
UINT64_MAX = 2**64 - 1

#: The longest wait, in nanoseconds: 146 years. What is longer is for ever.
LONGEST_NS = 2**62
_LONGEST_SECONDS = LONGEST_NS / 1e9

_from_buffer: Callable[..., Any] = ffi.from_buffer


def nanoseconds(seconds: Any, name: str = "timeout") -> int:
    """A time in seconds, 0 or more, as nanoseconds: rounded up, `LONGEST_NS` at most."""
    if not isinstance(seconds, (int, float)):
        seconds = _number(seconds, name)
    if not seconds >= 0:  # so written, it holds for NaN too
        raise ValueError(f"{name} must be 0 or more seconds, not {seconds!r}")
    wait_ns: int = LONGEST_NS if seconds >= _LONGEST_SECONDS else ceil(seconds * 1e9)
    return wait_ns


def _number(value: Any, name: str) -> float:
    """What is not an int or float, but converts like one (a Decimal, a NumPy number)."""
    if isinstance(value, (str, bytes, bytearray)):
        raise TypeError(f"{name} must be a number of seconds, not {type(value).__name__}")
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number of seconds, not {type(value).__name__}") from None


def timeout_ns(timeout: float | None) -> int:
    """A timeout in seconds or None as nanoseconds or `FOREVER_NS`."""
    if timeout is None:
        return FOREVER_NS
    wait_ns = nanoseconds(timeout)
    return FOREVER_NS if wait_ns == LONGEST_NS else wait_ns


#: What was probably meant, for names whose values are often wrong.
_HINTS = {"max_count": " (the time to wait is `timeout`: dequeue_many(timeout=0) polls)"}


def integer(value: Any, name: str, least: int, most: int = SIZE_MAX) -> int:
    """An integer within `least` and `most`."""
    try:
        number = index(value)
    except TypeError:
        kind = type(value).__name__
        raise TypeError(f"{name} must be an integer, not {kind}{_HINTS.get(name, '')}") from None
    if not least <= number <= most:
        limits = f"at least {least}" if number < least else f"at most {most}"
        raise ValueError(f"{name} must be {limits}, not {number}{_HINTS.get(name, '')}")
    return number


def readable(data: Any) -> Any:
    """The memory of a bytes-like object as C data: it is held until that is released."""
    try:
        return _from_buffer(data)
    except TypeError:
        raise TypeError(f"a bytes-like object is needed, not {type(data).__name__}") from None
    except ValueError as error:
        raise BufferError(str(error)) from None


def writable(buffer: Any) -> Any:
    """The memory of a writable bytes-like object, not empty, as C data."""
    try:
        view = _from_buffer(buffer, require_writable=True)
    except (TypeError, BufferError, ValueError) as error:
        raise TypeError(
            f"a writable contiguous buffer is needed, not {type(buffer).__name__} ({error})"
        ) from None
    if not len(view):
        ffi.release(view)
        raise ValueError("the buffer is empty")
    return view
