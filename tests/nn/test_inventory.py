"""Which weights a low-bit gather takes. What surgery makes of the inventory: test_surgery.py."""

from __future__ import annotations

from qtrain.models.gpt import GPT, GPTConfig
from qtrain.nn.inventory import gathered_layers
from qtrain.quant import ModelRecipe


def test_which_weights_are_gathered_in_low_bits():
    model = GPT(GPTConfig(vocab_size=13, sequence_tokens=8, layers=1, heads=2, width=16, tie_embeddings=True))
    found = gathered_layers(model, ModelRecipe(exclude=["*.up"]))
    assert "lm_head.weight" not in found, "it is the table of the embedding too"
    assert set(found) == {
        f"blocks.0.{n}.weight" for n in ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.down")
    }
    untied = GPT(
        GPTConfig(vocab_size=13, sequence_tokens=8, layers=1, heads=2, width=16, tie_embeddings=False)
    )
    assert "lm_head.weight" in gathered_layers(untied, ModelRecipe())
