"""Models of transformers as models of ours: the same numbers, names of their own, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from qtrain.models.huggingface import HuggingFaceConfig
from qtrain.models.protocol import ModelConfig
from qtrain.models.sampling import generate

TOKENS = torch.randint(61, (2, 12), generator=torch.Generator().manual_seed(1))
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 48, "num_key_value_heads": 2},
    "qwen3": {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8},
    "gpt2": {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
}


def configured(name: str, **more: Any) -> HuggingFaceConfig:
    changes = {"model_type": name, **SMALL, **ARCHITECTURES[name], **more.pop("config", {})}
    return HuggingFaceConfig(config=changes, **{"vocab_size": 61, "sequence_tokens": 16, **more})


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    cross_entropy(model(TOKENS[:, :-1]).flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_it_is_a_causal_model_that_depends_on_its_seed_alone(name: str) -> None:
    config = configured(name)
    assert isinstance(config, ModelConfig)
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    model = config.build(seed=5)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(4)
    again, other = config.build(seed=5), config.build(seed=6)
    weights = model.state_dict()
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in weights.items())
    assert not all(torch.equal(v, other.state_dict()[k]) for k, v in weights.items())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.training
    logits = model(TOKENS)
    assert logits.shape == (2, 12, 61)
    changed = TOKENS.clone()
    changed[:, 8:] = (changed[:, 8:] + 1) % 61
    torch.testing.assert_close(model(changed)[:, :8], logits[:, :8], rtol=0, atol=1e-6)
    assert (model(changed)[:, 8:] - logits[:, 8:]).abs().amax() > 1e-3
    assert [type(block) for block in model.repeated_blocks()] == [type(model.repeated_blocks()[0])] * 2


def test_its_weights_are_those_of_transformers_under_the_same_names() -> None:
    model = configured("llama").build(seed=0)
    theirs = LlamaForCausalLM(type(model.config)(**configured("llama").architecture))
    theirs.load_state_dict(model.state_dict())
    assert torch.equal(model(TOKENS), theirs(input_ids=TOKENS).logits)
    assert "model.layers.1.mlp.up_proj.weight" in model.state_dict()
    assert isinstance(model, LlamaForCausalLM)


def test_activation_checkpointing_recomputes_and_changes_no_gradient() -> None:
    model = configured("llama").build(seed=0)
    calls: list[int] = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    kept = gradients(model)
    assert len(calls) == 1
    model.set_activation_checkpointing(True)
    recomputed = gradients(model)
    assert len(calls) == 3  # and once more in the backward
    assert all(torch.equal(g, recomputed[n]) for n, g in kept.items())
    model.set_activation_checkpointing(False)
    gradients(model)
    assert len(calls) == 4


def test_the_context_is_kept_and_sampled_from() -> None:
    model = configured("gpt2").build(seed=0)
    assert model.transformer.wpe.weight.shape == (16, 32)  # as many positions as the longest sequence
    with pytest.raises(ValueError, match="17 tokens exceed the model's sequence_tokens 16"):
        model(torch.zeros(1, 17, dtype=torch.int64))
    text = generate(model, TOKENS[:1], 20, temperature=0, sequence_tokens=16)
    assert text.shape == (1, 32)
    assert model.training
    expected = model.eval()(text[:, -17:-1])[0, -1].argmax()
    assert text[0, -1] == expected


def test_a_scaled_rotary_embedding_keeps_its_length() -> None:
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    config = configured("llama", config={"rope_parameters": rope, "attention_bias": True})
    assert config.architecture["max_position_embeddings"] == 2048
    assert config.architecture["rope_parameters"]["factor"] == 4.0
    assert config.build(seed=0).model.layers[0].self_attn.q_proj.bias is not None
    assert configured("llama").architecture["max_position_embeddings"] == 16


def test_no_token_of_the_architecture_is_special() -> None:
    """The embedding of a padding token would get no gradient, and ours may be any token."""
    assert configured("opt").build(seed=0).model.decoder.embed_tokens.padding_idx is None


def test_what_a_run_writes_down_needs_no_other_file(tmp_path: Path) -> None:
    first = configured("gpt2", config={"activation_function": "relu"}).build(seed=0)
    first.config.save_pretrained(tmp_path / "gpt2")
    more = {"vocab_size": 70, "sequence_tokens": 8, "config": {"num_hidden_layers": 3, "hidden_size": None}}
    config = HuggingFaceConfig(path=str(tmp_path / "gpt2"), **more)
    (tmp_path / "gpt2" / "config.json").unlink()
    written = json.loads(json.dumps(config.plain()))
    assert written.pop("_target_") == "qtrain.models.huggingface.HuggingFaceConfig"
    again = HuggingFaceConfig(**written)
    assert again.plain() == config.plain()
    model, same = config.build(seed=2), again.build(seed=2)
    assert torch.equal(model(TOKENS[:, :8]), same(TOKENS[:, :8]))
    assert model.config.activation_function == "relu"
    assert (len(model.transformer.h), model.lm_head.weight.shape) == (3, (70, 32))
    assert (
        "transformers_version" not in written["architecture"]
    )  # which would make every upgrade another model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2 with weights that no seed of ours draws."""
    path = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(99)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24, "vocab_size": 61}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(path)
    return path


