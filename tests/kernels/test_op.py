"""define_op: what one declaration registers, and that importing ops is light."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from qtrain_kernels.op import Workload, all_ops, define_op
from torch import Tensor


def _twice(x: Tensor, times: int) -> Tensor:
    return x * times


def _declare(name: str, **kwargs):
    arguments = {
        "fake": lambda x, times: torch.empty_like(x),
        "cases": {"one": lambda: (torch.ones(3), 2)},
        "workloads": lambda device: [Workload("small", lambda on: (torch.ones(3, device=on), 2), bytes=24)],
    }
    return define_op(name, _twice, **(arguments | kwargs))


@pytest.fixture(autouse=True)
def keep_registry(monkeypatch):
    """Ops declared here stay out of the registry that other tests walk."""
    from qtrain_kernels import op as module

    monkeypatch.setattr(module, "_REGISTRY", dict(module._REGISTRY))


def test_schema_comes_from_the_annotations():
    op = _declare("test_op_schema")
    assert str(op.overload._schema) == "qtrain::test_op_schema(Tensor x, SymInt times) -> Tensor"


def test_calls_count_executions_by_implementation():
    op = _declare("test_op_counts", cpu="math:isnan")  # registered, and wrong: it must be what runs
    assert op.executions == {"reference": 0, "cpu": 0}
    with pytest.raises(TypeError):
        op(torch.ones(2), 3)
    assert op.calls == 0, "a call that raised is no execution"
    plain = _declare("test_op_plain")
    assert torch.equal(plain(torch.ones(2), 3), torch.full((2,), 3.0))
    assert plain.executions == {"reference": 1}


def test_kernel_falls_back_to_the_reference_only_where_none_is_registered():
    op = _declare("test_op_kernel", cpu="operator:mul")
    assert op.kernel("cuda") is _twice
    assert op(torch.ones(2), 3).tolist() == [3.0, 3.0]
    assert op.executions == {"reference": 0, "cpu": 1}


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("quantize_rows", {}, "defined twice"),
        ("test_op_bad", {"cases": {}}, "no cases"),
        ("test_op_bad", {"cuda": "no_colon"}, "package.module:function"),
    ],
)
def test_bad_declarations_raise(name, kwargs, message):
    all_ops()
    with pytest.raises(ValueError, match=message):
        _declare(name, **kwargs)


def test_importing_every_op_imports_no_triton_and_starts_no_cuda():
    code = (
        "import sys, torch; from qtrain_kernels.op import all_ops; ops = all_ops(); assert 'quantize_rows' in ops;"
        "assert 'triton' not in sys.modules; assert 'qtrain' not in sys.modules; assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_triton_the_launch_names_the_remedy():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from qtrain_kernels.op import all_ops\n"
        "op = all_ops()['quantize_rows']; op(*op.cases['fp32/int8/nearest']())\n"
        "try: op.kernel('cuda')\n"
        "except ModuleNotFoundError as error: assert 'pip install triton' in str(error), error\n"
        "else: raise SystemExit('no error')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
