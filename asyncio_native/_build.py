"""Builds `asyncio_native._native`: cffi in API mode over the public C header.

The declarations are the part of csrc/include/asyncio_native.h between its two marker comments, so
they are written once. The C core is compiled into the same extension, with a second module,
`_table`, for C and Cython extensions, and on CPython with its lock a third, `_fast`, with the hot
paths in C: so all use the one core, which exports nothing. It runs at build time, from the
project's root, and is not imported by the package.

Environment, besides the usual CC, CFLAGS and LDFLAGS:

ASYNCIO_NATIVE_LIBURING: "no" builds without the io_uring backend, "yes" fails where liburing is
    missing; a folder is where it was installed (include/liburing.h, lib/liburing.a); else it is
    built where the compiler finds it.
ASYNCIO_NATIVE_SYSTEM: "linux", "darwin" or "win32", as sys.platform has them, when CC compiles for
    another system than this one (tools/wheels.py).
ASYNCIO_NATIVE_SANITIZE: "address,undefined" builds with these sanitizers of gcc and clang, and with
    assertions, for debugging.
ASYNCIO_NATIVE_KQUEUE: "stand-in" or "libkqueue" has the kqueue backend on Linux as well, on
    tests/kqueue or on that library, for tests.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

from cffi import FFI

ROOT = Path(__file__).resolve().parent.parent
HEADER = ROOT / "csrc" / "include" / "asyncio_native.h"
SOURCES = ROOT / "csrc" / "sources.txt"

# A free-threaded CPython has no stable ABI before 3.15. It stays so if each module that it loads
# declares that it needs no interpreter lock: cffi's does, the other one would not be right to.
FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
KQUEUE = os.environ.get("ASYNCIO_NATIVE_KQUEUE", "")
SYSTEM = os.environ.get("ASYNCIO_NATIVE_SYSTEM") or sys.platform
LINUX = SYSTEM.startswith("linux")
BSD = SYSTEM.startswith(("freebsd", "openbsd", "netbsd", "dragonfly"))
MACOS = SYSTEM == "darwin"
WINDOWS = SYSTEM == "win32"
# Cross compilers for Windows take gcc's flags.
MSVC = WINDOWS and sys.platform == "win32"


def compiler(*arguments: str) -> str:
    """What the C compiler prints on these arguments; empty when it fails or is not there."""
    command = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()
    try:
        ended = subprocess.run([*command, *arguments], check=False, capture_output=True, text=True)
    except OSError:
        return ""
    return ended.stdout if ended.returncode == 0 else ""


def find_liburing() -> tuple[str, list[str]]:
    """The static library of liburing 2.3 or later, and its header's folder where it needs telling.

    The library is to be linked in; empty without one.
    """
    wanted = os.environ.get("ASYNCIO_NATIVE_LIBURING", "")
    if not LINUX or wanted == "no":
        return "", []
    folder = Path(wanted) if os.path.isabs(wanted) else None
    folders = [str(folder / "include")] if folder else []
    flags = ["-D_GNU_SOURCE", *(f"-I{path}" for path in folders)]
    header = compiler(*flags, "-E", "-include", "liburing.h", "-x", "c", os.devnull)
    library = compiler("-print-file-name=liburing.a").strip()
    if folder:
        library = str(folder / "lib" / "liburing.a")
    if "io_uring_submit_and_get_events" in header and os.path.isabs(library):
        return library, folders
    message = "liburing 2.3 or later is not here (Debian: liburing-dev): no io_uring backend"
    if wanted:
        raise RuntimeError(message)
    print(message, file=sys.stderr)
    return "", []


LIBURING, LIBURING_HEADERS = find_liburing()

PLATFORMS = {
    "posix": not WINDOWS,
    "linux": LINUX,
    "bsd": BSD,
    "macos": MACOS,
    "kqueue": BSD or MACOS or KQUEUE != "",
    "liburing": LIBURING != "",
    "windows": WINDOWS,
}


def declarations() -> str:
    """The header's part that cffi can read."""
    text = HEADER.read_text(encoding="utf-8")
    _, found, rest = text.partition("/* cdef: begin */")
    inside, found_end, _ = rest.partition("/* cdef: end */")
    if not (found and found_end):
        raise ValueError(f"{HEADER} has no part between cdef: begin and cdef: end")
    # The error numbers are macros, for the compiler to fill in.
    numbers = sorted(set(re.findall(r"^#define (AN_E[A-Z]+) ", text, re.MULTILINE)))
    return "".join(f"#define {number} ...\n" for number in numbers) + inside


