"""What the processes of test_reduce, test_gather and test_exchange do.

    python tests/communication/communicating.py FOLDER

forks 2, then 4 gloo processes. Every process leaves what it saw in ``FOLDER/WORLD-RANK.pt``. The loss of a step is linear
in the parameters, so that the gradient of each process is a tensor that the tests know.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from qtrain.communication.low_bit import LowBitCommunication
from qtrain.communication.settings import CommunicationSettings

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from forked_ranks import fork_ranks

WORLDS = (2, 4)
# Rows that do not divide, fewer rows than processes, a vector, more than two dimensions, groups that do not divide
SHAPES = {"inner.odd": (7, 33), "inner.few": (3, 200), "bias": (5,), "deep": (6, 4, 50), "tall": (257, 5)}
STEPS = 3
SPECS = ["int8_group128", "int4_row", "int8_group128_sr", "mxfp8"]
LONG, LONG_STEPS = "int4_row", 20
DESCENT_STEPS, DESCENT_LR = 100, 0.05


class Linear(nn.Module):
    """Parameters of SHAPES, two of them in a module of their own; forward(t) = sum over all of p * t."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.inner = nn.Module()
        for name, shape in SHAPES.items():
            owner = self.inner if name.startswith("inner.") else self
            owner.register_parameter(
                name.split(".")[-1], nn.Parameter(torch.randn(shape, generator=generator))
            )
        self.inner.forward = self.of_inner

    def of_inner(self, targets: dict[str, Tensor]) -> Tensor:
        return sum(
            ((p * targets[f"inner.{n}"]).sum() for n, p in self.inner.named_parameters()), torch.zeros(())
        )

    def forward(self, targets: dict[str, Tensor]) -> Tensor:
        own = ((p * targets[n]).sum() for n, p in self.named_parameters(recurse=False))
        return self.inner(targets) + sum(own, torch.zeros(()))


def gradients(step: int, rank: int, *, alike: bool = False) -> dict[str, Tensor]:
    """Of a process: random, one row zero, one element large. alike: the same in every step."""
    generator = torch.Generator().manual_seed(1000 * (0 if alike else step) + rank)
    found = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    found["inner.odd"][2] = 0
    found["tall"][100] = 0
    found["inner.few"][1, 7] = 50.0
    return found


