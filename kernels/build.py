"""Compiles a C++ kernel that ships as source, once per machine, and keeps the library in the user's cache directory.

The file name carries a digest of everything the machine code depends on (source, compiler and its version, flags, the
processor's instruction sets, jaxlib, whose headers are compiled in), so a change of any of them builds anew and nothing
stale is ever loaded. The library appears under its name by an atomic rename: processes that build at the same time do
the work twice and never see half a file.
"""

import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jaxlib

COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-O3", "-std=c++17", "-march=native", "-ffp-contract=fast", "-fPIC", "-shared", "-pthread")
HEADERS = tuple(Path(__file__).with_name(name) for name in ("simd.h", "threads.h", "tile.h"))
COMPILE_TIMEOUT_S = 300


class BuildError(RuntimeError):
    """The kernel cannot be had on this machine; the message is one line that says why."""


def shared_library(source: Path, *, compiler: str | None = None, cache: Path | None = None) -> Path:
    """The compiled form of `source`, built if it is not in the cache yet.

    Args:
      source: a C++ file that may include XLA's FFI headers and `HEADERS`.
      compiler: name or path of the compiler; None tries `c++`, `g++`, `clang++`.
      cache: directory of compiled kernels; None is the platform's per-user cache directory. Where it cannot be written,
        or others can write there, a private temporary directory takes its place.

    Raises:
      BuildError: no compiler, or it failed.
    """
    if sys.platform == "win32":
        raise BuildError("compiled CPU kernels are not supported on Windows")
    found = next((path for path in map(shutil.which, [compiler] if compiler else COMPILERS) if path), None)
    if found is None:
        raise BuildError(f"no C++ compiler found (looked for {compiler or ', '.join(COMPILERS)})")
    folder = _writable(cache if cache is not None else _user_cache())
    library = folder / f"{source.stem}-{_digest(source, found)}.so"
    if not library.is_file():
        _compile(found, source, library)
    return library


def _compile(compiler: str, source: Path, library: Path) -> None:
    handle, partial = tempfile.mkstemp(prefix=library.stem, suffix=".partial", dir=library.parent)
    os.close(handle)
    try:
        command = [
            compiler,
            *FLAGS,
            "-I",
            str(HEADERS[0].parent),
            "-isystem",
            jax.ffi.include_dir(),
            str(source),
            "-o",
            partial,
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise BuildError(f"{compiler} did not run: {' '.join(str(error).split())}") from error
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no message"]
            raise BuildError(f"{compiler} failed: {next((line for line in lines if 'error' in line), lines[0])}")
        os.replace(partial, library)
    finally:
        Path(partial).unlink(missing_ok=True)


def _digest(source: Path, compiler: str) -> str:
    try:
        version = subprocess.run(
            [compiler, "--version"], capture_output=True, text=True, timeout=60, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{compiler} did not run: {' '.join(str(error).split())}") from error
    parts = (
        source.read_text(),
        *(header.read_text() for header in HEADERS),
        compiler,
        version,
        " ".join(FLAGS),
        _processor(),
        jaxlib.__version__,
    )
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _processor() -> str:
    """What `-march=native` looks at: a home directory may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()} {platform.platform()}"
    wanted = ("flags", "Features", "model name", "CPU part")
    return platform.machine() + "".join(sorted({line for line in lines if line.startswith(wanted)}))


def _user_cache() -> Path:
    home = Path(os.path.expanduser("~"))
    return home / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "jaxstack" / "kernels"


def _writable(folder: Path) -> Path:
    """`folder` if this user, and nobody else, can write there, since code is loaded from it; else a temporary one."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
        private = status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if private and os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="jaxstack-kernels-"))
