"""What test_sharding.py trains, and the program that trains it in processes that each hold some rows.

    python tests/optim/sharded_processes.py FOLDER

imports torch once and forks gloo processes for one stage after the other, the later ones from the checkpoint of the
one before, whose number of processes is another:

    two: 2 processes, from the start    ->    four: 4 processes    ->    again: 2 processes

Each leaves weights and full state dicts in FOLDER.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from qtrain.optim import AdamW, check_shardable, fused, parameter_groups

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from forked_ranks import fork_ranks

Parameters = dict[str, nn.Parameter]
Place = Callable[[str, torch.Tensor], torch.Tensor]

STATES: dict[str, tuple[Any, Any]] = {
    "float32": ("none", "none"),
    "dynamic8": ("dynamic8", "dynamic8"),
    "dynamic8_bf16": ("dynamic8", "dynamic8"),
    "four_bits": ("dynamic4_group128", "linear4_nozero_group128"),
    "three_bits": ("int3_group64", "int3_group64"),
    "int8_row": ("int8_row", "uint8_row"),
    "percentile": ({"format": "int8", "clip": "percentile:99", "granularity": "row"}, "none"),
    "int8_tensor": ("int8_tensor", "int8_tensor"),
    "int8_tensor_bf16": ("int8_tensor", "none"),
    "asymmetric": ("int8_row_asym", "int8_tensor_asym"),
    "e4m3": ("e4m3_group128", "e4m3_tensor"),
    "e8m0_scales": ("mxfp8", {"format": "e4m3", "granularity": "tensor", "scale_format": "e8m0"}),
    "two_levels": ("nvfp4", "nvfp4"),
    "stochastic": ("dynamic8_sr", "uint8_row_sr"),
    "stochastic_bf16": ("int8_tensor_sr", "nvfp4_sr"),
    "fused": ("dynamic8", "dynamic8"),  # by the op, which runs its reference on a CPU
    "fused_bf16": ("dynamic4_group128", "linear4_nozero_group128"),
}
SHAPES = {
    "one": (1, 300),
    "three": (3, 130),
    "five": (5, 7, 19),
    "seven": (7, 257),
    "many": (33, 33),
    "small": (5, 51),
    "gain": (7,),
    "copied": (4, 70),
    "plain": (2, 200),
    "tok": (6, 64),
}
MIN_NUMEL = 256  # all but "small" and "gain" have more, and no shard of "three" in four processes
COPIED, PLAIN = "copied", "plain"  # a DTensor with Replicate(), and a parameter that is no DTensor
STAGES = {"two": (2, None, range(2)), "four": (4, "two", range(2, 4)), "again": (2, "four", range(4, 5))}
POISONED = [
    ("int8_tensor", torch.nan),
    ("int8_tensor", -torch.inf),
    ("int8_tensor_asym", torch.inf),
    ("nvfp4", torch.nan),
]


def as_it_is(name: str, t: torch.Tensor) -> torch.Tensor:
    return t


def gradient(name: str, step: int, dtype: torch.dtype) -> torch.Tensor | None:
    """Magnitudes over several decades, so that the largest lies in any shard; two parameters have none at first."""
    if name in ("five", PLAIN) and step < 1:
        return None
    shape = SHAPES[name]
    generator = torch.Generator().manual_seed(100 * step + list(SHAPES).index(name))
    return (torch.randn(shape, generator=generator) * 10 ** torch.randn(shape, generator=generator)).to(dtype)


def build(case: str, place: Place) -> tuple[Parameters, AdamW]:
    dtype = torch.bfloat16 if case.endswith("bf16") else torch.float32
    params = {}
    for name, shape in SHAPES.items():
        value = torch.randn(shape, generator=torch.Generator().manual_seed(len(name))).to(dtype)
        params[name] = nn.Parameter(place(name, value))
    names = [name for name in SHAPES if name != "tok"]
    groups = [
        {"params": [params[name] for name in names], "names": names},
        {"params": [params["tok"]], "names": ["tok"], "quantize_states": False},
    ]
    m, v = STATES[case]
    states = {"exp_avg": m, "exp_avg_sq": v, "min_numel": MIN_NUMEL}
    more = {"states": states, "seed": 2**40 + 5, "fused": True if case.startswith("fused") else None}
    return params, AdamW(groups, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, **more)


def train(params: Parameters, optimizer: AdamW, steps: range, place: Place = as_it_is) -> None:
    for step in steps:
        for name, p in params.items():
            g = gradient(name, step, p.dtype)
            p.grad = None if g is None else place(name, g)
        with mock.patch.object(fused, "DEVICES", ("cpu",)) if optimizer.fused else nullcontext():
            optimizer.step()


def poisoned(states: str, value: float, place: Place) -> tuple[Parameters, AdamW]:
    """One element of the last row has this gradient."""
    p = nn.Parameter(place("w", torch.ones(5, 60)))
    optimizer = AdamW([p], states={"exp_avg": states, "exp_avg_sq": states, "min_numel": 0})
    g = torch.linspace(-1, 1, 300).reshape(5, 60)
    g[4, 7] = value
    p.grad = place("w", g)
    optimizer.step()
    return {"w": p}, optimizer


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.tok, self.norm = nn.Embedding(11, 6), nn.LayerNorm(6)
        self.up, self.down = nn.Linear(6, 7), nn.Linear(7, 3, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(self.norm(self.tok(tokens))))).square().mean()


def net_tokens(rank: int, step: int) -> torch.Tensor:
    return torch.randint(11, (4, 5), generator=torch.Generator().manual_seed(10 * step + rank))


def net_optimizer(model: nn.Module) -> AdamW:
    states = {"exp_avg": "dynamic8_sr", "exp_avg_sq": "int8_tensor", "min_numel": 20}
    return AdamW(parameter_groups(model, weight_decay=0.1), lr=1e-2, states=states)


class Process:
    """One process of a stage."""

    def __init__(self, folder: Path, stage: str, rank: int) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        self.folder, self.stage, self.rank = folder, stage, rank
        self.world, self.before, self.steps = STAGES[stage]
        self.mesh = init_device_mesh("cpu", (self.world,))

    def place(self, name: str, t: torch.Tensor) -> torch.Tensor:
        from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

        if name == PLAIN:
            return t.clone()
        if name == COPIED:
            return DTensor.from_local(t.clone(), self.mesh, [Replicate()], run_check=False)
        return distribute_tensor(t, self.mesh, [Shard(0)], src_data_rank=None)

    def whole(self, params: Parameters) -> dict[str, torch.Tensor] | None:
        """The weights on rank 0, put together without the code under test."""
        from torch import distributed as dist
        from torch.distributed.tensor import DTensor, Shard

        mine = {n: p.to_local() if isinstance(p, DTensor) else p for n, p in params.items()}
        mine = {n: t.detach().clone() for n, t in mine.items()}
        gathered = [None] * self.world if self.rank == 0 else None
        dist.gather_object(mine, gathered, dst=0)
        if gathered is None:
            return None
        cut = [n for n, p in params.items() if isinstance(p, DTensor) and p.placements == (Shard(0),)]
        return {n: torch.cat([g[n] for g in gathered]) if n in cut else t for n, t in mine.items()}

    def save(self, what: str, params: Parameters, optimizer: AdamW, **more: Any) -> None:
        weights, full = self.whole(params), optimizer.full_state_dict()
        assert full["param_groups"] == optimizer.state_dict()["param_groups"]
        if self.rank == 0:
            torch.save({"weights": weights, "full": full, **more}, self.folder / f"{self.stage}-{what}.pt")
        else:
            assert full["state"] == {}

    def cases(self) -> None:
        for case in STATES:
            if self.before is None:
                params, optimizer = build(case, self.place)
            else:
                start = torch.load(self.folder / f"{self.before}-{case}.pt", weights_only=True)
                params, optimizer = build(case, lambda name, t, w=start["weights"]: self.place(name, w[name]))
                optimizer.load_state_dict(start["full"])
                self.save(f"{case}-loaded", params, optimizer)
            train(params, optimizer, self.steps, self.place)
            self.save(case, params, optimizer)
            if case == "four_bits":
                decoded = {n: optimizer.decode_states(p) for n, p in params.items()}
                mine = {"decoded": decoded, "bytes": optimizer.state_bytes()}
                torch.save(mine, self.folder / f"{self.stage}-rank{self.rank}.pt")

    def fully_sharded(self) -> None:
        """A real backward; its reduced gradients are kept for one process to repeat."""
        from torch.distributed.fsdp import fully_shard

        model = Net()
        for layer in (model.tok, model.up, model.down, model):
            fully_shard(layer, mesh=self.mesh)
        optimizer, gradients = net_optimizer(model), []
        for step in range(3):
            model(net_tokens(self.rank, step)).backward()
            gradients.append({n: p.grad.full_tensor() for n, p in model.named_parameters()})
            optimizer.step()
            optimizer.zero_grad()
        self.save("fully_shard", dict(model.named_parameters()), optimizer, gradients=gradients)

    def refusals(self) -> dict[str, str]:
        """What was tried -> the message, or ``accepted``."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

        found, flat = {}, [Shard(0)]

        def note(what: str, call: Callable[[], Any]) -> None:
            try:
                call()
                found[what] = "accepted"
            except ValueError as error:
                found[what] = str(error)

        def adamw(mesh: Any, placements: list[Any], **states: Any) -> AdamW:
            p = nn.Parameter(distribute_tensor(torch.ones(9, 8), mesh, placements))
            return AdamW([{"params": [p], "names": ["w"]}], states={"min_numel": 0, **states})

        grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
        note("grid", lambda: adamw(grid, [Replicate(), Shard(0)]))
        note("columns", lambda: adamw(self.mesh, [Shard(1)]))
        two_levels = {"format": "e2m1", "scale_format": "e4m3", "tensor_scale": True, "clip": "percentile:99"}
        groups = {"format": "e2m1", "granularity": "group:16", "clip": "rms:2.5"}
        note("mse", lambda: adamw(self.mesh, flat, exp_avg="int8_tensor_mse"))
        note("gaussian", lambda: adamw(self.mesh, flat, exp_avg="int8_row_gaussian"))
        note("rms", lambda: adamw(self.mesh, flat, exp_avg_sq=groups))
        note("percentile", lambda: adamw(self.mesh, flat, exp_avg=two_levels))
        note("replicated", lambda: adamw(self.mesh, [Replicate()], exp_avg="int8_tensor_mse"))

        optimizer = adamw(self.mesh, flat, exp_avg="dynamic8")
        (p,) = optimizer.param_groups[0]["params"]
        p.grad = DTensor.from_local(torch.ones(9, 8), self.mesh, [Partial()])
        note("partial gradient", optimizer.step)
        p.grad = torch.ones_like(p)
        optimizer.step()
        full = optimizer.full_state_dict()
        note("elsewhere", lambda: optimizer.load_state_dict(full))
        note("one shard", lambda: optimizer.load_state_dict(optimizer.state_dict()))
        other = nn.Parameter(distribute_tensor(torch.ones(4, 2), grid["b"], flat))
        optimizer.add_param_group({"params": [other], "names": ["v"]})
        note("two meshes", optimizer.full_state_dict)

        theirs = type("Adam8bit", (torch.optim.SGD,), {"__module__": "bitsandbytes.optim.adam"})
        mine = type("Mine", (theirs,), {})([{"params": [p], "names": ["w"]}])
        note("bitsandbytes", lambda: check_shardable(mine))
        note("bitsandbytes on plain", lambda: check_shardable(theirs([nn.Parameter(torch.ones(2))])))
        note("others", lambda: check_shardable(torch.optim.SGD([p])))
        return found


def run(folder: Path, stage: str, rank: int) -> None:
    import torch.distributed as dist

    store = dist.FileStore(str(folder / f"store-{stage}"), STAGES[stage][0])
    dist.init_process_group("gloo", store=store, rank=rank, world_size=STAGES[stage][0])
    process = Process(folder, stage, rank)
    process.cases()
    if stage == "four":
        for states, value in POISONED:
            process.save(f"{states}{value}", *poisoned(states, value, process.place))
        process.fully_sharded()
        (folder / f"refusals{rank}.json").write_text(json.dumps(process.refusals()))
    dist.barrier()
    dist.destroy_process_group()


def main(folder: Path) -> None:
    import torch.distributed.fsdp
    import torch.distributed.tensor

    torch.set_num_threads(1)
    for case in STATES:  # so that what is imported and cached at the first step is there before the forks
        train(*build(case, as_it_is), range(1))
    for stage, (world, _, _) in STAGES.items():
        fork_ranks(world, run, folder, stage)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