def test_pretrained_weights_are_read_unless_others_follow(folder: Path) -> None:
    theirs = GPT2LMHeadModel.from_pretrained(folder).eval()
    config = HuggingFaceConfig(path=str(folder), pretrained=True, vocab_size=57, sequence_tokens=12)
    assert (config.vocab_size, config.architecture["n_positions"]) == (
        61,
        24,
    )  # theirs, whatever the tokenizer has
    model = config.build(seed=0).eval()
    torch.testing.assert_close(model(TOKENS), theirs(input_ids=TOKENS).logits, rtol=0, atol=1e-6)
    assert model.lm_head.weight is model.transformer.wte.weight
    drawn = config.build(seed=0, pretrained=False)
    assert not torch.equal(drawn.lm_head.weight, theirs.lm_head.weight)
    assert config.plain()["path"] == str(folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vocab_size": 62}, r"for 61 ids and the tokenizer has 62.*pretrained=false"),
        ({"sequence_tokens": 25}, r"sequence_tokens=25 exceeds the 24 positions"),
    ],
)
def test_pretrained_weights_must_fit(folder: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        HuggingFaceConfig(path=str(folder), pretrained=True, **{"sequence_tokens": 12, **changes})


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"num_hidden_layers": 3}, r"transformer\.h\.2\.\S+.* are not there"),
        ({"num_hidden_layers": 1}, r"transformer\.h\.1\.\S+.* are left over"),
        ({"hidden_size": 16}, r"transformer\.\S+.* have another shape"),
    ],
)
def test_weights_of_another_shape_are_refused(folder: Path, config: dict[str, Any], said: str) -> None:
    shaped = HuggingFaceConfig(path=str(folder), pretrained=True, config=config, sequence_tokens=12)
    with pytest.raises(ValueError, match=said):
        shaped.build(seed=0)


def test_pickled_weights_are_not_read(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    torch.save(GPT2LMHeadModel.from_pretrained(folder).state_dict(), tmp_path / "pytorch_model.bin")
    config = HuggingFaceConfig(path=str(tmp_path), pretrained=True, sequence_tokens=12)
    with pytest.raises(ValueError, match="reads safetensors"):
        config.build(seed=0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, r"no architecture: give model\.path=FOLDER_OR_HUB_NAME, or model\.config\.model_type"),
        ({"pretrained": True}, r"pretrained=true without weights"),
        ({"path": "/nowhere/at/all"}, r"model\.path=/nowhere/at/all: .*folder with a config\.json"),
        ({"attention": "flash"}, r"model\.attention='flash': allowed are sdpa, eager"),
        ({"config": {"model_type": "lama"}}, r"'lama' is no architecture .* did you mean llama"),
        ({"config": {"model_type": "llama", "hiden_size": 8}}, r"hiden_size: LlamaConfig has no such value.*hidden_size"),
        ({"config": {"model_type": "llama", "vocab_size": 8}}, r"say it as model\.vocab_size=8"),
        ({"config": {"model_type": "gpt2", "n_positions": 8}}, r"say it as model\.sequence_tokens=8"),
        ({"config": {"model_type": "llama", "hidden_size": "a"}}, r"llama does not hold together.*hidden_size"),
        ({"config": {"model_type": "qwen3", "num_attention_heads": 4}}, r"num_key_value_heads=32 does not divide"),
        ({"config": {"model_type": "bert"}}, r"'bert' is no decoder-only language model"),
        ({"config": {"model_type": "t5"}}, r"'t5' is no decoder-only"),
        ({"config": {"model_type": "llava"}}, r"'llava' is no decoder-only"),
        ({"config": {"model_type": "gemma3"}}, r"'gemma3' reads more than text"),
        ({"config": {"model_type": "llama"}, "vocab_size": None}, r"needs the tokenizer's"),
    ],
)  # fmt: skip
def test_what_cannot_be_built_is_refused_at_once(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        HuggingFaceConfig(**{"vocab_size": 61, **arguments})


def test_transformers_missing_is_said_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ValueError, match=r"pip install 'qtrain\[hf\]'"):
        configured("llama")
