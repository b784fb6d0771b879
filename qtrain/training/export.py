"""export: a trained run as a model folder for other programs."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from qtrain.data.tokenizers import Tokenizer
from qtrain.data.tokenizers.huggingface import FILE, HuggingFaceTokenizer
from qtrain.models import hf_config, hf_folder, hf_weights
from qtrain.models.decoder import DecoderConfig

from .saved import TrainedRun

# In front of the model's names in a checkpoint: the attribute of QuantizedTransformer
_MODEL = "model."
# Names that a quantizer's own state has (learned, static and delayed ranges)
_QUANTIZERS = ".quantizers."


def weights_of(run: TrainedRun) -> tuple[dict[str, Tensor], list[str]]:
    """The model's own weights, the high-precision masters, and the names of what quantizers hold beside them."""
    state = {n.removeprefix(_MODEL): t for n, t in run.checkpoint["state_dict"].items()}
    left_out = [name for name in state if _QUANTIZERS in name]
    return {name: t for name, t in state.items() if name not in left_out}, left_out


def export_huggingface(run: TrainedRun, folder: Path) -> list[str]:
    """Writes ``folder`` in Hugging Face's layout (``hf_folder.write_folder``); returns what there is to know about it.

    Raises ValueError where Hugging Face has no such model, or ``folder`` exists.
    """
    config, tokenizer = run.parts.model_config, run.tokenizer
    weights, left_out = weights_of(run)
    if not isinstance(config, DecoderConfig):
        raise ValueError(
            f"a model of {type(config).__name__} cannot be exported: only GPTConfig and LlamaConfig can"
        )
    theirs = hf_config.to_huggingface(config, eot_token=None if tokenizer is None else tokenizer.eot_token)
    tensors = hf_weights.to_huggingface(config, weights)
    notes = [
        f"{type(theirs).__name__.removesuffix('Config')} of {sum(t.numel() for t in tensors.values()):,} parameters, step "
        f"{run.step}, float32",
        "the weights are the run's high-precision masters: whoever loads them computes without the recipe's quantization",
    ]
    if left_out:
        notes.append(f"left out: the ranges of {len(left_out)} quantizers, which the format does not hold")

    def write_tokenizer(partial: Path) -> None:
        notes.append(_write_tokenizer(tokenizer, partial))

    hf_folder.write_folder(theirs, tensors, folder, more=write_tokenizer)
    return notes


def _write_tokenizer(tokenizer: Tokenizer | None, folder: Path) -> str:
    """Writes the tokenizer where it is one of Hugging Face's; returns what to say about it."""
    if tokenizer is None:
        return "no tokenizer files: the run's data name none"
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return (
            f"no tokenizer files: the tokenizer {tokenizer.name!r} has no Hugging Face form; its ids are "
            f"0..{tokenizer.vocab_size - 1}, and {tokenizer.eot_token} ends a document"
        )
    file = folder / FILE
    file.write_bytes(tokenizer.files()[FILE])
    fast = hf_config.huggingface().PreTrainedTokenizerFast(tokenizer_file=str(file))
    fast.add_special_tokens({"bos_token": tokenizer.eot, "eos_token": tokenizer.eot})
    fast.save_pretrained(folder)
    return f"the tokenizer {tokenizer.name!r} is written too; {tokenizer.eot} (id {tokenizer.eot_token}) ends a document"
