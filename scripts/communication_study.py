"""Does training notice gradients and weights that travel in low bits? Paired seeds, in a plain loop without Lightning.

    python scripts/communication_study.py --processes 2 --steps 150 --seeds 3
    python scripts/communication_study.py --optimizer sgd --arms exact int4_group128 int2_group128

trains a small GPT on the bytes of Python's standard library by every arm, and prints the last validation losses, what each
arm lost to the exact one (per seed: the same initial weights, the same windows), and the bytes that left a process. A few
CPU minutes; what it shows is in docs/communication.md.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from qtrain.communication.low_bit import LowBitCommunication
from qtrain.communication.settings import CommunicationSettings
from qtrain.models.gpt import GPT, GPTConfig
from qtrain.nn.inventory import linear_layers
from qtrain.training.strategy import shard

ARMS: dict[str, dict[str, Any]] = {
    "exact": {},
    "int8_group128, feedback": {"reduce_gradients": "int8_group128"},
    "int4_group128, feedback": {"reduce_gradients": "int4_group128"},
    "int4_group128, none": {"reduce_gradients": "int4_group128", "error_feedback": None},
    "int4_group128_sr, none": {"reduce_gradients": "int4_group128_sr", "error_feedback": None},
    "int2_group128, feedback": {"reduce_gradients": "int2_group128"},
    "int2_group128, none": {"reduce_gradients": "int2_group128", "error_feedback": None},
    "fsdp2 gather int8_group128": {"gather_weights": "int8_group128"},
}
SEQUENCE, BATCH = 64, 8
LR = {"adamw": 3e-3, "sgd": 0.3}


def tokens() -> Tensor:
    """Two million bytes of source text."""
    held = b"".join(path.read_bytes() for path in sorted(Path(os.__file__).parent.glob("*.py")))[:2_000_000]
    return torch.frombuffer(bytearray(held), dtype=torch.uint8).long()


def windows(text: Tensor, generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
    starts = torch.randint(len(text) - SEQUENCE - 1, (count,), generator=generator)
    held = torch.stack([text[s : s + SEQUENCE + 1] for s in starts.tolist()])
    return held[:, :-1], held[:, 1:]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def make_optimizer(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    if kind == "sgd":
        return torch.optim.SGD(model.parameters(), lr=LR[kind], momentum=0.9)
    return torch.optim.AdamW(model.parameters(), lr=LR[kind], weight_decay=0.1)


def train(arm: str, seed: int, steps: int, text: Tensor, kind: str) -> tuple[float, dict[str, int]]:
    """(validation loss of the last weights, bytes of the last step)."""
    settings, rank, world = ARMS[arm], dist.get_rank(), dist.get_world_size()
    config = GPTConfig(vocab_size=256, sequence_tokens=SEQUENCE, layers=2, heads=2, width=64)
    model = config.build(seed=seed)
    assert isinstance(model, GPT)
    communication = None
    if settings:
        names = [f"{name}.weight" for name in linear_layers(model)]
        communication = LowBitCommunication(CommunicationSettings(**settings), seed=seed, gathered=names)
    run: nn.Module = model
    if arm.startswith("fsdp2"):
        shard(model, init_device_mesh("cpu", (world,)))
        assert communication is not None
        communication.attach_fsdp2(model)
    else:
        run = DistributedDataParallel(model)
        if communication is not None:
            communication.attach_ddp(run, model)
    optimizer = make_optimizer(kind, model)
    split = len(text) * 9 // 10
    draw = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LR[kind] * min(1.0, (step + 1) / 20) * (1 - step / steps)
        mine = [part.chunk(world)[rank] for part in windows(text[:split], draw, BATCH * world)]
        if communication is not None:
            communication.begin(step, 0)
        optimizer.zero_grad()
        loss_of(run, (mine[0], mine[1])).backward()
        optimizer.step()
    row = {} if communication is None else communication.traffic.row()
    model.eval()
    with torch.no_grad():
        held_out = windows(text[split:], torch.Generator().manual_seed(0), 256)
        return float(loss_of(model, held_out)), row


def work(rank: int, store: str, arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    world = arguments.processes
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    text, exact = tokens(), []
    for arm in (a for a in ARMS if a.startswith(tuple(arguments.arms))):
        results = [
            train(arm, seed, arguments.steps, text, arguments.optimizer) for seed in range(arguments.seeds)
        ]
        losses = [loss for loss, _ in results]
        exact = exact or losses
        lost = [100 * (a / b - 1) for a, b in zip(losses, exact, strict=True)]
        row = results[0][1]
        sent = (
            f"{row['communication/bytes_sent'] / row['communication/bytes_float32']:6.1%}"
            if row
            else " 100  %"
        )
        if rank == 0:
            shown = "  ".join(f"{loss:.4f}" for loss in losses)
            print(
                f"{arm:28} {shown}   {statistics.fmean(lost):+.2f} %  ({min(lost):+.2f} .. {max(lost):+.2f})   {sent}",
                flush=True,
            )
    dist.barrier()
    dist.destroy_process_group()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("processes", 2), ("steps", 150), ("seeds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--optimizer", choices=tuple(LR), default="adamw")
    parser.add_argument("--arms", nargs="+", default=[""], help="beginnings of their names; exact first")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        context = get_context("spawn")
        workers = [
            context.Process(target=work, args=(rank, str(Path(folder) / "store"), arguments))
            for rank in range(arguments.processes)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    return max(abs(worker.exitcode or 0) for worker in workers)


if __name__ == "__main__":
    sys.exit(main())
