"""The fused step: which parameters take it, and that it is the eager step."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from qtrain_kernels.adamw_step import adamw_step

from qtrain.optim import AdamW, fused
from qtrain.quant import QuantSpec

HYPER = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
STATES = {
    "dynamic8": {"exp_avg": "dynamic8", "exp_avg_sq": "dynamic8"},
    "4 bit": {"exp_avg": "dynamic4_group128", "exp_avg_sq": "linear4_nozero_group128"},
    "e4m3": {"exp_avg": "e4m3_group128", "exp_avg_sq": "e4m3_group128"},
    "int8 rows": {"exp_avg": "int8_row", "exp_avg_sq": "uint8_row"},
    "dynamic8 and float32": {"exp_avg": "dynamic8"},
    "float32": {},
}
SHAPES = ((64, 256), (33, 130), (129, 5), (8, 4, 3, 30), (300,), (), (0, 7))


def _parameters(dtype: torch.dtype, device: str) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(7)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(device, dtype)) for s in SHAPES]


def _groups(parameters: list[torch.nn.Parameter]) -> list[dict]:
    """Two groups: other numbers, and float32 states by wish."""
    return [
        {"params": parameters[:-3], "names": [f"w{i}" for i in range(len(SHAPES) - 3)]},
        {"params": parameters[-3:], "names": ["b", "c", "empty"], "weight_decay": 0.0, "lr": 1e-3},
    ]


def _give_gradients(parameters: list[torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in parameters:
        size = torch.randn(p.shape, generator=generator)
        p.grad = (torch.randn(p.shape, generator=generator) * 10**size).to(p.device, p.dtype)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The op runs its reference there."""
    monkeypatch.setattr(fused, "DEVICES", ("cuda", "cpu"))


def _differences(states: dict, dtype: torch.dtype, device: str) -> tuple[float, float, dict[str, float]]:
    """After 5 steps: largest difference of weights over the largest weight, of moments over the largest of a
    tensor, and the share of codes that differ."""
    ours, theirs = (_parameters(dtype, device) for _ in range(2))
    recipe = {**states, "min_numel": 0}
    a = AdamW(_groups(ours), **HYPER, states=recipe, fused=True)
    b = AdamW(_groups(theirs), **HYPER, states=recipe, fused=False)
    calls = adamw_step.calls
    for step in range(5):
        _give_gradients(ours, step), _give_gradients(theirs, step)
        a.step(), b.step()
    assert adamw_step.calls > calls
    assert set(a.fused_parameters().values()) == {None}
    assert set(b.fused_parameters().values()) == {"fused=False"}
    weights, moments, codes = 0.0, 0.0, {}
    for p, q in zip(ours, theirs, strict=True):
        if not p.numel():
            continue
        weights = max(weights, ((p - q).abs().max() / q.abs().max()).item())
        decoded, wanted = a.decode_states(p), b.decode_states(q)
        for kind in decoded:
            moments = max(
                moments, ((decoded[kind] - wanted[kind]).abs().max() / wanted[kind].abs().max()).item()
            )
        for key, t in b.state[q].items():
            assert a.state[p][key].dtype == t.dtype
            if key.endswith("codes"):
                codes[key] = max(codes.get(key, 0.0), (a.state[p][key] != t).float().mean().item())
    return weights, moments, codes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("states", STATES.values(), ids=STATES)
