"""What an offline W&B run holds: wandb's own messages, in the log format of LevelDB."""

from __future__ import annotations

import json
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# LevelDB's log format: blocks of 32 KiB, records of crc, length and kind (1 whole, 2 first, 3 middle, 4 last); wandb
# puts seven bytes of its own before the first
_BLOCK, _HEADER, _PREFIX = 1 << 15, 7, 7
_WHOLE, _LAST = 1, 4


def _messages(data: bytes) -> Iterator[bytes]:
    place, message = _PREFIX, b""
    while place + _HEADER <= len(data):
        left = _BLOCK - place % _BLOCK
        crc, length, kind = struct.unpack("<IHB", data[place : place + _HEADER])
        if left < _HEADER or not (length or kind):
            place += left
            continue
        part = data[place + _HEADER : place + _HEADER + length]
        if len(part) < length:
            return  # cut: the program died
        assert zlib.crc32(bytes([kind]) + part) & 0xFFFFFFFF == crc
        place, message = place + _HEADER + length, message + part
        if kind in (_WHOLE, _LAST):
            yield message
            message = b""


def records(log: Path, wait_seconds: float = 60.0) -> list[Any]:
    """All records of a run that has finished. wandb's process writes the last of them after it has said so."""
    from wandb.proto import wandb_internal_pb2

    end = time.monotonic() + wait_seconds
    while True:
        found = []
        for message in _messages(log.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(message)
            found.append(record)
        if found and found[-1].HasField("exit"):
            return found
        assert time.monotonic() < end, f"{log} has no last record"
        time.sleep(0.05)


def read_run(log: Path) -> tuple[str, list[dict[str, Any]]]:
    """The run's id, and its rows with their ``_step``."""
    run_id, rows = "", []
    for record in records(log):
        if record.HasField("run"):
            run_id = record.run.run_id
        if record.HasField("history"):
            items = {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            rows.append({"_step": record.history.step.num, **items})
    return run_id, rows
