"""ARCHITECTURE.md is true: its reactor works, its links and files are there."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import readme

ROOT = readme.ARCHITECTURE.parent
COMPILER = shutil.which("cc")

#: What a reactor and the test of reactors stand on.
SOURCES = (
    "csrc/os/posix.c",
    "csrc/os/linux.c",
    "csrc/backend/epoll.c",
    "csrc/backend/poll.c",
    "tests/c/test_reactor.c",
)


@pytest.mark.skipif(COMPILER is None, reason="there is no C compiler `cc`")
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="it is built from the files of Linux")
def test_the_reactor_of_ones_own_passes_the_test_of_reactors(tmp_path: Path) -> None:
    (source,) = readme.blocks("c", readme.ARCHITECTURE)
    path = tmp_path / "select.c"
    path.write_text(source, "utf-8")
    assert COMPILER is not None
    program = tmp_path / "test_reactor"
    options = ["-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-pthread"]
    options += ["-Icsrc", "-Icsrc/include", "-Itests/c", "-DAN_REACTOR_OF_YOURS=an_reactor_select"]
    build = [COMPILER, *options, *SOURCES, str(path), "-o", str(program)]
    built = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([program], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("reactor select\n")


def test_every_reactor_has_the_functions_of_the_interface_in_their_order() -> None:
    header = (ROOT / "csrc" / "reactor.h").read_text("utf-8")
    struct = r"struct an_reactor_interface \{(.*?)^\};"
    (interface,) = re.findall(struct, header, re.DOTALL | re.MULTILINE)
    members = re.findall(r"\(\*(\w+)\)", interface)
    assert members[:2] == ["open", "close"]
    sources = {"select": readme.blocks("c", readme.ARCHITECTURE)[0]}
    for name in ("epoll", "kqueue", "poll"):
        sources[name] = (ROOT / "csrc" / "backend" / f"{name}.c").read_text("utf-8")
    for name, source in sources.items():
        (table,) = re.findall(rf"an_reactor_{name} = \{{(.*?)\}};", source, re.DOTALL)
        functions = dict(re.findall(r"\.(\w+) = (\w+),", table))
        # `close` stands before `open`, which uses it where it fails.
        order = [m for m in ("close", "open", *members[2:]) if functions.get(m, "NULL") != "NULL"]
        places = [source.index(f" {functions[m]}(struct an_reactor") for m in order]
        assert places == sorted(places), f"{name}: {order}"


def test_every_reactor_is_a_small_file_that_names_no_operation() -> None:
    for name in ("epoll", "kqueue", "poll"):
        source = (ROOT / "csrc" / "backend" / f"{name}.c").read_text("utf-8")
        assert source.count("\n") <= 250, name
        code = re.sub(r"/\*.*?\*/", "", source, flags=re.DOTALL)
        assert "operation" not in code, name
        assert re.findall(r'#include "(.*)"', code) == ["reactor.h"], name


def test_files_and_links_that_it_names_are_there() -> None:
    text = readme.ARCHITECTURE.read_text("utf-8")
    links = re.findall(r"\]\(([^)#]+)\)", text)
    named = re.findall(r"`((?:csrc|tests|tools|asyncio_native|\.ci)/[\w./]*)`", text)
    assert links
    assert len(named) >= 10
    for path in (*links, *named):
        if not path.startswith("asyncio_native/"):  # the package is installed elsewhere
            assert Path(ROOT, path).exists(), path
