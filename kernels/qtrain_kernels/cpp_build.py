"""Builds the C++ kernels in ``cpp/`` on first use: one compiler call, one shared library, kept in the user's cache.

The library's name holds a digest of everything it depends on (sources, flags, compiler, torch and its OpenMP), so a
changed source is never served by an old build. Builders hold a lock: of several processes one compiles and the others
wait; a reader sees a whole library or none. Plain C symbols, called through ctypes, which needs neither Python's nor
torch's headers.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

SOURCES = Path(__file__).parent / "cpp"
COMPILERS = ("g++", "clang++")
FLAGS = (
    "-O3",
    "-std=c++17",
    "-shared",
    "-fPIC",
    "-fopenmp",
    "-ffp-contract=off",  # a fused multiply-add rounds once where the reference rounds twice
    "-fno-trapping-math",  # nobody asks for floating-point exceptions; loops with a comparison become vectors
)
_AVX512 = "avx512f avx512bw avx512vl avx512dq avx512vnni avx512bf16 amx-tile amx-int8"
BUILDS = {"avx512": ("avx512", _AVX512), "avx2_vnni": ("avx2", "avx2 avxvnni"), "avx2": ("avx2", "avx2")}
"""Name of a library -> the folder of its sources and the instructions that a compiler may use in all of them."""


class BuildError(RuntimeError):
    """The kernels cannot be built here; the message says why and what to do."""


def find_compiler() -> str | None:
    """The path of $CXX, g++ or clang++, whichever is found first."""
    names = [os.environ.get("CXX"), *COMPILERS]
    return next((path for name in names if name and (path := shutil.which(name))), None)


def cache_folder() -> Path:
    """$QTRAIN_CACHE/kernels, by default ~/.cache/qtrain/kernels."""
    root = os.environ.get("QTRAIN_CACHE")
    return (Path(root).expanduser() if root else Path.home() / ".cache" / "qtrain") / "kernels"


def _sources(build: str) -> list[Path]:
    return sorted((SOURCES / BUILDS[build][0]).glob("*.cpp"))


def _flags(build: str) -> list[str]:
    return [*FLAGS, *(f"-m{feature}" for feature in BUILDS[build][1].split())]


def _digest(compiler: str, build: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    state = hashlib.sha256("\0".join([*_flags(build), compiler, version, torch.__version__]).encode())
    for source in [*_sources(build), *sorted(SOURCES.rglob("*.h"))]:
        state.update(source.name.encode() + b"\0" + source.read_bytes())
    return state.hexdigest()[:16]


@functools.cache
def load_library(build: str) -> ctypes.CDLL:
    """The kernels of one of ``BUILDS``, compiled now where they are not in the cache (seconds, with a line on standard
    error). Raises BuildError without a compiler, where it fails, and where the cache cannot be written."""
    compiler = find_compiler()
    if compiler is None:
        raise BuildError("no C++ compiler ($CXX, g++ or clang++) is found; install g++")
    library = cache_folder() / f"qtrain_cpu_{build}_{_digest(compiler, build)}.so"
    try:
        if not library.exists():
            library.parent.mkdir(parents=True, exist_ok=True)
            with _locked(library.parent / "lock"):
                if not library.exists():  # another process may have built it meanwhile
                    _compile(compiler, build, library)
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise BuildError(f"{library}: {error}; QTRAIN_CACHE moves the folder") from error


def _torch_openmp() -> list[str]:
    """The OpenMP runtime that comes with torch, by whatever name: a second one would keep threads of its own, which wait
    for work on the same cores. Where torch brings none, both use the system's."""
    return [str(path) for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))[:1]]


class _locked:
    """An advisory lock, which the kernel gives up when its process dies."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        import fcntl

        self.file = self.path.open("w")
        fcntl.flock(self.file, fcntl.LOCK_EX)

    def __exit__(self, *exception: object) -> None:
        self.file.close()


def _compile(compiler: str, build: str, library: Path) -> None:
    print(f"qtrain: building its CPU kernels with {compiler}, once ({library})", file=sys.stderr, flush=True)
    temporary = library.with_name(f".{library.name}.{os.getpid()}.tmp")
    command = [compiler, *_flags(build), *map(str, _sources(build)), *_torch_openmp(), "-o", str(temporary)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            errors = [
                line for line in done.stderr.splitlines() if "error" in line
            ] or done.stderr.splitlines()
            raise BuildError(f"{compiler} does not build the CPU kernels: {' / '.join(errors[:3])}")
        os.replace(temporary, library)
    finally:
        temporary.unlink(missing_ok=True)
