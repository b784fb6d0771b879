"""Llama against its equations, written out in numpy, float64, one head and one position at a time."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from qtrain.models.decoder import Llama3RopeScaling, Rope, rope_angles
from qtrain.models.llama import Llama, LlamaConfig
from qtrain.models.sampling import generate

TINY = {"vocab_size": 23, "sequence_tokens": 12, "layers": 2, "heads": 4, "width": 16, "mlp_width": 20}
SCALING = Llama3RopeScaling(
    factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_sequence_tokens=64
)
VARIANTS = {
    "llama": {},
    "gqa": {"kv_heads": 2, "norm_eps": 1e-2},
    "mqa, wide heads": {"kv_heads": 1, "head_width": 6, "rope_base": 100.0},
    "qwen2": {"kv_heads": 2, "qkv_bias": True, "tie_embeddings": True},
    "qwen3": {"kv_heads": 2, "qk_norm": True, "head_width": 8},
    "bitnet": {"sub_norm": True, "activation": "relu2"},
    "all biases, stretched": {"qkv_bias": True, "o_bias": True, "mlp_bias": True, "rope_scaling": SCALING},
}
variants = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())


def tiny(seed=0, **changes):
    return Llama(LlamaConfig(**{**TINY, **changes}), seed=seed)


def lively(model):
    """Weights of size one: at initialisation (std .02) blocks barely matter and a test of them sees nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model


def tokens(batch=2, sequence=12, seed=0):
    return torch.randint(0, 23, (batch, sequence), generator=torch.Generator().manual_seed(seed))


def frequencies(config):
    """base^(-2i/D), stretched as Llama 3.1 describes it: by wavelength, case by case."""
    found = []
    for i in range(config.head_width // 2):
        f = config.rope_base ** (-2 * i / config.head_width)
        scaling = config.rope_scaling
        if scaling is not None:
            wavelength = 2 * math.pi / f
            low = scaling.original_sequence_tokens / scaling.low_frequency_factor
            high = scaling.original_sequence_tokens / scaling.high_frequency_factor
            if wavelength > low:
                f = f / scaling.factor
            elif wavelength >= high:
                smooth = (scaling.original_sequence_tokens / wavelength - scaling.low_frequency_factor) / (
                    scaling.high_frequency_factor - scaling.low_frequency_factor
                )
                f = (1 - smooth) * f / scaling.factor + smooth * f
        found.append(f)
    return found


def rotated(x, position, config):
    half = len(x) // 2
    out = np.empty_like(x)
    for i, f in enumerate(frequencies(config)):
        c, s = math.cos(position * f), math.sin(position * f)
        out[i], out[i + half] = x[i] * c - x[i + half] * s, x[i + half] * c + x[i] * s
    return out


def rms(x, gain, eps):
    return x / np.sqrt((x * x).mean() + eps) * gain


ACT = {"silu": lambda x: x / (1 + np.exp(-x)), "relu2": lambda x: np.maximum(x, 0) ** 2}


def reference(model, ids):
    """Logits [S, V] of one sequence."""
    config, state = model.config, {k: v.double().numpy() for k, v in model.state_dict().items()}
    size, eps = config.head_width, config.norm_eps

    def linear(x, name):
        return state[f"{name}.weight"] @ x + state.get(f"{name}.bias", 0.0)

    def norm(x, name):
        return rms(x, state[f"{name}.weight"], eps)

    xs = [state["token_embedding.weight"][t].copy() for t in ids]
    for layer in range(config.layers):
        at = f"blocks.{layer}.attn"
        hs = [norm(x, f"blocks.{layer}.attn_norm") for x in xs]
        qs, ks, vs = [], [], []
        for p, h in enumerate(hs):
            q, k, v = (linear(h, f"{at}.{n}").reshape(-1, size) for n in "qkv")
            if config.qk_norm:
                q = np.stack([norm(row, f"{at}.q_norm") for row in q])
                k = np.stack([norm(row, f"{at}.k_norm") for row in k])
            qs.append([rotated(row, p, config) for row in q])
            ks.append([rotated(row, p, config) for row in k])
            vs.append(v)
        for t in range(len(xs)):
            heads = []
            for h in range(config.heads):
                kv = h // (config.heads // config.kv_heads)
                scores = np.array([qs[t][h] @ ks[s][kv] for s in range(t + 1)]) / math.sqrt(size)
                weight = np.exp(scores - scores.max())
                weight /= weight.sum()
                heads.append(sum(weight[s] * vs[s][kv] for s in range(t + 1)))
            mixed = np.concatenate(heads)
            xs[t] = xs[t] + linear(norm(mixed, f"{at}.sub_norm") if config.sub_norm else mixed, f"{at}.o")
        for t, x in enumerate(xs):
            h, at = norm(x, f"blocks.{layer}.mlp_norm"), f"blocks.{layer}.mlp"
            inner = ACT[config.activation](linear(h, f"{at}.gate")) * linear(h, f"{at}.up")
            xs[t] = x + linear(norm(inner, f"{at}.sub_norm") if config.sub_norm else inner, f"{at}.down")
    return np.stack([linear(norm(x, "final_norm"), "lm_head") for x in xs])


@variants
@pytest.mark.parametrize("explicit", [False, True], ids=["fused", "with logits_hook"])
def test_logits_are_the_equations(variant, explicit):
    model = lively(tiny(**variant)).double()
    if explicit:
        for block in model.blocks:
            block.attn.logits_hook = nn.Identity()
    ids = tokens()
    for row, logits in zip(ids, model(ids), strict=True):
        # rotary angles are float32 in the model: below 12 radians, 1e-6 of each
        np.testing.assert_allclose(
            logits.detach().numpy(), reference(model, row.tolist()), rtol=2e-4, atol=2e-5
        )


@variants
def test_gradients_match_finite_differences(variant):
    model = lively(tiny(**{**variant, "layers": 1, "sequence_tokens": 5})).double()
    x = tokens(1, 5)
    names, values = zip(*model.named_parameters(), strict=True)

    def loss(*parameters):
        logits = torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (x,))
        return logits.log_softmax(-1)[0, :-1].gather(-1, x[0, 1:, None]).mean()

    inputs = tuple(value.detach().requires_grad_() for value in values)
    assert torch.autograd.gradcheck(loss, inputs, fast_mode=True)
    grads = dict(zip(names, torch.autograd.grad(loss(*inputs), inputs), strict=True))
    assert all(grad.abs().max() > 0 for grad in grads.values())


