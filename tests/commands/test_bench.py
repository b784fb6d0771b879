"""The step benchmark: its arms compute what they say, its statistics are right, its file is whole."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from torch import nn

from qtrain.commands import bench, bench_fake_quant, bench_timing

TINY: dict[str, Any] = {
    "model": {
        "_target_": "qtrain.models.gpt.GPTConfig",
        "vocab_size": 17,
        "sequence_tokens": 12,
        "layers": 1,
        "heads": 2,
        "width": 16,
    },
    "recipe": {
        "_target_": "qtrain.quant.ModelRecipe",
        "linear": {
            "fprop": {"input": "int8_row", "weight": "int8_row"},
            "dgrad": {"grad_output": "int8_row", "weight": "fprop"},
            "wgrad": {"grad_output": "int8_row", "input": "fprop"},
        },
        "exclude": ["lm_head"],
    },
    "what": "step",
    "arms": ["fake_quant_eager", "unquantized_eager"],
    "device": "cpu",
    "precision": "bf16",
    "batch_sequences": 2,
    "sequence_tokens": 11,
    "rounds": 5,
    "warmup_rounds": 1,
    "seed": 0,
    "output": None,
    "profile": False,
}


def config(**changes: Any) -> DictConfig:
    return OmegaConf.create({**TINY, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"what": "stp"}, "what='stp': allowed are step, train, linear, data, instruments and kernels"),
        ({"arms": ["fast"]}, "allowed are unquantized_compiled, recipe_compiled"),
        ({"arms": []}, "allowed are"),
        ({"arms": ["unquantized_eager"] * 2}, "name each arm once"),
        ({"rounds": 4}, "rounds=4: must be an integer of at least 5"),
        ({"batch_sequences": "x"}, "batch_sequences='x'"),
        ({"precision": "fp16"}, "allowed are bf16 and fp32"),
        ({"device": "tpu"}, "allowed are auto, cpu and cuda"),
        ({"profile": 1}, "profile=1: true or false"),
        (
            {"profile": True, "what": "linear"},
            "bench linear on device=cpu has no profile, bench linear on a GPU has",
        ),
        ({"profile": True, "what": "train", "device": "cuda"}, "bench train on device=cuda has no profile"),
        ({"profile": True, "what": "data"}, "bench data on device=cpu has no profile"),
        ({"sequence_tokens": 13}, "this model reads at most 12"),
    ],
)
def test_check_names_value_and_remedy(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bench.check(config(**changes))


def test_check_of_a_recipe_and_of_a_missing_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    bench.check(config())
    with pytest.raises(TypeError, match=r"_target_ must be qtrain\.quant\.ModelRecipe"):
        bench.check(config(recipe={"_target_": "qtrain.quant.LinearRecipe"}))
    monkeypatch.setattr(bench, "_compiler", lambda: None)
    bench.check(config())
    with pytest.raises(ValueError, match=r"need a C\+\+ compiler"):
        bench.check(config(arms=["recipe_compiled"]))


def test_run_prints_a_table_and_writes_the_file_atomically(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "deep" / "step.json"
    assert bench.run(config(output=str(path))) == 0
    assert os.listdir(path.parent) == ["step.json"]
    report = json.loads(path.read_text())
    assert {r["arm"] for r in report["rows"]} == set(TINY["arms"])
    assert all(len(report[key][arm]) == 5 for key in ("wall_ms", "cpu_ms") for arm in TINY["arms"])
    assert report["torch"] == torch.__version__
    assert report["settings"]["model"]["width"] == 16
    for key in ("device", "threads", "commit", "utc", "python", "qtrain"):
        assert key in report
    text = capsys.readouterr().out
    assert "| fake_quant_eager |" in text
    assert str(path) in text


def test_arms_are_interleaved_in_rotating_order() -> None:
    calls: list[tuple[str, int]] = []
    steps = {name: (lambda i, name=name: calls.append((name, i))) for name in "abc"}
    wall, cpu = bench_timing.timed_in_turns(steps, "cpu", rounds=3, warmup_rounds=1)
    assert ["".join(n for n, j in calls if j == i) for i in range(4)] == ["abc", "bca", "cab", "abc"]
    assert {len(v) for v in (*wall.values(), *cpu.values())} == {3}


def test_ratio_and_interval_of_known_samples() -> None:
    base = np.random.default_rng(1).normal(100.0, 5.0, 40)
    ratio, low, high = bench_timing.ratio_interval(list(1.5 * base), list(base))
    # Rounds are resampled as pairs, so a constant factor has no uncertainty
    assert (ratio, low, high) == (pytest.approx(1.5), pytest.approx(1.5), pytest.approx(1.5))
    ratio, low, high = bench_timing.ratio_interval(
        list(np.random.default_rng(2).normal(100.0, 5.0, 40)), list(base)
    )
    assert low < 1.0 < high
    assert low < ratio < high
    # A median of 40 varies by 1.25 * 5 / sqrt(40) = 1 %, a ratio of two by 1.4 %, 95 % is +-2.8 %
    assert 0.02 < high - low < 0.12


def test_the_interval_covers_about_95_percent() -> None:
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(60):
        a, b = rng.lognormal(0.0, 0.1, 25), rng.lognormal(0.0, 0.1, 25)
        _, low, high = bench_timing.ratio_interval(list(a), list(b))
        covered += low <= 1.0 <= high
    # Binomial(60, 0.95) falls below 51 with probability 0.002
    assert covered >= 51


def test_summary_is_relative_to_the_compiled_unquantized_arm() -> None:
    wall = {"recipe_compiled": [3.0] * 5, "unquantized_compiled": [2.0] * 5}
    rows = {r["arm"]: r for r in bench.summarize(wall, {k: [10.0, 20, 30, 40, 50] for k in wall})}
    assert rows["recipe_compiled"]["ratio"] == 1.5
    assert rows["unquantized_compiled"]["ratio"] == 1.0
    assert rows["recipe_compiled"]["cpu_median_ms"] == 30.0
    assert bench.summarize({"fake_quant_eager": [1.0] * 5}, {"fake_quant_eager": [1.0] * 5})[0][
        "ratio_to"
    ] == ("fake_quant_eager")


def grid(x: torch.Tensor) -> torch.Tensor:
    """Independent of the implementation: float64, one row at a time."""
    rows = []
    for row in x.double().reshape(-1, x.shape[-1]):
        scale = row.abs().max() / 127
        rows.append(torch.round(row / scale) * scale)
    return torch.stack(rows).reshape(x.shape).to(x.dtype)


@pytest.mark.parametrize("bias", [False, True])
def test_fake_quant_is_the_papers_linear_layer(bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 7, bias=bias))
    x = torch.randn(3, 5, 24, generator=generator, requires_grad=True)
    g = torch.randn(3, 5, 7, generator=generator)
    bench_fake_quant.fake_quantize_linears(model, exclude=())
    y = model(x)
    y.backward(g)
    layer = model[0]
    xq, wq = grid(x.detach()), grid(layer.weight.detach())
    expected = F.linear(xq, wq, layer.bias)
    # float32 sums of 24 products
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(y, F.linear(x, layer.weight, layer.bias), rtol=1e-4)
    torch.testing.assert_close(x.grad, g @ wq, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        layer.weight.grad, grid(g).reshape(15, 7).t() @ xq.reshape(15, 24), rtol=1e-5, atol=1e-5
    )
    if bias:
        torch.testing.assert_close(layer.bias.grad, g.sum((0, 1)), rtol=1e-5, atol=1e-5)


def test_zero_rows_stay_zero() -> None:
    assert bench_fake_quant.quantize_dequantize(torch.zeros(2, 8)).equal(torch.zeros(2, 8))


def test_excluded_layers_stay_as_they_are() -> None:
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "lm_head": nn.Linear(4, 4)})
    bench_fake_quant.fake_quantize_linears(model, exclude=("lm_head",))
    assert "forward" in vars(model["body"])
    assert "forward" not in vars(model["lm_head"])


def watched_models(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The models whose gradients the arms reset, as they do: each of them last when its step has run."""
    models: list[nn.Module] = []
    zero = nn.Module.zero_grad
    monkeypatch.setattr(nn.Module, "zero_grad", lambda self, **k: models.append(self) or zero(self, **k))
    return models


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_every_eager_arm_has_gradients_of_its_own(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """recipe_compiled runs here without the compiler: the same function, not the same speed."""
    monkeypatch.setattr(torch, "compile", lambda f, **k: f)
    models = watched_models(monkeypatch)
    gradients = {}
    for arm in bench.ARMS:
        bench.build_arm(arm, config(precision=precision), "cpu")(0)
        gradients[arm] = torch.cat([p.grad.flatten() for p in models[-1].parameters()])
    exact = gradients["unquantized_eager"]
    assert torch.equal(exact, gradients["unquantized_compiled"])
    for arm in ("recipe_compiled", "fake_quant_eager"):
        error = (gradients[arm] - exact).norm() / exact.norm()
        # 8 bits a row: about 1 % an operand; 0 would mean that nothing was quantized
        assert 1e-3 < error < 0.1, (arm, error)


def test_kernels_are_forwarded(monkeypatch: pytest.MonkeyPatch) -> None:
    from qtrain_kernels import bench as kernel_bench

    given: list[list[str]] = []
    monkeypatch.setattr(kernel_bench, "main", given.append)
    assert bench.FORWARDS["kernels"](["--op", "quantize_rows"]) == 0
    assert given == [["--op", "quantize_rows"]]


def test_commit_of_this_checkout() -> None:
    commit = bench.commit()
    assert commit is None or len(commit.removesuffix("-dirty")) == 40


@pytest.mark.inductor
@pytest.mark.slow
def test_compiled_arms_run(monkeypatch: pytest.MonkeyPatch) -> None:
    if bench._compiler() is None:
        pytest.skip("no C++ compiler")
    bench.check(config(arms=["unquantized_compiled", "recipe_compiled"]))
    models = watched_models(monkeypatch)
    gradients = []
    for arm in ("unquantized_compiled", "recipe_compiled"):
        bench.build_arm(arm, config(), "cpu")(0)
        gradients.append(torch.cat([p.grad.flatten() for p in models[-1].parameters()]))
    error = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    assert 1e-3 < error < 0.1  # as above


def test_train_times_native_beside_bf16_and_fp32_with_the_roof(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    monkeypatch.setattr(bench.bench_linear, "ROOF_SIZE", 64)
    monkeypatch.setattr(bench.bench_linear, "COPY_BYTES", 1 << 16)
    path = tmp_path / "train.json"
    assert bench.run(config(what="train", arms=None, output=str(path))) == 0
    report = json.loads(path.read_text())
    arms = [row["arm"] for row in report["rows"]]
    assert arms == ["unquantized_compiled", "native_compiled", "fp32_compiled"]
    assert {row["ratio_to"] for row in report["rows"]} == {"unquantized_compiled"}
    assert set(report["roof_per_s"]) - {"int8 peak"} == {"int8 GEMM", "bf16 GEMM", "fp32 GEMM", "copy"}
    assert report["cpu_kernels"]
    text = capsys.readouterr().out
    assert "roof, measured in this run: int8" in text
    assert "| native_compiled |" in text


def test_linear_has_a_row_a_shape_and_a_floor(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(bench.bench_linear, "SHAPES", ((8, 16, 24),))
    monkeypatch.setattr(bench.bench_linear, "ROOF_SIZE", 64)
    monkeypatch.setattr(bench.bench_linear, "COPY_BYTES", 1 << 16)
    path = tmp_path / "linear.json"
    assert bench.run(config(what="linear", arms=None, output=str(path))) == 0
    (row,) = json.loads(path.read_text())["shapes"]
    assert row["shape"] == [8, 16, 24]
    assert row["median_ms"].keys() == {"fp32", "bf16", "native"}
    roof = {"int8 peak": 1e9, "int8 GEMM": 5e8, "copy": 1e9}
    moved = 2 * 2 * (8 * 16 + 8 * 24) + 2 * 4 * 16 * 24
    assert bench.bench_linear.floor_ms((8, 16, 24), roof) == pytest.approx((6 * 8 * 16 * 24 + moved) * 1e-6)
    assert "| 8, 16, 24 |" in capsys.readouterr().out


def test_on_a_gpu_train_and_linear_are_its_own_benchmarks(monkeypatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench.bench_linear_cuda, "check", lambda cfg: asked.append("linear"))
    monkeypatch.setattr(bench.bench_train_cuda, "check", lambda cfg, model: asked.append(f"{model.width}"))
    bench.check(config(device="cuda", what="linear", arms=["native_fp8"]))
    bench.check(config(device="auto", what="train", arms=["native_fp8"]))
    assert asked == ["linear", "16"]
    with pytest.raises(ValueError, match="native_fp8"):
        bench.check(config(device="cpu", what="train", arms=["native_fp8"]))


def test_the_native_arm_is_native(monkeypatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    from qtrain_kernels.int8_scaled_mm import int8_scaled_mm

    for arm, products in (("native_compiled", 18), ("recipe_compiled", 0), ("fp32_compiled", 0)):
        before = int8_scaled_mm.calls
        bench.build_arm(arm, config(), "cpu")(0)
        assert int8_scaled_mm.calls - before == products, arm  # three GEMMs in q, k, v, out, up and down
