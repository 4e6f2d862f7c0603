"""The modules that stand beside `_native` in its extension file: all use the one core in it."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from typing import Any

from . import _native


def load(name: str) -> Any:
    """The module `asyncio_native.<name>` out of that file."""
    full = f"{__package__}.{name}"
    loader = importlib.machinery.ExtensionFileLoader(full, _native.__file__)
    spec = importlib.util.spec_from_file_location(full, _native.__file__, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    sys.modules[full] = module
    return module
