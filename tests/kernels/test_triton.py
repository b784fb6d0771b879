"""The Triton kernels without a GPU: values under the interpreter, machine code for three architectures."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from qtrain_kernels.aot import ARCHITECTURES
from qtrain_kernels.op import all_ops

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton: pip install triton"
)
KERNELS = [name for name, op in all_ops().items() if "cuda" in op.kernels]


def run(*command: str, **environment: str) -> str:
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *command], env=clean | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["counter_hash", *KERNELS])
def test_interpreted_kernel_equals_the_reference(name):
    script = str(Path(__file__).with_name("interpreter_checks.py"))
    assert json.loads(run(script, name, TRITON_INTERPRET="1")) == []


@pytest.mark.parametrize("name", KERNELS)
def test_machine_code_without_spills(name, tmp_path):
    """Compiled afresh (an empty cache) in a process of its own."""
    lines = run(
        "-m", "qtrain_kernels.aot", "--json", "--op", name, TRITON_CACHE_DIR=str(tmp_path)
    ).splitlines()
    rows = [json.loads(line) for line in lines]
    with_tensor_cores = {90, 100} if name == "fp8_scaled_mm" else set(ARCHITECTURES)  # sm_80 has none for fp8
    assert {row["arch"] for row in rows} == with_tensor_cores
    for row in rows:
        assert row["problems"] == [], row
        assert row["stack"] == row["local"] == 0
        assert 16 <= row["registers"] <= row["max_registers"] <= 255
