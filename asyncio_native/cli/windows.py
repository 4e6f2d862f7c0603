"""What Windows tells of another process: its memory, processor time and handles, over ctypes.

Each function takes a process id and returns None where the system does not tell. Not imported on
other systems; the calls are those of kernel32, named where they are made.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from ctypes import wintypes

assert sys.platform == "win32"

_kernel = ctypes.WinDLL("kernel32", use_last_error=True)
_kernel.OpenProcess.restype = wintypes.HANDLE
_kernel.OpenProcess.argtypes = [wintypes.DWORD, wintypes.BOOL, wintypes.DWORD]
_kernel.CloseHandle.argtypes = [wintypes.HANDLE]

_MAY_QUERY = 0x0400 | 0x0010  # PROCESS_QUERY_INFORMATION, PROCESS_VM_READ


class _Memory(ctypes.Structure):
    """PROCESS_MEMORY_COUNTERS."""

    _fields_ = [
        ("size", wintypes.DWORD),
        ("page_faults", wintypes.DWORD),
        ("peak_working_set", ctypes.c_size_t),
        ("working_set", ctypes.c_size_t),
        ("quotas", ctypes.c_size_t * 4),
        ("commit", ctypes.c_size_t),
        ("peak_commit", ctypes.c_size_t),
    ]


@contextlib.contextmanager
def _opened(process_id: int) -> Iterator[wintypes.HANDLE | None]:
    """A handle of the process, None where it cannot be had."""
    handle = _kernel.OpenProcess(_MAY_QUERY, False, process_id)
    try:
        yield wintypes.HANDLE(handle) if handle else None
    finally:
        if handle:
            _kernel.CloseHandle(handle)


def resident_bytes(process_id: int) -> int | None:
    """The process' working set (GetProcessMemoryInfo)."""
    memory = _Memory(size=ctypes.sizeof(_Memory))
    with _opened(process_id) as handle:
        if handle is None or not _kernel.K32GetProcessMemoryInfo(
            handle, ctypes.byref(memory), memory.size
        ):
            return None
    return int(memory.working_set)


def processor_seconds(process_id: int) -> float | None:
    """Seconds of processor time of all its threads, in units of 100 ns (GetProcessTimes)."""
    times = [wintypes.FILETIME() for _ in range(4)]  # creation, exit, kernel, user
    with _opened(process_id) as handle:
        if handle is None or not _kernel.GetProcessTimes(handle, *map(ctypes.byref, times)):
            return None
    return sum((time.dwHighDateTime << 32) + time.dwLowDateTime for time in times[2:]) / 1e7


def handles(process_id: int) -> int | None:
    """How many handles it has open, its sockets among them (GetProcessHandleCount)."""
    count = wintypes.DWORD()
    with _opened(process_id) as handle:
        if handle is None or not _kernel.GetProcessHandleCount(handle, ctypes.byref(count)):
            return None
    return count.value
