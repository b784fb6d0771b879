"""AdamW over processes that each hold some rows: every bit of weights, states and checkpoints is one process's."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qtrain.optim.sharding import RowShard, local

PROGRAM = Path(__file__).with_name("sharded_processes.py")
spec = importlib.util.spec_from_file_location("sharded_processes", PROGRAM)
runs = sys.modules["sharded_processes"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(runs)


def same(a: Any, b: Any) -> bool:
    """Equal structure, dtypes, shapes and numbers; NaN equals NaN."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(value, b[key]) for key, value in a.items())
    if not isinstance(a, torch.Tensor):
        return bool(a == b)
    return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def result(params: dict[str, torch.nn.Parameter], optimizer: Any) -> dict[str, Any]:
    return {
        "weights": {n: p.detach().clone() for n, p in params.items()},
        "full": optimizer.full_state_dict(),
    }


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """``left("two-int8_row")`` reads what a stage saved."""
    folder = tmp_path_factory.mktemp("sharding")
    done = subprocess.run(
        [sys.executable, PROGRAM, folder], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]

    def read(name: str) -> Any:
        path = folder / name
        return json.loads(path.read_text()) if path.suffix else torch.load(f"{path}.pt", weights_only=True)

    return read


def test_weights_and_checkpoints_are_those_of_one_process(left: Callable[[str], Any]) -> None:
    """Trained from the start, resumed by another number of processes, resumed by one."""
    differ = []
    for case in runs.STATES:
        params, optimizer = runs.build(case, runs.as_it_is)
        expected = {}
        for step in range(6):
            runs.train(params, optimizer, range(step, step + 1))
            expected[step + 1] = result(params, optimizer)
        assert same(optimizer.full_state_dict(), optimizer.state_dict())
        assert not same(expected[2]["full"], expected[4]["full"])
        stages = {"two": 2, "four-loaded": 2, "four": 4, "again-loaded": 4, "again": 5}
        for stage, steps in stages.items():
            name = "-".join([stage.split("-")[0], case, *stage.split("-")[1:]])
            differ += [] if same(left(name), expected[steps]) else [name]
        for stage, steps in (("two", 2), ("four", 4)):
            start = left(f"{stage}-{case}")
            params, optimizer = runs.build(case, lambda name, t, w=start["weights"]: w[name].clone())
            optimizer.load_state_dict(start["full"])
            differ += [] if same(result(params, optimizer), start) else [f"{stage}-{case} in one process"]
            runs.train(params, optimizer, range(steps, 6))
            differ += [] if same(result(params, optimizer), expected[6]) else [f"{stage}-{case}, one process"]
    assert differ == []


@pytest.mark.parametrize("case", runs.STATES)
def test_the_cases_are_quantized(case: str) -> None:
    """So that equal bits are those of packed states."""
    params, optimizer = runs.build(case, runs.as_it_is)
    runs.train(params, optimizer, range(2))
    for name, p in params.items():
        codes = [t for key, t in optimizer.state[p].items() if key.endswith(".codes")]
        quantized = sum(state != "none" for state in runs.STATES[case])
        assert len(codes) == (0 if name in ("small", "gain", "tok") else quantized), name


def test_a_full_state_dict_is_a_copy() -> None:
    params, optimizer = runs.build("dynamic8", runs.as_it_is)
    runs.train(params, optimizer, range(2))
    full, before = optimizer.full_state_dict(), optimizer.full_state_dict()
    runs.train(params, optimizer, range(2, 3))
    assert same(full, before)
    assert not same(full, optimizer.full_state_dict())


def test_a_real_backward_under_fully_shard(left: Callable[[str], Any]) -> None:
    saved, model, world = left("four-fully_shard"), runs.Net(), 4
    sum(model(runs.net_tokens(rank, 0)) / world for rank in range(world)).backward()
    optimizer = runs.net_optimizer(model)
    for step, gradients in enumerate(saved["gradients"]):
        for name, p in model.named_parameters():
            if step == 0:  # the sum over processes rounds otherwise
                torch.testing.assert_close(gradients[name], p.grad, rtol=1e-5, atol=1e-8)
            p.grad = gradients[name]
        optimizer.step()
    assert same(dict(model.state_dict()), saved["weights"])
    assert same(optimizer.state_dict(), saved["full"])
    assert sum("exp_avg.codes" in held for held in saved["full"]["state"].values()) == 2  # up and down


