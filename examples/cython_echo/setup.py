"""The extension needs folders of asyncio_native, which a .toml file cannot tell."""

from pathlib import Path

import asyncio_native
from Cython.Build import cythonize
from setuptools import Extension, setup

server = Extension(
    "cython_echo.server",
    ["cython_echo/server.pyx"],
    include_dirs=[asyncio_native.get_include()],
)
# Cython finds the .pxd of an installed package by itself; of an editable one it is told the folder.
packages = str(Path(asyncio_native.__file__).parent.parent)
setup(ext_modules=cythonize([server], include_path=[packages]))