@variants
def test_the_future_never_matters_and_the_past_always_does(variant):
    model = lively(tiny(**variant)).double()
    x = tokens(1)
    base = model(x)
    for t in (0, 5, 11):
        changed = x.clone()
        changed[0, t] = (changed[0, t] + 7) % 23
        difference = (model(changed) - base).abs().amax(dim=-1)[0]
        assert (difference[:t] == 0).all()
        assert difference[t:].min().item() > 0.0


def test_stretched_frequencies_meet_both_ends():
    """The shortest wavelengths stay, the longest are divided by the factor, and something lies between."""
    cos, sin = rope_angles(torch.ones(1), Rope(64, 10_000.0))
    stretched = torch.atan2(*rope_angles(torch.ones(1), Rope(64, 10_000.0, SCALING))[::-1])[0, :32]
    plain = torch.atan2(sin, cos)[0, :32]
    ratio = plain / stretched
    assert ratio[0] == 1
    torch.testing.assert_close(ratio[-1], torch.tensor(8.0), rtol=1e-5, atol=0)
    assert ((ratio > 1.1) & (ratio < 7.9)).any()
    expected = frequencies(LlamaConfig(**{**TINY, "head_width": 64}, rope_scaling=SCALING))
    torch.testing.assert_close(stretched, torch.tensor(expected), rtol=1e-5, atol=1e-9)


class Record(nn.Module):
    def forward(self, x):
        self.seen = x
        return x


def test_hook_points_see_what_attention_multiplies():
    model = lively(tiny(kv_heads=2))
    attention = model.blocks[1].attn
    expected = model(tokens())
    for name in ("q_rope", "k_rope", "v_hook"):
        setattr(attention, name, Record())
    logits = attention.logits_hook = Record()
    torch.testing.assert_close(model(tokens()), expected)
    q, k, v = attention.q_rope.seen, attention.k_rope.seen, attention.v_hook.seen
    assert q.shape == (2, 4, 12, 4)
    assert k.shape == v.shape == (2, 2, 12, 4)  # key-value heads once, as a cache would hold them
    torch.testing.assert_close(logits.seen, q @ k[:, [0, 0, 1, 1]].transpose(-2, -1) / 2.0)

    class Zero(nn.Module):
        def forward(self, x):
            return x * 0

    for name in ("q_rope", "k_rope", "v_hook", "logits_hook"):
        kept = getattr(attention, name)
        setattr(attention, name, Zero())
        assert not torch.allclose(model(tokens()), expected)
        setattr(attention, name, kept)


def test_projections_are_linears_that_rules_can_name():
    linears = [name for name, module in tiny(layers=1).named_modules() if isinstance(module, nn.Linear)]
    inside = ["attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down"]
    assert linears == [f"blocks.0.{name}" for name in inside] + ["lm_head"]


