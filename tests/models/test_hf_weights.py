"""Our models with Hugging Face's weights compute what Hugging Face's do, and hand the same bits back."""

from __future__ import annotations

import pytest
import torch
from hf_cases import CASES, theirs, tokens
from torch.nn.functional import cross_entropy

from qtrain.models import hf_config, hf_weights

cases = pytest.mark.parametrize("case", CASES)


def pair(case):
    """(their model, ours with its weights)."""
    hf = theirs(case)
    config = hf_config.from_huggingface(hf.config)
    ours = config.build(seed=0)
    ours.load_state_dict(hf_weights.from_huggingface(config, hf.state_dict()))
    return hf, ours.eval()


@cases
def test_logits_and_gradients_agree(case):
    hf, ours = pair(case)
    ids = tokens()
    logits, expected = ours(ids), hf(ids).logits
    assert expected.std() > 0.3  # else nothing would be seen
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    for result in (logits, expected):
        cross_entropy(result[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    gradients = {name: p.grad for name, p in hf.named_parameters()}
    mapped = hf_weights.from_huggingface(ours.config, gradients)
    for name, parameter in ours.named_parameters():
        assert parameter.grad.abs().max() > 0, name
        # The gradient of a key's bias in GPT-2 is zero up to rounding: hence an absolute part
        error = (parameter.grad - mapped[name]).abs().max()
        assert error < 1e-5 + 1e-4 * mapped[name].abs().max(), name


@cases
def test_round_trips_are_bit_equal(case):
    hf, ours = pair(case)
    back = hf_weights.to_huggingface(ours.config, ours.state_dict())
    named = dict(hf.named_parameters())  # a tied head once
    assert back.keys() == named.keys()
    for name, tensor in back.items():
        assert torch.equal(tensor, named[name]), name
        assert tensor.is_contiguous()
        assert tensor.dtype == torch.float32
    again = hf_weights.from_huggingface(ours.config, back)
    assert again.keys() == ours.state_dict().keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in ours.state_dict().items())


def test_bfloat16_is_carried():
    hf, ours = pair("llama")
    state = {name: t.bfloat16() for name, t in hf.state_dict().items()}
    found = hf_weights.from_huggingface(ours.config, state)
    assert {t.dtype for t in found.values()} == {torch.bfloat16}


def test_gpt2_as_the_hub_has_it():
    """Names of GPT2Model, without the prefix, and with the causal masks of older versions."""
    hf, ours = pair("gpt2")
    state = {n.removeprefix("transformer."): t for n, t in hf.state_dict().items() if n != "lm_head.weight"}
    state |= {"h.0.attn.bias": torch.ones(1, 1, 16, 16), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    found = hf_weights.from_huggingface(ours.config, state)
    assert found.keys() == ours.state_dict().keys()
    assert all(torch.equal(found[name], t) for name, t in ours.state_dict().items())


def test_what_has_no_place_is_refused():
    hf, ours = pair("llama, gqa, tied")
    state = hf.state_dict()
    with pytest.raises(
        ValueError, match=r"model\.layers\.0\.self_attn\.sinks \[4\]: qtrain's LlamaConfig has no such"
    ):
        hf_weights.from_huggingface(ours.config, {**state, "model.layers.0.self_attn.sinks": torch.ones(4)})
    with pytest.raises(ValueError, match="a head that is not the embedding"):
        hf_weights.from_huggingface(ours.config, {**state, "lm_head.weight": torch.ones(37, 24)})
    for name in ("blocks.0.attn.q.quantizers.fprop.input", "blocks.x.attn.q.weight", "extra.weight"):
        with pytest.raises(ValueError, match=f"{name}: Hugging Face's model has no such tensor"):
            hf_weights.to_huggingface(ours.config, {**ours.state_dict(), name: torch.ones(1)})
