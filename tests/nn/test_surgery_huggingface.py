"""Surgery on models of Hugging Face: Conv1D in place, names and ties kept, and nothing skipped in silence."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from layer_recipes import LAYERS
from layer_steps import MATRICES, OFFSET, STEP, hostile, sizes, step
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from qtrain.nn import Clock, QuantizedConv1D, QuantizedLayer, QuantizedLinear, apply_recipe, take_census
from qtrain.nn.compiled import compare_compiled
from qtrain.nn.inventory import as_patterns, outside_matrices
from qtrain.optim import AdamStateRecipe, AdamW, parameter_groups
from qtrain.quant import LinearRecipe, ModelRecipe, Rule

W8A8G8 = LinearRecipe(
    fprop={"input": "int8_row", "weight": "int8_row"},
    dgrad={"grad_output": "int8_row_sr", "weight": "fprop"},
    wgrad={"grad_output": "int8_row_sr", "input": "fprop"},
)
W4 = LinearRecipe(fprop={"weight": "int4_row"})
VOCABULARY = 61
TOKENS = torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": None,
    "eos_token_id": None,
}

QWEN3_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": None}
    return GPT2LMHeadModel(GPT2Config(**sizes, **tokens, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0))


def made(model: Any, config: Any, **more: Any) -> Any:
    torch.manual_seed(0)
    return model(config(**{**SHAPE, **more}))


MODELS = {
    "gpt2": gpt2,
    "llama": lambda: made(LlamaForCausalLM, LlamaConfig),
    "qwen2": lambda: made(Qwen2ForCausalLM, Qwen2Config, tie_word_embeddings=True),  # biases of q, k and v
    "qwen3": lambda: made(Qwen3ForCausalLM, Qwen3Config, head_dim=8),  # norms of q and k
}


def loss_of(model: nn.Module) -> Tensor:
    return model(TOKENS, labels=TOKENS, use_cache=False).loss


def layers_of(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, QuantizedLayer)]


def twins(recipe: LinearRecipe, in_features: int, out_features: int) -> tuple[QuantizedLayer, QuantizedLayer]:
    """A Conv1D and an nn.Linear with the same numbers, under one recipe, name and clock."""
    torch.manual_seed(0)
    conv, linear = Conv1D(out_features, in_features), nn.Linear(in_features, out_features)
    with torch.no_grad():
        conv.bias.normal_()
        linear.weight.copy_(conv.weight.t())
        linear.bias.copy_(conv.bias)
    found = []
    for layer in (conv, linear):
        clock = Clock(7)
        found.append(QuantizedLayer.convert(layer, recipe, name="up", clock=clock))
        clock.set(step=STEP, token_offset=OFFSET)
    return found[0], found[1]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", list(LAYERS))
def test_a_conv1d_is_the_linear_layer_of_the_transposed_weight_bit_for_bit(name: str, autocast: bool) -> None:
    recipe = LinearRecipe(**LAYERS[name])
    tokens, in_features, out_features = sizes(recipe)
    conv, linear = twins(recipe, in_features, out_features)
    assert type(conv) is QuantizedConv1D
    assert type(linear) is QuantizedLinear
    x = hostile(tokens, in_features)
    of_conv, of_linear = step(conv, x, autocast=autocast), step(linear, x, autocast=autocast)
    assert conv.weight.shape == conv.weight.grad.shape == (in_features, out_features)
    of_conv["dW"] = of_conv["dW"].t()
    for what in MATRICES:
        assert torch.equal(of_conv[what], of_linear[what]), what


@pytest.mark.parametrize("autocast", [False, True])
def test_a_conv1d_without_quantization_is_itself_bit_for_bit_and_reverts(autocast: bool) -> None:
    conv, _ = twins(W4, 37, 23)
    plain, x = Conv1D(23, 37), hostile(15, 37)
    plain.load_state_dict(conv.state_dict())
    expected = step(plain, x, autocast=autocast)
    assert not torch.equal(step(conv, x, autocast=autocast)["y"], expected["y"])
    conv.recipe = LinearRecipe()
    assert all(torch.equal(v, expected[k]) for k, v in step(conv, x, autocast=autocast).items())
    conv.revert()
    assert type(conv) is Conv1D
    assert vars(conv).keys() == vars(plain).keys()


def test_gpt2_keeps_its_parameters_keys_and_layout() -> None:
    model = gpt2()
    parameters, before = dict(model.named_parameters()), copy.deepcopy(model.state_dict())
    report = apply_recipe(model, ModelRecipe(linear=W8A8G8, exclude=["lm_head"]))
    names = [
        f"transformer.h.{i}.{n}"
        for i in (0, 1)
        for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    assert list(report.plan) == layers_of(model) == names
    assert [layer.shape for layer in report.layers[:4]] == [
        (96, 32),
        (32, 32),
        (128, 32),
        (32, 128),
    ]  # [O, I]
    assert all(p is parameters[n] for n, p in model.named_parameters())
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], v) and after[k].stride() == v.stride() for k, v in before.items())
    assert model.lm_head.weight is model.transformer.wte.weight
    assert type(model.lm_head) is nn.Linear
    apply_recipe(model, ModelRecipe())
    assert {type(m) for m in model.modules() if "c_" in m.__class__.__name__.lower()} <= {Conv1D}
    assert sum(type(m) is Conv1D for m in model.modules()) == 8


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("exclude", [["lm_head"], []])
def test_the_census_sees_every_layer(name: str, exclude: list[str]) -> None:
    model = MODELS[name]()
    report = apply_recipe(model, ModelRecipe(linear=W8A8G8, exclude=exclude))
    count = {"gpt2": 8}.get(name, 14) + (not exclude)
    assert len(report.plan) == count
    census = take_census(model, report, loss_of)
    census.check()
    assert len(census.quantized()) == 6 * count
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == (name in ("gpt2", "qwen2"))


def test_the_census_finds_a_conv1d_that_is_not_quantized(monkeypatch: pytest.MonkeyPatch) -> None:
    model = gpt2()
    report = apply_recipe(model, ModelRecipe(linear=W8A8G8, exclude=["lm_head"]))
    monkeypatch.setattr(QuantizedConv1D, "forward", Conv1D.forward)
    failures = take_census(model, report, loss_of).failures()
    assert sum("transformer.h.1.mlp.c_fc fprop.weight: SQNR" in f for f in failures) == 1
    assert {f.split()[0] for f in failures} == set(report.plan)


def test_a_quantized_tied_head_is_right() -> None:
    """The embedding reads the matrix, the head its codes; the gradient is the sum of the two."""
    recipe = ModelRecipe(linear=LinearRecipe(fprop={"input": "int8_row", "weight": "int4_row"}))
    tied, untied = gpt2(), gpt2()
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    losses = []
    for model in (tied, untied):
        apply_recipe(model, recipe)
        loss = loss_of(model)
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == losses[1]
    total = untied.lm_head.weight.grad + untied.transformer.wte.weight.grad
    torch.testing.assert_close(tied.lm_head.weight.grad, total, rtol=1e-6, atol=1e-8)
    assert untied.lm_head.weight.grad.norm() > 0


def test_rules_go_by_the_names_of_hugging_face() -> None:
    model = MODELS["llama"]()
    rules = [Rule(pattern="model.layers.0.*", recipe=None), Rule(pattern="*.mlp.down_proj", recipe=W4)]
    report = apply_recipe(model, ModelRecipe(linear=W8A8G8, rules=rules, exclude=["lm_head"]))
    first, second = "model.layers.0.", "model.layers.1."
    assert report.plan[first + "mlp.down_proj"] == report.plan[second + "mlp.down_proj"] == W4
    assert {n for n in report.plan if n.startswith(first)} == {first + "mlp.down_proj"}
    assert report.plan[second + "self_attn.q_proj"] == W8A8G8


@pytest.mark.parametrize(
    ("model", "config", "more"),
    [
        (MixtralForCausalLM, MixtralConfig, {"num_local_experts": 4}),
        (Qwen3MoeForCausalLM, Qwen3MoeConfig, QWEN3_MOE),
    ],
)
def test_fused_experts_are_refused_by_name_and_listed_when_excluded(
    model: Any, config: Any, more: Any
) -> None:
    moe = made(model, config, **more)
    with pytest.raises(ValueError, match="matrices outside of linear layers") as refused:
        apply_recipe(moe, ModelRecipe(linear=W8A8G8, exclude=["lm_head"]))
    assert layers_of(moe) == []
    outside = ["mlp.gate", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    patterns = [f"model.layers.*.{name}" for name in outside]
    suggested = str(refused.value).rpartition("exclude ")[2].split(", ")
    assert sorted(suggested) == sorted(map(repr, patterns))  # ready to be pasted
    assert "model.layers.0.mlp.experts.down_proj [4 x " in str(refused.value)
    report = apply_recipe(moe, ModelRecipe(linear=W8A8G8, exclude=["lm_head", *patterns]))
    assert list(report.plan) == [
        f"model.layers.{i}.self_attn.{n}_proj" for i in (0, 1) for n in ("q", "k", "v", "o")
    ]
    listed = {layer.name for layer in report.layers if layer.recipe is None}
    assert listed == {"lm_head"} | {f"model.layers.{i}.{name}" for i in (0, 1) for name in outside}
    everything = (
        sum(p.numel() for p in moe.parameters() if p.dim() > 1) - moe.model.embed_tokens.weight.numel()
    )
    assert report.quantized_fraction == sum(x.parameters for x in report.layers if x.recipe) / everything
    take_census(moe, report, loss_of).check()


def test_experts_that_no_rule_covers_need_no_exclusion() -> None:
    moe = made(MixtralForCausalLM, MixtralConfig, num_local_experts=4)
    report = apply_recipe(moe, ModelRecipe(rules=[Rule(pattern="*.self_attn.*", recipe=W4)]))
    assert len(report.plan) == 8
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj"):
        apply_recipe(moe, ModelRecipe(rules=[Rule(pattern="*.mlp.*", recipe=W4)]))
    assert layers_of(apply_and_return(moe, ModelRecipe())) == []  # no recipe refuses nothing


def apply_and_return(model: nn.Module, recipe: ModelRecipe) -> nn.Module:
    apply_recipe(model, recipe)
    return model


def llava() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=8,
        patch_size=4,
    )
    text = LlamaConfig(**SHAPE)
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=VOCABULARY - 1, vision_feature_layer=-1
    )
    return LlavaForConditionalGeneration(config)


def test_a_vision_language_model_trains_on_quantized_layers_of_both_towers() -> None:
    model = llava()
    patches = "model.vision_tower.embeddings.patch_embedding"
    with pytest.raises(ValueError, match=rf"{patches} \[32 x 3 x 4 x 4\].*exclude '{patches}'"):
        apply_recipe(model, ModelRecipe(linear=W8A8G8, exclude=["lm_head"]))
    report = apply_recipe(model, ModelRecipe(linear=W8A8G8, exclude=["lm_head", patches]))
    pixels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    tokens = TOKENS[:1] % (VOCABULARY - 1)
    tokens[0, 1:5] = VOCABULARY - 1  # four patches

    def probe(model: nn.Module) -> Tensor:
        return model(input_ids=tokens, pixel_values=pixels, labels=tokens, use_cache=False).loss

    census = take_census(model, report, probe)
    census.check()
    towers = {n.split(".")[1] for n in report.plan}
    assert towers == {"vision_tower", "multi_modal_projector", "language_model"}
    assert len(census.quantized()) == 6 * len(report.plan)


class Linear8bitLt(nn.Linear):
    """As bitsandbytes calls its layer, which is a subclass too."""


class LoraLinear(nn.Module):
    """As PEFT wraps a layer."""

    __module__ = "peft.tuners.lora.layer"

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(32, 4, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(4, 48, bias=False)})


def own_forward(layer: nn.Linear) -> nn.Linear:
    layer.forward = layer.forward
    return layer


def int8_weight(layer: nn.Linear) -> nn.Linear:
    layer.weight = nn.Parameter(torch.zeros(48, 32, dtype=torch.int8), requires_grad=False)
    return layer


class Wrapped(Tensor):
    """A tensor subclass, as torchao keeps quantized weights in."""


def wrapped_weight(layer: nn.Linear) -> nn.Linear:
    layer.weight = nn.Parameter(torch.zeros(48, 32).as_subclass(Wrapped))
    return layer


@pytest.mark.parametrize(
    ("put", "said"),
    [
        (lambda layer: Linear8bitLt(32, 48), "up_proj is a Linear8bitLt, whose own forward"),
        (LoraLinear, "up_proj.base_layer belongs to a PEFT adapter.*merge or unload"),
        (torch.nn.utils.parametrizations.weight_norm, "up_proj has a weight that is computed"),
        (torch.nn.utils.spectral_norm, "up_proj has a weight that is computed"),
        (own_forward, "up_proj has a forward of its own set on it"),
        (int8_weight, "up_proj keeps its weight in torch.int8"),
        (wrapped_weight, "up_proj keeps its weight in a Wrapped"),
    ],
)
def test_layers_that_are_no_plain_linear_are_refused_by_name(put: Any, said: str) -> None:
    model = MODELS["llama"]()
    mlp = model.model.layers[1].mlp
    mlp.up_proj = put(mlp.up_proj)
    with pytest.raises(TypeError, match=f"model.layers.1.mlp.{said}.*exclude"):
        apply_recipe(model, ModelRecipe(linear=W4, exclude=["lm_head"]))
    assert layers_of(model) == []
    exclude = ["lm_head", "model.layers.1.mlp.up_proj*"]
    report = apply_recipe(model, ModelRecipe(linear=W4, exclude=exclude))
    assert len(report.plan) == 13


def test_a_subclass_of_conv1d_is_refused() -> None:
    class Own(Conv1D):
        pass

    with pytest.raises(TypeError, match=r"0 is a Own, whose own forward"):
        apply_recipe(nn.Sequential(Own(4, 4)), ModelRecipe(linear=W4))


def test_a_model_that_was_loaded_quantized_is_refused() -> None:
    model = MODELS["llama"]()
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(ValueError, match="LlamaForCausalLM was loaded quantized"):
        apply_recipe(model, ModelRecipe(linear=W4))
    apply_recipe(model, ModelRecipe())


def test_what_lies_outside_of_linear_layers() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions = nn.Parameter(torch.zeros(1, 5, 4))
            self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))  # a vector: no GEMM
            self.norm = nn.LayerNorm((5, 4))
            self.embed, self.up = nn.Embedding(6, 4), nn.Linear(4, 4)
            self.conv, self.rnn = nn.Conv1d(4, 4, 3), nn.GRU(4, 4)

    assert list(outside_matrices(Odd())) == ["positions", "conv", "rnn.weight_ih_l0", "rnn.weight_hh_l0"]
    assert as_patterns(["a.0.b", "a.11.b", "0.c2", "d"]) == ["a.*.b", "*.c2", "d"]


def test_llama_pretrains_in_a_plain_loop() -> None:
    """30 steps on a text that repeats itself, with the census before and after compiling."""
    model = made(LlamaForCausalLM, LlamaConfig, num_hidden_layers=1)
    report = apply_recipe(model, ModelRecipe(linear=W8A8G8, exclude=["lm_head"]), seed=3)
    take_census(model, report, loss_of).check()
    model.compile(backend="aot_eager", dynamic=False)
    take_census(model, report, loss_of).check()
    compare_compiled(model, report, loss_of).check()
    states = AdamStateRecipe(exp_avg="dynamic8", exp_avg_sq="dynamic8", min_numel=0)
    optimizer = AdamW(parameter_groups(model, weight_decay=0.1), lr=1e-2, states=states)
    text = torch.arange(12).repeat(2, 1) * 5 % VOCABULARY
    losses = []
    for number in range(30):
        report.clock.set(step=number)
        loss = model(text, labels=text, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 3.9  # ln 61 = 4.11
    assert losses[-1] < 0.5
