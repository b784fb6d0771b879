"""How a run is spread over the processes that are connected.

ddp     every process holds everything; gradients are averaged once a step
fsdp2   every process holds its rows (dim 0) of each parameter, gradient and optimizer state; a block's parameters
        are gathered before it computes, and its gradient is averaged and cut up after each micro-batch

Either way a checkpoint is that of one process: whole tensors under the same names, gathered one at a time, written by
rank 0 and read by every rank. So a run resumes exactly under another strategy or on another number of processes.

No mixed precision of FSDP's: the parameters that a block gathers are the float32 masters, from which W is quantized;
autocast computes in bfloat16 as it does in one process.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.environments import ClusterEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.strategies.parallel import ParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from qtrain.nn.inventory import linear_layers

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


class FSDP2Strategy(ModelParallelStrategy):
    """Lightning's strategy for a model that ``configure_model`` sharded with ``shard``; checkpoints go through the
    CheckpointIO, as those of one process do. Optimizers need ``full_state_dict``."""

    def __init__(self, settings: ProcessSettings) -> None:
        super().__init__(
            data_parallel_size=settings.world_size,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            timeout=timedelta(seconds=settings.timeout_seconds),
        )

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Of whole tensors on the CPU, on rank 0; empty on the others. All ranks call it."""
        assert self.lightning_module is not None
        return gathered_state_dict(self.lightning_module)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        load_whole_state_dict(self.lightning_module, checkpoint["state_dict"])

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        return optimizer.full_state_dict()  # type: ignore[attr-defined]

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(state)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        ParallelStrategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return ParallelStrategy.load_checkpoint(self, checkpoint_path, weights_only)

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True


class LowBitDDPStrategy(DDPStrategy):
    """DDP whose gradients are reduced as the module's ``communication`` says."""

    def configure_ddp(self) -> None:
        super().configure_ddp()
        module: Any = self.lightning_module
        assert isinstance(self.model, DistributedDataParallel)
        module.communication.attach_ddp(self.model, module.model)


def make_strategy(settings: ProcessSettings) -> Strategy | str:
    """Lightning's strategy for a run whose processes are connected (``processes.connected``)."""
    if settings.sharding == "none":
        return "auto"
    if settings.sharding == "fsdp2":
        return FSDP2Strategy(settings)
    timeout = timedelta(seconds=settings.timeout_seconds)
    kind = DDPStrategy if settings.communication.reduce_gradients is None else LowBitDDPStrategy
    # Every parameter takes part in every step. Buffers, where a model has some, are rank 0's (torch's default)
    return kind(timeout=timeout, find_unused_parameters=False)


def shard(model: Any, mesh: DeviceMesh) -> None:
    """Cuts the parameters of ``model``, a ``LanguageModel``, up over the one-dimensional ``mesh``, in place, blocks by
    themselves and the rest together. After surgery, and before the optimizer takes the parameters."""
    for block in model.repeated_blocks():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def compile_for(model: Any, sharding: str) -> None:
    """Compiles ``model`` in place, parameters keep their names; under FSDP2 before ``shard``.

    Whole, but under FSDP2 block by block: what gathers and frees a block's parameters is Python, and stays around
    the compiled code (the ``forward`` of each block, and of each linear layer outside of them) and out of it.
    """
    dynamo: Any = torch._dynamo.config
    if sharding != "fsdp2":
        if sharding == "ddp":
            # It would cut the graph into buckets, and cannot where a quantized layer's own backward is in it
            dynamo.optimize_ddp = False
        model.compile()
        return
    blocks = list(model.repeated_blocks())
    inside = {id(module) for block in blocks for module in block.modules()}
    parts = [*blocks, *(m for m in linear_layers(model).values() if id(m) not in inside)]
    # The blocks' code is one; where they draw random bits, which go by a layer's name, each may be compiled anew
    dynamo.recompile_limit = max(dynamo.recompile_limit, 4 * len(parts))
    for part in parts:
        part.forward = torch.compile(part.forward)  # type: ignore[method-assign]


def reshard(module: nn.Module) -> None:
    """Back to the rows: after a forward without a backward the outermost parameters are still whole."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def gathered_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """``module.state_dict()`` with every DTensor whole and on the CPU, on rank 0; empty on the others. All ranks call
    it; each holds one whole tensor at a time. Tied parameters stay one tensor."""
    reshard(module)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    whole: dict[int, Tensor] = {}
    found = {}
    for name, value in module.state_dict().items():
        key = id(parameters.get(name, value))
        if key not in whole:
            full = value.full_tensor() if isinstance(value, DTensor) else value
            # A copy: what was gathered is a part of something longer where the rows do not divide evenly
            whole[key] = full.to("cpu", copy=True) if processes.rank() == 0 else torch.empty(0)
        found[name] = whole[key]
    return found if processes.rank() == 0 else {}


def load_whole_state_dict(module: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Gives every parameter of ``module`` its rows of the whole tensors in ``saved``, which every rank has read.

    Raises ValueError where names or shapes differ.
    """
    reshard(module)
    own = module.state_dict()
    different = sorted(set(own) ^ set(saved))
    if different:
        raise ValueError(
            f"the checkpoint and the model do not both have {', '.join(different[:5])}: it is another model's"
        )
    for name, value in own.items():
        if value.shape != saved[name].shape:
            raise ValueError(
                f"{name} is {tuple(saved[name].shape)} in the checkpoint and {tuple(value.shape)} in the model"
            )
        if isinstance(value, DTensor):
            full = saved[name].to(value.device)
            rows = distribute_tensor(full, value.device_mesh, value.placements, src_data_rank=None)
            value.to_local().copy_(rows.to_local())
        else:
            value.copy_(saved[name])
