"""The public C header as Hawkmoth reads it: a file for each section, comments before declarations.

The header has plain comments, some behind what they tell of; Hawkmoth takes ``/** ... */`` before
it. The part between the header's markers is plain C that needs no other header but for a few types,
so the pages are made without a compiler's own headers.
"""

from __future__ import annotations

import re
from pathlib import Path

TYPES = """\
typedef unsigned long size_t;
typedef long intptr_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long int64_t;
typedef unsigned long uint64_t;
"""
"""What <stddef.h> and <stdint.h> declare of what the header uses."""

PYTHON_TYPES = "typedef struct _object PyObject;\n"
"""And <Python.h> of what the header for extensions uses."""

PYTHON_OBJECTS = re.compile(r"/\* python: begin \*/(.*)/\* python: end \*/", re.DOTALL)
DECLARATIONS = re.compile(r"/\* cdef: begin \*/(.*)/\* cdef: end \*/", re.DOTALL)
TITLE = re.compile(r"^/\* ---- (.+?) -+ \*/$", re.MULTILINE)
ERROR = re.compile(r"^#define AN_E\w+ E\w+ +/\* .+? \*/$", re.MULTILINE)

#: A member, an enumerator or a macro with its comment behind it, on one line or more.
BEHIND = re.compile(
    r"^(?P<indent> *)(?P<code>[^\s/*][^/\n]*?) */\* (?P<text>[^/]*?) ?\*/$", re.MULTILINE
)
#: One that its name explains. What is reserved stays out of the pages.
PLAIN = re.compile(r"(?<!\*/\n)^    (?!.*\breserved\b)(\w[^/*()\n]*[;,\d])$", re.MULTILINE)
COMMENT = re.compile(r"/\* (.*?)\*/", re.DOTALL)
OURS = re.compile(r"\b(an_\w+|AN_[A-Z_]+)\b(?!\.\.)")


def sections(header: str) -> dict[str, str]:
    """The text of each section by its title; the error numbers are one of their own."""
    (declarations,) = DECLARATIONS.findall(header)
    _, *parts = TITLE.split(declarations)
    found = dict(zip(parts[::2], parts[1::2], strict=True))
    return {"errors": "\n".join(ERROR.findall(header)), **found}


def file_name(title: str) -> str:
    """The name of a section's file."""
    return title.split(": no ", maxsplit=1)[0].replace(": ", "-").replace(" ", "-") + ".h"


def documented(section: str) -> str:
    """A section with its comments in Hawkmoth's form and place."""
    section = BEHIND.sub(r"\g<indent>/* \g<text> */\n\g<indent>\g<code>", section)
    section = PLAIN.sub(r"    /* \\ */\n    \1", section)
    return COMMENT.sub(lambda found: f"/** {_marked_up(found[1])}*/", section)


def _marked_up(text: str) -> str:
    """A comment as reStructuredText: our names are links, what means something else is escaped."""
    text = re.sub(r"\s*\n\s*(\* )?", " ", text)
    text = re.sub(r"([*|])", r"\\\1", text)
    text = re.sub(r"`(\w+)`", r"``\1``", text)
    return OURS.sub(r":c:expr:`\1`", text)


def write_sections(header: Path, extensions: Path, folder: Path) -> None:
    """Writes each section's file into a folder; the header for extensions is one of them."""
    folder.mkdir(parents=True, exist_ok=True)
    found = sections(header.read_text("utf-8"))
    for title, section in found.items():
        types = TYPES if title == "types" else TYPES + found["types"]
        (folder / file_name(title)).write_text(f"{types}\n{documented(section)}\n", "utf-8")
    (objects,) = PYTHON_OBJECTS.findall(extensions.read_text("utf-8"))
    objects = TITLE.sub("", objects)
    types = TYPES + found["types"] + PYTHON_TYPES
    (folder / "python-objects.h").write_text(f"{types}\n{documented(objects)}\n", "utf-8")
