"""Model folders of Hugging Face's layout: config.json and safetensors, read and written.

A name that is no folder is one on the hub. Pickles (pytorch_model.bin) are not read: they run code.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import hf_config, hf_weights
from .decoder import DecoderConfig

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Fields that say how a model is trained or started, not what it computes
_FREE = ("dropout", "init_std", "init_from", "sequence_tokens")


def local_folder(source: str, *, weights: bool) -> Path:
    """The folder of ``source``: itself, or what the hub has under that name, downloaded into Hugging Face's cache.

    weights: False downloads the configuration alone. Raises ValueError where there is neither.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if source.startswith(("/", ".", "~")) or source.count("/") > 1:
        raise ValueError(f"init_from={source}: there is no such folder")
    hf_config.huggingface()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [CONFIG, *([WEIGHTS, INDEX, "model-*.safetensors"] if weights else [])]
    try:
        return Path(snapshot_download(source, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"init_from={source} is no folder here, and Hugging Face's hub did not give it ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}); check the name, or download it elsewhere and give its folder"
        ) from None


def read_config(folder: Path) -> DecoderConfig:
    """Our configuration of the model in ``folder``. Raises ValueError for what ours cannot represent."""
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} has no {CONFIG}: it is no model folder of Hugging Face's layout")
    try:
        theirs = hf_config.huggingface().AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from None
    return hf_config.from_huggingface(theirs)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the safetensors in ``folder``, on the CPU, in the dtypes of the files."""
    hf_config.huggingface()
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if (folder / WEIGHTS).is_file():
        files = [WEIGHTS]
    elif (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        files = sorted(set(index["weight_map"].values()))
        if any(Path(name).name != name for name in files):
            raise ValueError(f"{folder / INDEX} names files outside of its folder")
    else:
        raise ValueError(
            f"{folder} has neither {WEIGHTS} nor {INDEX}; other forms are not read (a pickle runs code): load the model "
            "with transformers and save it with save_pretrained"
        )
    found: dict[str, Tensor] = {}
    for name in files:
        try:
            found |= load_file(folder / name)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{folder / name} cannot be read: {error}") from None
    return found


def check_pretrained(config: DecoderConfig) -> None:
    """Raises ValueError, naming every field, unless ``config.init_from`` holds a model of this shape. Reads no
    weights."""
    if config.init_from is not None:
        _check_same(config, read_config(local_folder(config.init_from, weights=False)))


def _check_same(config: DecoderConfig, theirs: DecoderConfig) -> None:
    if type(config) is not type(theirs):
        raise ValueError(
            f"init_from={config.init_from} holds a model of {type(theirs).__name__}, and model= is a "
            f"{type(config).__name__}; take a file of configs/model with that one"
        )
    ours, has = asdict(config), asdict(theirs)
    wrong = [name for name in ours if name not in _FREE and ours[name] != has[name]]
    if config.sequence_tokens > theirs.sequence_tokens:
        wrong.append("sequence_tokens")
    if wrong:
        remedy = " ".join(f"model.{name}={_written(has[name])}" for name in wrong)
        raise ValueError(f"init_from={config.init_from} is a model of another shape; say {remedy}")


def _written(value: Any) -> str:
    """``value`` as on a command line."""
    if isinstance(value, dict):
        value = {"_target_": "qtrain.models.decoder.Llama3RopeScaling", **value}
        return "'{" + ", ".join(f"{k}: {v}" for k, v in value.items()) + "}'"
    return {None: "null", True: "true", False: "false"}.get(value, str(value))


@torch.no_grad()
def load_pretrained(model: nn.Module, source: str) -> None:
    """Gives ``model``, a ``Decoder``, the weights of ``source``, cast to its dtype; learned positions beyond its
    ``sequence_tokens`` are left out.

    Raises ValueError, naming fields or tensors, where the model there is another one or is not whole.
    """
    config: Any = model.config
    folder = local_folder(source, weights=True)
    _check_same(config, read_config(folder))
    state = hf_weights.from_huggingface(config, read_tensors(folder))
    learned = "position_embedding.weight"
    if learned in state:
        state[learned] = state[learned][: config.sequence_tokens]
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{folder} does not hold the model that its {CONFIG} describes: {error}") from None


def write_folder(
    theirs: Any, tensors: Mapping[str, Tensor], folder: Path, *, more: Callable[[Path], None] = lambda _: None
) -> None:
    """Writes what ``AutoModelForCausalLM.from_pretrained(folder)`` loads: config.json, model.safetensors and
    generation_config.json, under a temporary name that becomes ``folder`` when all is there.

    theirs: a PretrainedConfig. tensors: the weights under their names, float32, none of them twice. more: writes further
    files into the folder that it is given. Raises ValueError where ``folder`` exists.
    """
    transformers = hf_config.huggingface()
    from safetensors.torch import save_file

    if folder.exists():
        raise ValueError(f"out={folder} exists; name a folder that does not, or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.parent / f".{folder.name}.{secrets.token_hex(4)}.partial"
    partial.mkdir()
    try:
        text = json.dumps(_config_json(theirs), indent=2, sort_keys=True) + "\n"
        (partial / CONFIG).write_text(text, encoding="utf-8")
        save_file(dict(tensors), partial / WEIGHTS, metadata={"format": "pt"})
        (partial / WEIGHTS).chmod((partial / CONFIG).stat().st_mode)  # safetensors lets nobody else read it
        ends = {name: getattr(theirs, name) for name in ("bos_token_id", "eos_token_id")}
        transformers.GenerationConfig(**ends).save_pretrained(partial)
        more(partial)
        for file in partial.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        os.rename(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _config_json(theirs: Any) -> dict[str, Any]:
    """The values of config.json, which transformers 4 reads as well as 5."""
    hf_config.huggingface()
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    values = json.loads(theirs.to_json_string())
    values["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[theirs.model_type]]
    values["dtype"] = values["torch_dtype"] = "float32"
    rope = values.get("rope_parameters")
    if rope is not None and "rope_theta" in rope:  # transformers 4 knows no rope_parameters
        values["rope_theta"] = rope["rope_theta"]
        values["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    return values
