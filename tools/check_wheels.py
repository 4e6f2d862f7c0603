"""Checks the source package and the wheels in a folder, by whomever they were built.

    python tools/check_wheels.py DIR

For all: twine's metadata check, and that they hold what a user needs. For each wheel: abi3audit,
check-wheel-contents, its contents, what its extension exports and which libraries it needs, and on
Linux what auditwheel says of it. It ends with a table; the status is 1 if anything is wrong.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from cross import BIN, llvm

# What another extension in the process could meet, were there more of it.
EXPORTED = {"PyInit__native", "PyInit__table", "PyInit__fast"}
# The linker's own on macOS, in every library.
LINKERS = {"__dso_handle", "_mh_bundle_header", "_mh_dylib_header"}

# What the system brings, by a part of the wheel's tag. The C runtime of Windows is in many pieces.
SYSTEM_LIBRARIES = {
    "manylinux": r"lib(c|pthread|rt|dl)\.so\.\d|ld-linux-[a-z0-9-]+\.so\.\d",
    "musllinux": r"libc\.(musl-[a-z0-9_]+\.so\.1|so)",
    "macosx": r"/usr/lib/libSystem\.B\.dylib|@rpath/_native\.abi3\.so",
    "win": r"(?i)(python3|kernel32|ws2_32|mswsock|iphlpapi|ntdll|api-ms-win-crt-[a-z0-9-]+)\.dll"
    r"|(?i:vcruntime140|ucrtbase|msvcrt)\.dll",
}

# Files that a wheel must have; and what it must be made of.
NEEDED = (
    r"asyncio_native/__init__\.py",
    r"asyncio_native/py\.typed",
    r"asyncio_native/_native\.pyi",
    r"asyncio_native/__init__\.pxd",
    r"asyncio_native/include/asyncio_native\.h",
    r"asyncio_native/include/asyncio_native_capi\.h",
    r"asyncio_native/_native\.(abi3\.so|pyd)",
    r"asyncio_native-[^/]*\.dist-info/licenses/LICENSE",
)
ALLOWED = r"asyncio_native/|asyncio_native-[^/]*\.dist-info/"


class WheelError(Exception):
    """What is wrong with a file."""


def tool(*command: str | Path) -> str:
    """Runs a program of this environment, or of the system; returns what it says."""
    program = BIN / command[0]
    words = [program if program.exists() else command[0], *command[1:]]
    ended = subprocess.run(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if ended.returncode != 0:
        raise WheelError(f"{command[0]}, status {ended.returncode}:\n{ended.stdout}")
    return ended.stdout


def contents(wheel: Path) -> list[str]:
    """The names in a wheel, checked."""
    names = sorted(zipfile.ZipFile(wheel).namelist())
    missing = [name for name in NEEDED if not any(re.fullmatch(name, have) for have in names)]
    foreign = [name for name in names if not re.match(ALLOWED, name)]
    if missing or foreign:
        raise WheelError(f"it lacks {missing}, and does not own {foreign}")
    if len([name for name in names if name.endswith((".so", ".pyd", ".dll", ".dylib"))]) != 1:
        raise WheelError("it must have one extension")
    return names


def exported(library: Path) -> set[str]:
    """The names that an extension defines for others; Mach-O puts an underscore before them."""
    if library.suffix == ".pyd":
        return set(re.findall(r"Name: (\w+)", tool(llvm("readobj"), "--coff-exports", library)))
    with library.open("rb") as file:
        dynamic = ["-D"] if file.read(4) == b"\x7fELF" else []
    listed = tool(llvm("nm"), *dynamic, "--defined-only", "--extern-only", library)
    return {
        name.removeprefix("_") for name in re.findall(r"(?m)^[0-9a-f]+ \w (\w+)", listed)
    } - LINKERS


def needed_libraries(library: Path) -> set[str]:
    """The libraries that an extension is linked with."""
    if library.suffix == ".pyd":
        listed = tool(llvm("readobj"), "--coff-imports", library)
        return set(re.findall(r"(?m)^Import \{\n\s+Name: (\S+)", listed))
    listed = tool(llvm("readobj"), "--needed-libs", library)
    blocks = re.findall(r"NeededLibraries \[([^]]*)", listed)  # one for each processor
    return {line.strip() for block in blocks for line in block.strip().splitlines()}


def check_extension(wheel: Path) -> str:
    """Checks what the extension exports and needs; says both."""
    platform = wheel.stem.split("-")[-1]
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as opened:
        (name,) = (name for name in opened.namelist() if name.endswith((".so", ".pyd")))
        library = Path(opened.extract(name, folder))
        names, libraries = exported(library), needed_libraries(library)
    if not {"PyInit__native", "PyInit__table"} <= names <= EXPORTED:
        raise WheelError(f"it exports {sorted(names)}")
    pattern = next(known for part, known in SYSTEM_LIBRARIES.items() if platform.startswith(part))
    if foreign := [library for library in libraries if not re.fullmatch(pattern, library)]:
        raise WheelError(f"it needs {foreign}")
    return f"exports: {' '.join(sorted(names))}\nneeds: {' '.join(sorted(libraries))}"


def check_wheel(wheel: Path) -> None:
    """Checks one wheel and prints what is in it."""
    if "-cp311-abi3-" not in wheel.name:
        raise WheelError("it is not for the stable ABI of CPython 3.11")
    print("\n".join(contents(wheel)))
    print(check_extension(wheel))
    print(tool("abi3audit", "--strict", "--verbose", wheel).strip())
    print(tool("check-wheel-contents", wheel).strip())
    if "linux" in wheel.name:
        print(tool("auditwheel", "show", wheel).strip())


def check_sdist(sdist: Path) -> None:
    """Checks that the source package has what a build, the tests and the reader need."""
    with tarfile.open(sdist) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    needed = {"pyproject.toml", "setup.py", "CMakeLists.txt", "LICENSE", "README.md"}
    needed |= {"csrc/sources.txt", "csrc/include/asyncio_native.h", "asyncio_native/_build.py"}
    needed |= {"tests/conftest.py", "tools/run_tests.py", "docs/index.md"}
    if missing := needed - names:
        raise WheelError(f"it lacks {sorted(missing)}")
    if built := [name for name in names if name.endswith((".so", ".pyd", ".pyc", ".o"))]:
        raise WheelError(f"it has what was built: {built}")
    print(f"{len(names)} files")


def check(folder: Path) -> int:
    """Checks all in the folder; returns the exit status."""
    wheels = sorted(folder.glob("*.whl"))
    sdists = sorted(folder.glob("*.tar.gz"))
    if not wheels and not sdists:
        print(f"nothing is in {folder}", file=sys.stderr)
        return 1
    rows = []
    for path in [*sdists, *wheels]:
        print(f"--- {path.name}", flush=True)
        verdict = "passed"
        try:
            print(tool("twine", "check", "--strict", path).strip())
            if path.suffix == ".whl":
                check_wheel(path)
            else:
                check_sdist(path)
        except WheelError as error:
            print(error)
            verdict = "FAILED"
        rows.append(f"{path.stat().st_size / 1024:7.0f} KiB  {verdict}  {path.name}")
    print("---", *rows, sep="\n")
    return int(any("FAILED" in row for row in rows))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(check(Path(sys.argv[1])))
