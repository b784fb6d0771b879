"""What a run ends with: summary.json, the table of the same numbers, and a sample of text."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qtrain.data.tokenizers import Tokenizer
from qtrain.models.sampling import generate
from qtrain.optim import fused
from qtrain.optim.sharding import local

from .baselines import ReferenceRun
from .callbacks.metrics_jsonl import bits_per_byte
from .module import QuantizedTransformer
from .processes import summed
from .settings import SampleSettings

NO_TOKENIZER = "the data name no tokenizer; give it with data.tokenizer=NAME"
# The training loss reported is the mean over the last part of the run: a single step is noise.
LAST_SHARE = 0.05


class _Vocabulary(nn.Module):
    """A model's logits without the ids that pad its vocabulary."""

    def __init__(self, model: nn.Module, ids: int) -> None:
        super().__init__()
        self.model, self.ids = model, ids

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens)[..., : self.ids]


def sample_text(
    module: QuantizedTransformer, tokenizer: Tokenizer, settings: SampleSettings, seed: int
) -> str:
    """The prompt and what the model, quantized and in the precision it was trained in, adds to it.

    Runs eagerly, since each token has another length and would compile anew, and at step 0 of the clock.
    """
    model = module.model
    module.surgery.clock.set(step=0, token_offset=0)
    bf16 = module.settings.precision == "bf16"
    ids = tokenizer.encode(settings.prompt).astype("int64").tolist() or [tokenizer.eot_token]
    device = next(model.parameters()).device
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)
    with torch.compiler.set_stance("force_eager"), autocast:
        tokens = generate(
            _Vocabulary(model, tokenizer.vocab_size),
            torch.tensor([ids], device=device),
            settings.max_new_tokens,
            temperature=settings.temperature,
            top_k=settings.top_k,
            seed=seed,
            sequence_tokens=module.parts.model_config.sequence_tokens,
        )
    return tokenizer.decode(tokens[0].tolist())


