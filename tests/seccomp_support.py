"""Real seccomp filters, for scripts that see what the policy of a container does.

Linux on x86-64 and AArch64, where the three calls have the same numbers. A filter is for good and
is inherited: use it in a process of its own.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

#: The system calls of io_uring(7), by name.
IO_URING_CALLS = {"io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427}

# linux/prctl.h, linux/seccomp.h, linux/bpf_common.h
_SET_SECCOMP, _SET_NO_NEW_PRIVILEGES, _FILTER = 22, 38, 2
_LOAD_WORD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _FAIL = 0x7FFF0000, 0x00050000
# struct seccomp_data: the number, the architecture, the instruction, then six arguments of 8 bytes
# (the low word is first on both machines).
_NUMBER_AT, _ARGUMENTS_AT = 0, 16


def _install(instructions: list[tuple[int, int, int, int]]) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *i) for i in instructions))
    program = ctypes.create_string_buffer(
        struct.pack("@HP", len(instructions), ctypes.addressof(code))
    )
    for arguments in ((_SET_NO_NEW_PRIVILEGES, 1, 0), (_SET_SECCOMP, _FILTER, program)):
        if libc.prctl(arguments[0], arguments[1], arguments[2], 0, 0) != 0:
            number = ctypes.get_errno()
            raise OSError(number, f"prctl: {os.strerror(number)}")


def forbid(number: int, *calls: str) -> None:
    """From here on these calls of io_uring fail with the error number, in this process."""
    last = len(calls)
    checks = [
        (_JUMP_IF_EQUAL, last - place, 0, IO_URING_CALLS[call]) for place, call in enumerate(calls)
    ]
    _install(
        [
            (_LOAD_WORD, 0, 0, _NUMBER_AT),
            *checks,
            (_RETURN, 0, 0, _ALLOW),
            (_RETURN, 0, 0, _FAIL | number),
        ]
    )


def refuse_entering(flags: int) -> None:
    """io_uring_enter with exactly these flags fails with EBUSY, in this process.

    The library submits with 0 while it prepares, waits without a limit and polls with
    IORING_ENTER_GETEVENTS (1), and waits with a limit with IORING_ENTER_EXT_ARG (8) as well."""
    flags_at = _ARGUMENTS_AT + 3 * 8
    _install(
        [
            (_LOAD_WORD, 0, 0, _NUMBER_AT),
            (_JUMP_IF_EQUAL, 0, 3, IO_URING_CALLS["io_uring_enter"]),
            (_LOAD_WORD, 0, 0, flags_at),
            (_JUMP_IF_EQUAL, 0, 1, flags),
            (_RETURN, 0, 0, _FAIL | errno.EBUSY),
            (_RETURN, 0, 0, _ALLOW),
        ]
    )
