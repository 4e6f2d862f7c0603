"""Builds what is measured: the C programs, the library, and an environment with the peers.

Everything goes into `build/bench` under the project's root and is made again only after a change.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from bench.servers import PEER_PACKAGES

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "bench" / "c"
CYTHON_ECHO = ROOT / "examples" / "cython_echo"
DEFAULT_FOLDER = ROOT / "build" / "bench"
WARNINGS = ("-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-Werror")
ALONE = ("echo_epoll", "echo_io_uring", "echo_udp", "file_server", "load")
ON_THE_LIBRARY = ("echo_native", "parts")
OLDEST, NEWEST = 11, 20  # minor versions of CPython 3 that are looked for


class BuildError(Exception):
    """Something could not be built; the text says what."""


def run(command: list[str], **environment: str) -> str:
    """Runs a command; returns its output."""
    ended = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env={**os.environ, **environment},
        cwd=ROOT,
    )
    if ended.returncode != 0:
        raise BuildError(f"{' '.join(command)} failed:\n{ended.stdout.strip()}")
    return ended.stdout


def compile_program(name: str, folder: Path, *more: str) -> None:
    """Compiles one program of bench/c, unless it is newer than all sources there."""
    source, output = SOURCES / f"{name}.c", folder / name
    newest = max(path.stat().st_mtime for path in SOURCES.iterdir())
    newest = max([newest, *(Path(path).stat().st_mtime for path in more if path.endswith(".a"))])
    if output.exists() and output.stat().st_mtime > newest:
        return
    compiler = os.environ.get("CC", "cc")
    run([compiler, "-std=gnu11", "-O2", *WARNINGS, "-o", str(output), str(source), *more])


def build_programs(folder: Path = DEFAULT_FOLDER) -> None:
    """The programs that stand alone."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ALONE:
        compile_program(name, folder)


def build_native_programs(folder: Path = DEFAULT_FOLDER) -> None:
    """The library, optimised and without assertions, and the programs on it."""
    library = folder / "library"
    cache = library / "CMakeCache.txt"
    if not cache.exists():
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        options = ["-DCMAKE_BUILD_TYPE=Release", "-DAN_BUILD_TESTS=OFF"]
        run(["cmake", *generator, "-S", str(ROOT), "-B", str(library), *options])
    run(["cmake", "--build", str(library), "--target", "asyncio_native_static"])
    liburing = ["-luring"] if "LIBURING_LIBRARY-NOTFOUND" not in cache.read_text() else []
    for name in ON_THE_LIBRARY:
        archive = str(library / "libasyncio_native.a")
        header = f"-I{ROOT / 'csrc' / 'include'}"
        compile_program(name, folder, header, archive, *liburing, "-pthread")


def find_python() -> str:
    """The newest CPython from 3.11 on that is on the PATH or among pyenv's."""
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [sys.executable, *map(str, versions.glob("3.*/bin/python3"))]
    candidates += [shutil.which(f"python3.{minor}") or "" for minor in range(OLDEST, NEWEST)]
    question = "import sys; print(sys.implementation.name, *sys.version_info[:3])"
    found: list[tuple[tuple[int, ...], str]] = []
    for candidate in filter(None, dict.fromkeys(candidates)):
        asked = subprocess.run(
            [candidate, "-c", question], capture_output=True, text=True, check=False
        )
        words = asked.stdout.split()
        if asked.returncode == 0 and words[0] == "cpython":
            found.append((tuple(map(int, words[1:])), candidate))
    usable = [pair for pair in found if pair[0] >= (3, OLDEST)]
    if not usable:
        raise BuildError(f"no CPython from 3.{OLDEST} on was found")
    return max(usable)[1]


@dataclass
class Environment:
    """An interpreter with asyncio_native and the peers."""

    python: Path
    version: str  # the interpreter's
    packages: dict[str, str] = field(default_factory=dict)  # and their versions
    missing: dict[str, str] = field(default_factory=dict)  # peers, and why not


def this_environment() -> Environment:
    """The interpreter that runs this, with what is installed there."""
    packages = {found.name: found.version for found in importlib.metadata.distributions()}
    return Environment(Path(sys.executable), platform.python_version(), packages)


def digest() -> str:
    """Of all that the extension is built from."""
    paths = [ROOT / "setup.py", ROOT / "pyproject.toml"]
    paths += [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".c", ".h", ".txt")]
    paths += (ROOT / "asyncio_native").rglob("*.py")
    paths += (ROOT / "asyncio_native").rglob("*.pxd")
    paths += [path for path in CYTHON_ECHO.rglob("*.*") if path.suffix in (".py", ".pyx", ".toml")]
    sums = hashlib.sha256()
    for path in sorted(paths):
        sums.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return sums.hexdigest()


def install_cython_echo(pip: list[str], folder: Path) -> None:
    """The example's server, against the asyncio_native that is there."""
    run([*pip, "install", "-q", "cython>=3.1", "setuptools>=77"])
    source = folder / "cython_echo"
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(
        CYTHON_ECHO, source, ignore=shutil.ignore_patterns("build", "*.egg-info", "*.c")
    )
    install = ["install", "-q", "--force-reinstall", "--no-deps", "--no-build-isolation"]
    run([*pip, *install, str(source)])


def install_peers(pip: list[str], note: Path) -> dict[str, str]:
    """Installs each peer that has a wheel; returns the reasons of those that have none."""
    if note.exists():
        missing: dict[str, str] = json.loads(note.read_text())
        return missing
    missing = {}
    for package in PEER_PACKAGES:
        try:
            run([*pip, "install", "-q", "--only-binary=:all:", package])
        except BuildError as error:
            missing[package] = str(error).splitlines()[-1]
    note.write_text(json.dumps(missing, indent=1) + "\n")
    return missing


def build_environment(
    python: str = "", peers: bool = True, folder: Path = DEFAULT_FOLDER
) -> Environment:
    """asyncio_native as it is in this checkout, and the peers, under that interpreter."""
    python = python or find_python()
    version = run([python, "-c", "import platform; print(platform.python_version())"]).strip()
    place = folder / f"python-{version}"
    own = place / "bin" / "python"
    if not own.exists():
        run([python, "-m", "venv", str(place)])
    pip = [str(own), "-m", "pip", "--disable-pip-version-check", "--no-input"]
    missing = install_peers(pip, place / "peers.json") if peers else {}
    built = place / "built-from"
    if not built.exists() or built.read_text() != digest():
        run([*pip, "install", "-q", "cffi>=2.0", "tqdm"])
        # Without liburing the extension would silently lack a backend.
        install = ["install", "-q", "--force-reinstall", "--no-deps", str(ROOT)]
        run([*pip, *install], ASYNCIO_NATIVE_LIBURING="yes")
        install_cython_echo(pip, place)
        built.write_text(digest())
    listed = json.loads(run([*pip, "list", "--format=json"]))
    packages = {entry["name"]: entry["version"] for entry in listed}
    return Environment(own, version, packages, missing)
