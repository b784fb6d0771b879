"""Memory of a CPU run: what a step frees is kept by the process for the next step.

glibc maps every large tensor anew and gives it back to the system when it is freed (mallopt(3): M_MMAP_THRESHOLD,
M_TRIM_THRESHOLD); each of its pages then costs a fault and is zeroed again in every step: 25,000 faults and a 15th of the
time of a step of gpt_10m on two cores.
"""

from __future__ import annotations

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h
_NEVER = -1  # as M_TRIM_THRESHOLD: nothing goes back to the system
TOP_PAD_BYTES = 64 << 20  # the heap grows by as much at a time


def keep_freed_memory() -> bool:
    """Tells glibc's malloc to serve all sizes from its heap and to keep what is freed. Returns whether it did: not where the C
    library has no mallopt, and not where the environment sets one of MALLOC_MMAP_MAX_, MALLOC_MMAP_THRESHOLD_,
    MALLOC_TRIM_THRESHOLD_ and MALLOC_TOP_PAD_, whose user knows better."""
    if not sys.platform.startswith("linux") or any(
        f"MALLOC_{name}_" in os.environ
        for name in ("MMAP_MAX", "MMAP_THRESHOLD", "TRIM_THRESHOLD", "TOP_PAD")
    ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _NEVER), (_M_TOP_PAD, TOP_PAD_BYTES))
    answers = [mallopt(name, value) for name, value in settings]
    return all(answers)
