"""Bytes that really leave a process: two of them train on this machine with gloo, and the kernel says what their TCP
sockets sent (``TCP_INFO``, Linux 4.1 and later)."""

from __future__ import annotations

import os
import socket
import struct
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .trace import token_loss

_BYTES_ACKED = 120  # offset of tcpi_bytes_acked in struct tcp_info (include/uapi/linux/tcp.h)
PROCESSES = 2


def sent_bytes() -> int:
    """By all TCP sockets of this process since they were opened, as far as it has arrived; nothing is counted twice.
    Raises RuntimeError where the kernel does not say."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            duplicate = os.dup(int(name))
        except OSError:
            continue
        try:
            connection = socket.socket(fileno=duplicate)
        except OSError:
            os.close(duplicate)
            continue
        with connection:
            try:
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            except OSError:
                continue
        if len(info) < _BYTES_ACKED + 8:
            raise RuntimeError("this kernel's TCP_INFO has no bytes_acked: Linux 4.1 or later is needed")
        total += struct.unpack_from("=Q", info, _BYTES_ACKED)[0]
    return total


def _wrapped(model: Any, strategy: str) -> Any:
    if strategy == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (PROCESSES,))
    for block in model.repeated_blocks():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _process(rank: int, folder: str, config: Any, sequences: int, tokens: int) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    found = {}
    for strategy in ("ddp", "fsdp2"):
        model = _wrapped(config.build(seed=0), strategy)
        batch = torch.zeros(sequences, tokens + 1, dtype=torch.int64)
        counts = []
        for _ in range(3):  # ddp rebuilds its buckets after the first
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(batch[:, :-1])
            token_loss(logits, batch[:, 1:]).backward()
            dist.barrier()
            counts.append(sent_bytes())
        found[strategy] = counts[-1] - counts[-2]
    if rank == 0:
        Path(folder, "found").write_text(repr(found), encoding="utf-8")
    dist.destroy_process_group()


def wire_bytes(config: Any, sequences: int, tokens: int) -> dict[str, int]:
    """Bytes that the first of two processes sends in a step, by strategy: ``ddp``, ``fsdp2``. sequences: a process."""
    import ast

    with tempfile.TemporaryDirectory(prefix="qtrain-wire-") as folder:
        torch.multiprocessing.spawn(_process, args=(folder, config, sequences, tokens), nprocs=PROCESSES)
        found: dict[str, int] = ast.literal_eval(Path(folder, "found").read_text(encoding="utf-8"))
    return found
