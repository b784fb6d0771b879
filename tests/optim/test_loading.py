"""A run that is saved and resumed is the run that was not interrupted; other checkpoints are refused."""

from __future__ import annotations

import io

import pytest
import torch

from qtrain.optim import AdamW

STATES = [
    ("none", "none"),
    ("int8_tensor", "int8_tensor"),
    ("int8_row", "uint8_row"),
    ("dynamic8", "dynamic8"),
    ("int4_group128", "uint4_group128"),
    ("int4_group128", "linear4_nozero_group128"),
    ("dynamic4_group128", "dynamic4_group128"),
    ("e4m3_group128", "e4m3_group128"),
    ("dynamic8_sr", "uint8_row_sr"),
    ("nvfp4", "mxfp8"),
    ("int8_row_asym", "int8_row_asym"),
]
SHAPES = {"w": (33, 130), "conv": (40, 3, 40), "small": (3, 5), "gain": (48,), "bias": (), "tok": (96, 64)}


def build(dtype: torch.dtype, states: dict, seed: int = 5) -> tuple[dict[str, torch.nn.Parameter], AdamW]:
    generator = torch.Generator().manual_seed(1)
    params = {n: torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for n, s in SHAPES.items()}
    names = [n for n in SHAPES if n != "tok"]
    groups = [
        {"params": [params[n] for n in names], "names": names},
        {"params": [params["tok"]], "names": ["tok"], "quantize_states": False},
    ]
    return params, AdamW(groups, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, states=states, seed=seed)


def train(params: dict[str, torch.nn.Parameter], optimizer: AdamW, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for name, p in params.items():
            g = torch.randn(p.shape, generator=generator).to(p.dtype)
            p.grad = None if name == "small" and step < 2 else g
        optimizer.step()


def saved(optimizer: AdamW) -> dict:
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("m", "v"), STATES)
def test_resume_is_bitwise_the_uninterrupted_run(m: str, v: str, dtype: torch.dtype) -> None:
    states = {"exp_avg": m, "exp_avg_sq": v}
    params, optimizer = build(dtype, states)
    train(params, optimizer, range(2))
    checkpoint, weights = saved(optimizer), {n: p.detach().clone() for n, p in params.items()}
    resumed_params, resumed = build(dtype, states, seed=99)  # the checkpoint's seed counts
    for name, p in resumed_params.items():
        p.data.copy_(weights[name])
    resumed.load_state_dict(checkpoint)
    for name, p in resumed_params.items():
        held, original = resumed.state.get(p, {}), optimizer.state.get(params[name], {})
        assert {k: (t.dtype, t.shape) for k, t in held.items()} == {
            k: (t.dtype, t.shape) for k, t in original.items()
        }
        codes = [t.dtype for k, t in held.items() if k.endswith(".codes")]
        quantized = {"exp_avg": m, "exp_avg_sq": v} if name in ("w", "conv") else {}
        assert codes == [torch.uint8] * sum(s != "none" for s in quantized.values())
        assert all(t.dtype in (torch.uint8, torch.float32) for t in held.values())
    frozen = {k: t.clone() for s in checkpoint["state"].values() for k, t in s.items()}
    train(params, optimizer, range(2, 5))
    train(resumed_params, resumed, range(2, 5))
    for name, p in params.items():
        assert torch.equal(p, resumed_params[name])
        for key, t in optimizer.state[p].items():
            assert torch.equal(t, resumed.state[resumed_params[name]][key])
    # the loaded dictionary is not trained along
    assert all(torch.equal(t, frozen[k]) for k, t in list(checkpoint["state"].values())[-1].items())
    assert resumed.state_bytes() == optimizer.state_bytes()


@pytest.mark.parametrize(
    ("own", "says"),
    [
        (
            {"exp_avg": "int8_row", "exp_avg_sq": "dynamic8"},
            "w: the checkpoint stores exp_avg as .*dynamic8.*int8",
        ),
        (
            {"exp_avg": "dynamic8", "exp_avg_sq": "none"},
            "w: the checkpoint stores exp_avg_sq as .*float32; resume with",
        ),
        (
            {"exp_avg": "dynamic8", "exp_avg_sq": "dynamic8", "min_numel": 4500},
            "w: .*exp_avg as .*keeps it as float32",
        ),
        ({"exp_avg": "dynamic8_row", "exp_avg_sq": "dynamic8"}, "w: .*group:256.*row"),
        ({"exp_avg": "dynamic8_sr", "exp_avg_sq": "dynamic8"}, "w: .*nearest.*stochastic"),
    ],
)
def test_other_formats_are_refused(own: dict, says: str) -> None:
    params, optimizer = build(torch.float32, {"exp_avg": "dynamic8", "exp_avg_sq": "dynamic8"})
    train(params, optimizer, range(2))
    with pytest.raises(ValueError, match=says):
        build(torch.float32, own)[1].load_state_dict(saved(optimizer))


def test_other_contents_are_refused_and_leave_the_optimizer_as_it_was() -> None:
    states = {"exp_avg": "dynamic8", "exp_avg_sq": "int8_row_asym"}
    params, optimizer = build(torch.float32, states)
    train(params, optimizer, range(3))

    def refuses(change, says: str) -> None:
        checkpoint = saved(optimizer)
        change(checkpoint)
        _, fresh = build(torch.float32, states)
        with pytest.raises(ValueError, match=says):
            fresh.load_state_dict(checkpoint)
        assert not fresh.state

    def cast(c):
        c["state"][0]["exp_avg.codes"] = c["state"][0]["exp_avg.codes"].bfloat16()

    def narrow(c):
        c["state"][1]["exp_avg.scale"] = c["state"][1]["exp_avg.scale"].bfloat16()

    def cut(c):
        c["state"][0]["exp_avg_sq.codes"] = c["state"][0]["exp_avg_sq.codes"][:, :64]

    def drop(c):
        del c["state"][0]["exp_avg_sq.zero_point"]

    refuses(cast, r"w: exp_avg.codes in the checkpoint is torch.bfloat16 .*expected torch.uint8 \(33, 130\)")
    refuses(narrow, "conv: exp_avg.scale in the checkpoint is torch.bfloat16")
    refuses(cut, r"w: exp_avg_sq.codes in the checkpoint is torch.uint8 \(33, 64\)")
    refuses(drop, "w: the checkpoint holds .*zero_point")
    refuses(lambda c: c["state"][0].pop("step"), "w: the checkpoint holds no step")
    refuses(
        lambda c: c["state"][0].update(max_exp_avg_sq=torch.zeros(2)),
        "w: the checkpoint holds .*max_exp_avg_sq",
    )
    refuses(lambda c: c["state"].update({77: {}}), "no group names")
    refuses(lambda c: c["param_groups"][0]["names"].reverse(), "'w' meets the state of 'bias'")
    refuses(lambda c: c["param_groups"].pop(), "groups hold")
    refuses(lambda c: c["param_groups"][0].update(amsgrad=True), "amsgrad")
    refuses(lambda c: c["param_groups"][0].pop("states"), "unnamed format")


def test_a_checkpoint_of_torch_meets_quantized_states_with_a_refusal() -> None:
    p = torch.nn.Parameter(torch.zeros(64, 64))
    theirs = torch.optim.AdamW([p])
    p.grad = torch.ones_like(p)
    theirs.step()
    with pytest.raises(ValueError, match="parameter 0: the checkpoint stores exp_avg as float32"):
        AdamW([p], states={"exp_avg": "dynamic8"}).load_state_dict(theirs.state_dict())
