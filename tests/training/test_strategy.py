"""A run is the same run in 1, 2 and 4 processes, under DDP and FSDP2: real processes, started by the launcher.

The micro-batches are the same, of one sequence each, whoever computes them, and so are their random bits; what
differs is the order in which float32 gradients are added. The bounds are those of that order.

Measured over 4 steps, in all places: unquantized, losses agree to 2e-7 and weights to 2e-7 of their way from the
initial ones; quantized, where a code near a threshold falls to the other side, losses to 9e-6 and weights to 1.4e-3
of their way. The first loss, before any such code, agrees to 1e-7; with the random bits of rank 0 on every rank it is
off by 2e-6 to 5e-6, and by 2e-4 with its dropout masks.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import ranks
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from qtrain.models.gpt import GPT, GPTConfig
from qtrain.nn.surgery import apply_recipe
from qtrain.quant import DgradRecipe, FpropRecipe, LinearRecipe, ModelRecipe, WgradRecipe
from qtrain.training.assembly import assemble
from qtrain.training.callbacks.metrics_jsonl import read_metrics
from qtrain.training.fit import train
from qtrain.training.launcher import launch
from qtrain.training.processes import ProcessSettings, connected
from qtrain.training.saved import checkpoint_of, read_checkpoint
from qtrain.training.strategy import compile_for, gathered_state_dict, load_whole_state_dict, shard

STEPS, BATCH = 4, 8
COMMON = [
    "precision=fp32",
    f"steps={STEPS}",
    f"batch_sequences={BATCH}",
    "micro_batch_sequences=1",
    "eval_windows=7",  # over 4 processes: one of them has a window less
    "eval_every_steps=3",
    "model.layers=2",
    "model.width=32",
    "optimizer.states.min_numel=1024",
    "sample.max_new_tokens=1",
]
RECIPES = {
    "none": ["recipe=none", "m1=none", "m2=none", "~callbacks.census"],
    # Everything that draws: dropout, and stochastic rounding in all operands
    "all_gemms": [
        "recipe=all_gemms",
        "w=int8_row_sr",
        "a=int8_row_sr",
        "g=int8_row_sr",
        "model.dropout=0.1",
    ],
    # Tied: 257 rows, over 4 processes 65, 65, 65 and 62
    "qpt": ["recipe=qpt", "model.tie_embeddings=true", "checkpoint_every_steps=2", "~callbacks.census"],
}
RESUMED = [("fsdp2", 2), ("ddp", 4)]
PLACES = [(strategy, world) for world in (2, 4) for strategy in ("ddp", "fsdp2")]


class Run(NamedTuple):
    """losses, norms: by step. val: by validation. checkpoint: the final one."""

    losses: torch.Tensor
    norms: torch.Tensor
    val: torch.Tensor
    checkpoint: dict


def run_of(folder: Path) -> Run:
    rows = read_metrics(folder / "metrics.jsonl")
    steps, vals = ([r for r in rows if r["kind"] == kind] for kind in ("train", "val"))
    assert [r["step"] for r in steps] == list(range(1, STEPS + 1))
    assert [r["step"] for r in vals] == [3, 4]
    return Run(
        torch.tensor([r["loss"] for r in steps], dtype=torch.float64),
        torch.tensor([r["grad_norm"] for r in steps], dtype=torch.float64),
        torch.tensor([r["val_loss"] for r in vals], dtype=torch.float64),
        read_checkpoint(checkpoint_of(folder)),
    )


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("strategies")


@pytest.fixture(scope="module")
def single(configure, out) -> dict[str, Run]:
    """The runs in one process: this one."""
    found = {}
    for name, more in RECIPES.items():
        verdict, folder = train(assemble(configure(out, *COMMON, *more, f"name={name}", "run=single")))
        assert verdict.good
        found[name] = run_of(folder)
    return found


def several(configure, out: Path, world: int) -> None:
    """All that is to be seen of ``world`` processes."""
    jobs = []

    def add(*overrides: str, reload: str | None = None, callback: str | None = None) -> None:
        config = configure(out, *COMMON, f"trainer.devices={world}", "trainer.timeout_seconds=60", *overrides)
        if callback is not None:
            config["callbacks"]["mine"] = {"_target_": f"ranks.{callback}"}
        jobs.append({"config": config, "reload": reload})

    middle = str(out / "qpt" / "single" / "checkpoints" / "step-000002")
    for strategy in ("ddp", "fsdp2"):
        place = [f"trainer.strategy={strategy}", f"run={strategy}-{world}"]
        for name, more in RECIPES.items():
            syncs = "GradientSyncs" if (strategy, name) == ("ddp", "none") else None
            add(*place, *more, f"name={name}", callback=syncs)
        resumed = [*place, *RECIPES["qpt"], "name=resumed", f"resume={middle}"]
        if (strategy, world) in RESUMED:
            add(*resumed)
        add(*resumed, "steps=2", f"out={out / f'reload-{strategy}-{world}'}", reload=middle)
        if world == 2:
            add(*place, *RECIPES["none"], "name=poisoned", callback="PoisonRankOne")
    (out / str(world)).mkdir()
    assert launch({"jobs": jobs, "out": str(out / str(world))}, "ranks:work", world) == 0


@pytest.fixture(scope="module")
def two(configure, out, single) -> None:
    several(configure, out, 2)


@pytest.fixture(scope="module")
def four(configure, out, single) -> None:
    several(configure, out, 4)


@pytest.fixture(scope="module")
def all_runs(out, single, two, four) -> dict[tuple[str, str, int], Run]:
    return {
        (name, strategy, world): run_of(out / name / f"{strategy}-{world}")
        for name in RECIPES
        for strategy, world in PLACES
    }


def way(run: Run, other: dict) -> float:
    """norm(w - w_other) over all weights; other: a state dict."""
    weights = run.checkpoint["state_dict"]
    assert list(weights) == list(other)
    return sum(float((w.double() - other[n].double()).square().sum()) for n, w in weights.items()) ** 0.5


def assemble_of(run: Run):
    return assemble(run.checkpoint["hyper_parameters"]["config"])


def initial(run: Run) -> dict:
    model = assemble_of(run).make_model()
    return {f"model.{name}": w for name, w in model.state_dict().items()}


# (losses, gradient norms and validation losses, relative; final weights, of the way from the initial ones)
BOUNDS = {"none": (1e-6, 2e-6), "all_gemms": (3e-5, 5e-3), "qpt": (3e-5, 5e-3)}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize(("strategy", "world"), PLACES)
def test_a_run_is_the_same_run_in_several_processes(all_runs, single, name, strategy, world):
    run, one = all_runs[name, strategy, world], single[name]
    of_loss, of_weights = BOUNDS[name]
    # Nothing was added up yet but the losses of the first step themselves
    torch.testing.assert_close(run.losses[:1], one.losses[:1], rtol=2e-7, atol=0)
    for found, expected in zip(run[:3], one[:3], strict=True):
        torch.testing.assert_close(found, expected, rtol=of_loss, atol=0)
    assert way(run, one.checkpoint["state_dict"]) < of_weights * way(one, initial(one))


def layout(value):
    """Keys, types, shapes and dtypes of a checkpoint."""
    if isinstance(value, dict):
        return {key: layout(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [layout(inner) for inner in value]
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.device.type, value.untyped_storage().nbytes()
    return type(value)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize(("strategy", "world"), PLACES)
def test_a_checkpoint_is_that_of_one_process(all_runs, single, name, strategy, world):
    ours, theirs = all_runs[name, strategy, world].checkpoint, single[name].checkpoint
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "loops", "qtrain"):
        assert layout(ours[key]) == layout(theirs[key]), key
    assert (
        ours["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["ready"] == STEPS * BATCH // world
    )


def equal(a, b) -> bool:
    """Bit for bit, through all containers."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a == b


