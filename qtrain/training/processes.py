"""The processes of a run: how many there are, which one this is, and the few things that they agree on.

    world size = trainer.devices (processes a machine) * trainer.num_nodes (machines)

``qtrain train`` starts the processes of one machine itself (``launcher``). Where torchrun or srun started them,
each is told its place by environment variables (RANK, WORLD_SIZE, ...) and starts none. With one process everything
here is trivial and no process group is made, but for FSDP2, which shards over a group of one as well.

Collectives must be called by all ranks, in the same order. gloo carries them between CPUs, NCCL between GPUs.
"""

from __future__ import annotations

import atexit
import os
import re
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

from qtrain.communication.settings import CommunicationSettings

STRATEGIES = ("auto", "ddp", "fsdp2")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ProcessSettings:
    """Of the ``trainer`` part of a configuration, what is not an argument of Lightning's Trainer alone.

    devices: processes a machine, one a GPU where there are some. num_nodes: machines. strategy: ``ddp`` (every
    process holds the model), ``fsdp2`` (every process holds its rows of each parameter, gradient and optimizer
    state), or ``auto``: ddp where there are several processes. timeout_seconds: how long one process may wait for
    the others, the first preparation of the data included. gather_weights, reduce_gradients, error_feedback: what
    travels between them in low bits (``CommunicationSettings``).

    Raises ValueError, naming the value, what is allowed and the remedy.
    """

    devices: int = 1
    num_nodes: int = 1
    strategy: str = "auto"
    timeout_seconds: float = 1800
    gather_weights: Any = None
    reduce_gradients: Any = None
    error_feedback: str | None = "float32"

    def __post_init__(self) -> None:
        for name in ("devices", "num_nodes"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"trainer.{name}={value!r}: must be a whole number, 1 or more")
        if self.strategy not in STRATEGIES:
            raise ValueError(
                f"trainer.strategy={self.strategy!r}: allowed are {', '.join(STRATEGIES)}; Lightning's other "
                "strategies gather neither quantized optimizer states nor the census"
            )
        if isinstance(self.timeout_seconds, bool) or not isinstance(self.timeout_seconds, int | float):
            raise ValueError(f"trainer.timeout_seconds={self.timeout_seconds!r}: must be a number of seconds")
        if not self.timeout_seconds > 0:
            raise ValueError(f"trainer.timeout_seconds={self.timeout_seconds!r}: must be positive")
        self._check_communication()

    def _check_communication(self) -> None:
        """What travels in low bits has somewhere to go."""
        alone = "one process sends nothing; set trainer.devices to 2 or more, or leave it null"
        low_bit = self.communication
        if low_bit.gather_weights is not None and self.sharding != "fsdp2":
            why = (
                alone
                if self.world_size == 1
                else "under ddp every process holds the weights whole and gathers none; take trainer.strategy=fsdp2, or "
                "trainer.reduce_gradients for what ddp sends"
            )
            raise ValueError(f"trainer.gather_weights={self.gather_weights!r}: {why}")
        for name in ("gather_weights", "reduce_gradients"):
            if getattr(low_bit, name) is not None and self.world_size == 1:
                raise ValueError(f"trainer.{name}={getattr(self, name)!r}: {alone}")

    @staticmethod
    def of(trainer: Mapping[str, Any]) -> ProcessSettings:
        """The settings among the keys of a configuration's ``trainer``."""
        known = [f.name for f in fields(ProcessSettings)]
        return ProcessSettings(**{name: trainer[name] for name in known if name in trainer})

    @staticmethod
    def others(trainer: Mapping[str, Any]) -> dict[str, Any]:
        """The other keys: arguments of Lightning's Trainer."""
        known = [f.name for f in fields(ProcessSettings)]
        return {name: value for name, value in trainer.items() if name not in known}

    @property
    def communication(self) -> CommunicationSettings:
        return CommunicationSettings(
            gather_weights=self.gather_weights,
            reduce_gradients=self.reduce_gradients,
            error_feedback=self.error_feedback,
        )

    @property
    def world_size(self) -> int:
        return self.devices * self.num_nodes

    @property
    def sharding(self) -> str:
        """``none``, ``ddp`` or ``fsdp2``: what ``strategy`` comes to."""
        if self.strategy == "fsdp2":
            return "fsdp2"
        return "ddp" if self.world_size > 1 else "none"

    def check(self, device: str) -> None:
        """Whether they can run here, on ``cpu`` or ``cuda``; raises ValueError where not."""
        if device == "cuda" and self.devices > torch.cuda.device_count():
            raise ValueError(
                f"trainer.devices={self.devices}, and torch sees {torch.cuda.device_count()} CUDA device(s); set "
                "trainer.devices to that, or device=cpu"
            )
        started = started_externally()
        if started is not None and started != self.world_size:
            raise ValueError(
                f"trainer.devices={self.devices} times trainer.num_nodes={self.num_nodes} makes {self.world_size} "
                f"process(es), and torchrun or srun started {started} (WORLD_SIZE): set trainer.devices to the "
                "processes of a machine and trainer.num_nodes to the machines"
            )
        if started is None and self.num_nodes > 1:
            raise ValueError(
                f"trainer.num_nodes={self.num_nodes}: qtrain starts the processes of one machine; start it on every "
                "machine by torchrun or srun, which set WORLD_SIZE, or set trainer.num_nodes=1"
            )

    @property
    def starts_others(self) -> bool:
        """Whether this process has to start the processes of the run."""
        return self.devices > 1 and started_externally() is None


