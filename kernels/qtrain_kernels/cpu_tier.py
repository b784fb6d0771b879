"""Which implementation the CPU ops run: the best that this machine has, or the one that QTRAIN_CPU_KERNELS names.

    amx            the built C++ kernels, products on AMX tiles (int8, since Sapphire Rapids)
    avx512_vnni    the built C++ kernels, products by vpdpbusd
    avx2_vnni      the same in vectors of 256 bits (since Alder Lake, and Zen 5)
    avx2           quantization and epilogue built, products by ``torch._int_mm``
    torch          what torch ships: eager quantization and epilogue, ``torch._int_mm``

All give the same bits. The C++ kernels are built on first use (``cpp_build``). Where they cannot be, ``torch``
runs, and ``tier().reason`` says why; a tier that was asked for by name runs or raises.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

from .cpp_build import BuildError, load_library

VARIABLE = "QTRAIN_CPU_KERNELS"
TIERS = ("amx", "avx512_vnni", "avx2_vnni", "avx2", "torch")
BUILDS = {"amx": "avx512", "avx512_vnni": "avx512", "avx2_vnni": "avx2_vnni", "avx2": "avx2"}
"""The library of each tier that has one, in ``cpp_build.BUILDS``."""
# Flags of /proc/cpuinfo, which the kernel shows where the CPU has the instructions and the system saves their state
_AVX512 = {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"}
NEEDS = {
    "amx": _AVX512 | {"amx_tile", "amx_int8", "avx512_bf16"},
    "avx512_vnni": _AVX512,
    "avx2_vnni": {"avx2", "avx_vnni"},
    "avx2": {"avx2"},
}


@dataclass(frozen=True)
class Tier:
    """name: of TIERS. reason: why no better one; empty for the best. library: the C++ kernels, None for torch.
    multiplies: whether they have a GEMM; else torch's is used."""

    name: str
    reason: str
    library: ctypes.CDLL | None

    @property
    def multiplies(self) -> bool:
        return self.name not in ("avx2", "torch")

    def __str__(self) -> str:
        return self.name + (f" ({self.reason})" if self.reason else "")


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """The flags of the first CPU; empty where the system does not tell."""
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return frozenset(next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), []))


def tier() -> Tier:
    """The tier of this process. Raises ValueError for a QTRAIN_CPU_KERNELS that is no tier or that cannot run here."""
    return _tier(os.environ.get(VARIABLE) or "auto")


@functools.cache
def _tier(asked: str) -> Tier:
    if asked not in ("auto", *TIERS):
        raise ValueError(f"{VARIABLE}={asked!r}: allowed are auto, {', '.join(TIERS)}")
    if asked == "torch":
        return Tier("torch", f"{VARIABLE}=torch", None)
    reasons: list[str] = []
    for name in TIERS[:-1] if asked == "auto" else (asked,):
        reason, library = _try(name)
        if library is not None:
            return Tier(name, reasons[0] if reasons else "", library)
        reasons.append(reason)
    if asked != "auto":
        raise ValueError(f"{VARIABLE}={asked}: {reasons[0]}; take auto or torch")
    return Tier("torch", reasons[-1], None)


def _try(name: str) -> tuple[str, ctypes.CDLL | None]:
    """("", library), or (why not, None)."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"{name} needs Linux on x86-64, not {sys.platform} on {platform.machine()}", None
    missing = sorted(NEEDS[name] - cpu_flags())
    if missing:
        return f"this CPU has no {', '.join(missing)}", None
    try:
        library = load_library(BUILDS[name])
    except BuildError as error:
        return str(error), None
    if name == "amx" and library.qtrain_request_amx():
        return "the system does not grant AMX tiles", None
    return "", library