@pytest.fixture(scope="module")
def reloaded(configure, out, single) -> Path:
    """The checkpoint of step 2, taken over and saved again by this process."""
    folder = out / "reload-single"
    middle = str(out / "qpt" / "single" / "checkpoints" / "step-000002")
    config = configure(out, *COMMON, *RECIPES["qpt"], "steps=2")
    ranks.reload(assemble(config), middle, str(folder))
    return folder


@pytest.mark.parametrize(("strategy", "world"), PLACES)
def test_a_checkpoint_is_taken_over_bit_for_bit(all_runs, out, reloaded, strategy, world):
    """8-bit states and tied weights; and the evaluation of equal weights is equal, window by window."""
    middle = read_checkpoint(out / "qpt" / "single" / "checkpoints" / "step-000002")
    folder = out / f"reload-{strategy}-{world}"
    saved = read_checkpoint(folder / "step-000002")
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert equal(saved[key], middle[key]), key
    assert any(key.endswith(".codes") for s in saved["optimizer_states"][0]["state"].values() for key in s)
    windows = json.loads((folder / "windows.json").read_text())
    assert len(windows) == 7
    assert windows == json.loads((reloaded / "windows.json").read_text())


@pytest.mark.parametrize(("strategy", "world"), RESUMED)
def test_a_run_goes_on_in_other_processes(all_runs, single, out, strategy, world):
    """From one process's checkpoint; two steps later it is where that process was."""
    rows = read_metrics(out / "resumed" / f"{strategy}-{world}" / "metrics.jsonl")
    losses = torch.tensor([r["loss"] for r in rows if r["kind"] == "train"], dtype=torch.float64)
    torch.testing.assert_close(losses, single["qpt"].losses[2:], rtol=BOUNDS["qpt"][0], atol=0)