def test_the_op_takes_the_eager_step(states: dict, dtype: torch.dtype, on_cpu: None) -> None:
    """On a CPU torch rounds addcmul and addcdiv otherwise than the op: one unit in the last place a step, and a code
    apart where that crosses a midpoint, which is then a cell of the grid apart."""
    weights, moments, codes = _differences(states, dtype, "cpu")
    assert weights < (5e-6 if dtype == torch.float32 else 1.6e-2)
    assert max(codes.values(), default=0.0) <= 2e-3
    assert moments < (0.1 if codes else 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("states", STATES.values(), ids=STATES)
def test_on_cuda_the_op_is_the_eager_step_bit_for_bit(states: dict, dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    weights, moments, codes = _differences(states, dtype, "cuda")
    assert (weights, moments, max(codes.values(), default=0.0)) == (0.0, 0.0, 0.0)


@pytest.mark.gpu
def test_on_cuda_float32_states_are_torch_bit_for_bit() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    ours, theirs = (_parameters(torch.float32, "cuda") for _ in range(2))
    a, b = AdamW(ours, **HYPER, fused=True), torch.optim.AdamW(theirs, **HYPER, foreach=False)
    for step in range(5):
        _give_gradients(ours, step), _give_gradients(theirs, step)
        a.step(), b.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


def test_parameters_of_a_kind_share_a_call(on_cpu: None) -> None:
    parameters = _parameters(torch.float32, "cpu")
    optimizer = AdamW(_groups(parameters), **HYPER, states={**STATES["dynamic8"], "min_numel": 0})
    for expected in (2, 3):
        _give_gradients(parameters, 0)
        if expected == 3:  # a parameter that lags a step has other bias corrections
            optimizer.state[parameters[0]]["step"] += 1
        before = adamw_step.calls
        optimizer.step()
        assert adamw_step.calls == before + expected


def test_on_a_cpu_the_step_is_eager_and_says_why() -> None:
    parameters = _parameters(torch.float32, "cpu")
    optimizer = AdamW(_groups(parameters), states=STATES["dynamic8"])
    assert optimizer.fused_parameters() == {}
    _give_gradients(parameters[:1], 0)
    before = adamw_step.calls
    optimizer.step()
    assert adamw_step.calls == before
    assert list(optimizer.fused_parameters()) == ["w0"]
    assert "it lies on cpu" in optimizer.fused_parameters()["w0"]


def test_fused_true_raises_before_anything_changes() -> None:
    parameters = _parameters(torch.float32, "cpu")
    optimizer = AdamW(parameters, states=STATES["dynamic8"], fused=True)
    _give_gradients(parameters, 0)
    before = [p.detach().clone() for p in parameters]
    with pytest.raises(ValueError, match="parameter 0 cannot be stepped with fused=True: it lies on cpu"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(parameters, before, strict=True))
    assert not any(optimizer.state[p] for p in parameters)


@pytest.mark.parametrize(
    ("states", "says"),
    [
        ({"exp_avg": "dynamic8_sr"}, "stochastically"),
        ({"exp_avg": "int8_tensor"}, "blocks over several rows"),
        ({"exp_avg": QuantSpec(format="int8", granularity="row", clip="mse")}, "one float32 maximum"),
        ({"exp_avg": QuantSpec(format="int8", granularity="row", symmetric=False)}, "one float32 maximum"),
        (
            {"exp_avg": QuantSpec(format="int8", granularity="group:32", scale_format="e8m0")},
            "one float32 maximum",
        ),
        ({"exp_avg": "int6_row"}, "6 bits"),
        ({"exp_avg": "dynamic8", "packed": False}, "packed=false"),
        ({"exp_avg": "dynamic8_group128", "exp_avg_sq": "dynamic8_row"}, "blocks of 128 and 256 columns"),
        ({"exp_avg": "int4_group33", "exp_avg_sq": "uint8_group33"}, "within a byte"),
        ({"exp_avg": QuantSpec(format="int8", granularity="row", min_scale=1e-3)}, "floor of the scale"),
    ],
    ids=str,
)
def test_states_without_a_layout_are_refused_or_stepped_eagerly(
    states: dict, says: str, on_cpu: None
) -> None:
    p = _parameters(torch.float32, "cpu")[0]
    with pytest.raises(ValueError, match=says):
        AdamW([p], states=states, fused=True)
    optimizer = AdamW([p], states=states)
    _give_gradients([p], 0)
    before, calls = p.detach().clone(), adamw_step.calls
    optimizer.step()
    assert says in optimizer.fused_parameters()["parameter 0"]
    assert adamw_step.calls == calls
    assert not torch.equal(p, before)


def test_rows_longer_than_the_kernel_holds_are_refused() -> None:
    wide = torch.nn.Parameter(torch.zeros(2, 5000))
    with pytest.raises(ValueError, match="blocks of 5000 columns"):
        AdamW([wide], states=STATES["int8 rows"], fused=True)
    AdamW([wide], states=STATES["dynamic8"], fused=True)


def test_a_turned_parameter_is_stepped_eagerly(on_cpu: None) -> None:
    turned = torch.nn.Parameter(torch.zeros(64, 128).t())
    optimizer = AdamW([turned], states=STATES["dynamic8"])
    turned.grad = torch.ones(128, 64)
    optimizer.step()
    assert "not contiguous" in optimizer.fused_parameters()["parameter 0"]


def test_checkpoints_know_nothing_of_it(on_cpu: None) -> None:
    """Saved fused, resumed eagerly and the reverse; the same keys and formats; copies keep the choice."""
    recipe = {**STATES["dynamic8"], "min_numel": 0}
    made = {}
    for choice in (None, False):
        parameters = _parameters(torch.float32, "cpu")
        optimizer = AdamW(_groups(parameters), **HYPER, states=recipe, fused=choice)
        _give_gradients(parameters, 0)
        optimizer.step()
        made[choice] = optimizer.state_dict()
    assert made[None]["param_groups"] == made[False]["param_groups"]
    for i, held in made[None]["state"].items():
        assert {k: (t.shape, t.dtype) for k, t in held.items()} == {
            k: (t.shape, t.dtype) for k, t in made[False]["state"][i].items()
        }
    optimizer.load_state_dict(made[None])
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert twin.fused is False