def summarize(
    module: QuantizedTransformer,
    rows: Sequence[Mapping[str, Any]],
    *,
    data: Mapping[str, Any],
    tokens_per_byte: float | None,
    trigram: float | None,
    reference: ReferenceRun | None,
    state_bytes: Mapping[str, int] | None,
    fused_step: Mapping[str, Any] | None,
    census: str | None,
    linear_flops: str | None,
    communication: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The numbers of a finished run. rows: of its metrics.jsonl; losses are nats per token. state_bytes: from
    ``optimizer_state_bytes``; fused_step: from ``fused_tensors``."""
    train = [r for r in rows if r["kind"] == "train"]
    last_val: Mapping[str, Any] = next((r for r in reversed(rows) if r["kind"] == "val"), {})
    last = train[-max(1, round(LAST_SHARE * len(train))) :]
    val, train_loss = module.val_loss, statistics.fmean(r["loss"] for r in last)
    return {
        "steps": train[-1]["step"],
        "tokens": train[-1]["tokens"],
        "train_loss": train_loss,
        "train_bits_per_byte": bits_per_byte(train_loss, tokens_per_byte),
        "val_loss": val,
        "val_bits_per_byte": bits_per_byte(val, tokens_per_byte),
        "val_losses": {
            k.removeprefix("val_loss/"): v for k, v in last_val.items() if k.startswith("val_loss/")
        },
        "trigram_loss": trigram,
        "baseline": None if reference is None else reference.label,
        "baseline_val_loss": None if reference is None else reference.val_loss,
        "gap_nats": None if reference is None else val - reference.val_loss,
        "gap_percent": None if reference is None else 100 * (val / reference.val_loss - 1),
        "clip_share": statistics.fmean(r["clipped"] for r in train),
        "parameters": sum(p.numel() for p in module.model.parameters()),
        "quantized_fraction": module.surgery.quantized_fraction,
        "optimizer_state_bytes": state_bytes,
        "optimizer_fused": fused_step,
        "compute": module.surgery.compute,
        "linear_flops": linear_flops,
        "census": census,
        "communication": communication,
        "tokens_per_s": statistics.median(r["tokens_per_s"] for r in train),
        "data": dict(data),
    }


def optimizer_state_bytes(optimizer: Any, *, sharded: bool) -> dict[str, int] | None:
    """Bytes held, and what float32 would take; None for optimizers that do not say. sharded: whether every process
    holds a part; all of them then call this, and it is the sum."""
    if not hasattr(optimizer, "state_bytes"):
        return None
    held = optimizer.state_bytes()
    found = {name: held[name] for name in ("total", "as_float32")}
    if not sharded:
        return found
    totals = summed(torch.tensor(list(found.values()), dtype=torch.int64))
    return dict(zip(found, totals.tolist(), strict=True))


def fused_tensors(optimizer: Any) -> dict[str, Any] | None:
    """How many tensors of this process the last step stepped in the fused kernel, of how many, and for the others the
    reasons with their counts: {"fused", "tensors", "eager"}. None where there is no such kernel: on other devices, and
    for optimizers that do not say."""
    if not hasattr(optimizer, "fused_parameters"):
        return None
    devices = {local(p).device.type for group in optimizer.param_groups for p in group["params"]}
    reasons = list(optimizer.fused_parameters().values())
    if not reasons or devices.isdisjoint(fused.DEVICES):
        return None
    eager = Counter(reason for reason in reasons if reason is not None)
    return {"fused": reasons.count(None), "tensors": len(reasons), "eager": dict(eager.most_common())}


def _fused_row(found: Mapping[str, Any]) -> str:
    eager = "".join(f"; {count} eagerly: {reason}" for reason, count in found["eager"].items())
    return f"{found['fused']} of {found['tensors']} tensors in the fused kernel{eager}"


def _communication_rows(found: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """What one process sent in the last step, and what float32 would have been."""
    if found is None:
        return []
    rows = []
    for purpose, (sent, float32) in found["bytes"].items():
        size = f"{_megabytes(sent)} a step where float32 sends {_megabytes(float32)} ({sent / float32:.1%})"
        if purpose == "gather_weights":
            how = f"{found['exact']} of {found['gathered']} weights lose nothing"
            rows.append(("weights gathered", f"{found['gather_weights']}: {size}; {how}"))
        else:
            kept = found["error_feedback"]
            how = "errors are forgotten" if kept is None else f"error feedback in {kept}"
            rows.append(("gradients reduced", f"{found['reduce_gradients']}: {size}; {how}"))
    return rows


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB"


def _loss(nats: float, bits: float | None) -> str:
    per_byte = "bits/byte unknown (no tokenizer)" if bits is None else f"{bits:.4f} bits/byte"
    return f"{nats:.4f} nats/token   {per_byte}"


def table_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(what, value) of every row of the final table, from ``summary.json`` alone."""
    rows = [
        (
            "training loss",
            _loss(summary["train_loss"], summary["train_bits_per_byte"]),
        ),
        (
            "validation loss",
            _loss(summary["val_loss"], summary["val_bits_per_byte"]),
        ),
    ]
    rows += [
        (f"validation, {name}", f"{loss:.4f} nats/token") for name, loss in summary["val_losses"].items()
    ]
    if summary["trigram_loss"] is not None:
        better = summary["trigram_loss"] - summary["val_loss"]
        rows.append(
            (
                "trigram, same windows",
                f"{summary['trigram_loss']:.4f} nats/token   the model is {abs(better):.4f} {'better' if better > 0 else 'WORSE'}",
            )
        )
    if summary["baseline"] is not None:
        rows.append(
            (
                f"gap to {summary['baseline']}",
                f"{summary['gap_nats']:+.4f} nats/token   {summary['gap_percent']:+.2f}%   (it has {summary['baseline_val_loss']:.4f})",
            )
        )
    held = summary["optimizer_state_bytes"]
    if held is not None:
        saved = 1 - held["total"] / held["as_float32"]
        rows.append(
            (
                "optimizer states",
                f"{_megabytes(held['total'])} of {_megabytes(held['as_float32'])} in float32: {saved:.1%} saved",
            )
        )
    if summary["optimizer_fused"] is not None:
        rows.append(("optimizer", _fused_row(summary["optimizer_fused"])))
    rows += [
        (
            "linear weights quantized",
            f"{summary['quantized_fraction']:.1%} (of {summary['parameters']:,} parameters in all)",
        ),
        ("linear FLOPs by precision", f"{summary['linear_flops'] or 'not seen'}   ({summary['compute']})"),
        ("census", summary["census"] or "not taken"),
        *_communication_rows(summary.get("communication")),
        ("steps with a clipped gradient", f"{summary['clip_share']:.1%}"),
        ("tokens", f"{summary['tokens']:,} in {summary['steps']:,} steps"),
        ("speed", f"{summary['tokens_per_s']:,.0f} tokens/s   {summary['wall_seconds']:.1f} s in all"),
        ("files", summary["folder"]),
    ]
    return rows


def print_report(summary: Mapping[str, Any], sample: str) -> None:
    """The final table and the sample on standard output."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, title=f"{Path(summary['folder']).parent.name}", title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in table_rows(summary):
        table.add_row(name, Text(value))
    console = Console()
    console.print(table)
    console.rule("a sample", align="left")
    console.print(Text(sample))