class Collectives(TorchDispatchMode):
    """Every collective that reaches the backend, Python's and DDP's own: (name, dtype, bytes of its input)."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).split(".")
        if name[0] == "c10d":
            given = _tensors(args)
            inputs = given[-1:] if name[1].endswith("base_") else given[:1]  # (output, input) there
            self.seen += [(name[1], str(t.dtype), t.nbytes) for t in inputs]
        return func(*args, **(kwargs or {}))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [t for inner in value for t in _tensors(inner)]
    return []


class Setup:
    """A model under a strategy, and its communication (None: torch's own)."""

    def __init__(self, strategy: str, gathered: tuple[str, ...] = (), **settings: Any) -> None:
        self.model = Linear()
        self.communication = None
        if settings:
            self.communication = LowBitCommunication(
                CommunicationSettings(**settings), seed=11, gathered=gathered
            )
        self.run: nn.Module = self.model
        if strategy == "ddp":
            self.run = DistributedDataParallel(self.model, bucket_cap_mb=0.002)
            if self.communication is not None:
                self.communication.attach_ddp(self.run, self.model)
            return
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(self.model.inner, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        if self.communication is not None:
            self.communication.attach_fsdp2(self.model)

    def step(self, step: int, targets: dict[str, Tensor], micro_step: int = 0) -> dict[str, Tensor]:
        """The whole reduced gradient."""
        if self.communication is not None:
            self.communication.begin(step, micro_step)
        self.model.zero_grad()
        self.run(targets).backward()
        return {
            name: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad.clone()
            for name, p in self.model.named_parameters()
        }

    def owed(self) -> dict[str, Any]:
        assert self.communication is not None
        return self.communication.state_dict()


def of_reduction(strategy: str) -> dict[str, Any]:
    rank, found = dist.get_rank(), {}
    exact = Setup(strategy)
    found["exact"] = [exact.step(s, gradients(s, rank)) for s in range(STEPS)]
    for spec in SPECS:
        for feedback in ("float32", None):
            case = Setup(strategy, reduce_gradients=spec, error_feedback=feedback)
            steps = [case.step(s, gradients(s, rank)) for s in range(STEPS)]
            found[f"{spec}/{feedback}"] = {"steps": steps, "state": case.owed()}
    alike = Setup(strategy, reduce_gradients="int4_row_sr", error_feedback=None)
    found["one gradient"] = alike.step(0, gradients(0, 0))
    for feedback in ("float32", "bfloat16", None):
        case = Setup(strategy, reduce_gradients=LONG, error_feedback=feedback)
        total: dict[str, Tensor] = {}
        for s in range(LONG_STEPS):
            for name, g in case.step(s, gradients(s, rank, alike=True)).items():
                total[name] = total.get(name, torch.zeros(g.shape, dtype=torch.float64)) + g
        found[f"long/{feedback}"] = {"total": total, "state": case.owed()}
    return found


def of_descent(feedback: str | None) -> dict[str, float]:
    """SGD on the mean over processes of |w - t_r|^2 / 2, whose gradients do not vanish one by one at the optimum: how far
    from it, of the way from the start, each matrix ends."""
    case, rank, world = (
        Setup("ddp", reduce_gradients="int4_row", error_feedback=feedback),
        dist.get_rank(),
        dist.get_world_size(),
    )
    held = [gradients(0, r, alike=True) for r in range(world)]
    optimum = {name: sum(t[name] for t in held) / world for name in SHAPES}
    parameters = dict(case.model.named_parameters())
    begun = {name: float((p.detach() - optimum[name]).norm()) for name, p in parameters.items()}
    for s in range(DESCENT_STEPS):
        reduced = case.step(s, {name: p.detach() - held[rank][name] for name, p in parameters.items()})
        with torch.no_grad():
            for name, p in parameters.items():
                p -= DESCENT_LR * reduced[name]
    return {name: float((p.detach() - optimum[name]).norm()) / begun[name] for name, p in parameters.items()}


def of_non_finite(strategy: str) -> dict[str, Any]:
    case, rank = Setup(strategy, reduce_gradients="int8_group128"), dist.get_rank()
    steps = []
    for s, bad in enumerate((0.0, math.nan, math.inf, 0.0)):
        targets = gradients(s, rank)
        if rank == 1:
            targets["inner.few"][2, 150] += bad
            targets["bias"][1] += bad
        steps.append(case.step(s, targets))
    return {"steps": steps, "state": case.owed()}


def of_resume(strategy: str) -> dict[str, Any]:
    """Two steps, then two more: straight on, and by others that took the state over."""
    rank, settings = dist.get_rank(), {"reduce_gradients": "int4_group64_sr"}
    case = Setup(strategy, **settings)
    for s in range(2):
        case.step(s, gradients(s, rank))
    box = [case.owed()]
    dist.broadcast_object_list(box, src=0)
    other = Setup(strategy, **settings)
    other.communication.load_state_dict(box[0])
    again = other.owed()
    on = [[c.step(s, gradients(s, rank)) for s in (2, 3)] for c in (case, other)]
    elsewhere = Setup("ddp" if strategy == "fsdp2" else "fsdp2", **settings)
    elsewhere.communication.load_state_dict(box[0])
    return {"state": box[0], "again": again, "on": on, "elsewhere": elsewhere.owed()}


GATHERED = ("inner.odd", "deep", "tall", "inner.few")


def of_gather(spec: str) -> dict[str, Any]:
    """The weights that the forward saw, in training and in eval mode."""
    case = Setup("fsdp2", gathered=GATHERED, gather_weights=spec)
    seen: dict[str, dict[str, Tensor]] = {}

    def look(part: str) -> Callable[..., None]:
        def hook(module: nn.Module, *_: Any) -> None:
            prefix = "inner." if module is case.model.inner else ""
            own = {f"{prefix}{n}": p.detach().clone() for n, p in module.named_parameters(recurse=False)}
            seen.setdefault(part, {}).update(own)

        return hook

    for part in ("train", "later", "eval"):
        case.model.train(part != "eval")
        handles = [m.register_forward_pre_hook(look(part)) for m in (case.model, case.model.inner)]
        case.step(1 if part == "later" else 0, gradients(0, dist.get_rank()))
        for handle in handles:
            handle.remove()
    masters = {n: p.full_tensor().detach() for n, p in case.model.named_parameters()}
    return {**seen, "masters": masters}


def of_traffic() -> dict[str, Any]:
    """What the backend is given in a step, beside what was counted."""
    found = {}
    for name, strategy, settings in (
        ("ddp", "ddp", {"reduce_gradients": "int8_group128"}),
        ("ddp, exact", "ddp", {}),
        (
            "fsdp2",
            "fsdp2",
            {"reduce_gradients": "int4_row", "gather_weights": "int8_row", "gathered": GATHERED},
        ),
        ("fsdp2, exact", "fsdp2", {}),
    ):
        case, rank = Setup(strategy, **settings), dist.get_rank()
        case.step(0, gradients(0, rank))
        if case.communication is not None:
            case.communication.begin(1, 0)
        case.model.zero_grad()
        with Collectives() as collectives:
            case.run(gradients(1, rank)).backward()
        counted = {} if case.communication is None else case.communication.traffic.row()
        found[name] = {"seen": collectives.seen, "counted": counted}
    return found


def run(folder: Path, world: int, rank: int) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / f"store-{world}"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    found: dict[str, Any] = {}
    for strategy in ("ddp", "fsdp2"):
        found[strategy] = of_reduction(strategy)
        found[f"{strategy}/bad"] = of_non_finite(strategy)
        found[f"{strategy}/resume"] = of_resume(strategy)
    found["gather"] = {spec: of_gather(spec) for spec in ("int8_row", "int8_group128", "int4_group64_sr")}
    found["traffic"] = of_traffic()
    found["descent"] = {str(feedback): of_descent(feedback) for feedback in ("float32", "bfloat16", None)}
    if world == 4:
        state = torch.load(folder / "2-0.pt")["ddp/resume"]["state"]
        case = Setup("ddp", reduce_gradients="int4_group64_sr")
        case.communication.load_state_dict(state)
        found["from two"] = case.owed()
    torch.save(found, folder / f"{world}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def main(folder: Path) -> None:
    for world in WORLDS:
        fork_ranks(world, run, folder, world)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
