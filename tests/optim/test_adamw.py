"""AdamW against Adam written from the paper in float64, against torch and against bitsandbytes."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from qtrain_kernels.counter_hash import random_bits, stream_id, uniform

from qtrain.optim import AdamStateRecipe, AdamW
from qtrain.optim import eager as module
from qtrain.quant import QuantSpec, dequantize, quantize

STATES = [
    ("none", "none"),
    ("int8_tensor", "int8_tensor"),
    ("int8_row", "int8_row"),
    ("dynamic8", "dynamic8"),
    ("int8_row", "uint8_row"),
    ("int4_group128", "uint4_group128"),
    ("int4_group128", "linear4_nozero_group128"),
    ("dynamic4_group128", "dynamic4_group128"),
    ("e4m3_group128", "e4m3_group128"),
    ("dynamic8_sr", "none"),
]
HYPER = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def gradient(shape: tuple[int, ...], step: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + step)
    return torch.randn(shape, generator=generator) * 10 ** torch.randn(shape, generator=generator)


def parameter(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(dtype))


class PaperAdamW:
    """Algorithm 1 of arXiv 1412.6980 with decoupled decay, float64; ``store`` is applied to what is remembered."""

    def __init__(self, w: torch.Tensor, store_m=None, store_v=None) -> None:
        self.w = w.double().numpy().copy()
        self.m, self.v = np.zeros_like(self.w), np.zeros_like(self.w)
        self.store, self.t = (store_m or (lambda x: x), store_v or (lambda x: x)), 0

    def step(self, g: torch.Tensor) -> None:
        g, self.t, (b1, b2), lr = g.double().numpy(), self.t + 1, HYPER["betas"], HYPER["lr"]
        m, v = b1 * self.m + (1 - b1) * g, b2 * self.v + (1 - b2) * g * g
        mhat, vhat = m / (1 - b1**self.t), v / (1 - b2**self.t)
        self.w = self.w - lr * HYPER["weight_decay"] * self.w - lr * mhat / (np.sqrt(vhat) + HYPER["eps"])
        self.m, self.v = self.store[0](m), self.store[1](v)


@pytest.mark.parametrize("shape", [(), (5,), (3, 7), (129, 65), (4, 3, 5), (0,), (0, 5), (3, 0)])
def test_float32_states_are_torch_bit_for_bit(shape: tuple[int, ...], monkeypatch) -> None:
    monkeypatch.setattr(module, "CPU_CHUNK", 1000)  # several chunks of the largest
    ours, theirs = parameter(shape), parameter(shape)
    a = AdamW([ours], **HYPER, states={"exp_avg": "none", "exp_avg_sq": None})
    b = torch.optim.AdamW([theirs], **HYPER, foreach=False)
    for step in range(6):
        ours.grad, theirs.grad = gradient(shape, step), gradient(shape, step)
        a.step(), b.step()
        assert torch.equal(ours, theirs)
    for kind, value in a.decode_states(ours).items():
        assert torch.equal(value, b.state[theirs][kind])
    a.load_state_dict(b.state_dict())  # and their checkpoints are ours
    ours.grad, theirs.grad = gradient(shape, 9), gradient(shape, 9)
    a.step(), b.step()
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("m", "v"), STATES[:-1])
def test_follows_the_paper_with_the_moments_on_their_grids(m: str, v: str) -> None:
    shape = (6, 200)
    p, recipe = parameter(shape), AdamStateRecipe(exp_avg=m, exp_avg_sq=v, min_numel=0)
    optimizer = AdamW([p], **HYPER, states=recipe)
    paper = PaperAdamW(p.detach())
    for step in range(5):
        p.grad = gradient(shape, step)
        optimizer.step()
        paper.step(p.grad)
        # float32 against float64: a few roundings of weights of size 1 and of updates up to 0.2
        np.testing.assert_allclose(p.detach().numpy(), paper.w, rtol=2e-6, atol=2e-6)
        for kind, name in (("exp_avg", "m"), ("exp_avg_sq", "v")):
            spec, exact = getattr(recipe, kind), torch.from_numpy(getattr(paper, name)).float()
            ours = optimizer.decode_states(p)[kind]
            if spec is None:
                torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-6 * exact.abs().max().item())
                continue
            stored = dequantize(quantize(exact, spec))
            gap = (spec.number_format.levels().diff().max() * quantize(exact, spec).scale.max()).item()
            off = (ours - stored).abs()
            assert (off > 1e-5 * stored.abs()).float().mean() < 0.01  # float32 may cross a midpoint, rarely
            assert off.max() <= gap
            assert (stored - exact).abs().max() > 1e-4 * exact.abs().max()  # it did quantize
            # what is remembered is what was stored: continue from our bits, so that midpoints cannot add up
            setattr(paper, name, ours.double().numpy())


@pytest.mark.parametrize(("m", "v"), STATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_change_nothing(m: str, v: str, dtype: torch.dtype, monkeypatch) -> None:
    found = []
    for chunk in (1 << 18, 300):
        monkeypatch.setattr(module, "CPU_CHUNK", chunk)
        p = parameter((11, 10, 13), dtype)
        optimizer = AdamW([p], **HYPER, states={"exp_avg": m, "exp_avg_sq": v, "min_numel": 0}, seed=3)
        for step in range(3):
            p.grad = gradient(tuple(p.shape), step).to(dtype)
            optimizer.step()
        found.append((p.detach().clone(), optimizer.state[p]))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(t, found[1][1][key]) for key, t in found[0][1].items())


@pytest.mark.parametrize(("m", "v"), STATES)
def test_parameters_need_not_be_contiguous(m: str, v: str) -> None:
    straight = parameter((24, 40))
    turned = torch.nn.Parameter(straight.detach().t().contiguous().t())
    assert not turned.is_contiguous()
    recipe = AdamStateRecipe(exp_avg=m, exp_avg_sq=v, min_numel=0)
    pairs = [(p, AdamW([p], **HYPER, states=recipe)) for p in (straight, turned)]
    for step, (p, optimizer) in itertools.product(range(3), pairs):
        p.grad = gradient((24, 40), step)
        optimizer.step()
    assert torch.equal(straight, turned)


def test_bfloat16_weights_are_updated_in_float32_and_rounded_once() -> None:
    p = parameter((40, 30), torch.bfloat16)
    start = p.detach().float().clone()
    optimizer = AdamW([p], **HYPER, states={"exp_avg": "dynamic8", "min_numel": 0})
    wide = torch.nn.Parameter(start)
    reference = AdamW([wide], **HYPER, states={"exp_avg": "dynamic8", "min_numel": 0})
    p.grad = gradient((40, 30), 0).bfloat16()
    wide.grad = p.grad.float()
    optimizer.step(), reference.step()
    assert torch.equal(p, wide.bfloat16())
    assert optimizer.state[p]["exp_avg.scale"].dtype == torch.float32
    assert optimizer.state[p]["exp_avg_sq"].dtype == torch.float32


@pytest.mark.parametrize("beta2", [0.999, 0.95])
def test_linear_int8_second_moment_decodes_to_zero_and_the_update_explodes(beta2: float) -> None:
    """Where v decodes to 0, |update| = lr * mhat / sqrt((1 - b2) g^2 / (1 - b2^t)): 1/sqrt(1 - b2) times too large
    at |g| equal to its RMS. Long constant gradients: mhat = g, 1 - b2^t = 1 and v = g^2 but for the stored bits."""
    blowup, small, steps = 1 / math.sqrt(1 - beta2), 1e-2, 12_000 if beta2 == 0.999 else 400
    g = torch.full((1, 256), small)
    g[0, 0] = 1.0  # amax; small^2 = 1e-4 < 1/254 of it: the zero bin of int8, the lowest level of uint8 too
    updates = {}
    for fmt in ("none", "int8_row", "linear4_nozero_row", "dynamic8"):
        p = torch.nn.Parameter(torch.zeros(1, 256))
        states = {"exp_avg_sq": fmt, "min_numel": 0}
        optimizer = AdamW([p], lr=1.0, betas=(0.0, beta2), eps=0.0, weight_decay=0.0, states=states)
        p.grad = g
        optimizer.step()
        held = optimizer.state[p]
        held["step"].fill_(steps)  # the stationary state, without walking there
        layout = optimizer.recipe.layout("exp_avg_sq", (1, 256))
        if layout.spec is None:
            held["exp_avg_sq"].copy_(g * g)
        layout.write(held, g * g)
        before = p.detach().clone()
        optimizer.step()
        updates[fmt] = (before - p.detach())[0, 1].item()
    assert updates["none"] == pytest.approx(1.0, rel=1e-5)
    assert updates["int8_row"] == pytest.approx(blowup, rel=1e-5)  # 31.6 at .999, 4.5 at .95
    # without a zero the least v is amax/16: the update is too small, never too large
    assert 0.0 < updates["linear4_nozero_row"] <= 4 * small * 1.05
    assert updates["dynamic8"] == pytest.approx(1.0, rel=0.03)  # half a cell of its decade: 5.6% of v


def test_stochastic_states_are_unbiased_and_named_by_their_parameter() -> None:
    g, steps, name = gradient((16, 64), 0), 800, "blocks.0.w"
    spec = QuantSpec(format="int4", granularity="row", rounding="stochastic")
    total = torch.zeros(16, 64)
    for seed in range(steps):
        p = parameter((16, 64))
        group = {"params": [p], "names": [name]}
        optimizer = AdamW([group], betas=(0.9, 0.95), states={"exp_avg": spec, "min_numel": 0}, seed=seed)
        p.grad = g
        optimizer.step()
        total += optimizer.decode_states(p)["exp_avg"]
    exact = torch.zeros_like(g).lerp_(g, 1 - 0.9)
    scale = exact.abs().amax(1, keepdim=True) / 7
    # each draw lies within a step and so has a standard deviation of at most half of one; 1024 elements, 5 sigma
    assert ((total / steps - exact).abs() <= 5 * 0.5 * scale / math.sqrt(steps)).all()
    assert ((optimizer.decode_states(p)["exp_avg"] - exact).abs() <= 1.001 * scale).all()
    bits = random_bits(torch.tensor(steps - 1), torch.tensor(1), stream_id(f"{name}/exp_avg"), 16, 64)
    assert torch.equal(
        optimizer.decode_states(p)["exp_avg"], dequantize(quantize(exact, spec, uniform(bits)))
    )


def test_bytes_are_those_of_the_ledger() -> None:
    big, embedding, small, bias = (parameter(s) for s in ((64, 300), (128, 64), (8, 8), (5000,)))
    groups = [{"params": [big, small, bias]}, {"params": [embedding], "quantize_states": False}]
    optimizer = AdamW(groups, states={"exp_avg": "int4_group128", "exp_avg_sq": "dynamic8"})
    assert optimizer.state_bytes() == {"total": 0, "as_float32": 0}
    for p in (big, embedding, small, bias):
        p.grad = torch.ones_like(p)
    optimizer.step()
    m = quantize(torch.zeros(64, 300), optimizer.recipe.exp_avg)
    v = quantize(torch.zeros(64, 300), optimizer.recipe.exp_avg_sq)
    plain = 4 * (embedding.numel() + small.numel() + bias.numel())
    counted = optimizer.state_bytes()
    assert counted["exp_avg.codes"] + counted["exp_avg.scale"] == m.nbytes == 64 * 150 + 64 * 3 * 4
    assert counted["exp_avg_sq.codes"] + counted["exp_avg_sq.scale"] == v.nbytes
    assert counted["exp_avg"] == counted["exp_avg_sq"] == plain
    assert counted["total"] == m.nbytes + v.nbytes + 2 * plain + counted["step"]
    assert counted["as_float32"] == 2 * (plain + 4 * big.numel()) + counted["step"]
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for h in optimizer.state.values()
        for t in h.values()
    }
    assert sum(storages.values()) == counted["total"]


def test_steps_are_close_to_those_of_bitsandbytes() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    ours, theirs = parameter((64, 256)), parameter((64, 256))
    a = AdamW([ours], **HYPER, states={"exp_avg": "dynamic8", "exp_avg_sq": "dynamic8"})
    b = bnb.optim.AdamW8bit([theirs], **HYPER)
    for step in range(4):
        g = torch.randn(64, 256, generator=torch.Generator().manual_seed(step))
        ours.grad, theirs.grad = g, g.clone()
        a.step(), b.step()
        off = (ours - theirs).detach().abs()
        if step == 0:  # nothing was read back yet: the update is Adam's, up to float32
            assert off.max() < 2e-6
        # their search is not always nearest, and a code apart is 1 percent of a moment
        assert off.mean() < 1e-3 * HYPER["lr"] * (step + 1)
    held = b.state[theirs]
    for i, (kind, moment) in enumerate(a.decode_states(ours).items(), start=1):
        apart = a.state[ours][f"{kind}.codes"].int() - held[f"state{i}"].int()
        assert (apart != 0).float().mean() < 2e-2
        absmax = held[f"absmax{i}"][:, None]
        decoded = held[f"qmap{i}"][held[f"state{i}"].long()] * absmax
        assert ((moment - decoded).abs() <= 0.015 * absmax).all()  # one cell of the widest decade
        torch.testing.assert_close(a.state[ours][f"{kind}.scale"], absmax, rtol=1e-2, atol=0.0)


def test_missing_gradients_are_skipped_and_non_finite_ones_propagate() -> None:
    p, q = parameter((64, 64)), parameter((64, 64))
    optimizer = AdamW([p, q], states={"exp_avg": "dynamic8", "exp_avg_sq": "dynamic8"})
    before = q.detach().clone()
    p.grad = torch.ones_like(p)
    p.grad[3, 5] = torch.nan
    optimizer.step()
    assert torch.equal(q, before)
    assert q not in optimizer.state
    with pytest.raises(KeyError, match="parameter 1 has no state"):
        optimizer.decode_states(q)
    assert p[3, 5].isnan()
    assert int(p.isnan().sum()) == 1
    assert optimizer.decode_states(p)["exp_avg"][3].isnan().all()
    assert optimizer.decode_states(p)["exp_avg"][2].isfinite().all()


def test_zero_gradients_and_closure() -> None:
    p = parameter((64, 64))
    optimizer = AdamW(
        [p], lr=0.1, weight_decay=0.0, states={"exp_avg": "dynamic8", "exp_avg_sq": "uint8_row"}
    )
    before = p.detach().clone()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (p * 0).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 0
    assert torch.equal(p, before)


def test_refusals() -> None:
    p = parameter((64, 64))
    for bad, says in [
        ({"lr": -1.0}, "lr"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"eps": -1e-8}, "eps"),
        ({"weight_decay": float("nan")}, "weight_decay"),
    ]:
        with pytest.raises(ValueError, match=says):
            AdamW([p], **bad)
    with pytest.raises(ValueError, match="float64"):
        AdamW([torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))])
    with pytest.raises(ValueError, match="complex64"):
        AdamW([torch.nn.Parameter(torch.zeros(3, dtype=torch.complex64))])
    with pytest.raises(ValueError, match="states of its own"):
        AdamW([{"params": [p], "states": {}}])
    with pytest.raises(ValueError, match="1 names for 2"):
        AdamW([{"params": [p, parameter((2,))], "names": ["a"]}])
    embedding = torch.nn.Embedding(100, 64, sparse=True)
    optimizer = AdamW([{"params": embedding.parameters(), "names": ["tok"]}])
    embedding(torch.tensor([3])).sum().backward()
    with pytest.raises(RuntimeError, match="tok has a sparse gradient"):
        optimizer.step()


def test_copies_keep_their_recipe() -> None:
    p = parameter((64, 64))
    optimizer = AdamW([p], states={"exp_avg": "dynamic8"})
    p.grad = torch.ones_like(p)
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    assert twin.recipe == optimizer.recipe
    q = twin.param_groups[0]["params"][0]
    p.grad, q.grad = gradient((64, 64), 1), gradient((64, 64), 1)
    optimizer.step(), twin.step()
    assert torch.equal(p, q)
