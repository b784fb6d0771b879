"""The layer benchmark of a GPU, run here on a CPU: what is timed is what it says, and what is missing is named."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from qtrain_kernels import bench as kernel_bench

from qtrain.commands import bench_contenders, bench_linear_cuda
from qtrain.commands.bench_contenders import CONTENDERS

SHAPE = (64, 48, 32)
OURS = ["bf16", "bf16_compiled", "native_int8", "native_int8_requantized", "simulated"]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """No compiler: the same functions, not the same speed."""
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    monkeypatch.setitem(kernel_bench.COPY_BYTES, "cpu", 1 << 16)
    monkeypatch.setitem(kernel_bench.PEAK_SHAPES, "cpu", ((64, 64, 64),))


@pytest.mark.usefixtures("small")
def test_contenders_compute_the_layer_each_with_the_error_of_its_bits() -> None:
    found = bench_linear_cuda.of_shape(SHAPE, OURS, 5, 0, "cpu")["contenders"]
    assert list(found) == OURS
    for name, r in found.items():
        assert len(r["ms"]) == 5
        for error in r["errors"]:
            if name.startswith("bf16"):
                assert error < 1e-3, "bf16 itself, another order of sums aside"
            else:
                # Uniform on 127 steps of a row's maximum, about 3 standard deviations: 0.7 % an operand
                assert 3e-3 < error < 3e-2, (name, r["errors"])


@pytest.mark.usefixtures("small")
def test_native_contenders_run_int8_products() -> None:
    from qtrain_kernels.int8_scaled_mm import int8_scaled_mm

    x, weight, g = (torch.randn(n, m).bfloat16() for n, m in ((64, 48), (32, 48), (64, 32)))
    for name, products in (("native_int8", 3), ("native_int8_requantized", 3), ("simulated", 0), ("bf16", 0)):
        step = bench_linear_cuda.LayerStep(name, x.requires_grad_(), weight, g, 0)
        before = int8_scaled_mm.calls
        step()
        assert int8_scaled_mm.calls - before == products, name


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("name", "quantized"), [("native_int8", 4), ("native_int8_requantized", 4)])
def test_every_call_quantizes_its_input_again(name: str, quantized: int) -> None:
    """Codes are shared by the layers that read one tensor; a layer that is timed again and again is not such a one."""
    from qtrain_kernels.quantize_rows_columns import quantize_rows_columns

    x, weight, g = (torch.randn(n, m).bfloat16() for n, m in ((64, 48), (32, 48), (64, 32)))
    step = bench_linear_cuda.LayerStep(name, x.requires_grad_(), weight, g, 0)
    for _ in range(3):
        before = quantize_rows_columns.calls
        step()
        assert quantize_rows_columns.calls - before == quantized, (
            "x, W and g; W again in the backward, as nothing of it is saved"
        )


@pytest.mark.usefixtures("small")
def test_calls_give_the_same_and_weights_are_not_shared() -> None:
    x, weight, g = (torch.randn(n, m).bfloat16() for n, m in ((64, 48), (32, 48), (64, 32)))
    step = bench_linear_cuda.LayerStep("bf16", x.requires_grad_(), weight, g, 0)
    first, again = step(), step()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), "gradients do not add up"
    assert x.grad is None
    assert step.weight.data_ptr() != weight.data_ptr()


@pytest.mark.usefixtures("small")
def test_saved_bytes_are_the_input_of_bf16_and_codes_of_native() -> None:
    found = bench_linear_cuda.of_shape(SHAPE, OURS, 5, 0, "cpu")["contenders"]
    T, I, _ = SHAPE
    codes_of_x = T * I + 4 * T  # int8, and a float32 scale a row
    assert found["bf16"]["saved_bytes"] == 2 * T * I
    assert found["native_int8"]["saved_bytes"] == codes_of_x, "nothing of W"
    assert found["native_int8_requantized"]["saved_bytes"] == T * I + 4 * I, "a scale a column of x"
    # int8's scales weigh more in so small a layer than in those of the benchmark
    assert found["native_int8_requantized"]["saved_bytes"] < 0.56 * found["bf16"]["saved_bytes"]


@pytest.mark.usefixtures("small")
def test_what_cannot_run_is_in_the_table_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: Any) -> None:
        raise ModuleNotFoundError("No module named 'torchao' | or so\nsecond line")

    absent_one = bench_contenders.Contender(absent, compiled=True, bits=8)
    monkeypatch.setitem(CONTENDERS, "torchao_int8", absent_one)
    result = bench_linear_cuda.of_shape(SHAPE, ["bf16", "torchao_int8"], 5, 0, "cpu")
    assert result["contenders"]["torchao_int8"].keys() == {"missing"}
    lines = bench_linear_cuda.table([result, result]).splitlines()
    missing = [line for line in lines if "| torchao_int8 |" in line]
    assert len(missing) == 2, "not in the sum of all shapes"
    assert "missing: ModuleNotFoundError: No module named 'torchao' / or so |" in missing[0]
    assert len({line.count("|") for line in lines}) == 1


def made_up(ms: float, graph: float | None, saved: int) -> dict[str, Any]:
    times = {"median_ms": ms, "graph_ms": graph, "floor_ms": 1.0, "tflop_per_s": 1.0}
    return {**times, "saved_bytes": saved, "errors": [0.0] * 3}


def test_ratios_are_speed_and_saved_bytes_against_bf16() -> None:
    one = {"bf16": made_up(4.0, 3.0, 100), "native_int8": made_up(2.0, 1.0, 50)}
    two = {"bf16": made_up(6.0, 5.0, 100), "native_int8": made_up(2.0, None, 52)}
    two["native_int8"]["no_graph"] = "RuntimeError: no"
    lines = bench_linear_cuda.table(
        [{"shape": [16] * 3, "contenders": one}, {"shape": [32] * 3, "contenders": two}]
    ).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    cells = [[cell.strip() for cell in line.split("|")] for line in lines]
    of = {(c[1], c[2]): c[3:11] for c in cells[2:]}
    assert of["16, 16, 16", "native_int8"] == [
        "2.000",
        "2.00",
        "1.000",
        "3.00",
        "1.000",
        "100%",
        "0.0",
        "0.50",
    ]
    assert of["32, 32, 32", "native_int8"][2:4] == ["RuntimeError: no", ""]
    assert of["32, 32, 32", "native_int8"][5] == "50%", "without a graph, of the eager time"
    assert of["sum", "native_int8"][:5] == ["4.000", "2.50", "", "", "2.000"]
    assert of["sum", "bf16"][:4] == ["10.000", "1.00", "8.000", "1.00"]
    assert of["sum", "native_int8"][7] == "0.51"


def test_floor_counts_operations_at_the_operands_width_and_each_tensor_once() -> None:
    T, I, O = 16, 32, 48
    moved = 2 * (T * I + T * I + T * O + T * O + O * I + O * I)
    compute = 6 * T * I * O
    assert bench_linear_cuda.floor_ms((T, I, O), 16, 1e9, 1e6) == pytest.approx(compute * 1e-6 + moved * 1e-3)
    assert bench_linear_cuda.floor_ms((T, I, O), 8, 1e9, 1e6) == pytest.approx(
        compute / 2 * 1e-6 + moved * 1e-3
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": ["native_int4"]}, r"on a GPU, allowed are bf16, bf16_compiled, native_int8"),
        ({"arms": ["bf16", "bf16"]}, "name each arm once"),
        ({"rounds": 3}, "at least 5"),
        ({"shapes": [[16, 16]]}, r"each is \[T, I, O\]"),
        ({"shapes": [[16, 16, 20]]}, "multiples of 16"),
    ],
)
def test_check_names_value_and_remedy(
    changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    settings = {"arms": None, "rounds": 20, "shapes": None, "seed": 0}
    bench_linear_cuda.check(SimpleNamespace(**settings))
    with pytest.raises(ValueError, match=message):
        bench_linear_cuda.check(SimpleNamespace(**{**settings, **changes}))


def test_check_without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="finds no CUDA device"):
        bench_linear_cuda.check(SimpleNamespace(arms=None, rounds=20, shapes=None, seed=0))


@pytest.mark.usefixtures("small")
def test_results_are_saved_after_each_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    of_shape = bench_linear_cuda.of_shape
    monkeypatch.setattr(bench_linear_cuda, "of_shape", lambda *args: of_shape(*args, device="cpu"))
    saved: list[int] = []
    cfg = SimpleNamespace(arms=["bf16"], rounds=5, shapes=[[16, 16, 32], [32, 16, 16]], seed=0)
    found, text = bench_linear_cuda.measured(
        cfg, lambda found: saved.append(len(json.loads(json.dumps(found))["shapes"]))
    )
    assert saved == [1, 2]
    assert [r["shape"] for r in found["shapes"]] == [[16, 16, 32], [32, 16, 16]]
    assert "measured beside each shape: best bf16 GEMM" in text


@pytest.mark.gpu
def test_contenders_run_on_a_gpu_and_in_graphs() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    arms = ["bf16", "bf16_compiled", "native_int8", "simulated"]
    found = bench_linear_cuda.of_shape((512, 256, 256), arms, 5, 0)["contenders"]
    assert {name: r.get("missing") or r.get("no_graph") for name, r in found.items()} == dict.fromkeys(arms)
    for name, r in found.items():
        assert (max(r["errors"]) < 1e-3) == name.startswith("bf16"), (name, r["errors"])


@pytest.mark.gpu
def test_a_graph_computes_what_the_layer_computes() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    x, weight, g = (
        torch.randn(n, m, device="cuda").bfloat16() for n, m in ((512, 256), (128, 256), (512, 128))
    )
    step = bench_linear_cuda.LayerStep("native_int8", x.requires_grad_(), weight, g, 0)
    kept: list[tuple[torch.Tensor, ...]] = []
    call = bench_linear_cuda.LayerStep.__call__
    want = [t.clone() for t in step()]

    class Keeping(bench_linear_cuda.LayerStep):
        def __call__(self) -> tuple[torch.Tensor, ...]:
            kept.append(call(self))
            return kept[-1]

    step.__class__ = Keeping
    replay = step.graph()
    for t in kept[-1]:
        t.zero_()
    replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(kept[-1], want, strict=True))
