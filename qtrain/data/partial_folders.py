"""Folders under construction: ``.NAME.XXXX.partial`` beside NAME, with a lock file ``.NAME.XXXX.lock``.

A writer holds an flock on its lock file. The kernel gives it up when the process ends, however it ends, so a lock
file that can be locked belongs to a writer that is gone, and what it left is removed by the next one. No age is
looked at: a clock may jump, and a living writer may be slow.

Each step leaves a state that the next writer understands: the lock file comes before the folder and goes after it.
A lock seen free between its creation and its locking may be removed by another process; the writer notices, and
takes a new one. Some file systems of several machines keep flocks to each machine: the file names its writer's
machine, and only the same one (equal boot, or equal host name after a restart) removes anything.
"""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_PARTIAL, _LOCK = ".partial", ".lock"
# What file systems without flock answer.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


def _machine() -> tuple[str, str]:
    """(id of this boot of the kernel, or "-" where there is none; host name)."""
    try:
        boot = _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        boot = "-"
    return boot, platform.node() or "-"


def _is_this_machine(written: str) -> bool:
    theirs = written.split()
    return len(theirs) == 2 and any(a == b != "-" for a, b in zip(theirs, _machine(), strict=True))


def _still_there(handle: int, path: Path) -> bool:
    """Whether ``path`` is the file behind the descriptor ``handle``."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _new_lock(directory: Path) -> tuple[int, Path]:
    """(descriptor, path) of a new lock file, locked where the file system can lock.

    Where it cannot, no other process can lock the file either, and none will remove what it stands for.
    """
    while True:
        handle, name = tempfile.mkstemp(suffix=_LOCK, prefix=f".{directory.name}.", dir=directory.parent)
        path = Path(name)
        try:
            os.write(handle, " ".join(_machine()).encode())
            os.fsync(handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
            if _still_there(handle, path):
                return handle, path
        except BaseException:
            path.unlink(missing_ok=True)
            os.close(handle)
            raise
        os.close(handle)


@contextmanager
def partial_folder(directory: Path) -> Iterator[Path]:
    """A new empty folder beside ``directory``, whose parent exists. It may be renamed; else it is removed."""
    handle, lock = _new_lock(directory)
    partial = lock.with_suffix(_PARTIAL)
    try:
        partial.mkdir()
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):  # on a full or failing disk the reason is already on its way
            lock.unlink(missing_ok=True)
        os.close(handle)


def remove_stale(directory: Path) -> list[Path]:
    """Removes the partial folders of ``directory`` whose writers are gone. Returns those that it removed.

    What cannot be removed (a folder of others, a read-only disk) stays: nothing reads it.
    """
    # mkstemp's eight characters hold no dot: `.d.x.ABCDEFGH.lock` is of `d.x`, not of `d`
    mine = re.compile(rf"\.{re.escape(directory.name)}\.[^.]+{re.escape(_LOCK)}")
    removed = []
    try:
        names = sorted(name for name in os.listdir(directory.parent) if mine.fullmatch(name))
    except OSError:
        return []
    for name in names:
        lock = directory.parent / name
        try:
            handle = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            if _remove_unless_alive(handle, lock):
                removed.append(lock.with_suffix(_PARTIAL))
        finally:
            os.close(handle)
    return removed


def _remove_unless_alive(handle: int, lock: Path) -> bool:
    """Whether a folder was removed. ``handle``: the lock file, opened."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    # Published, or removed by another process, after it was listed
    if not _still_there(handle, lock):
        return False
    partial = lock.with_suffix(_PARTIAL)
    existed = partial.is_dir()
    # A writer without a folder loses nothing but its lock file
    if existed and not _is_this_machine(os.pread(handle, 4096, 0).decode(errors="replace")):
        return False
    shutil.rmtree(partial, ignore_errors=True)
    if partial.exists():
        return False
    with suppress(OSError):
        lock.unlink(missing_ok=True)
    return existed


def sync_folder(folder: Path) -> None:
    """Has the disk keep the names in ``folder``: without it a power cut may undo a rename. Raises OSError."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
