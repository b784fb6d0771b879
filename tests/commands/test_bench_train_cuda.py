"""The training benchmark of a GPU, run here on a CPU without the compiler: shared parameters, turns, ratios, the search."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from qtrain_kernels import bench as kernel_bench

from qtrain.commands import bench_train_cuda, bench_train_steps
from qtrain.commands.bench_train_cuda import Bench, largest
from qtrain.commands.bench_train_steps import OPTIMIZERS, SharedParameters, TrainStep, loss_of
from qtrain.models.gpt import GPTConfig

MODEL = GPTConfig(vocab_size=32, sequence_tokens=16, layers=2, heads=2, width=32, tie_embeddings=True)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    monkeypatch.setitem(kernel_bench.COPY_BYTES, "cpu", 1 << 16)
    monkeypatch.setitem(kernel_bench.PEAK_SHAPES, "cpu", ((64, 64, 64),))


def settings(**changes: Any) -> DictConfig:
    given = {"arms": ["bf16", "native_int8", "simulated"], "optimizers": ["torch_fused", "adamw8bit"]}
    more = {
        "rounds": 5,
        "seed": 0,
        "batch_sequences": 2,
        "sequence_tokens": 15,
        "largest_batch": False,
        "cuda_graphs": False,
    }
    return OmegaConf.create({**given, **more, **changes})


def test_models_share_every_parameter_and_are_tied() -> None:
    shared = SharedParameters(MODEL, "cpu", 0)
    a, b = shared.model(), shared.model()
    assert a is not b
    for (name, p), (_, q) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        assert p is q, name
        assert not p.is_meta
    assert a.lm_head.weight is a.token_embedding.weight
    assert a.num_parameters() == MODEL.build(seed=0).num_parameters()
    assert a.blocks[0].mlp.up.weight.detach().std().item() == pytest.approx(0.02, rel=0.1)
    assert torch.equal(a.final_norm.weight, torch.ones(32))
    assert not any(buffer.is_meta for buffer in a.buffers())


def test_gradients_are_those_of_the_loss_and_each_contenders_own() -> None:
    tokens = torch.randint(32, (2, 16), generator=torch.Generator().manual_seed(0))
    shared = SharedParameters(MODEL, "cpu", 0)
    found = {}
    for name in ("bf16", "native_int8", "simulated"):
        TrainStep(name, shared, 0).gradients(tokens)
        found[name] = torch.cat([p.grad.flatten() for p in shared.model().parameters()])
    for p in shared.model().parameters():
        p.grad = None
    loss_of(shared.model(), tokens, "cpu").backward()
    exact = torch.cat([p.grad.flatten() for p in shared.model().parameters()])
    assert torch.equal(found["bf16"], exact)
    for name in ("native_int8", "simulated"):
        error = (found[name] - exact).norm() / exact.norm()
        assert 1e-3 < error < 0.1, (name, error)


@pytest.mark.parametrize("name", ["torch_fused", "adamw32", "adamw8bit"])
def test_a_step_updates_the_shared_parameters_with_the_optimizers_own_states(name: str) -> None:
    from qtrain.optim import parameter_groups

    shared = SharedParameters(MODEL, "cpu", 0)
    step = TrainStep("bf16", shared, 0)
    optimizer = OPTIMIZERS[name](parameter_groups(shared.model(), 0.1))
    before = step.model.blocks[0].mlp.up.weight.detach().clone()
    step.step(torch.randint(32, (2, 16)), optimizer)
    change = (shared.model().blocks[0].mlp.up.weight - before).abs().max()
    # Adam's first step moves every weight by about the rate
    assert 0.5 * bench_train_steps.LR < change < 1.5 * bench_train_steps.LR
    count = sum(p.numel() for p in step.parameters)
    states = optimizer.state_bytes()["total"]
    assert states < 6 * count if name == "adamw8bit" else states >= 8 * count


def test_the_report_has_every_combination_and_its_ratio_to_the_first(capsys: Any) -> None:
    saved: list[str] = []
    found, text = bench_train_cuda.measured(
        settings(arms=["bf16", "native_int8"]), MODEL, lambda f: saved.append(json.dumps(f)), "cpu"
    )
    assert [(r["optimizer"], r["arm"]) for r in found["rows"]] == [
        ("torch_fused", "bf16"),
        ("torch_fused", "native_int8"),
        ("adamw8bit", "bf16"),
        ("adamw8bit", "native_int8"),
    ]
    for r in found["rows"]:
        assert len(r["ms"]) == 5
        assert r["tokens_per_s"] == pytest.approx(2 * 15 / r["median_ms"] * 1e3)
        achieved = r["tokens_per_s"] * found["flops_per_token"]
        assert r["of_measured_peak"] == pytest.approx(achieved / found["bf16_peak_per_s"])
        assert r["mfu"] is None, "no data sheet for this device"
        assert 3.0 < r["loss"] < 4.0, "near ln 32"
        assert r["optimizer_ms"] > 0
    assert [r["ratio"] for r in found["rows"][::2]] == [1.0, 1.0]
    assert found["parameters"] == MODEL.build(seed=0).num_parameters()
    assert len(saved) == 1
    assert "| adamw8bit | native_int8 | 2 |" in text


def test_what_cannot_run_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(groups: Any) -> Any:
        raise ValueError("this optimizer needs a library")

    monkeypatch.setitem(OPTIMIZERS, "bnb8bit", absent)
    cfg = settings(arms=["bf16", "torchao_int8"], optimizers=["torch_fused", "bnb8bit"])
    monkeypatch.setitem(__import__("sys").modules, "torchao", None)
    found, text = bench_train_cuda.measured(cfg, MODEL, lambda f: None, "cpu")
    assert found["missing"].keys() == {"torchao_int8", "bnb8bit"}
    assert [(r["optimizer"], r["arm"]) for r in found["rows"]] == [("torch_fused", "bf16")]
    assert "bnb8bit: missing: ValueError: this optimizer needs a library" in text


def test_combinations_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(settings(arms=["bf16", "simulated"], optimizers=["torch_fused"]), MODEL, "cpu")
    bench.prepare(bench.tokens(2))
    order: list[str] = []
    for name, step in bench.steps.items():
        monkeypatch.setattr(step, "step", lambda tokens, optimizer, name=name: order.append(name))
    times = bench.timed(bench.tokens(2), rounds=2)
    n = bench_train_cuda.STEPS
    a, b = ["bf16"] * n, ["simulated"] * n
    assert order == [*a, *b, *b, *a, *a, *b]
    assert {key: len(ms) for key, ms in times.items()} == {"bf16 torch_fused": 2, "simulated torch_fused": 2}


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 8, 63, 64, 100, 1000])
@pytest.mark.parametrize("first", [1, 4, 64])
def test_the_largest_batch_is_found_within_a_sixteenth(limit: int, first: int) -> None:
    tried: list[int] = []

    def fits(n: int) -> float | None:
        tried.append(n)
        return float(n) if n <= limit else None

    got = largest(fits, first)
    assert got is not None
    n, ms = got
    assert n == ms
    assert limit - max(1, limit // 16) < n + 1 <= limit + 1
    assert len(tried) == len(set(tried)), "nothing is tried twice"
    assert len(tried) <= 16
    assert largest(lambda n: None, first) is None


def test_the_data_sheet_knows_the_device() -> None:
    assert bench_train_cuda.data_sheet_peak("NVIDIA H200") == 989.4e12
    assert bench_train_cuda.data_sheet_peak("NVIDIA H100 80GB HBM3") == 989.4e12
    assert bench_train_cuda.data_sheet_peak("NVIDIA GeForce RTX 4090") is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": ["native_compiled"]}, "on a GPU, allowed are bf16"),
        ({"optimizers": ["sgd"]}, "allowed are torch_fused, adamw32, adamw8bit, bnb8bit"),
        ({"optimizers": []}, "allowed are torch_fused"),
        ({"rounds": 4}, "at least 5"),
        ({"sequence_tokens": 17}, "this model reads at most 16"),
        ({"largest_batch": "yes"}, "true or false"),
    ],
)
def test_check_names_value_and_remedy(
    changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    bench_train_cuda.check(settings(), MODEL)
    with pytest.raises(ValueError, match=message):
        bench_train_cuda.check(settings(**changes), MODEL)


@pytest.mark.gpu
def test_peak_memory_leaves_out_other_optimizers_and_the_search_ends() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    bench = Bench(settings(arms=["bf16"], optimizers=["torch_fused", "adamw8bit"]), MODEL, "cuda")
    tokens = bench.tokens(2)
    bench.prepare(tokens)
    fused, ours = (bench.peak_bytes("bf16", name, tokens) for name in bench.optimizers)
    parameters = 4 * sum(p.numel() for p in bench.steps["bf16"].parameters)
    assert fused >= 4 * parameters, "weights, gradients and two float32 states"
    assert fused - ours > 0
    assert bench.fits("bf16", "torch_fused", 2) is not None
