"""The benchmark: contract before numbers, complete rows, the roof, rivals that are missing, clear errors."""

from __future__ import annotations

import json

import pytest
import torch
from qtrain_kernels import bench, bench_picture
from qtrain_kernels.op import Op, Workload, all_ops

FIELDS = {
    "op", "workload", "contender", "implementation", "median_ms", "p20_ms", "p80_ms", "gb_per_s", "percent_of_copy",
    "tflop_per_s", "percent_of_peak", "peak", "share_equal_to_reference", "missing", "rounds", "device", "torch", "triton",
    "commit", "utc",
}  # fmt: skip
ARGUMENTS = [
    "--op",
    "quantize_rows",
    "--device",
    "cpu",
    "--workload",
    "512x768/bf16/nearest",
    "--rounds",
    "3",
]


def small_roof(monkeypatch):
    monkeypatch.setitem(bench.COPY_BYTES, "cpu", 1 << 22)
    monkeypatch.setitem(bench.PEAK_SHAPES, "cpu", ((128, 128, 128), (8, 8, 8)))


def test_rows_are_complete_and_consistent(tmp_path, capsys, monkeypatch):
    small_roof(monkeypatch)
    file = tmp_path / "rows.json"
    bench.main([*ARGUMENTS, "--rivals", "eager", "--json", str(file)])
    rows = json.loads(file.read_text())
    assert [row["contender"] for row in rows] == ["op", "eager", "copy"]
    for row in rows:
        assert set(row) == FIELDS
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
    traffic = 512 * 768 * 3 + 512 * 4  # bf16 in, int8 and one float32 a row out
    assert rows[0]["gb_per_s"] == pytest.approx(traffic / rows[0]["median_ms"] * 1e-6)
    assert rows[2]["percent_of_copy"] == pytest.approx(100)
    assert rows[0]["share_equal_to_reference"] == 1.0
    assert "eager reference" in rows[0]["implementation"], "without a CPU kernel the row says what ran"
    assert "eager reference" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [file], "no temporary file is left"


def workload(name: str, rivals=None, dtype=torch.int8) -> Workload:
    def inputs(device: str):
        return (torch.ones(64, 32, dtype=dtype),)

    return Workload(name, inputs, bytes=64 * 32 * 2, flops=10**6, rivals=rivals or {})


