"""Builds the C core and its binding into one extension module; see asyncio_native/_build.py.

The wheel is for the stable ABI of CPython 3.11 and later (tag cp311-abi3). A free-threaded
interpreter has no stable ABI before 3.15: there the wheel is for it alone (tag cp314-cp314t).
"""

import sysconfig
import tomllib
from pathlib import Path

from setuptools import setup

STABLE_ABI = not sysconfig.get_config_var("Py_GIL_DISABLED")
HEADERS = ("asyncio_native.h", "asyncio_native_capi.h")


def copy_headers() -> None:
    """The package carries the public headers, for C code that is built against it."""
    root = Path(__file__).resolve().parent
    version = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    folder = root / "asyncio_native" / "include"
    folder.mkdir(exist_ok=True)
    for header in HEADERS:
        text = (root / "csrc" / "include" / header).read_text("utf-8")
        (folder / header).write_text(text.replace("@VERSION@", version), "utf-8")


copy_headers()
setup(
    cffi_modules=["asyncio_native/_build.py:ffibuilder"],
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if STABLE_ABI else {},
)