@pytest.mark.parametrize(("states", "value"), runs.POISONED)
def test_non_finite_numbers_reach_all_shards_of_a_shared_scale(
    left: Callable[[str], Any], states: str, value: float
) -> None:
    params, optimizer = runs.poisoned(states, value, runs.as_it_is)
    assert not optimizer.decode_states(params["w"])["exp_avg"][0].isfinite().any()
    assert same(left(f"four-{states}{value}"), result(params, optimizer))


def test_a_process_decodes_and_counts_its_rows(left: Callable[[str], Any]) -> None:
    params, optimizer = runs.build("four_bits", runs.as_it_is)
    runs.train(params, optimizer, range(4))
    ranks = [left(f"four-rank{rank}") for rank in range(4)]
    for name, p in params.items():
        for kind, moment in optimizer.decode_states(p).items():
            parts = [rank["decoded"][name][kind] for rank in ranks]
            if name in (runs.COPIED, runs.PLAIN):
                assert all(torch.equal(part, moment) for part in parts)
            else:
                assert torch.equal(torch.cat(parts), moment)
    expected = optimizer.state_bytes()
    for name in (runs.COPIED, runs.PLAIN):  # three more processes hold them
        for key, t in optimizer.state[params[name]].items():
            expected[key] += 3 * t.numel() * t.element_size()
        expected["as_float32"] += 3 * 8 * params[name].numel()
    for key in expected.keys() - {"total", "as_float32", "step"}:
        assert sum(rank["bytes"][key] for rank in ranks) == expected[key]
    assert sum(rank["bytes"]["as_float32"] for rank in ranks) == expected["as_float32"] + 3 * 4 * len(params)
    assert all(rank["bytes"]["step"] == 4 * len(params) for rank in ranks)


def test_what_cannot_be_sharded_is_refused_by_name(left: Callable[[str], Any]) -> None:
    says = {
        "grid": ["w lies as", "device mesh of shape (2, 2)", "init_device_mesh(device_type, (world_size,))"],
        "columns": ["w has the placement Shard(dim=1)", "shard_placement_fn"],
        "mse": ["w is sharded", "exp_avg with clip='mse' and a scale over the whole tensor", "clip=absmax"],
        "gaussian": ["w is sharded", "exp_avg with clip='gaussian' (int8 row", "clip=absmax"],
        "rms": ["w is sharded", "exp_avg_sq with clip='rms:2.5' (e2m1"],
        "percentile": ["w is sharded", "clip='percentile:99' and a scale over the whole tensor"],
        "replicated": ["accepted"],
        "partial gradient": ["gradient of w has the placements", "Partial", "redistribute"],
        "one shard": ["w: exp_avg.codes", "(9, 8)", "full_state_dict()"],
        "two meshes": ["w is sharded over ranks [0, 1, 2, 3], v over"],
        "bitsandbytes": ["Mine of bitsandbytes cannot step w", "DDP", "optimizer=adamw m1=dynamic8"],
        "bitsandbytes on plain": ["accepted"],
        "others": ["accepted"],
    }
    for rank in range(4):
        found = left(f"refusals{rank}.json")
        says["elsewhere"] = ["accepted"] if rank == 0 else ["every rank but 0", "on every rank"]
        assert found.keys() == says.keys()
        for what, words in says.items():
            assert all(word in found[what] for word in words), (what, found[what])


def test_a_parameter_that_is_whole_asks_nobody() -> None:
    shard, t = RowShard(0, 5, 5, None), torch.arange(5.0)
    assert shard.take(t) is shard.gather(t) is shard.maximum(t) is local(t) is t
