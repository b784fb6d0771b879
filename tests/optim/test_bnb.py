"""bitsandbytes' optimizers: their steps against the papers' equations, bits by group, bytes, refusals, exact resuming."""

from __future__ import annotations

import io
import sys

import pytest
import torch

from qtrain.optim import AdamStateRecipe, AdamW, BnbAdamW, BnbLion, check_shardable, parameter_groups
from qtrain.optim import bnb as module

KINDS = [(BnbAdamW, 8), (BnbAdamW, 32), (BnbLion, 8), (BnbLion, 32)]


def network(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    layers = torch.nn.Embedding(70, 64), torch.nn.Linear(64, 129), torch.nn.LayerNorm(129)
    return torch.nn.Sequential(*layers).to(dtype)


def step(model: torch.nn.Module, optimizer, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    for p in model.parameters():
        p.grad = (torch.randn(p.shape, generator=generator) * 10 ** torch.randn((), generator=generator)).to(
            p.dtype
        )
    optimizer.step()


def trained(make, bits: int, steps: int, dtype: torch.dtype = torch.float32):
    model = network(dtype)
    optimizer = make(parameter_groups(model, 0.1), lr=1e-2, bits=bits)
    for i in range(steps):
        step(model, optimizer, i)
    return model, optimizer


def test_adamw_is_ours_within_the_rounding_of_the_states() -> None:
    """The same map and blocks as ``dynamic8`` where a row is a multiple of 256; 32-bit embeddings and norms agree to
    float32."""
    torch.manual_seed(0)
    ours = torch.nn.Sequential(torch.nn.Embedding(70, 64), torch.nn.Linear(256, 20))
    theirs = torch.nn.Sequential(torch.nn.Embedding(70, 64), torch.nn.Linear(256, 20))
    theirs.load_state_dict(ours.state_dict())
    states = AdamStateRecipe(exp_avg="dynamic8", exp_avg_sq="dynamic8")
    a = AdamW(parameter_groups(ours, 0.1), lr=1e-2, betas=(0.9, 0.95), states=states)
    b = BnbAdamW(parameter_groups(theirs, 0.1), lr=1e-2, betas=(0.9, 0.95))
    begin = ours[1].weight.detach().clone()
    for i in range(5):
        step(ours, a, i), step(theirs, b, i)
    torch.testing.assert_close(ours[0].weight, theirs[0].weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours[1].bias, theirs[1].bias, rtol=1e-5, atol=1e-6)
    moved, apart = (ours[1].weight - begin).norm(), (ours[1].weight - theirs[1].weight).norm()
    # Levels next to a tie fall either way, a fiftieth of a step; float32 states would be further off than that
    assert 0 < apart < 0.05 * moved


@pytest.mark.parametrize("bits", [8, 32])
def test_lion_follows_its_paper(bits: int) -> None:
    model, optimizer = network(), None
    reference = {
        n: [p.detach().double().clone(), torch.zeros_like(p).double()] for n, p in model.named_parameters()
    }
    optimizer = BnbLion(parameter_groups(model, 0.1), lr=1e-3, betas=(0.9, 0.99), bits=bits)
    signs = agree = 0
    for i in range(4):
        step(model, optimizer, i)
        for name, p in model.named_parameters():
            w, m = reference[name]
            g = p.grad.double()
            decay = 0.1 if name == "1.weight" else 0.0
            w.copy_(w - 1e-3 * decay * w - 1e-3 * torch.sign(0.9 * m + 0.1 * g))
            m.copy_(0.99 * m + 0.01 * g)
            if name == "1.weight":
                signs += w.numel()
                agree += int((w - p.double()).abs().lt(5e-4).sum())  # a sign that differs moves 2e-3
            else:  # an embedding, a norm and biases, whose states are float32 with 8 bits too
                torch.testing.assert_close(p.double(), w, rtol=1e-5, atol=1e-6)
    assert (agree == signs) if bits == 32 else (0.98 * signs < agree)


@pytest.mark.parametrize(("make", "bits"), KINDS)
def test_bits_and_bytes_by_group(make, bits: int) -> None:
    model, optimizer = trained(make, bits, 1)
    names = {p: n for n, p in model.named_parameters()}
    dtypes = {names[p]: held["state1"].dtype for p, held in optimizer.state.items()}
    assert dtypes.pop("1.weight") == (torch.uint8 if bits == 8 else torch.float32)
    assert set(dtypes.values()) == {torch.float32}
    states = 2 if make is BnbAdamW else 1
    matrix, others = 129 * 64, 70 * 64 + 3 * 129
    found = optimizer.state_bytes()
    assert found["as_float32"] == states * 4 * (matrix + others)
    blocks = -(-matrix // 256)
    packed = states * (matrix + 4 * blocks + 4 * 256)  # codes, scales, one map a state
    assert found["total"] == states * 4 * others + (packed if bits == 8 else states * 4 * matrix)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("make", "bits"), KINDS)
def test_a_resumed_training_is_the_same_bit_for_bit(make, bits: int, dtype: torch.dtype) -> None:
    whole, kept = trained(make, bits, 6, dtype)
    model, optimizer = trained(make, bits, 3, dtype)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    again = network(dtype)
    again.load_state_dict(saved["model"])
    resumed = make(parameter_groups(again, 0.1), lr=9.0, bits=bits)
    resumed.load_state_dict(saved["optimizer"])
    for held, other in zip(optimizer.state.values(), resumed.state.values(), strict=True):
        assert {k: getattr(v, "dtype", v) for k, v in held.items()} == {
            k: getattr(v, "dtype", v) for k, v in other.items()
        }
    for i in range(3, 6):
        step(again, resumed, i)
    for p, q in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
    for held, other in zip(kept.state.values(), resumed.state.values(), strict=True):
        assert all(torch.equal(torch.as_tensor(held[k]), torch.as_tensor(other[k])) for k in held)


@pytest.mark.parametrize(
    ("saver", "loader", "says"),
    [
        ((BnbAdamW, 8), (BnbAdamW, 32), "uint8"),
        ((BnbAdamW, 32), (BnbAdamW, 8), "float32"),
        ((BnbAdamW, 8), (BnbLion, 8), r"1 state\(s\) of torch.uint8"),
        ((BnbLion, 8), (BnbAdamW, 8), r"2 state\(s\) of torch.uint8"),
    ],
)
def test_states_of_another_optimizer_are_refused(saver, loader, says: str) -> None:
    _, optimizer = trained(*saver, 1)
    other = loader[0](parameter_groups(network(), 0.1), bits=loader[1])
    with pytest.raises(ValueError, match=says):
        other.load_state_dict(optimizer.state_dict())


def test_states_of_our_adamw_are_refused() -> None:
    model = network()
    ours = AdamW(parameter_groups(model, 0.1))
    step(model, ours, 0)
    with pytest.raises(ValueError, match=r"parameter 0: the checkpoint holds \['exp_avg'"):
        BnbAdamW(parameter_groups(network(), 0.1)).load_state_dict(ours.state_dict())


def test_groups_of_one_run_say_nothing_of_the_next() -> None:
    """A second optimizer over the very same tensors, without the first one's exemption."""
    model, _ = trained(BnbAdamW, 8, 1)
    second = BnbAdamW(model.parameters())
    step(model, second, 0)
    assert second.state[model[0].weight]["state1"].dtype == torch.uint8


def test_what_cannot_run_is_refused(monkeypatch) -> None:
    p = [torch.nn.Parameter(torch.zeros(64, 64))]
    with pytest.raises(ValueError, match=r"bits=4: .* 8 or 32"):
        BnbAdamW(p, bits=4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="paged=true needs a CUDA device"):
        BnbAdamW(p, paged=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    optimizer = BnbAdamW(p, paged=True)  # a machine with a GPU, parameters on the CPU
    p[0].grad = torch.ones_like(p[0])
    with pytest.raises(ValueError, match="parameters on cpu"):
        optimizer.step()
    with pytest.raises(ValueError, match="take trainer=ddp, or optimizer=adamw"):
        module._Ours.init_state(optimizer, {}, type("Sharded", (), {"placements": ()})(), 0, 0)
    check_shardable(BnbAdamW(p))  # whole parameters
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    module._subclass.cache_clear()
    with pytest.raises(ValueError, match=r"pip install 'bitsandbytes>=0.45'"):
        BnbAdamW(p)
