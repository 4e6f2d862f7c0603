"""What the interpreter is."""

from __future__ import annotations

import sys

FREE_THREADED = "t" in getattr(sys, "abiflags", "")
"""Whether it was built to run threads side by side, without an interpreter lock.

PYTHON_GIL=1 brings the lock back there, but not what an extension module was built without.
"""
