"""Whether a file is still what it was, by what its inode says: no byte is read."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field

# Time stamps may be this coarse (2 s on FAT, 4 ms in most kernels): one as young as that when it was recorded would
# not show a change within the same tick.
_TICK_NS = 2_000_000_000


@dataclass(frozen=True)
class FileStamp:
    """What a file's inode says when its bytes are checked; equal stamps mean equal bytes if ``settled``.

    The system sets the change time itself, and to anything: a touch, a copy over it, a rename. So a stamp that
    differs says "look again", and what the clock said in between (a jump, a date in the future) decides nothing.
    """

    device: int
    inode: int
    size: int
    modified_ns: int
    changed_ns: int
    settled: bool = field(compare=False)

    @staticmethod
    def of(handle: int) -> FileStamp:
        now, s = time.time_ns(), os.fstat(handle)
        settled = abs(now - s.st_ctime_ns) > _TICK_NS
        return FileStamp(s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns, settled)

    def shows(self, other: FileStamp) -> bool:
        """Whether a file stamped ``other`` has the bytes that it had at this stamp."""
        return self.settled and self == other

    def as_list(self) -> list[int | bool]:
        """The fields in their order, for JSON."""
        return [self.device, self.inode, self.size, self.modified_ns, self.changed_ns, self.settled]
