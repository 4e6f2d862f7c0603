"""The pages of docs/ are true: their Python runs, their C compiles, their links lead somewhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import asyncio_native as an
import pytest
import readme
from capi_support import compile_cython, needs_cython
from support import check_python

DOCS = readme.README.parent / "docs"
ROOT = DOCS.parent
PAGES = sorted(DOCS.rglob("*.md"))
COMPILER = shutil.which("cc")


def with_blocks(language: str) -> list[str]:
    """The pages with code of that language, by their path in docs/."""
    return [page.relative_to(DOCS).as_posix() for page in PAGES if readme.blocks(language, page)]


#: Pages whose programs are for POSIX alone, and why.
POSIX_ONLY = {
    "howto/free-threads.md": "several listeners on one port: SO_REUSEPORT, which Windows has not",
    "explanation/backends.md": "opens a port on poll, which Windows has not",
    "howto/inside-asyncio.md": "watches the port by its descriptor, which Windows has not",
    "howto/processes.md": "there is no fork on Windows",
}


def programs() -> list[Any]:
    """The pages with Python, but for those that need a module of Cython's, for pytest."""
    return [
        pytest.param(name, marks=pytest.mark.posix(POSIX_ONLY[name]))
        if name in POSIX_ONLY
        else name
        for name in with_blocks("python")
        if name not in with_blocks("cython")
    ]


def program(page: Path) -> str:
    """The Python blocks of a page as one program, each on the lines where it stands in the page."""
    lines = []
    inside = False
    for line in page.read_text("utf-8").splitlines():
        if line.startswith("```"):
            inside = line == "```python"
            lines.append("")
        else:
            lines.append(line if inside else "")
    return "\n".join(lines)


@pytest.mark.parametrize("name", programs())
def test_the_python_blocks_of_a_page_are_one_program_that_prints_its_text_blocks(
    name: str, backend: str
) -> None:
    page = DOCS / name
    assert check_python(program(page), backend) == "".join(readme.blocks("text", page))


@needs_cython
def test_the_command_of_the_cython_page_builds_its_module(tmp_path: Path) -> None:
    page = DOCS / "howto" / "cython.md"
    lines = "".join(readme.blocks("sh", page)).splitlines()
    (command,) = (line for line in lines if line.startswith("CFLAGS="))
    Path(tmp_path, "counting.pyx").write_text("\n".join(readme.blocks("cython", page)), "utf-8")
    environment = dict(os.environ)
    # `python` and `cythonize` of the environment that runs the tests, whether activated or not.
    environment["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    environment["PYTHONPATH"] = str(Path(an.__file__).parent.parent)  # the install may be editable
    subprocess.run(
        ["sh", "-ec", f"{command} && python -c 'import counting; print(counting.Counter)'"],
        check=True,
        cwd=tmp_path,
        # Where it is set, the working folder would not be looked into.
        env={name: value for name, value in environment.items() if name != "PYTHONSAFEPATH"},
        timeout=120,
    )


@needs_cython
@pytest.mark.parametrize("name", with_blocks("cython"))
def test_the_cython_blocks_of_a_page_are_the_module_that_its_python_blocks_import(
    name: str, backend: str, tmp_path: Path
) -> None:
    page = DOCS / name
    (module,) = set(re.findall(r"^from (\w+) import (?!annot)", program(page), re.MULTILINE))
    source = tmp_path / f"{module}.pyx"
    source.write_text("\n".join(readme.blocks("cython", page)), "utf-8")
    compile_cython(source, tmp_path)
    find = f"import sys; sys.path.insert(0, {str(tmp_path)!r})"
    output = check_python(find + program(page), backend)
    assert output == "".join(readme.blocks("text", page))


@pytest.mark.skipif(COMPILER is None, reason="there is no C compiler `cc`")
@pytest.mark.parametrize("name", with_blocks("c"))
def test_the_c_blocks_of_a_page_compile_as_one_file(name: str, tmp_path: Path) -> None:
    source = tmp_path / "page.c"
    source.write_text("\n".join(readme.blocks("c", DOCS / name)), "utf-8")
    assert COMPILER is not None
    options = ["-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
    options += [f"-I{an.get_include()}", f"-I{sysconfig.get_path('include')}"]
    command = [COMPILER, *options, str(source)]
    compiled = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert compiled.returncode == 0, compiled.stderr


def test_there_is_code_of_both_languages() -> None:
    assert len(with_blocks("python")) >= 10
    assert len(with_blocks("c")) >= 2
    assert len(with_blocks("cython")) >= 1
    for page in PAGES:
        fences = re.findall(r"^ *```(.*)$", page.read_text("utf-8"), re.MULTILINE)
        assert len(fences) % 2 == 0, page
        assert set(fences[::2]) <= {"python", "c", "cython", "text", "sh", "{toctree}"}, page


def test_links_between_pages_lead_to_pages() -> None:
    count = 0
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text("utf-8")):
            assert "://" in link or (page.parent / link).is_file(), f"{page}: {link}"
            count += 1
    assert count >= 20


def test_files_that_the_pages_name_are_there() -> None:
    for page in PAGES:
        text = page.read_text("utf-8")
        for name in re.findall(r"`((?:csrc|examples|tests|tools|\.ci)/[\w./]*)`", text):
            assert Path(ROOT, name).exists(), f"{page}: {name}"


def test_every_public_name_of_the_module_is_in_the_reference() -> None:
    text = (DOCS / "reference" / "python.rst").read_text("utf-8")
    told = set(re.findall(r"^\.\. (?:auto|py:)\w+:: (\w+)", text, re.MULTILINE))
    # The members of OperationKind are names of the module as well.
    assert told - {"asyncio_native"} == set(an.__all__) - {kind.name for kind in an.OperationKind}


def test_every_section_of_the_header_is_in_the_reference() -> None:
    header = (ROOT / "csrc" / "include" / "asyncio_native.h").read_text("utf-8")
    text = (DOCS / "reference" / "c.rst").read_text("utf-8")
    sections = re.findall(r"^/\* ---- ", header, re.MULTILINE)
    # Beside them the errors, and what the header for extensions adds.
    assert text.count(".. c:autodoc:: ") == len(sections) + 2
