"""How Sphinx makes the pages; CONTRIBUTING.md has the command."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
HEADER = ROOT / "csrc" / "include" / "asyncio_native.h"
EXTENSIONS_HEADER = HEADER.with_name("asyncio_native_capi.h")
HEADER_SECTIONS = DOCS / "_build" / "header"

# The binding whose classes are in Python, with signatures and types. The other has the same.
os.environ["ASYNCIO_NATIVE_BINDING"] = "cffi"

sys.path.insert(0, str(DOCS))
import header  # noqa: E402

project = "asyncio-native"
author = "asyncio-native contributors"
release = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "hawkmoth"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3
smartquotes_action = "D"  # dashes only: what is quoted is a value more often than a phrase

html_theme = "furo"
html_title = f"{project} {release}"
html_copy_source = False
html_show_copyright = False
html_static_path = ["static"]
html_css_files = ["pages.css"]
pygments_style = "friendly"

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_type_aliases = {"Address": "Address"}
python_use_unqualified_type_names = True
# Docstrings have names and values between single backticks; see `literal_unless_a_name`.
default_role = "py:obj"

# The sections stand alone, no compiler is asked for its folders.
hawkmoth_autoconf: list[str] = []
hawkmoth_root = str(HEADER_SECTIONS)

nitpick_ignore_regex = [
    # The standard library and C's own types: the pages stand alone, without other projects'.
    ("py:.*", r"(Any|Self|Buffer|Iterable|Mapping|Literal|Protocol)"),
    ("py:.*", r"(bool|bytes|float|int|list|str|tuple|object|None|socket|PathLike|IntEnum|OSError)"),
    ("py:.*", r"(collections|enum|os|socket|stdlib|types|typing)\..*"),
    # What the page on Python says in words.
    ("py:.*", r"Address|asyncio_native\._\w+\.HasFileno"),
    ("c:identifier", r"(u?int\d+_t|size_t|intptr_t|sockaddr|PyObject)"),
]

PARAMETER = r"(?:(?<=\. )|^)((?:{names})(?:, (?:{names}))*): "
"""Where a docstring begins to tell of a parameter ("timeout: seconds."), also within a line."""


def fields_of_parameters(names: list[str], text: list[str]) -> list[str]:
    """A paragraph of a docstring, with what it says of parameters as fields.

    What follows "Raises" at the end is no parameter's any more.
    """
    pattern = re.compile(PARAMETER.format(names="|".join(map(re.escape, names))))
    first, *parts = pattern.split(" ".join(line.strip() for line in text))
    lines, behind = [first.strip(), ""], []
    for name, sentences in zip(parts[::2], parts[1::2], strict=True):
        told, raises, rest = sentences.partition("Raises ")
        lines += [f":param {one}: {told.strip()}" for one in name.split(", ")]
        if raises:
            behind += ["", raises + rest, ""]
    return [*lines, *behind, ""]


def fields_of_attributes(owner: type, text: list[str]) -> list[str]:
    """A paragraph that tells of attributes, one a line ("kind: what it is"), each by itself.

    A line that is indented goes on with the attribute before it.
    """
    lines: list[str] = []
    for line in text:
        name, _, told = line.partition(": ")
        if line.startswith(" "):
            lines.append(f"   {line.strip()}")
        else:
            annotation = str(owner.__annotations__[name]).replace(" | Any", "")
            lines += [f".. py:attribute:: {name}", f"   :type: {annotation}", "", f"   {told}"]
    return [*lines, ""]


def paragraphs(lines: list[str]) -> list[list[str]]:
    """A docstring's paragraphs, each as its lines."""
    found: list[list[str]] = [[]]
    for line in lines:
        if line.strip():
            found[-1].append(line)
        elif found[-1]:
            found.append([])
    return [paragraph for paragraph in found if paragraph]


def docstring_fields(
    _app: Any, kind: str, name: str, thing: Any, _options: Any, lines: list[str]
) -> None:
    """Gives Sphinx as fields what our docstrings say in a sentence for each parameter."""
    if kind not in ("class", "exception", "function", "method") or "::" in "".join(lines):
        return
    annotations = inspect.get_annotations(thing) if inspect.isclass(thing) else {}
    try:
        parameters = [name for name in inspect.signature(thing).parameters if name != "self"]
    except (TypeError, ValueError):
        parameters = []
    of_parameter = re.compile(PARAMETER.format(names="|".join(parameters) or "$"), re.MULTILINE)
    made: list[str] = []
    for text in paragraphs(lines):
        told_of = text[0].partition(": ")[0]
        if told_of in annotations:
            made += fields_of_attributes(thing, text)
        elif of_parameter.search("\n".join(text)):
            made += fields_of_parameters(parameters, text)
        else:
            made += [*text, ""]
    lines[:] = made


def literal_unless_a_name(_app: Any, _env: Any, node: Any, shown: Any) -> Any:
    """What stands between single backticks and is no name of ours stays a piece of code."""
    return shown if node.get("reftype") == "obj" else None


def write_header_sections(_app: Any) -> None:
    """Hawkmoth reads files."""
    header.write_sections(HEADER, EXTENSIONS_HEADER, HEADER_SECTIONS)


def read_sources(_app: Any) -> None:
    """Lets Sphinx find our classes' sources, for the order of members and their docstrings.

    It looks for them in the module that they say they are of, which is the package.
    """
    analyzer = importlib.import_module("sphinx.pycode").ModuleAnalyzer
    module = importlib.import_module("asyncio_native")
    package = analyzer.for_module("asyncio_native")
    package.analyze()
    for public in filter(inspect.isclass, vars(module).values()):
        for offset, written in enumerate(public.__mro__):
            functions = filter(inspect.isfunction, vars(written).values())
            source = next((function.__module__ for function in functions), "")
            if not source.startswith("asyncio_native."):
                continue
            part = analyzer.for_module(source)
            part.analyze()
            for name, place in part.tagorder.items():
                owner, _, member = name.partition(".")
                if owner == written.__name__:
                    inherited = f"{public.__name__}.{member}"
                    package.tagorder.setdefault(inherited, place + offset * 1000)
            for (owner, member), docs in part.attr_docs.items():
                if owner == written.__name__:
                    package.attr_docs.setdefault((public.__name__, member), docs)


def setup(app: Any) -> dict[str, bool]:
    """Connects the above."""
    app.connect("builder-inited", write_header_sections)
    app.connect("builder-inited", read_sources)
    app.connect("autodoc-process-docstring", docstring_fields)
    app.connect("missing-reference", literal_unless_a_name)
    return {"parallel_read_safe": True}
