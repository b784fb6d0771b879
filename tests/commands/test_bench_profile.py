"""The profile of a step: sums and launches of one step, by the kernel's name, and nothing that is no kernel."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qtrain.commands import bench_profile


def event(name: str, us: float, device: str = "CUDA", *, annotation: bool = False) -> Any:
    return SimpleNamespace(
        name=name,
        device_type=SimpleNamespace(name=device),
        is_user_annotation=annotation,
        time_range=SimpleNamespace(elapsed_us=lambda: us),
        self_cpu_time_total=us / 4,
    )


# Two steps: a GEMM three times a step, a quantizer once, a fill in the second step only
EVENTS = [
    *(event("gemm", us) for us in (10.0, 20, 30, 12, 22, 26)),
    event("cudaLaunchKernel", 500.0, "CPU"),
    event("step", 1000.0, annotation=True),
    event("quantize", 7.0),
    event("quantize", 9.0),
    event("Memset (Device)", 1.0),
]


def test_times_and_launches_are_of_one_step_the_longest_first() -> None:
    found = bench_profile.by_name(bench_profile.launches(EVENTS, "cuda"), 2)
    assert found["kernels"] == [
        {"name": "gemm", "us": 60.0, "launches": 3.0},
        {"name": "quantize", "us": 8.0, "launches": 1.0},
        {"name": "Memset (Device)", "us": 0.5, "launches": 0.5},
    ]
    assert (found["us"], found["launches"]) == (68.5, 4.5)


def test_on_a_cpu_operations_count_with_their_own_time() -> None:
    assert bench_profile.launches(EVENTS, "cpu") == [("cudaLaunchKernel", 125.0)]


def test_the_text_has_the_twelve_longest_and_the_sum_of_the_rest() -> None:
    events = [(f"kernel<{i}|" + "x" * 200, 100.0 - i) for i in range(15)]
    lines = bench_profile.text("16, 16, 16, bf16", bench_profile.by_name(events, 1)).splitlines()
    total = sum(us for _, us in events)
    assert lines[0] == f"16, 16, 16, bf16: {total:.1f} us in 15 launches a step"
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[4:]]
    assert len(rows) == 13
    assert rows[0][:3] == ["100.0", f"{100 / total:.1%}", "1"]
    assert rows[0][3] == ("kernel<0/" + "x" * 200)[:100]
    assert rows[12] == ["261.0", f"{261 / total:.1%}", "3", "3 others"], "88 + 87 + 86"


def test_a_step_is_profiled_as_often_as_it_is_divided_by() -> None:
    a, calls = torch.randn(32, 32), []

    def step() -> None:
        calls.append(a @ a)
        a.relu()

    found = bench_profile.profiled(step, "cpu")
    launches = {row["name"]: row["launches"] for row in found["kernels"]}
    assert len(calls) == bench_profile.STEPS + 1
    assert (launches["aten::mm"], launches["aten::relu"]) == (1, 1)
    assert found["us"] == pytest.approx(sum(row["us"] for row in found["kernels"]))


def test_no_kernel_at_all_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="the profiler saw no kernel"):
        bench_profile.profiled(lambda: None, "cpu")