def started_externally(environ: MutableMapping[str, str] = os.environ) -> int | None:
    """The world size that whoever started this process set; None where it was started by itself.

    A task of SLURM's srun that is one of several gets the variables that torchrun would have set.
    """
    if "WORLD_SIZE" not in environ and int(environ.get("SLURM_NTASKS", 1)) > 1 and "SLURM_STEP_ID" in environ:
        environ.update(_of_slurm(environ))
    return int(environ["WORLD_SIZE"]) if "WORLD_SIZE" in environ else None


def _of_slurm(environ: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables for a task of a SLURM step (its names: srun's manual, "output environment variables").

    The first host of the step listens, on a port that follows from job and step, so that all tasks name the same.
    """
    hosts = environ["SLURM_STEP_NODELIST"]
    # a,b or node[03-05,09],other: the first name, or the prefix with the first number
    first = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", hosts)
    if first is None:
        raise ValueError(
            f"SLURM_STEP_NODELIST={hosts!r}: no host is named there; set MASTER_ADDR and WORLD_SIZE"
        )
    found = {
        "RANK": environ["SLURM_PROCID"],
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "GROUP_RANK": environ["SLURM_NODEID"],
        "WORLD_SIZE": environ["SLURM_NTASKS"],
        "MASTER_ADDR": first[1] + (first[2] or ""),
        # Ports from 15000 to 25000: below those that Linux gives out by itself
        "MASTER_PORT": str(
            15000 + (int(environ["SLURM_JOB_ID"]) * 7 + int(environ["SLURM_STEP_ID"])) % 10000
        ),
    }
    return {name: environ.get(name, value) for name, value in found.items()}


def rank() -> int:
    """Of this process among all of the run: 0 where there is one."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size() -> int:
    """Processes of the run that are connected."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def local_rank() -> int:
    """Of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def node_rank() -> int:
    """Of this machine among those of the run."""
    return int(os.environ.get("GROUP_RANK", 0))


@contextmanager
def connected(settings: ProcessSettings, device: str) -> Iterator[None]:
    """The process group of a run on ``cpu`` or ``cuda``; all ranks leave it together.

    A group of several processes stays for the next run in the same processes, until they end.
    """
    if settings.sharding != "none":
        _init_processes(settings, device)
    try:
        yield
        # Not where the run raised: the others may wait for this process elsewhere
        barrier()
    finally:
        if settings.world_size == 1:
            _disconnect()


def _init_processes(settings: ProcessSettings, device: str) -> None:
    backend, place = "gloo", None
    if device == "cuda":
        backend, place = "nccl", torch.device("cuda", local_rank())
        torch.cuda.set_device(place)
    if distributed.is_initialized():
        if distributed.get_backend() != backend:
            raise RuntimeError(
                f"the processes are connected by {distributed.get_backend()}, and device={device} needs {backend}: "
                "start the runs on the two devices by two commands"
            )
        return
    timeout = timedelta(seconds=settings.timeout_seconds)
    if settings.world_size == 1:
        store = distributed.HashStore()
        distributed.init_process_group(
            backend, timeout=timeout, store=store, rank=0, world_size=1, device_id=place
        )
    else:
        distributed.init_process_group(backend, timeout=timeout, device_id=place)
        atexit.register(_disconnect)


def _disconnect() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()


def barrier() -> None:
    """Wait until all ranks are here."""
    if world_size() > 1:
        on_gpu = distributed.get_backend() == "nccl"
        distributed.barrier(device_ids=[torch.cuda.current_device()] if on_gpu else None)


def broadcast(value: T) -> T:
    """Rank 0's ``value`` on every rank. Of containers, strings and numbers; it travels pickled, between processes
    of one run."""
    if world_size() == 1:
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def any_rank(flag: bool) -> bool:
    """Whether ``flag`` is set on one rank at least."""
    return bool(summed(torch.tensor(float(flag))) > 0)


def summed(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of ``tensor`` over the ranks, on the CPU. NaN and infinities stay."""
    if world_size() == 1:
        return tensor.cpu()
    on_gpu = distributed.get_backend() == "nccl"
    total = tensor.detach().to("cuda" if on_gpu else "cpu", copy=True)
    distributed.all_reduce(total)
    return total.cpu()


class RankZeroFailed(RuntimeError):
    """What rank 0 did alone raised; it reports that itself."""


def by_rank_zero(action: Callable[[], T]) -> T:
    """``action()`` on rank 0 alone; what it returns, on every rank. Where it raises, it raises on rank 0, and
    RankZeroFailed on the others."""
    if world_size() == 1:
        return action()
    if rank() != 0:
        done, value = broadcast((False, None))
        if not done:
            raise RankZeroFailed(str(value))
        return value  # type: ignore[return-value]
    try:
        result = action()
    except BaseException as error:
        broadcast((False, f"{type(error).__name__}: {error}"))
        raise
    broadcast((True, result))
    return result


def rank_zero_first(action: Callable[[], T]) -> T:
    """``action()`` on every rank, on rank 0 before the others: what it leaves on disk, they find. Raises as
    ``by_rank_zero``."""
    made: list[T] = []
    by_rank_zero(lambda: made.append(action()))
    return made[0] if made else action()
