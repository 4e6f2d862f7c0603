"""Builds the source package and the wheels for all systems on one Linux machine; checks them.

    python tools/wheels.py [--out DIR] [--base WHEEL] [--check] [TARGET ...]

Targets: sdist, manylinux_x86_64, manylinux_aarch64, musllinux_x86_64, musllinux_aarch64,
macosx_universal2, win_amd64, win_arm64; none means all. ``--check`` builds nothing and checks what
is in DIR, by whomever it was built; so does .github/workflows/release.yml.

``pip install -e '.[wheels]'`` brings the Python tools, apt-get those of LLVM (``llvm``) and make.
All wheels are for the stable ABI of CPython 3.11, hold the very same Python files, and differ in
the extension, which zig compiles (tools/cross.py). The Python files are those of the wheel that
setuptools makes from the source package here; ``--base`` gives such a wheel. The same sources give
the same bytes: times are SOURCE_DATE_EPOCH, or else that of the last commit.
"""

from __future__ import annotations

import argparse
import gzip
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import check_wheels
import cross
import liburing

ROOT = cross.ROOT
# A compiler keeps one processor busy, and much of a gigabyte of memory.
SIDE_BY_SIDE = min(4, os.cpu_count() or 1)


def set_epoch() -> None:
    """Sets SOURCE_DATE_EPOCH, unless it is set: to the last commit's time, if there is one."""
    if os.environ.get("SOURCE_DATE_EPOCH"):
        return
    ended = subprocess.run(
        ["git", "log", "-1", "--format=%ct"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    # 1980: the first time that a zip file can have.
    os.environ["SOURCE_DATE_EPOCH"] = ended.stdout.strip() or "315532800"


def normalize(archive: Path) -> None:
    """Writes a tar.gz anew, in order, with one time, and without the builder's user and rights."""
    epoch = int(os.environ["SOURCE_DATE_EPOCH"])
    content = io.BytesIO()
    with tarfile.open(archive) as old, tarfile.open(fileobj=content, mode="w") as new:
        for member in sorted(old.getmembers(), key=lambda member: member.name):
            member.mtime = epoch
            member.uid = member.gid = 0
            member.uname = member.gname = ""
            member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            member.pax_headers = {}
            new.addfile(member, old.extractfile(member) if member.isfile() else None)
    with archive.open("wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=epoch) as packed:
        packed.write(content.getvalue())


def build_sdist(folder: Path) -> Path:
    """The source package, of a copy: the checkout stays as it is."""
    copy = folder / "checkout"
    names = shutil.ignore_patterns(".git", ".venv*", "build*", "dist", "*.so", "*.egg-info")
    shutil.copytree(ROOT, copy, ignore=names)
    cross.run([sys.executable, "-m", "build", "-q", "--sdist", "--outdir", folder, copy])
    (archive,) = folder.glob("*.tar.gz")
    normalize(archive)
    return archive


def build_base(sdist: Path, folder: Path) -> Path:
    """The wheel that setuptools makes here from the source package alone."""
    source = folder / "source"
    source.mkdir()
    cross.run(["tar", "-xf", sdist, "-C", source, "--strip-components=1"])
    cross.run([sys.executable, "-m", "build", "-q", "--wheel", "--outdir", folder, source])
    (wheel,) = folder.glob("*.whl")
    return wheel


def assemble(target: cross.Target, base: Path, product: Path, folder: Path) -> Path:
    """The base wheel with the target's extension in place of its own, under the target's tag."""
    with zipfile.ZipFile(base) as opened:
        opened.extractall(folder / "content")
    package = folder / "content" / "asyncio_native"
    for path in [*package.glob("_native*.so"), *package.glob("_native*.pyd")]:
        path.unlink()
    shutil.copyfile(product, package / target.extension)
    (package / target.extension).chmod(0o755)
    (information,) = (folder / "content").glob("*.dist-info")
    lines = (information / "WHEEL").read_text().splitlines()
    lines = [line for line in lines if line and not line.startswith("Tag: ")]
    lines.append(f"Tag: cp311-abi3-{target.platform}")
    (information / "WHEEL").write_text("\n".join(lines) + "\n")
    cross.run([sys.executable, "-m", "wheel", "pack", "-d", folder, folder / "content"])
    (wheel,) = folder.glob("*.whl")
    return wheel


def repair(wheel: Path, out: Path) -> None:
    """Gives a Linux wheel the tag of the oldest systems that it runs on, by its symbols."""
    cross.run([sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", out, wheel])


def build_wheel(target: cross.Target, base: Path, source: Path, folder: Path, out: Path) -> str:
    """Builds one wheel; returns its target's name."""
    folder.mkdir()
    product = cross.compile_extension(target, source, folder / "extension")
    wheel = assemble(target, base, product, folder)
    if target.system == "linux":
        repair(wheel, out)
    else:
        shutil.copyfile(wheel, out / wheel.name)
    return target.name


def build(names: list[str], base: Path | None, out: Path) -> None:
    """Builds what is named into the folder."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="wheels-") as name:
        folder = Path(name)
        os.environ.setdefault("ZIG_GLOBAL_CACHE_DIR", str(folder / "zig"))
        os.environ.setdefault("ZIG_LOCAL_CACHE_DIR", str(folder / "zig"))
        targets = [cross.TARGETS[name] for name in names if name != "sdist"]
        sdist = None
        if "sdist" in names or (targets and base is None):
            sdist = build_sdist(folder)
            if "sdist" in names:
                shutil.copyfile(sdist, out / sdist.name)
        if not targets:
            return
        if base is None:
            assert sdist is not None
            base = build_base(sdist, folder)
        source = folder / "liburing"
        if any(target.system == "linux" for target in targets):
            liburing.fetch(source)
            print("with liburing", liburing.version(source), flush=True)
        with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
            waiting = [
                pool.submit(build_wheel, target, base, source, folder / target.name, out)
                for target in targets
            ]
            for built in waiting:
                print("built", built.result(), flush=True)


def main() -> int:
    """Does what the command line says and returns the exit status."""
    names = ["sdist", *cross.TARGETS]
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="default: dist")
    parser.add_argument("--base", type=Path, help="a wheel that setuptools made here")
    parser.add_argument("--check", action="store_true", help="only check what is there")
    parser.add_argument("target", nargs="*", help=", ".join(names))
    options = parser.parse_args()
    if unknown := set(options.target) - set(names):
        parser.error(f"unknown: {', '.join(sorted(unknown))} (there are: {', '.join(names)})")
    if not options.check:
        set_epoch()
        base = options.base.resolve() if options.base else None
        build(options.target or names, base, options.out.resolve())
    return check_wheels.check(options.out.resolve())


if __name__ == "__main__":
    sys.exit(main())