@pytest.mark.parametrize("variant", [VARIANTS["gqa"], VARIANTS["qwen2"], VARIANTS["bitnet"]], ids=str)
def test_parameter_count_and_flops_in_closed_form(variant):
    model = tiny(**variant)
    config = model.config
    v, s, c, m = 23, 12, 16, 20
    inner, kv = config.heads * config.head_width, config.kv_heads * config.head_width
    block = 2 * c * inner + 2 * c * kv + 3 * c * m + 2 * c
    block += (inner + 2 * kv if config.qkv_bias else 0) + (inner + m if config.sub_norm else 0)
    body = 2 * block + c
    assert model.num_parameters(non_embedding=True) == body
    assert model.num_parameters() == body + v * c * (1 if config.tie_embeddings else 2)
    assert model.flops_per_token() == 6 * (body + v * c) + 12 * 2 * inner * s


def test_initial_statistics():
    model = Llama(
        LlamaConfig(
            vocab_size=300,
            sequence_tokens=8,
            layers=8,
            heads=4,
            width=128,
            mlp_width=256,
            qkv_bias=True,
            qk_norm=True,
        )
    )
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all()
        elif parameter.ndim == 1:
            assert (parameter == 1).all()
        else:
            std = 0.02 / math.sqrt(16) if name.endswith(("attn.o.weight", "mlp.down.weight")) else 0.02
            n = parameter.numel()
            # five standard errors of the mean, std / sqrt(n), and of the standard deviation, std / sqrt(2n)
            assert abs(parameter.mean().item()) < 5 * std / math.sqrt(n), name
            assert abs(parameter.std().item() - std) < 5 * std / math.sqrt(2 * n), name
    again = Llama(model.config, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_meta_then_real_equals_real():
    with torch.device("meta"):
        model = tiny(**VARIANTS["qwen2"])
    model.to_empty(device="cpu")
    model.init_weights(9)
    assert torch.equal(model(tokens()), tiny(seed=9, **VARIANTS["qwen2"])(tokens()))


@pytest.mark.filterwarnings("error")
@variants
def test_bf16_autocast_stays_close(variant):
    model = lively(tiny(**variant))
    exact = model(tokens())
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(tokens())
    assert rough.dtype == torch.bfloat16
    error = (rough.float() - exact).norm() / exact.norm()
    assert 1e-4 < error < 5e-2  # bf16 has a relative step of 2^-8; about fifteen roundings in a row


@variants
def test_traces_as_one_graph(variant):
    model = lively(tiny(**variant))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens()), model(tokens()))


@pytest.mark.inductor
@pytest.mark.slow
def test_compiles_as_one_graph():
    model = lively(tiny(**{**VARIANTS["qwen3"], "layers": 1}))
    model.set_activation_checkpointing(True)
    model(tokens()).logsumexp(-1).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    torch._dynamo.reset()
    torch.compile(model, fullgraph=True)(tokens()).logsumexp(-1).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)


def test_it_generates_with_a_cropped_context():
    model = lively(tiny(kv_heads=2))
    expected = tokens(1, 3)
    for _ in range(14):
        chosen = model(expected[:, -12:])[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat((expected, chosen), dim=1)
    assert torch.equal(generate(model, tokens(1, 3), 14, temperature=0), expected)


def test_too_long_an_input_is_refused():
    with pytest.raises(ValueError, match="13 tokens exceed the model's sequence_tokens 12"):
        tiny()(torch.zeros(1, 13, dtype=torch.int64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "tanh"}, "unknown activation 'tanh'; allowed: gelu, "),
        ({"heads": 3}, "width 16 is not divisible by heads 3"),
        ({"kv_heads": 3}, "heads 4 are not divisible by kv_heads 3"),
        ({"kv_heads": 0}, "kv_heads 0 must be a positive integer"),
        ({"head_width": 5}, "head_width 5 must be even"),
        ({"mlp_width": None}, "mlp_width None must be a positive integer"),
        ({"norm_eps": 0.0}, r"norm_eps 0\.0 must be positive"),
        ({"rope_base": -1.0}, r"rope_base -1\.0 must be positive"),
        ({"rope_scaling": {"factor": 2}}, "rope_scaling .* must be None or a mapping with _target_"),
    ],
)
def test_config_errors(change, message):
    with pytest.raises(ValueError, match=message):
        LlamaConfig(**{**TINY, **change})


@pytest.mark.parametrize(
    "change", [{"factor": 0.5}, {"low_frequency_factor": 4.0}, {"original_sequence_tokens": 0}], ids=str
)
def test_scaling_errors(change):
    with pytest.raises(ValueError, match="must"):
        replace(SCALING, **change)