def clone(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


def identity_op(**more) -> Op:
    """An op outside of the registry."""
    fields = {"name": "identity", "reference": clone, "cases": {}, "workloads": lambda _: []}
    return Op(**fields, kernels={}, mutates=(), rtol=0, atol=0, code_flips=0.0, overload=clone, **more)


@pytest.mark.parametrize(("dtype", "factor"), [(torch.int8, 2), (torch.bfloat16, 1)])
def test_operations_are_held_to_the_measured_peak(dtype, factor, monkeypatch):
    small_roof(monkeypatch)
    rows = bench.measure(identity_op(), workload("w", dtype=dtype), "cpu", 3, [], {})
    by_name = {row["contender"]: row for row in rows}
    large, small = (by_name[f"bf16 peak {n}x{n}x{n}"] for n in (128, 8))
    assert large["tflop_per_s"] == pytest.approx(2 * 128**3 / large["median_ms"] * 1e-9)
    peak = max(large["tflop_per_s"], small["tflop_per_s"])
    rate = 1e6 / by_name["op"]["median_ms"] * 1e-9
    assert by_name["op"]["percent_of_peak"] == pytest.approx(100 * rate / (factor * peak))
    assert by_name["op"]["peak"] == f"{factor} x bf16 peak"
    assert by_name["copy"]["tflop_per_s"] is None
    assert by_name["copy"]["gb_per_s"] == pytest.approx((1 << 22) / by_name["copy"]["median_ms"] * 1e-6)


def test_a_rival_that_fails_is_named_with_its_reason(monkeypatch):
    def absent(_):
        raise ImportError("No module named 'fast'\nmore")

    def broken(_):
        return lambda: torch.ones(2) @ torch.ones(3)

    small_roof(monkeypatch)
    rivals = {"absent": absent, "broken": broken, "sound": lambda inputs: lambda: inputs[0] + 1}
    rows = bench.measure(identity_op(), workload("w", rivals), "cpu", 3, [], {})
    missing = {row["contender"]: row["missing"] for row in rows if row["missing"]}
    assert missing["absent"] == "ImportError: No module named 'fast'"
    assert missing.keys() == {"absent", "broken"}
    assert len({frozenset(row) for row in rows}) == 1, "all rows have the same fields"
    text = bench.table(rows)
    assert "| identity | w | absent | missing: ImportError" in text
    assert "| identity | w | sound |" in text


def test_rounds_end_with_the_time(monkeypatch):
    clock = iter(range(0, 10_000))
    monkeypatch.setattr(bench.time, "perf_counter", lambda: float(next(clock)))
    times = bench.interleaved_ms({"a": lambda: None, "b": lambda: None}, "cpu", 100, seconds=0.5)
    assert {len(ms) for ms in times.values()} == {bench.LEAST_ROUNDS}
    times = bench.interleaved_ms({"a": lambda: None}, "cpu", 12)
    assert len(times["a"]) == 12


def test_workloads_are_spread():
    names = [workload(str(i)) for i in range(6)]
    assert [w.name for w in bench._spread(names, 2)] == ["2", "5"]
    assert [w.name for w in bench._spread(names, 1)] == ["5"]
    assert bench._spread(names, None) == names
    assert bench._spread(names, 9) == names


def test_a_broken_op_does_not_hide_the_others(monkeypatch, tmp_path, capsys):
    small_roof(monkeypatch)
    monkeypatch.setattr(bench, "broken_contracts", lambda names, _: {n: ["x"] * (n == "quantize_rows_columns") for n in names})  # fmt: skip
    monkeypatch.setattr(all_ops()["quantize_rows"], "workloads", lambda _: [workload("w")])
    monkeypatch.setattr(bench, "measure", lambda op, w, *_: [{**dict.fromkeys(FIELDS), "op": op.name, "workload": w.name, "contender": "op", "missing": "-"}])  # fmt: skip
    file = tmp_path / "rows.json"
    with pytest.raises(SystemExit, match="broken:\nquantize_rows_columns: x"):
        bench.main(["--op", "quantize_rows", "--op", "quantize_rows_columns", "--device", "cpu", "--json", str(file)])  # fmt: skip
    assert {row["op"] for row in json.loads(file.read_text())} == {"quantize_rows"}
    assert "quantize_rows_columns: contract broken, nothing is measured" in capsys.readouterr().out


def test_a_workload_that_fails_does_not_hide_the_others(monkeypatch, tmp_path):
    def measure(op, workload, *_):
        if workload.name == "bad":
            raise RuntimeError("out of memory")
        return [{**dict.fromkeys(FIELDS), "op": op.name, "workload": workload.name, "contender": "op", "missing": "-"}]  # fmt: skip

    monkeypatch.setattr(bench, "broken_contracts", lambda names, _: {n: [] for n in names})
    monkeypatch.setattr(all_ops()["quantize_rows"], "workloads", lambda _: [workload("bad"), workload("good")])  # fmt: skip
    monkeypatch.setattr(bench, "measure", measure)
    file = tmp_path / "rows.json"
    with pytest.raises(SystemExit, match="quantize_rows: bad failed"):
        bench.main(["--op", "quantize_rows", "--device", "cpu", "--json", str(file)])
    assert [row["workload"] for row in json.loads(file.read_text())] == ["good"]


def test_contracts_of_several_ops_are_checked_in_processes():
    names = ["fp8_scaled_mm", "int8_scaled_mm"]
    assert bench.broken_contracts(names, "cpu") == {name: [] for name in names}


def test_the_picture_shows_shares_of_the_right_roof(monkeypatch, tmp_path):
    small_roof(monkeypatch)
    common = {"device": "x", "torch": "1", "triton": "2"}
    rows = bench.measure(identity_op(), workload("flops"), "cpu", 3, ["eager"], common)
    shown = bench_picture.shares(rows)
    assert [(label, name, roof) for label, name, _, roof in shown] == [
        ("identity flops", "op", "2 x bf16 peak"),
        ("identity flops", "eager", "2 x bf16 peak"),
    ]
    assert shown[0][2] == rows[0]["percent_of_peak"]
    bench_picture.draw(rows, tmp_path / "rows.png")
    assert (tmp_path / "rows.png").read_bytes()[:4] == b"\x89PNG"
    assert len(list(tmp_path.iterdir())) == 1


def test_no_number_from_an_op_that_breaks_its_contract(monkeypatch, capsys):
    op = all_ops()["quantize_rows"]
    case = op.cases["fp32/int8/nearest"]
    monkeypatch.setattr(op, "cases", {"other": lambda: (case()[0].requires_grad_().view(7, 33), *case()[1:])})
    monkeypatch.setattr(op, "reference", lambda *args: (torch.zeros(1), torch.zeros(1)))
    with pytest.raises(SystemExit, match="broken:\nquantize_rows: quantize_rows other: output 0"):
        bench.main([*ARGUMENTS, "--rivals"])
    assert "GB/s" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--op", "nothing"], "the ops are"),
        (["--workload", "nothing"], "no workload holds"),
        pytest.param(
            ["--device", "cuda"],
            "finds no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device"),
        ),
    ],
)
def test_clear_errors(change, message, capsys):
    with pytest.raises(SystemExit):
        bench.main([*ARGUMENTS, *change])
    assert message in capsys.readouterr().err
