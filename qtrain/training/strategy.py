"""How Lightning spreads a run over the processes that are connected."""

from __future__ import annotations

from datetime import timedelta

import torch
from lightning.pytorch.plugins.environments import ClusterEnvironment
from lightning.pytorch.strategies import DDPStrategy, Strategy

from . import processes
from .processes import ProcessSettings


class ConnectedProcesses(ClusterEnvironment):
    """Tells Lightning that the processes run already, and which of them this is. Lightning's own environments read
    variables that a batch system sets also where it did not start the processes."""

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        raise RuntimeError("the processes are connected already")

    @property
    def main_port(self) -> int:
        raise RuntimeError("the processes are connected already")

    @staticmethod
    def detect() -> bool:
        return torch.distributed.is_initialized()

    def world_size(self) -> int:
        return processes.world_size()

    def set_world_size(self, size: int) -> None:
        assert size == processes.world_size(), (size, processes.world_size())

    def global_rank(self) -> int:
        return processes.rank()

    def set_global_rank(self, rank: int) -> None:
        assert rank == processes.rank(), (rank, processes.rank())

    def local_rank(self) -> int:
        return processes.local_rank()

    def node_rank(self) -> int:
        return processes.node_rank()


def make_strategy(settings: ProcessSettings) -> Strategy | str:
    """Lightning's strategy for a run whose processes are connected (``processes.connected``)."""
    if settings.sharding == "none":
        return "auto"
    timeout = timedelta(seconds=settings.timeout_seconds)
    # Every parameter takes part in every step. Buffers, where a model has some, are rank 0's (torch's default)
    return DDPStrategy(timeout=timeout, find_unused_parameters=False)
