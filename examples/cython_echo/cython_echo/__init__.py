"""An echo server whose handler is in Cython; `python -m cython_echo --port 5555` starts it."""

from .server import EchoServer

__all__ = ["EchoServer"]