def test_gradients_are_averaged_once_a_step(all_runs, out):
    for world in (2, 4):
        micro_steps = BATCH // world
        seen = json.loads((out / "none" / f"ddp-{world}" / "syncs.json").read_text())
        assert seen == [i % micro_steps == micro_steps - 1 for i in range(STEPS * micro_steps)]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_nan_on_one_rank_stops_all_alike(all_runs, out, single, strategy):
    ends = [json.loads((out / "2" / f"ends-{rank}.json").read_text()) for rank in range(2)]
    assert str(ends[0]) == str(ends[1])  # as text: nan is not equal to itself
    verdict = json.loads((out / "poisoned" / f"{strategy}-2" / "verdict.json").read_text())
    assert (verdict["outcome"], verdict["step"], verdict["quantity"]) == ("non_finite", 2, "loss")
    assert verdict["parameters"] == len(list(assemble_of(single["none"]).make_model().parameters()))
    saved = read_checkpoint(checkpoint_of(out / "poisoned" / f"{strategy}-2"))
    assert saved["qtrain"]["step"] == 1
    assert all(bool(w.isfinite().all()) for w in saved["state_dict"].values())


def test_the_states_that_are_reported_are_those_of_the_whole_model(all_runs, out):
    for strategy, world in PLACES:
        numbers = json.loads((out / "qpt" / f"{strategy}-{world}" / "summary.json").read_text())
        one = json.loads((out / "qpt" / "single" / "summary.json").read_text())
        # A shard counts its steps itself: 4 bytes a parameter tensor and rank
        for key in ("total", "as_float32"):
            more = numbers["optimizer_state_bytes"][key] - one["optimizer_state_bytes"][key]
            assert 0 <= more <= 4 * 30 * world, (strategy, world, key)
        assert numbers["parameters"] == one["parameters"]


@pytest.fixture
def one_of_fsdp2():
    """A process group of this process alone, which FSDP2 shards over."""
    with connected(ProcessSettings(strategy="fsdp2"), "cpu"):
        yield init_device_mesh("cpu", (1,))


def small_gpt(layers: int = 2, exclude: Sequence[str] = (), **recipe: str) -> nn.Module:
    model = GPT(
        GPTConfig(vocab_size=13, sequence_tokens=8, layers=layers, heads=2, width=16, tie_embeddings=True)
    )
    if recipe:
        fprop = FpropRecipe(**recipe)
        backward = {"dgrad": DgradRecipe(weight="fprop"), "wgrad": WgradRecipe(input="fprop")}
        apply_recipe(model, ModelRecipe(linear=LinearRecipe(fprop=fprop, **backward), exclude=list(exclude)))
    return model


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    tokens = torch.arange(16).view(2, 8) % 13
    model(tokens).square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    return {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in found.items()}


def test_a_run_of_fsdp2_in_one_process(configure, out, single, one_of_fsdp2):
    more = [*RECIPES["qpt"], "name=qpt", "run=fsdp2-1", "trainer.strategy=fsdp2"]
    verdict, folder = train(assemble(configure(out, *COMMON, *more)))
    assert verdict.good
    run, one = run_of(folder), single["qpt"]
    torch.testing.assert_close(run.losses, one.losses, rtol=1e-6, atol=0)
    assert layout(run.checkpoint["state_dict"]) == layout(one.checkpoint["state_dict"])


