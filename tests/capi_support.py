"""Compiles extensions against the installed package, as a user's build does: headers only."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import asyncio_native as an
import pytest

SOURCES = Path(__file__).resolve().parent / "capi"
COMPILER = shutil.which("cc")


def why_not(cython: bool = False) -> str:
    """Why no extension can be compiled here; empty if one can."""
    if os.name != "posix" or COMPILER is None:
        return "there is no C compiler `cc`"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "there are no headers of Python"
    if cython and importlib.util.find_spec("Cython") is None:
        return "Cython is not installed"
    return ""


needs_compiler = pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")
needs_cython = pytest.mark.skipif(bool(why_not(cython=True)), reason=why_not(cython=True) or "-")


#: For an extension that one file serves later interpreters of; a free-threaded one has no such API.
LIMITED_API = [] if sysconfig.get_config_var("Py_GIL_DISABLED") else ["-DPy_LIMITED_API=0x030b0000"]


def run(command: list[str], cwd: Path | None = None) -> str:
    """What a command says; it must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def compile_c(source: Path, *options: str, include: str = "") -> Path:
    """An extension module beside its C source; it links nothing."""
    output = source.with_suffix(".so")
    folders = (include or an.get_include(), sysconfig.get_path("include"))
    flags = ["-shared", "-fPIC", "-O1", "-g", "-Wall", "-Wextra", "-Werror", *options]
    assert COMPILER is not None
    run([COMPILER, *flags, *(f"-I{folder}" for folder in folders), str(source), "-o", str(output)])
    return output


def compile_cython(source: Path, folder: Path) -> Path:
    """An extension module of Cython in that folder."""
    made = folder / f"{source.stem}.c"
    # It finds the .pxd by itself where the package is installed; an editable one is told to it.
    packages = Path(an.__file__).parent.parent
    command = [sys.executable, "-m", "cython", "-3", "-I", str(packages), str(source)]
    said = run([*command, "-o", str(made)], folder)
    assert "warning" not in said, said
    # What Cython writes is not as strict as we are.
    return compile_c(made, "-Wno-unused-function", "-Wno-unused-parameter", "-Wno-sign-compare")


def load(path: Path) -> Any:
    """The extension module of that file."""
    loader = importlib.machinery.ExtensionFileLoader(path.stem, str(path))
    spec = importlib.util.spec_from_file_location(path.stem, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module
