"""What the system allows (descriptors, ports, backlog) and what a process costs (memory, CPU time).

Where a system does not tell, these functions return None or a cautious value; they never fail.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

DESCRIPTOR_LIMIT_TOP = 1 << 20
"""Linux' default of fs.nr_open; asking for more fails there, and no command needs more."""

PORTS_ASSUMED = 16_384
"""The dynamic ports 49152 to 65535 of RFC 6335, where the system does not tell its own range."""

BACKLOG_ASSUMED = 128
"""The limit of BSD and macOS by default, where the system does not tell."""


def raise_descriptor_limit(wanted: int = DESCRIPTOR_LIMIT_TOP) -> int:
    """Raises this process' limit of open descriptors (RLIMIT_NOFILE) as high as it may.

    The soft limit goes up to the hard one; a privileged process raises that too if `wanted` is
    above. Processes started later inherit the limit. Returns the limit in force.
    """
    try:
        import resource
    except ImportError:  # Windows: sockets are handles, limited by memory alone
        return DESCRIPTOR_LIMIT_TOP
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if soft == unlimited:
        return DESCRIPTOR_LIMIT_TOP
    attempts = []
    if hard != unlimited and wanted > hard:
        attempts.append((wanted, wanted))
    # macOS refuses a soft limit above its own maximum though the hard one says unlimited: halve.
    target = DESCRIPTOR_LIMIT_TOP if hard == unlimited else min(hard, DESCRIPTOR_LIMIT_TOP)
    while target > soft:
        attempts.append((target, hard))
        target //= 2
    for attempt in attempts:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, attempt)
        except (ValueError, OSError):
            continue
        return attempt[0]
    return soft


def ephemeral_ports() -> int:
    """How many local ports the system may give to connections from one address to one server."""
    numbers = _read_numbers("/proc/sys/net/ipv4/ip_local_port_range")
    if len(numbers) == 2:
        return numbers[1] - numbers[0] + 1
    return PORTS_ASSUMED


def backlog_limit() -> int:
    """How many connections may wait to be accepted, whatever `listen` asks for."""
    numbers = _read_numbers("/proc/sys/net/core/somaxconn")
    return numbers[0] if numbers else BACKLOG_ASSUMED


def loopback_addresses() -> int:
    """How many source addresses 127.0.0.1, 127.0.0.2, ... work as they are (Linux: a whole /8)."""
    return 254 if sys.platform == "linux" else 1


def processors() -> int:
    """How many processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def resident_bytes(process_id: int) -> int | None:
    """The process' resident memory in bytes: /proc/PID/statm, Windows' working set, else None."""
    if sys.platform == "win32":
        from . import windows

        return windows.resident_bytes(process_id)
    numbers = _read_numbers(f"/proc/{process_id}/statm")
    return numbers[1] * os.sysconf("SC_PAGE_SIZE") if len(numbers) >= 2 else None


def scheduled_seconds(process_id: int) -> float | None:
    """CPU time of all the process' threads in seconds, of /proc/PID/task/*/schedstat.

    The scheduler counts in nanoseconds there, where `times` counts in ticks of 10 ms. None where
    there is no such file.
    """
    total_ns = 0
    found = False
    for path in Path(f"/proc/{process_id}/task").glob("*/schedstat"):
        numbers = _read_numbers(str(path))
        if numbers:
            total_ns += numbers[0]
            found = True
    return total_ns / 1e9 if found else None


def advice(error_number: int) -> str:
    """What a user can do about an error of the system; empty if there is nothing to say."""
    if error_number in (errno.EMFILE, errno.ENFILE):
        return "raise the limit of open files: ulimit -n"
    if error_number in (errno.EADDRNOTAVAIL, errno.EADDRINUSE) and sys.platform == "linux":
        return "widen the port range: sysctl -w net.ipv4.ip_local_port_range='1024 65535'"
    return ""


def _read_numbers(path: str) -> list[int]:
    try:
        return [int(word) for word in Path(path).read_text("ascii").split()]
    except (OSError, ValueError):
        return []
