"""Cross compiles the extension, for tools/wheels.py: by zig, as the PyPI package ziglang has it.

What is compiled, and with which flags, ``asyncio_native/_build.py`` says; here is what setuptools
would do with that where it cannot, as it compiles for the system it runs on.
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import abi3info  # type: ignore[import-untyped]
import liburing
import ziglang  # type: ignore[import-untyped]

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent  # the programs that came with this environment's packages
ZIG = Path(ziglang.__file__).parent / "zig"

# The oldest interpreter, whose stable ABI is asked for.
PYTHON = (3, 11)


@dataclass(frozen=True)
class Target:
    """A wheel's platform."""

    name: str
    system: str  # as sys.platform has it
    triples: tuple[str, ...]  # zig's names; macOS has two slices in one file
    platform: str  # the wheel's tag as built; auditwheel replaces those of Linux

    @property
    def machines(self) -> tuple[str, ...]:
        """The processors."""
        return tuple(triple.partition("-")[0] for triple in self.triples)

    @property
    def extension(self) -> str:
        """The extension's file name, as the stable ABI has it."""
        return "_native.pyd" if self.system == "win32" else "_native.abi3.so"


# glibc 2.17 and musl 1.2 are the oldest that the compiler knows, and macOS 11 is the first one on
# both processors.
TARGETS = {
    target.name: target
    for target in (
        Target("manylinux_x86_64", "linux", ("x86_64-linux-gnu.2.17",), "linux_x86_64"),
        Target("manylinux_aarch64", "linux", ("aarch64-linux-gnu.2.17",), "linux_aarch64"),
        Target("musllinux_x86_64", "linux", ("x86_64-linux-musl",), "linux_x86_64"),
        Target("musllinux_aarch64", "linux", ("aarch64-linux-musl",), "linux_aarch64"),
        Target(
            "macosx_universal2",
            "darwin",
            ("x86_64-macos.11.0", "aarch64-macos.11.0"),
            "macosx_11_0_universal2",
        ),
        Target("win_amd64", "win32", ("x86_64-windows-gnu",), "win_amd64"),
        Target("win_arm64", "win32", ("aarch64-windows-gnu",), "win_arm64"),
    )
}


def run(command: Sequence[str | Path], **environment: str) -> None:
    """Runs a command from the project's root; its error has all that it said."""
    ended = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"} | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if ended.returncode != 0:
        words = " ".join(str(word) for word in command)
        raise RuntimeError(f"status {ended.returncode} of {words}\n{ended.stdout}")


def llvm(tool: str) -> str:
    """LLVM's tool; Debian has some of them only in LLVM's own folder, one for each version."""
    found = shutil.which(f"llvm-{tool}")
    others = sorted(Path("/usr/lib").glob(f"llvm-*/bin/llvm-{tool}"))
    if not (found or others):
        raise RuntimeError(f"llvm-{tool} is not here (Debian: llvm)")
    return found or str(others[-1])


def compiler(triple: str) -> list[str]:
    """The C compiler; for musl with dynamic linking, as zig would compile all of musl else."""
    return [str(ZIG), "cc", "-target", triple, *(["-dynamic"] if "musl" in triple else [])]


def describe(target: Target, triple: str, prefix: Path, folder: Path) -> dict[str, Any]:
    """The extension as `_build.py` has it for that system; writes cffi's source into the folder.

    It reads its settings from the environment, which is a process's own: so in one of its own.
    """
    settings = {
        "CC": " ".join(compiler(triple)),
        "CFLAGS": "",
        "ASYNCIO_NATIVE_SYSTEM": target.system,
        "ASYNCIO_NATIVE_LIBURING": str(prefix) if target.system == "linux" else "no",
        "ASYNCIO_NATIVE_KQUEUE": "",
        "ASYNCIO_NATIVE_SANITIZE": "",
    }
    run([sys.executable, Path(__file__).resolve(), folder], **settings)
    described: dict[str, Any] = json.loads((folder / "extension.json").read_text())
    return described