def sources() -> list[str]:
    """The C files for this platform, relative to the project's root as setuptools wants them."""
    paths = []
    for line in SOURCES.read_text(encoding="utf-8").splitlines():
        words = line.partition("#")[0].split()
        if words and all(PLATFORMS[platform] for platform in words[:-1]):
            paths.append(words[-1])
    # The hot paths are guarded by the interpreter lock, which a free-threaded one has not.
    if sys.implementation.name == "cpython" and not FREE_THREADED:
        python = (ROOT / "csrc" / "python").glob("*.c")
        paths += sorted(path.relative_to(ROOT).as_posix() for path in python)
    else:
        paths.append("csrc/python/capi.c")
    return [*paths, "tests/kqueue/kqueue.c"] if KQUEUE == "stand-in" else paths


def libkqueue(what: str) -> list[str]:
    """What pkg-config tells of libkqueue, where that is wanted."""
    if KQUEUE not in ("", "stand-in", "libkqueue"):
        raise ValueError(f"ASYNCIO_NATIVE_KQUEUE is stand-in or libkqueue, not {KQUEUE}")
    if KQUEUE != "libkqueue":
        return []
    command = ["pkg-config", what, "libkqueue"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


def headers() -> list[str]:
    """What the sources include: a change there compiles them again."""
    return [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "csrc").rglob("*.h"))]


def version() -> str:
    """The project's version, which stands in pyproject.toml alone."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found: str = tomllib.loads(text)["project"]["version"]
    return found


def macros() -> list[tuple[str, str | None]]:
    """Macros for the compiler."""
    defined: list[tuple[str, str | None]] = [("AN_VERSION_STRING", f'"{version()}"')]
    # The core serves this extension alone: another copy in the process must not meet its names.
    defined.append(("AN_HIDDEN", "1"))
    if LINUX:
        defined.append(("_GNU_SOURCE", "1"))  # musl's headers of liburing's types ask for it
    if KQUEUE:
        defined.append(("AN_HAVE_KQUEUE", "1"))
    if LIBURING:
        defined.append(("AN_HAVE_LIBURING", "1"))
    if WINDOWS:  # else windows.h brings an older Winsock, and a macro `interface`
        defined.append(("WIN32_LEAN_AND_MEAN", "1"))
    if not FREE_THREADED:
        defined.append(("Py_LIMITED_API", "0x030B0000"))
    return defined


def compiler_flags() -> list[str]:
    """Flags for the C compiler; an -O in CFLAGS stands."""
    if MSVC:
        return ["/std:c11", "/O2", "/W3"]
    # cffi's generated code has parameters that it does not use.
    flags = ["-std=gnu11", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"]
    if sanitizers := os.environ.get("ASYNCIO_NATIVE_SANITIZE"):
        # -UNDEBUG: the interpreter's own flags switch assertions off.
        debugging = ["-g", "-O1", "-fno-omit-frame-pointer", "-UNDEBUG"]
        return [*flags, f"-fsanitize={sanitizers}", *debugging]
    return flags if "-O" in os.environ.get("CFLAGS", "") else [*flags, "-O2"]


def linker_flags() -> list[str]:
    """Flags for the linker."""
    sanitizers = os.environ.get("ASYNCIO_NATIVE_SANITIZE")
    flags = [f"-fsanitize={sanitizers}"] if sanitizers and not MSVC else []
    # The names of liburing must not meet those of another copy in the process.
    return [*flags, "-Wl,--exclude-libs,ALL"] if LIBURING else flags


ffibuilder = FFI()
ffibuilder.cdef(declarations())
ffibuilder.set_source(
    "asyncio_native._native",
    '#include "asyncio_native.h"',
    sources=sources(),
    depends=[*headers(), SOURCES.relative_to(ROOT).as_posix(), "pyproject.toml"],
    include_dirs=[
        "csrc/include",
        "csrc",
        *(["tests/kqueue"] if KQUEUE == "stand-in" else []),
        *LIBURING_HEADERS,
    ],
    define_macros=macros(),
    py_limited_api=not FREE_THREADED,
    extra_compile_args=[*compiler_flags(), *libkqueue("--cflags")],
    extra_link_args=[*linker_flags(), *libkqueue("--libs")],
    extra_objects=[LIBURING] if LIBURING else [],
    libraries=["ws2_32", "mswsock", "iphlpapi"] if WINDOWS else [],
)
