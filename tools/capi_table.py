"""Writes what follows from the C headers: the table of functions for extensions, and the .pxd file.

    python tools/capi_table.py

The declarations stand in csrc/include/asyncio_native.h and, of what takes Python objects, in
asyncio_native_capi.h beside it. The latter also has the table, between two comments: functions that
are in it stay in their places, new ones go to its end. A test fails when a file is not as written
here, or when the table's order is not the recorded one.
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
INCLUDE = ROOT / "csrc" / "include"
HEADER = INCLUDE / "asyncio_native.h"
TABLE_HEADER = INCLUDE / "asyncio_native_capi.h"
PXD = ROOT / "asyncio_native" / "__init__.pxd"

FUNCTION = re.compile(r"^(?P<result>\w[\w ]*?\*?)\b(?P<name>an_\w+)\((?P<parameters>[^()]*)\);$")
COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)

#: What the .pxd says of a function that fails with an exception.
RAISES = {"PyObject *": "", "int ": " except -1"}

PXD_HEAD = '''\
"""The C interface for Cython: `cimport asyncio_native`; written by tools/capi_table.py.

The header asyncio_native.h says what each of these does. A module that uses them calls
`asyncio_native.asyncio_native_import()` first, and is compiled with the folder of
`asyncio_native.get_include()`.
"""

from libc.stdint cimport int32_t, int64_t, intptr_t, uint16_t, uint32_t, uint64_t

cdef extern from "asyncio_native_capi.h" nogil:
'''


@dataclass(frozen=True)
class Function:
    """A declaration, with single spaces; `result` ends as it stands before the name."""

    result: str
    name: str
    parameters: str


def between(text: str, name: str) -> str:
    """The part of a header between its two comments of that name."""
    _, _, rest = text.partition(f"/* {name}: begin")
    inside, found, _ = rest.partition(f"/* {name}: end */")
    if not found:
        raise ValueError(f"no part between {name}: begin and {name}: end")
    return inside.partition("*/\n")[2]


def statements(text: str) -> list[str]:
    """Its declarations without comments, each on one line."""
    code = re.sub(r"\s+", " ", COMMENT.sub("", text))
    found, depth, begin = [], 0, 0
    for position, character in enumerate(code):
        depth += (character == "{") - (character == "}")
        if character == ";" and depth == 0:
            found.append(code[begin : position + 1].strip())
            begin = position + 1
    return found


def functions(text: str) -> list[Function]:
    """The functions that a piece of a header declares."""
    matches = (FUNCTION.match(statement) for statement in statements(text))
    return [Function(*match.groups()) for match in matches if match]


def core_functions() -> list[Function]:
    """Those of the public header."""
    return functions(between(HEADER.read_text("utf-8"), "cdef"))


def python_functions() -> list[Function]:
    """Those that take or give Python objects."""
    return functions(between(TABLE_HEADER.read_text("utf-8"), "python"))


def table() -> list[Function]:
    """All of them in the order of the table: what is in it keeps its place."""
    declared = {function.name: function for function in core_functions() + python_functions()}
    written = TABLE_HEADER.read_text("utf-8").partition("#define AN_CAPI_FUNCTIONS(each)")[2]
    placed = re.findall(r"each\((\w+)\)", written.partition("*/")[0])
    if gone := [name for name in placed if name not in declared]:
        raise ValueError(f"in the table, but not declared any more: {gone}")
    return [declared[name] for name in dict.fromkeys([*placed, *declared])]


def table_text() -> str:
    """The structure, and the list of its functions."""
    placed = table()
    members = [f"    {f.result}(*{f.name})({f.parameters});" for f in placed]
    names = " \\\n    ".join(f"each({f.name})" for f in placed)
    return f"""
enum {{ AN_CAPI_COUNT = {len(placed)} }}; /* functions in the table */

/* The package's; static. */
struct an_capi {{
    uint32_t abi;        /* AN_CAPI_ABI */
    uint32_t count;      /* AN_CAPI_COUNT */
    const char *version; /* the package's */
{chr(10).join(members)}
}};

