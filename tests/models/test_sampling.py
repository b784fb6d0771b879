import math

import pytest
import torch
from torch import nn

from qtrain.models.gpt import GPT, GPTConfig
from qtrain.models.sampling import filter_logits, generate


@pytest.fixture
def model():
    config = GPTConfig(vocab_size=31, sequence_tokens=8, layers=1, heads=2, width=16, init_std=0.5)
    return GPT(config, seed=1)


PROMPT = torch.tensor([[1, 2, 3], [4, 5, 6]])


def test_greedy_is_the_argmax_loop_with_a_cropped_context(model):
    expected = PROMPT.clone()
    for _ in range(12):
        logits = model(expected[:, -8:])[:, -1]
        expected = torch.cat((expected, logits.argmax(-1, keepdim=True)), dim=1)
    out = generate(model, PROMPT, 12, temperature=0)
    assert out.shape == (2, 15)
    assert out.dtype == torch.int64
    assert torch.equal(out, expected)


def test_top_k_1_and_a_tiny_top_p_are_greedy(model):
    greedy = generate(model, PROMPT, 12, temperature=0)
    assert torch.equal(generate(model, PROMPT, 12, top_k=1, seed=3), greedy)
    assert torch.equal(generate(model, PROMPT, 12, top_p=1e-6, seed=3), greedy)


def test_the_seed_decides(model):
    state = torch.get_rng_state()
    one = generate(model, PROMPT, 20, seed=5)
    assert torch.equal(one, generate(model, PROMPT, 20, seed=5))
    assert not torch.equal(one, generate(model, PROMPT, 20, seed=6))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(one[:, :3], PROMPT)


def test_samples_follow_the_tempered_distribution(model):
    many = PROMPT[:1].expand(20_000, -1)
    drawn = generate(model, many, 1, temperature=0.7, seed=0)[:, -1]
    share = torch.bincount(drawn, minlength=31) / len(many)
    expected = (model(PROMPT[:1])[0, -1] / 0.7).softmax(-1)
    # five standard deviations of a binomial share, plus a floor of one draw in a thousand for rare tokens
    assert ((share - expected).abs() < 5 * (expected * (1 - expected) / len(many)).sqrt() + 1e-3).all()


def test_every_submodule_keeps_its_mode(model):
    model.train()
    model.blocks[0].mlp.eval()
    seen = []
    model.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    before = [m.training for m in model.modules()]
    generate(model, PROMPT, 2)
    assert seen == [False, False]
    assert [m.training for m in model.modules()] == before

    def explode(*_):
        raise RuntimeError("boom")

    model.final_norm.register_forward_hook(explode)
    with pytest.raises(RuntimeError, match="boom"):
        generate(model, PROMPT, 2)
    assert [m.training for m in model.modules()] == before


def test_filters():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.05, 0.15, 0.3, 0.5]]).log()

    def kept(**kwargs):
        return (filter_logits(logits, **{"top_k": None, "top_p": None, **kwargs}) > -math.inf).int().tolist()

    assert kept() == [[1, 1, 1, 1]] * 2
    assert kept(top_k=2) == [[1, 1, 0, 0], [0, 0, 1, 1]]
    assert kept(top_k=99) == [[1, 1, 1, 1]] * 2
    assert kept(top_p=0.4) == [[1, 0, 0, 0], [0, 0, 0, 1]]
    assert kept(top_p=0.7) == [[1, 1, 0, 0], [0, 0, 1, 1]]
    assert kept(top_p=0.9) == [[1, 1, 1, 0], [0, 1, 1, 1]]
    assert kept(top_p=1.0) == [[1, 1, 1, 1]] * 2
    assert kept(top_k=2, top_p=0.6) == [[1, 0, 0, 0], [0, 0, 0, 1]]  # 0.5 / 0.8 reaches 0.6 alone
    survivors = filter_logits(logits, 2, None)
    assert torch.equal(survivors[0, :2], logits[0, :2])


def test_any_module_with_a_stated_context():
    class Next(nn.Module):
        """Predicts the token after the last with certainty."""

        def forward(self, tokens):
            assert tokens.shape[1] <= 4
            return nn.functional.one_hot((tokens + 1) % 9, 9).float() * 100

    out = generate(Next(), torch.tensor([[3]]), 7, sequence_tokens=4)
    assert out.tolist() == [[3, 4, 5, 6, 7, 8, 0, 1]]
    assert torch.equal(generate(Next(), torch.tensor([[3]]), 0, sequence_tokens=4), torch.tensor([[3]]))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"temperature": -1}, "temperature -1 must not be negative"),
        ({"top_k": 0}, "top_k 0 must be at least 1"),
        ({"top_p": 0.0}, r"top_p 0\.0 must lie in \(0, 1\]"),
        ({"top_p": 1.5}, r"top_p 1\.5"),
        ({"max_new_tokens": -2}, "max_new_tokens -2"),
        ({"tokens": torch.tensor([1, 2])}, r"shape \(2,\) must be \[B, S\]"),
        ({"tokens": torch.empty(1, 0, dtype=torch.int64)}, "end-of-document"),
    ],
)
def test_errors(model, kwargs, message):
    arguments = {"tokens": PROMPT, "max_new_tokens": 1, **kwargs}
    with pytest.raises(ValueError, match=message):
        generate(model, **arguments)
