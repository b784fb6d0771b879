"""The benchmark: contract before numbers, complete rows, clear errors."""

from __future__ import annotations

import json

import pytest
import torch
from qtrain_kernels import bench
from qtrain_kernels.op import all_ops

FIELDS = {
    "op", "workload", "contender", "implementation", "median_ms", "p20_ms", "p80_ms", "gb_per_s", "percent_of_copy",
    "tflop_per_s", "share_equal_to_reference", "rounds", "device", "torch", "triton", "commit", "utc",
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


def test_rows_are_complete_and_consistent(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(bench.COPY_BYTES, "cpu", 1 << 22)
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


def test_no_number_from_an_op_that_breaks_its_contract(monkeypatch, capsys):
    op = all_ops()["quantize_rows"]
    case = op.cases["fp32/int8/nearest"]
    monkeypatch.setattr(op, "cases", {"other": lambda: (case()[0].requires_grad_().view(7, 33), *case()[1:])})
    monkeypatch.setattr(op, "reference", lambda *args: (torch.zeros(1), torch.zeros(1)))
    with pytest.raises(SystemExit, match="contract broken"):
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
