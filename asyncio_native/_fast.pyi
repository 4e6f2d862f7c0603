"""The types of the compiled module of the hot paths, as far as the package uses it (csrc/python).

What users see of its classes is typed in the classes over cffi, which have the same methods.
"""

from typing import Any, final

@final
class Operation: ...

class Completion: ...

class Socket:
    _address: int
    _family: int
    _port: Any
    def _give(self, address: int, family: int) -> None: ...

class Port:
    _address: int
    def _open(self, address: int, main_thread: int | None) -> None: ...
    def _fill(self, done: list[Any], max_count: int, timeout: float | None) -> None: ...
    def _abandon(self, done: list[Any]) -> None: ...

def bind(
    socket_type: type, kinds: tuple[Any, ...], numbers: tuple[int, int, int], **helpers: Any
) -> None: ...