/* clang-format off */
#define AN_CAPI_FUNCTIONS(each) \\
    {names}
/* clang-format on */

"""


def names_text() -> str:
    """A macro for each function, by which its name calls the one in the table."""
    return "".join(f"#define {f.name} (*an_capi->{f.name})\n" for f in table())


def replaced(text: str, name: str, new: str) -> str:
    """A header with another part between its comments of that name."""
    pattern = rf"(/\* {name}: begin[^\n]*\*/\n).*?(/\* {name}: end \*/)"
    return re.sub(pattern, lambda found: found[1] + new + found[2], text, count=1, flags=re.DOTALL)


def formed(text: str) -> str:
    """As clang-format has it, which stands beside this interpreter."""
    program = Path(sys.executable).parent / "clang-format"
    command = [str(program), "--assume-filename", str(TABLE_HEADER)]
    done = subprocess.run(command, input=text, stdout=subprocess.PIPE, text=True, check=True)
    return str(done.stdout)


def header_text() -> str:
    """The header with its table, not yet formed."""
    text = TABLE_HEADER.read_text("utf-8")
    return replaced(replaced(text, "table", table_text()), "names", names_text())


def _structure(name: str, body: str) -> list[str]:
    fields = [field.strip() for field in body.split(";") if field.strip()]
    shown = [field for field in fields if "reserved" not in field]
    return [f"ctypedef struct {name}:", *(f"    {field}" for field in shown or ["pass"])]


def _type_lines(statement: str) -> list[str]:
    """A type of the header as Cython has it; none for what is no type."""
    if match := re.fullmatch(r"typedef struct (\w+) \1;", statement):
        return [f"ctypedef struct {match[1]}:", "    pass"]
    if match := re.fullmatch(r"typedef struct (\w+) \{(.*)\} \1;", statement):
        return _structure(match[1], match[2])
    if match := re.fullmatch(r"enum (\w+) \{(.*)\};", statement):
        names = re.findall(r"\b(AN_\w+)", match[2])
        return [f"enum {match[1]}:", *(f"    {name}" for name in names)]
    if match := re.fullmatch(r"typedef (\w+ \w+);", statement):
        return [f"ctypedef {match[1]}"]
    return []


def _function_line(function: Function, python: bool) -> str:
    parameters = "" if function.parameters == "void" else function.parameters
    if not python:
        return f"{function.result}{function.name}({parameters})"
    raises = RAISES.get(function.result, " except NULL")
    result = function.result.replace("PyObject *", "object ")
    return f"{result}{function.name}({parameters.replace('PyObject *', 'object ')}){raises}"


def pxd_text() -> str:
    """The .pxd file."""
    header = HEADER.read_text("utf-8")
    errors = sorted(set(re.findall(r"^#define (AN_E[A-Z]+) ", header, re.MULTILINE)))
    parts = [["enum:", *(f"    {name}" for name in errors)]]
    parts += [_type_lines(statement) for statement in statements(between(header, "cdef"))]
    parts += [[_function_line(function, python=False) for function in core_functions()]]
    python = [
        ["ctypedef void (*an_py_handler)(an_completion *completion, void *context) noexcept"],
        ["int asyncio_native_import() except -1"],
        [_function_line(function, python=True) for function in python_functions()],
    ]
    return (
        PXD_HEAD
        + "\n\n".join(_indented(part) for part in parts if part)
        + '\n\ncdef extern from "asyncio_native_capi.h":\n'
        + "\n\n".join(_indented(part) for part in python)
        + "\n"
    )


def _indented(lines: list[str]) -> str:
    return "\n".join(f"    {line}" for line in lines)


def main() -> None:
    """Writes both files."""
    TABLE_HEADER.write_text(formed(header_text()), "utf-8")
    PXD.write_text(pxd_text(), "utf-8")


if __name__ == "__main__":
    main()
