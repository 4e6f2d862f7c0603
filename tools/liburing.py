"""Builds liburing, for wheels with the io_uring backend; installs it for the compiler CC.

    python tools/liburing.py fetch SOURCE
    python tools/liburing.py build SOURCE PREFIX

``fetch`` lays its source into the folder SOURCE: on Debian and Ubuntu by apt-get from the system's
archive, which verifies it (without root); elsewhere by git, a commit that is named here. ``build``
installs the static library and the headers into PREFIX, for ``ASYNCIO_NATIVE_LIBURING=PREFIX``. CC
may be a cross compiler; AR is the archiver for its objects.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FIRST = (2, 3)  # the first version with all that csrc/backend/ring.c calls
REPOSITORY = "https://github.com/axboe/liburing"
COMMIT = "4915f2af869876d892a1f591ee2c21be21c6fc5c"  # the tag liburing-2.3


def source_entries() -> str:
    """The system's own package archives, as archives of sources, in apt's deb822 form."""
    texts = [path.read_text() for path in Path("/etc/apt/sources.list.d").glob("*.sources")]
    entries = "\n\n".join(texts)
    for path in [Path("/etc/apt/sources.list"), *Path("/etc/apt/sources.list.d").glob("*.list")]:
        for line in path.read_text().splitlines() if path.exists() else []:
            if found := re.match(r"deb\s+(?:\[[^]]*\]\s+)?(\S+)\s+(\S+)\s+(.+)", line):
                uri, suite, components = found.groups()
                entries += f"\n\nTypes: deb\nURIs: {uri}\nSuites: {suite}\nComponents: {components}"
    return re.sub(r"(?m)^Types:.*$", "Types: deb-src", entries) + "\n"


def fetch(source: Path) -> None:
    """Lays liburing's source into the folder."""
    if shutil.which("apt-get"):
        fetch_from_archive(source)
    else:
        fetch_from_repository(source, REPOSITORY)


def fetch_from_repository(source: Path, repository: str) -> None:
    """Takes the one commit, by its own number, which no one can give to another."""
    git = ["git", "-C", str(source)]
    source.mkdir(parents=True)
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "fetch", "-q", "--depth=1", repository, COMMIT], check=True)
    subprocess.run([*git, "checkout", "-q", "FETCH_HEAD"], check=True)


def fetch_from_archive(source: Path) -> None:
    """Unpacks the source package of this Debian or Ubuntu."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "lists" / "partial").mkdir(parents=True)
        (folder / "parts").mkdir()
        (folder / "parts" / "sources.sources").write_text(source_entries())
        settings = [
            f"Dir::Etc::SourceParts={folder / 'parts'}",
            "Dir::Etc::SourceList=/dev/null",
            f"Dir::State::Lists={folder / 'lists'}",
            f"Dir::Cache={folder}",
            # Else root drops its rights, and cannot write into a folder of its own.
            "APT::Sandbox::User=root",
        ]
        command = ["apt-get", "-qq", *(word for setting in settings for word in ("-o", setting))]
        subprocess.run([*command, "update"], check=True, stdout=subprocess.DEVNULL)
        subprocess.run(
            [*command, "source", "--download-only", "liburing"],
            check=True,
            cwd=folder,
            stdout=subprocess.DEVNULL,
        )
        archives = folder.glob("liburing_*.orig.tar.*")
        (archive,) = (path for path in archives if path.suffix != ".asc")  # not its signature
        source.mkdir(parents=True)
        subprocess.run(
            ["tar", "-xf", archive, "-C", source.resolve(), "--strip-components=1"], check=True
        )


def version(source: Path) -> str:
    """The version that the source says it is."""
    text = (source / "liburing.spec").read_text()
    found = re.search(r"(?m)^Version:\s*([0-9.]+)", text)
    if found is None:
        raise RuntimeError(f"{source} has no version in liburing.spec")
    if tuple(int(number) for number in found[1].split(".")) < FIRST:
        raise RuntimeError(f"liburing {found[1]} is too old: 2.3 or later is needed")
    return found[1]


def build(source: Path, prefix: Path, compiler: str, archiver: str) -> None:
    """Installs the static library and the headers into the prefix."""
    version(source)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "liburing"
        shutil.copytree(source, folder)
        arguments = [f"--cc={compiler}", f"--prefix={prefix.resolve()}"]
        subprocess.run(
            ["sh", "./configure", *arguments], cwd=folder, check=True, stdout=subprocess.DEVNULL
        )
        variables = [
            f"CC={compiler}",
            f"AR={archiver}",
            "RANLIB=true",  # ar has made the index
            # It becomes part of a shared library, which does not export it.
            "CFLAGS=-O2 -fPIC -g0 -fvisibility=hidden",
            "ENABLE_SHARED=0",
        ]
        for target in ("liburing.a", "install"):
            subprocess.run(
                ["make", "-s", "-C", "src", target, *variables],
                cwd=folder,
                check=True,
                capture_output=True,
                text=True,
            )


def main(arguments: list[str]) -> int:
    """Does what the command line says and returns the exit status."""
    try:
        match arguments:
            case ["fetch", source]:
                fetch(Path(source))
                print("liburing", version(Path(source)))
            case ["build", source, prefix]:
                tools = os.environ.get("CC", "cc"), os.environ.get("AR", "ar")
                build(Path(source), Path(prefix), *tools)
            case _:
                print(__doc__, file=sys.stderr)
                return 2
    except subprocess.CalledProcessError as error:
        print(error, error.stdout or "", error.stderr or "", sep="\n", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
