"""A process that ``launcher.launch`` started: reads from standard input what it has to do, and does it.

It ends with its parent, also where that is killed by SIGKILL and can tell nobody: on Linux the kernel then kills it
(prctl PR_SET_PDEATHSIG). Nothing heavy is imported before that is arranged.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import re
import signal
import sys
import traceback
from collections.abc import Mapping
from typing import Any

from qtrain import interrupts

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# What gloo says where the process at the other end has died; that one is named by the parent
_LOST = re.compile(r"gloo/transport/.*(reset|closed) by peer|gloo/transport/.*Broken pipe", re.DOTALL)


def end_with(parent: int) -> None:
    """From now on this process is killed when its parent, process ``parent``, ends. Elsewhere than on Linux
    nothing is arranged: there, killing the parent by SIGKILL leaves the children."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            error = ctypes.get_errno()
            raise OSError(error, f"prctl(PR_SET_PDEATHSIG): {os.strerror(error)}")
    if os.getppid() != parent:  # it ended before
        os.kill(os.getpid(), signal.SIGKILL)


def work(task: Mapping[str, Any]) -> int:
    """Calls ``task["entry"]`` (``package.module:function``) on ``task["config"]``; returns the exit status."""
    end_with(task["parent"])
    module, _, function = task["entry"].partition(":")
    try:
        with interrupts.listen():
            return int(getattr(importlib.import_module(module), function)(task["config"]))
    except interrupts.Interrupted as stop:
        code = interrupts.exit_code(stop.signum)
        interrupts.end_soon(code)
        return code
    except Exception as error:
        if _LOST.search(str(error)):
            print(f"the connection to another process of the run is lost ({error})", file=sys.stderr)
        else:
            traceback.print_exc()
        return 1
