import math

import pytest
import torch
from torch import nn

from qtrain.models.decoder import Attention, Rope, rope_angles, rotate
from qtrain.models.gpt import GPT, GPTConfig

TINY = {"vocab_size": 23, "sequence_tokens": 12, "layers": 2, "heads": 2, "width": 8}
GPT2_LIKE = {
    "norm": "layernorm",
    "activation": "gelu_tanh",
    "positions": "learned",
    "bias": True,
    "tie_embeddings": True,
}
VARIANTS = [{}, GPT2_LIKE, {"qk_norm": True, "activation": "relu2", "mlp_width": 20}]
variants = pytest.mark.parametrize("variant", VARIANTS, ids=["modern", "gpt2", "qk_norm"])


def tiny(seed=0, **kwargs):
    return GPT(GPTConfig(**{**TINY, **kwargs}), seed=seed)


def lively(model):
    """Weights of size one: at initialisation (std .02) blocks barely matter and a test of them sees nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model


def tokens(batch=2, sequence=12, seed=0):
    return torch.randint(0, 23, (batch, sequence), generator=torch.Generator().manual_seed(seed))


@variants
def test_the_future_never_matters_and_the_past_always_does(variant):
    model = lively(tiny(**variant)).double()
    x = tokens(1)
    base = model(x)
    for t in range(12):
        changed = x.clone()
        changed[0, t] = (changed[0, t] + 7) % 23
        difference = (model(changed) - base).abs().amax(dim=-1)[0]
        assert difference[:t].max().item() == 0.0 if t else True
        assert difference[t:].min().item() > 0.0


def naive_attention(attention: Attention, x, rope):
    """One head and one position at a time, as the definition reads."""
    batch, sequence, _ = x.shape
    heads, size = attention.heads, attention.head_width
    q, k, v = attention.q(x), attention.k(x), attention.v(x)
    out = torch.zeros_like(x)
    for b in range(batch):
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            for t in range(sequence):
                scores = []
                for s in range(t + 1):
                    qt, ks = q[b, t, part], k[b, s, part]
                    if rope:
                        qt, ks = naive_rotate(qt, t), naive_rotate(ks, s)
                    scores.append((qt * ks).sum() / math.sqrt(size))
                weight = torch.stack(scores).softmax(0)
                out[b, t, part] = sum(weight[s] * v[b, s, part] for s in range(t + 1))
    return attention.o(out)


def naive_rotate(x, position, base=10_000.0):
    half = len(x) // 2
    out = torch.empty_like(x)
    for i in range(half):
        angle = position * base ** (-2 * i / len(x))
        cos, sin = math.cos(angle), math.sin(angle)
        out[i] = x[i] * cos - x[i + half] * sin
        out[i + half] = x[i + half] * cos + x[i] * sin
    return out


@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("explicit", [False, True], ids=["fused", "with logits_hook"])
def test_attention_matches_the_naive_sum(rope, explicit):
    attention = lively(tiny(heads=2)).double().blocks[0].attn
    if explicit:
        attention.logits_hook = nn.Identity()
    x = torch.randn(2, 7, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    angles = rope_angles(torch.arange(7), Rope(4, 10_000.0)) if rope else None
    # the angles are float32: 1e-6 covers their rounding at positions below 7
    torch.testing.assert_close(
        attention(x, angles), naive_attention(attention, x, rope), rtol=1e-5, atol=1e-6
    )


def test_rope_depends_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cos, sin = rope_angles(torch.arange(64), Rope(16, 10_000.0))

    def score(t, s):
        return (
            (rotate(q, cos[t : t + 1], sin[t : t + 1]) * rotate(k, cos[s : s + 1], sin[s : s + 1]))
            .sum()
            .item()
        )

    for distance in (0, 1, 5, 17):
        scores = [score(distance + shift, shift) for shift in (0, 3, 20, 46)]
        assert max(scores) - min(scores) < 1e-4  # float32 angles of up to 63 radians
    assert abs(score(5, 0) - score(6, 0)) > 1e-3
    assert abs(score(5, 0) - score(0, 5)) > 1e-3


def test_rope_keeps_norms_and_dtype():
    x = torch.randn(1, 2, 10, 8)
    cos, sin = rope_angles(torch.arange(10), Rope(8, 10_000.0))
    torch.testing.assert_close(rotate(x, cos, sin).norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(rotate(x, cos, sin)[:, :, 0], x[:, :, 0])
    assert rotate(x.bfloat16(), cos, sin).dtype == torch.bfloat16


class Record(nn.Module):
    def forward(self, x):
        self.seen = x
        return x


def test_qk_norm_bounds_the_logits():
    attention = tiny(qk_norm=True).blocks[0].attn
    attention.q_rope, attention.k_rope = Record(), Record()
    x = torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(0)) * 100
    attention(x, rope_angles(torch.arange(7), Rope(4, 10_000.0)))
    for hook in (attention.q_rope, attention.k_rope):
        rms = hook.seen.square().mean(-1).sqrt()
        torch.testing.assert_close(rms, torch.ones_like(rms), rtol=1e-3, atol=0)


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_hook_points_see_what_attention_multiplies(positions):
    model = lively(tiny(positions=positions))
    attention = model.blocks[1].attn
    expected = model(tokens())
    for name in ("q_rope", "k_rope", "v_hook"):
        setattr(attention, name, Record())
    logits = attention.logits_hook = Record()
    torch.testing.assert_close(model(tokens()), expected)
    q, k, v = attention.q_rope.seen, attention.k_rope.seen, attention.v_hook.seen
    assert q.shape == k.shape == v.shape == (2, 2, 12, 4)
    torch.testing.assert_close(logits.seen, q @ k.transpose(-2, -1) / 2.0)

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
    inside = ["attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down"]
    assert linears == [f"blocks.0.{name}" for name in inside] + ["lm_head"]


def test_tied_embeddings_share_storage():
    model = tiny(tie_embeddings=True)
    assert model.lm_head.weight is model.token_embedding.weight
    untied = tiny()
    assert untied.lm_head.weight.data_ptr() != untied.token_embedding.weight.data_ptr()
    assert untied.num_parameters() - tiny(tie_embeddings=True).num_parameters() == 23 * 8
    assert untied.num_parameters(non_embedding=True) == model.num_parameters(non_embedding=True)


def test_initial_statistics():
    config = GPTConfig(vocab_size=300, sequence_tokens=64, layers=8, heads=4, width=128, **GPT2_LIKE)
    for name, parameter in GPT(config, seed=3).named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all()
        elif parameter.ndim == 1:
            assert (parameter == 1).all()
        else:
            residual = name.endswith(("attn.o.weight", "mlp.down.weight"))
            std = 0.02 / math.sqrt(16) if residual else 0.02
            n = parameter.numel()
            # five standard errors of the mean, std / sqrt(n), and of the standard deviation, std / sqrt(2n)
            assert abs(parameter.mean().item()) < 5 * std / math.sqrt(n), name
            assert abs(parameter.std().item() - std) < 5 * std / math.sqrt(2 * n), name


def test_weights_follow_from_seed_and_name_alone():
    state = torch.get_rng_state()
    a, b, other = tiny(seed=4), tiny(seed=4), tiny(seed=5)
    assert torch.equal(state, torch.get_rng_state())
    for name, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[name])
        assert value.ndim == 1 or not torch.equal(value, other.state_dict()[name])
    q, k = a.blocks[0].attn.q.weight, a.blocks[0].attn.k.weight
    assert not torch.equal(q, k)
    assert not torch.equal(q, a.blocks[1].attn.q.weight)
    wider = tiny(seed=4, mlp_width=16, qk_norm=True, tie_embeddings=True)
    assert torch.equal(wider.blocks[1].attn.v.weight, a.blocks[1].attn.v.weight)


@variants
def test_meta_then_real_equals_real(variant):
    with torch.device("meta"):
        model = GPT(GPTConfig(**{**TINY, **variant}))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    model.to_empty(device="cpu")
    model.init_weights(9)
    direct = tiny(seed=9, **variant)
    assert torch.equal(model(tokens()), direct(tokens()))
    assert model.num_parameters() == direct.num_parameters()


def test_default_dtype_is_respected():
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = tiny()
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.lm_head.weight, tiny().lm_head.weight.bfloat16())


@variants
def test_gradients_match_finite_differences(variant):
    model = lively(tiny(layers=1, sequence_tokens=5, **variant)).double()
    x = tokens(1, 5)
    names, values = zip(*model.named_parameters(), strict=True)

    def loss(*parameters):
        logits = torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (x,))
        return logits.log_softmax(-1)[0, :-1].gather(-1, x[0, 1:, None]).mean()

    inputs = tuple(value.detach().requires_grad_() for value in values)
    assert torch.autograd.gradcheck(loss, inputs, fast_mode=True)
    assert all(grad.abs().max() > 0 for grad in torch.autograd.grad(loss(*inputs), inputs))


@pytest.mark.parametrize("variant", [{}, {**GPT2_LIKE, "dropout": 0.3}], ids=["modern", "gpt2 with dropout"])
def test_activation_checkpointing_gives_identical_gradients(variant):
    grads = []
    for enabled in (False, True):
        model = lively(tiny(**variant))
        model.set_activation_checkpointing(enabled)
        calls = []
        model.blocks[0].attn.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(0)
        model(tokens()).logsumexp(-1).sum().backward()
        assert len(calls) == (2 if enabled else 1)
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]), name


def test_dropout_acts_in_training_only():
    model = lively(tiny(dropout=0.5))
    assert not torch.equal(model(tokens()), model(tokens()))
    model.eval()
    assert torch.equal(model(tokens()), model(tokens()))
    model.blocks[0].attn.logits_hook = nn.Identity()
    assert torch.equal(model(tokens()), model(tokens()))


@pytest.mark.filterwarnings("error")
@variants
def test_bf16_autocast_stays_close(variant):
    model = lively(tiny(**variant))
    exact = model(tokens())
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(tokens())
    assert rough.dtype == torch.bfloat16
    error = (rough.float() - exact).norm() / exact.norm()
    assert 1e-4 < error < 3e-2  # bf16 has a relative step of 2^-8; about ten roundings in a row


@pytest.mark.inductor
@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiles_as_one_graph(checkpointing):
    model = lively(tiny(layers=1, qk_norm=True))
    model.set_activation_checkpointing(checkpointing)
    model(tokens()).logsumexp(-1).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    compiled(tokens()).logsumexp(-1).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)


def test_traces_as_one_graph():
    model = lively(tiny(**GPT2_LIKE))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(tokens()), model(tokens()))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("positions", ["learned", "rope"])
def test_parameter_count_in_closed_form(tied, bias, norm, positions):
    v, s, layers, c, m = 23, 12, 3, 8, 20
    model = tiny(layers=layers, mlp_width=m, tie_embeddings=tied, bias=bias, norm=norm, positions=positions)
    norms = (2 * layers + 1) * c * (2 if norm == "layernorm" and bias else 1)
    body = layers * (4 * c * c + 2 * c * m + (5 * c + m if bias else 0)) + norms
    assert model.num_parameters(non_embedding=True) == body
    total = body + v * c * (1 if tied else 2) + (s * c if positions == "learned" else 0)
    assert model.num_parameters() == total
    assert model.flops_per_token() == 6 * (body + v * c) + 12 * layers * c * s


def test_flops_agree_with_a_counter():
    model = tiny(layers=2, positions="learned")
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        model(tokens(1)).sum().backward()
    norms = 6 * (2 * 2 + 1) * 8  # the formula counts norm gains as if they were multiplied by matrices
    # The counter gives attention's backward 2.5 times its forward where it recomputes QK^T, the formula 2.
    counted, formula = counter.get_total_flops() / 12, model.flops_per_token() - norms
    attention = 12 * 2 * 8 * 12
    assert formula - attention <= counted <= formula + attention / 6 + 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "batchnorm"}, "unknown norm 'batchnorm'; allowed: rmsnorm, layernorm"),
        ({"activation": "tanh"}, "unknown activation 'tanh'; allowed: gelu, "),
        ({"positions": "alibi"}, "unknown positions 'alibi'; allowed: learned, rope"),
        ({"heads": 3}, "width 8 is not divisible by heads 3"),
        ({"heads": 8}, "width / heads = 1 must be even.*learned"),
        ({"layers": 0}, "layers 0 must be a positive integer"),
        ({"width": 8.0}, r"width 8\.0 must be a positive integer"),
        ({"mlp_width": -1}, "mlp_width -1"),
        ({"dropout": 1.0}, r"dropout 1\.0 must lie in \[0, 1\)"),
        ({"init_std": 0.0}, r"init_std 0\.0 must be positive"),
        ({"rope_base": -1.0}, r"rope_base -1\.0 must be positive"),
    ],
)
def test_config_errors(change, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**{**TINY, **change})


def test_config_is_frozen_and_fills_the_mlp_width():
    config = GPTConfig(**TINY)
    assert config.mlp_width == 32
    with pytest.raises(AttributeError):
        config.width = 3
    assert hash(config) == hash(GPTConfig(**TINY))


def test_too_long_an_input_is_refused():
    with pytest.raises(ValueError, match="13 tokens exceed the model's sequence_tokens 12"):
        tiny()(torch.zeros(1, 13, dtype=torch.int64))
    assert tiny()(torch.zeros(1, 3, dtype=torch.int64)).shape == (1, 3, 23)
