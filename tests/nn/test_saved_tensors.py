"""Memory for the backward: what is counted, and that native layers keep what they promise."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from qtrain.models.decoder import rope_angles
from qtrain.models.gpt import GPTConfig
from qtrain.models.llama import LlamaConfig
from qtrain.nn import apply_recipe
from qtrain.nn.saved_tensors import saved_bytes, saved_for_backward
from qtrain.quant import ModelRecipe

LEAN = Path(__file__).parents[2] / "configs" / "recipe" / "int8_lean.yaml"
INT8 = {
    "fprop": {"input": "int8_row", "weight": "int8_row"},
    "dgrad": {"grad_output": "int8_row", "weight": "fprop"},
    "wgrad": {"grad_output": "int8_row", "input": "fprop"},
    "saved": "quantized",
}


def test_each_storage_counts_once_and_whole() -> None:
    a, b = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True)

    def run() -> Tensor:
        c = a * b  # a and b
        return c[:2] * c[2:]  # two views of one storage

    found = saved_for_backward(run)
    assert [saved.nbytes for saved in found] == [96, 96, 96]
    assert saved_bytes(run, [a, b]) == 96
    assert saved_bytes(lambda: (a * b).detach(), [b]) == 96
    with torch.no_grad():
        assert saved_for_backward(run) == []
    assert str(found[0]) == "          96  float32       4 x 6"


def lean() -> ModelRecipe:
    """The recipe of the file, without Hydra, which GPU machines may lack."""
    text = LEAN.read_text()
    for knob in ("w", "a", "g", "compute"):
        value = re.search(rf"^{knob}: (\w+)", text, re.MULTILINE)
        assert value is not None
        text = text.replace(f'"${{{knob}}}"', value[1])
    fields = yaml.safe_load(text)["recipe"]
    del fields["_target_"]
    return ModelRecipe(**fields)


BLOCKS: dict[str, Any] = {
    "gpt": GPTConfig(vocab_size=64, sequence_tokens=64, layers=1, heads=4, width=128),
    "gpt2": GPTConfig(
        vocab_size=64, sequence_tokens=64, layers=1, heads=4, width=128, norm="layernorm", activation="gelu_tanh",
        positions="learned", bias=True,
    ),
    "llama": LlamaConfig(vocab_size=64, sequence_tokens=64, layers=1, heads=4, width=128, mlp_width=344),
    "llama_gqa": LlamaConfig(
        vocab_size=64, sequence_tokens=64, layers=1, heads=4, kv_heads=2, width=128, mlp_width=344
    ),
}  # fmt: skip


def of_block(
    config: Any, recipe: ModelRecipe | None, device: str = "cpu", backend: str | None = None
) -> list[Any]:
    """What one block under bf16 autocast saves, its input included: it is kept for this block. backend: to compile it."""
    model = config.build(seed=0).to(device)
    if recipe is not None:
        apply_recipe(model, recipe)
    x = torch.randn(16, 64, 128, generator=torch.Generator().manual_seed(1)).to(device).requires_grad_()
    angles = None if model.rope is None else rope_angles(torch.arange(64, device=device), model.rope)

    def run() -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return model.blocks[0](x, angles)

    if backend is not None:
        torch.compiler.reset()
        model.blocks[0].compile(fullgraph=True, backend=backend)
        run()
    return saved_for_backward(run, model.parameters())


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_keeps_three_quarters_of_bf16s_at_most(name: str) -> None:
    bf16, native = of_block(BLOCKS[name], None), of_block(BLOCKS[name], lean())
    ratio = sum(s.nbytes for s in native) / sum(s.nbytes for s in bf16)
    table = "\n".join(map(str, [f"{ratio:.3f} of bf16's:", *bf16, "native:", *native]))
    assert ratio <= 0.75, table
    wide = [s for s in native if s.shape[-1] == BLOCKS[name].mlp_width and s.dtype == torch.bfloat16]
    assert len(wide) == (2 if name.startswith("llama") else 1), (
        table
    )  # gate and up, or h; nothing of down's input
    assert sum(s.dtype == torch.int8 and s.shape == (1024, 128) for s in native) == 2, (
        table
    )  # qkv; up (and gate)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_a_compiled_block_keeps_nothing_of_w_and_of_downs_input(name: str, backend: str) -> None:
    """What the backward quantizes again is not merged with what the forward did."""
    bf16, native = (of_block(BLOCKS[name], recipe, backend=backend) for recipe in (None, lean()))
    ratio = sum(s.nbytes for s in native) / sum(s.nbytes for s in bf16)
    table = "\n".join(map(str, [f"{ratio:.3f} of bf16's:", *bf16, "native:", *native]))
    assert ratio <= (0.69 if name == "gpt" else 0.76), table
    # Of the inputs of qkv, o (beside attention's own copy, since the two quantizations of it are merged) and up
    assert [s.nbytes for s in native if s.dtype == torch.int8] == [1024 * 128] * 3, table


@pytest.mark.parametrize("backend", [None, "aot_eager"])
@pytest.mark.parametrize("way", ["row", "row_sr", "tensor"])
def test_a_wide_layer_keeps_codes_of_its_input_alone(way: str, backend: str | None) -> None:
    """bf16 parameters, which are at hand in the backward: bf16 keeps x, two bytes an element, and nothing of W."""
    spec, found = f"int8_{way}", []
    linear = {
        "fprop": {"input": spec, "weight": spec},
        "dgrad": {"grad_output": spec, "weight": "fprop"},
        "wgrad": {"grad_output": spec, "input": "fprop"},
        "saved": "quantized",
    }
    for recipe in (None, ModelRecipe(linear=linear, compute="native")):
        layer = nn.Sequential(nn.Linear(256, 768, bias=False, dtype=torch.bfloat16))
        if recipe is not None:
            apply_recipe(layer, recipe)

        def run(x: Tensor, layer: nn.Module = layer) -> Tensor:
            return layer(x)

        if backend is not None and recipe is not None:
            torch.compiler.reset()
            run = torch.compile(run, fullgraph=True, backend=backend)
        x = torch.randn(64, 256, dtype=torch.bfloat16, requires_grad=True)
        run(x)
        found.append(saved_for_backward(lambda run=run, x=x: run(x), layer.parameters()))
    bf16, native = found
    table = "\n".join(map(str, [*bf16, "native:", *native]))
    assert [s.shape for s in bf16] == [(64, 256)], table
    assert sum(s.nbytes for s in native) <= 0.55 * sum(s.nbytes for s in bf16), table


@pytest.mark.parametrize("incoming", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("siblings", [1, 3])
def test_linears_keep_half_of_bf16s(incoming: torch.dtype, siblings: int) -> None:
    """Codes of x, once for all; bf16 keeps x and W in its own copies."""
    found = []
    for recipe in (None, ModelRecipe(linear=INT8, compute="native")):
        layers = nn.ModuleList(nn.Linear(256, 320, bias=False) for _ in range(siblings))
        if recipe is not None:
            apply_recipe(layers, recipe)
        x = torch.randn(512, 256).to(incoming).requires_grad_()

        def run(layers: Any = layers, x: Tensor = x) -> list[Tensor]:
            with torch.autocast("cpu", torch.bfloat16):
                return [layer(x) for layer in layers]

        found.append(saved_for_backward(run, layers.parameters()))
    bf16, native = found
    table = "\n".join(map(str, [*bf16, "native:", *native]))
    assert sum(s.nbytes for s in native) <= 0.55 * sum(s.nbytes for s in bf16), table
    assert sum(s.dtype == torch.int8 and s.shape == (512, 256) for s in native) == 1, table


def test_the_lean_recipe_gives_the_numbers_of_all_gemms() -> None:
    """Native, where nothing depends on what is saved: gradients to the bit."""
    gradients = []
    for recipe in (
        lean(),
        ModelRecipe(linear={**INT8, "saved": "high_precision"}, exclude=["lm_head"], compute="native"),
    ):
        model = BLOCKS["llama"].build(seed=0)
        apply_recipe(model, recipe)
        tokens = torch.randint(64, (2, 33), generator=torch.Generator().manual_seed(2))
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(tokens[:, :-1])
        nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten()).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