def write_description(folder: Path) -> None:
    """The other side of `describe`."""
    builder = runpy.run_path(str(ROOT / "asyncio_native" / "_build.py"))["ffibuilder"]
    extension = builder.distutils_extension(str(folder), verbose=False)
    (folder / "extension.json").write_text(json.dumps(vars(extension)))


def python_headers(folder: Path) -> Path:
    """Python's headers for any 64-bit system: they differ in pyconfig.h alone."""
    headers = folder / "python"
    shutil.copytree(sysconfig.get_path("include"), headers)
    shutil.copyfile(ROOT / "tools" / "pyconfig.h", headers / "pyconfig.h")
    return headers


def import_library(machine: str, folder: Path) -> Path:
    """The import library of python3.dll: the names of the stable ABI."""
    lines = ["LIBRARY python3.dll", "EXPORTS"]
    for symbols, suffix in ((abi3info.FUNCTIONS, ""), (abi3info.DATAS, " DATA")):
        lines += sorted(
            f"{symbol.name}{suffix}"
            for symbol, known in symbols.items()
            if (known.added.major, known.added.minor) <= PYTHON
        )
    definitions = folder / "python3.def"
    definitions.write_text("\n".join(lines) + "\n")
    library = folder / "libpython3.a"
    kind = {"x86_64": "i386:x86-64", "aarch64": "arm64"}[machine]
    run([ZIG, "dlltool", "-m", kind, "-d", definitions, "-l", library])
    return library


def linker_flags(target: Target, triple: str, folder: Path) -> list[str]:
    """What the platform needs beside the flags of `_build.py`."""
    if target.system == "win32":
        return [str(import_library(triple.partition("-")[0], folder))]
    if target.system == "darwin":
        # The interpreter has Python's names; the install name must not have the build's folder.
        return ["-Wl,-undefined,dynamic_lookup", f"-Wl,-install_name,@rpath/{target.extension}"]
    return []


def compile_slice(target: Target, triple: str, source: Path, folder: Path) -> Path:
    """The extension for one processor."""
    folder.mkdir()
    prefix = folder / "liburing"
    if target.system == "linux":
        liburing.build(source, prefix, " ".join(compiler(triple)), f"{ZIG} ar")
    extension = describe(target, triple, prefix, folder)
    product = folder / target.extension
    # zig's linker does not know this one; liburing was compiled hidden.
    flags = [flag for flag in extension["extra_link_args"] if "--exclude-libs" not in flag]
    macros = [f"-D{name}={value}" for name, value in extension["define_macros"]]
    includes = [f"-I{path}" for path in [*extension["include_dirs"], python_headers(folder)]]
    run(
        [
            *compiler(triple),
            *["-shared", "-fPIC", "-s", "-g0", "-DNDEBUG", "-pthread"],
            # Paths of this machine do not get into the file.
            f"-ffile-prefix-map={folder}=.",
            *extension["extra_compile_args"],
            *macros,
            *includes,
            *extension["sources"],
            *extension["extra_objects"],
            *flags,
            *linker_flags(target, triple, folder),
            *(f"-l{library}" for library in extension["libraries"]),
            "-o",
            product,
        ]
    )
    return product


def compile_extension(target: Target, source: Path, folder: Path) -> Path:
    """The extension for a target; `source` is liburing's. Its folder is the product's."""
    folder.mkdir()
    slices = [
        compile_slice(target, triple, source, folder / triple.partition("-")[0])
        for triple in target.triples
    ]
    product = folder / target.extension
    if len(slices) == 1:
        slices[0].rename(product)
    else:
        run([llvm("lipo"), "-create", *slices, "-output", product])
    if "musl" in target.triples[0]:
        # zig calls musl by its development name; the file of that name is a compiler's.
        soname = f"libc.musl-{target.machines[0]}.so.1"
        run(["patchelf", "--replace-needed", "libc.so", soname, product])
    return product


if __name__ == "__main__":
    write_description(Path(sys.argv[1]))