@pytest.mark.parametrize(
    ("recipe", "exclude", "graphs"),
    [
        # Blocks that are alike share their code; and lm_head
        ({"input": "int8_row", "weight": "int4_row"}, ["lm_head"], {2}),
        # Bits go by the layer's name, and so may the code
        ({"input": "int8_row", "weight": "int4_row_sr"}, ["lm_head", "*.attn.*", "*.up"], {2, 3, 4}),
    ],
)
def test_blocks_are_compiled_and_sharded_by_themselves(one_of_fsdp2, monkeypatch, recipe, exclude, graphs):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain, model = (small_gpt(3, exclude, **recipe) for _ in range(2))
    names = list(model.state_dict())
    with torch._dynamo.config.patch(recompile_limit=1):  # beyond it code runs uncompiled
        compile_for(model, "fsdp2")
        shard(model, one_of_fsdp2)
        assert list(model.state_dict()) == names
        expected = gradients(plain)
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-5)
        assert torch._dynamo.config.recompile_limit >= 4
    frames = torch._dynamo.utils.counters["frames"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] in graphs
    assert frames["ok"] == frames["total"]
    assert not torch._dynamo.utils.counters["graph_break"]


def test_ddp_compiles_whole_graphs():
    """Else dynamo cuts them where a bucket of gradients ends, which raises on a layer with a backward of its own."""
    with torch._dynamo.config.patch(optimize_ddp=True):
        compile_for(nn.Linear(2, 2), "none")
        assert torch._dynamo.config.optimize_ddp
        compile_for(nn.Linear(2, 2), "ddp")
        assert not torch._dynamo.config.optimize_ddp


def test_a_state_dict_after_a_forward_alone(one_of_fsdp2):
    """The outermost parameters are whole then, and no DTensors."""
    plain, model = small_gpt(), small_gpt()
    shard(model, one_of_fsdp2)
    with torch.no_grad():
        model(torch.zeros(1, 3, dtype=torch.int64))
    assert not isinstance(model.lm_head.weight, DTensor)
    found = gathered_state_dict(model)
    assert equal(found, dict(plain.state_dict()))
    assert found["lm_head.weight"] is found["token_embedding.weight"]
    with torch.no_grad():
        model(torch.zeros(1, 3, dtype=torch.int64))
    load_whole_state_dict(model, {name: w + 1 for name, w in found.items()})
    assert equal(gathered_state_dict(model), {name: w + 1 for name, w in plain.state_dict().items()})
    assert all(isinstance(p, DTensor) for p in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda saved: saved.pop("final_norm.weight"), r"do not both have final_norm.weight"),
        (lambda saved: saved.update(more=torch.ones(1)), r"do not both have more"),
        (
            lambda saved: saved.update({"final_norm.weight": torch.ones(15)}),
            r"final_norm.weight is \(15,\) in the checkpoint and \(16,\) in the model",
        ),
    ],
)
def test_weights_of_another_model_are_refused(one_of_fsdp2, change, message):
    model = small_gpt()
    shard(model, one_of_fsdp2)
    saved = gathered_state_dict(model)
    change(saved)
    with pytest.raises(ValueError, match=message):
        load_whole_state_dict(model, saved)


def test_an_optimizer_whose_states_cannot_be_gathered_is_refused(configure, tmp_path):
    config = configure(tmp_path, "trainer=fsdp2")
    config = {k: v for k, v in config.items() if k not in ("m1", "m2")}  # knobs of optimizers that have them
    config["optimizer"] = {"_target_": "torch.optim.AdamW", "lr": 1e-3}
    with pytest.raises(ValueError, match=r"optimizer torch.optim.AdamW under trainer.strategy=fsdp2"):
        assemble(config)
    assemble({**config, "trainer": {**config["trainer"], "strategy": "ddp"}})


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_a_micro_batch_that_is_left_open_is_a_processs_share(configure, tmp_path, devices):
    parts = assemble(configure(tmp_path, "batch_sequences=8", f"trainer.devices={devices}"))
    assert parts.settings.micro_batch_sequences == 8 // devices
    assert parts.settings.accumulate(parts.world_size) == 1


def test_a_batch_that_cannot_be_shared_is_refused(configure, tmp_path):
    with pytest.raises(
        ValueError, match=r"batch_sequences=8 cannot be shared by 3 processes .* batch_sequences=6"
    ):
        assemble(configure(tmp_path, "batch_sequences=8", "trainer.devices=3"))
