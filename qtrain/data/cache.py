"""Where prepared data are kept, and the checksums of files that need not be read again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from qtrain.data.file_stamps import FileStamp

_READ_BYTES = 1 << 22


def cache_root() -> Path:
    """``$QTRAIN_CACHE`` or, without it, ``~/.cache/qtrain/data``."""
    given = os.environ.get("QTRAIN_CACHE")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "qtrain" / "data"


def sha256_of(path: Path) -> str:
    """Of the file's bytes; about 1 GB/s."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _stamp(path: Path) -> FileStamp:
    with path.open("rb") as file:
        return FileStamp.of(file.fileno())


class RememberedDigests:
    """sha256 of a set of files, in ``cache_root()/digests``: a file is read again only where its inode, size or times
    differ from when it was read, or were too young then to show a change.

    What cannot be written there is computed anew the next time; nothing else depends on it.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        names = json.dumps(sorted(map(str, paths)))
        name = hashlib.sha256(names.encode()).hexdigest()[:32]
        self._file = cache_root() / "digests" / f"{name}.json"

    def _known(self) -> dict[str, tuple[FileStamp, str]]:
        try:
            raw = json.loads(self._file.read_text(encoding="utf-8"))
            return {path: (FileStamp(*stamp), digest) for path, (stamp, digest) in raw.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def get(self, compute: Callable[[Path], str] = sha256_of) -> list[str]:
        """The digests, in the order of the paths. Raises OSError where a file cannot be read."""
        known = self._known()
        found: dict[str, tuple[FileStamp, str]] = {}
        for path in self.paths:
            before = _stamp(path)
            entry = known.get(str(path))
            if entry is not None and entry[0].shows(before):
                found[str(path)] = entry
            else:
                # The stamp from before: what is written while it is read will show
                found[str(path)] = (before, compute(path))
        if found != known:
            self._remember(found)
        return [found[str(path)][1] for path in self.paths]

    def _remember(self, found: dict[str, tuple[FileStamp, str]]) -> None:
        partial = self._file.with_suffix(f".{os.getpid()}.partial")
        try:
            if not self._file.parent.is_dir():
                os.makedirs(self._file.parent, exist_ok=True)
            with open(partial, "w", encoding="utf-8") as file:
                json.dump({p: (stamp.as_list(), digest) for p, (stamp, digest) in found.items()}, file)
            os.replace(partial, self._file)
        except OSError:
            return
