"""Folders that Hugging Face reads, and those that it wrote."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import transformers
from hf_cases import CASES, theirs, tokens
from safetensors.torch import load_file, save_file

from qtrain.models import hf_config, hf_folder, hf_weights


def written(config, state, folder, eot_token=None, **more):
    theirs = hf_config.to_huggingface(config, eot_token=eot_token)
    hf_folder.write_folder(theirs, hf_weights.to_huggingface(config, state), folder, **more)


def saved(case, folder, **more):
    model = theirs(case)
    model.save_pretrained(folder, **more)
    return model


@pytest.mark.parametrize("case", CASES)
def test_what_they_save_starts_our_model(case, tmp_path):
    hf = saved(case, tmp_path / "model")
    config = replace(hf_config.from_huggingface(hf.config), init_from=str(tmp_path / "model"))
    hf_folder.check_pretrained(config)
    torch.testing.assert_close(config.build(seed=3)(tokens()), hf(tokens()).logits, rtol=0, atol=1e-4)
    plain = replace(config, init_from=None)
    # A checkpoint's weights follow: the folder need not be there
    gone = replace(config, init_from=str(tmp_path / "gone"))
    for one, two in zip(
        gone.build(seed=3, pretrained=False).parameters(), plain.build(seed=3).parameters(), strict=True
    ):
        assert torch.equal(one, two)


@pytest.mark.parametrize("case", CASES)
def test_what_we_write_they_load(case, tmp_path):
    hf = saved(case, tmp_path / "model")
    config = hf_config.from_huggingface(hf.config)
    ours = replace(config, init_from=str(tmp_path / "model")).build(seed=0)
    written(config, ours.state_dict(), tmp_path / "out", eot_token=36)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(again) is type(hf)
    for (name, one), (other, two) in zip(again.named_parameters(), hf.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(one, two), name
    torch.testing.assert_close(again(tokens()).logits, ours(tokens()), rtol=0, atol=1e-4)
    assert again.generation_config.eos_token_id == 36
    one, two = (load_file(tmp_path / folder / "model.safetensors") for folder in ("model", "out"))
    assert one.keys() == two.keys()
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    assert hf_folder.read_config(tmp_path / "out") == config


def test_older_readers_find_the_rotary_base(tmp_path):
    """transformers 4 knows no rope_parameters, and would take 10,000."""
    config = hf_config.from_huggingface(theirs("llama 3").config)
    written(config, config.build(seed=0).state_dict(), tmp_path / "out")
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values["rope_theta"] == 5e5
    assert values["rope_scaling"]["rope_type"] == "llama3"
    assert values["architectures"] == ["LlamaForCausalLM"]
    assert values["torch_dtype"] == "float32"


def test_files_in_pieces(tmp_path):
    hf = saved("llama", tmp_path, max_shard_size="10KB")
    assert not (tmp_path / "model.safetensors").exists()
    found = hf_folder.read_tensors(tmp_path)
    assert found.keys() == hf.state_dict().keys()
    index = tmp_path / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["lm_head.weight"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="names files outside of its folder"):
        hf_folder.read_tensors(tmp_path)


def test_a_shorter_context_is_a_model_of_its_own(tmp_path):
    for case in ("gpt2", "llama"):
        hf = saved(case, tmp_path / case)
        config = hf_config.from_huggingface(hf.config)
        short = replace(config, sequence_tokens=5, init_from=str(tmp_path / case)).build(seed=0)
        torch.testing.assert_close(short(tokens()[:, :5]), hf(tokens()[:, :5]).logits, rtol=0, atol=1e-4)
        with pytest.raises(ValueError, match=r"another shape; say model\.sequence_tokens=16$"):
            hf_folder.check_pretrained(replace(config, sequence_tokens=17, init_from=str(tmp_path / case)))


def test_another_shape_is_refused_with_what_to_say(tmp_path):
    hf = saved("llama 3", tmp_path)
    config = replace(hf_config.from_huggingface(hf.config), init_from=str(tmp_path))
    other = replace(config, layers=3, kv_heads=4, rope_scaling=None, init_std=0.1)
    with pytest.raises(
        ValueError, match=r"another shape; say model\.layers=2 model\.kv_heads=2 model\.rope_scaling='\{_t"
    ):
        hf_folder.check_pretrained(other)
    with pytest.raises(ValueError, match="another shape"):
        other.build(seed=0)
    saved("gpt2", tmp_path / "gpt2")
    with pytest.raises(ValueError, match="holds a model of GPTConfig, and model= is a LlamaConfig"):
        hf_folder.check_pretrained(replace(config, init_from=str(tmp_path / "gpt2")))


def broken(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def test_folders_that_are_not_whole_are_refused(tmp_path):
    hf = saved("llama", tmp_path / "a")
    config = replace(hf_config.from_huggingface(hf.config), init_from=str(tmp_path / "a"))
    broken(tmp_path / "a", lambda state: state.pop("model.norm.weight"))
    with pytest.raises(ValueError, match=r"(?s)does not hold the model .*final_norm\.weight"):
        config.build(seed=0)
    (tmp_path / "a" / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        config.build(seed=0)
    (tmp_path / "a" / "model.safetensors").rename(tmp_path / "a" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="a pickle runs code"):
        config.build(seed=0)
    (tmp_path / "a" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config\.json"):
        hf_folder.check_pretrained(config)
    with pytest.raises(ValueError, match=r"init_from=\./gone: there is no such folder"):
        hf_folder.check_pretrained(replace(config, init_from="./gone"))


@pytest.mark.parametrize("name", ["nobody/nothing", "no such name"])
def test_a_name_that_the_hub_does_not_give(name, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ValueError, match=f"init_from={name} is no folder here, and Hugging Face's hub did not give it"
    ):
        hf_folder.local_folder(name, weights=True)


def test_a_name_on_the_hub_is_downloaded(monkeypatch, tmp_path):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **more: asked.append((name, more)) or str(tmp_path)
    )
    assert hf_folder.local_folder("gpt2", weights=False) == tmp_path
    assert hf_folder.local_folder("org/model", weights=True) == tmp_path
    assert [name for name, _ in asked] == ["gpt2", "org/model"]
    assert asked[0][1]["allow_patterns"] == ["config.json"]
    assert not any(pattern.endswith("bin") for pattern in asked[1][1]["allow_patterns"])


def test_nothing_half_written_is_left(tmp_path):
    config = hf_config.from_huggingface(theirs("llama").config)
    state = config.build(seed=0).state_dict()

    def fail(folder):
        assert (folder / "model.safetensors").is_file()
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        written(config, state, tmp_path / "out", more=fail)
    assert list(tmp_path.iterdir()) == []
    written(config, state, tmp_path / "out")
    with pytest.raises(ValueError, match="out exists; name a folder that does not"):
        written(config, state, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
