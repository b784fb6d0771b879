"""What a validation loss is held against: a trigram model on the same windows, and another run."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtrain.data.ngram import trigram_nats_per_token
from qtrain.data.shards import TokenShards
from qtrain.data.validation import ValidationSet

from .run_folder import SUMMARY, write_json


def trigram_loss(shards: TokenShards, windows: ValidationSet) -> float:
    """Nats per token of an interpolated Kneser-Ney trigram of the training split on the tokens of ``windows``.

    Kept beside the shards, where that folder can be written: it is a function of them alone.
    """
    kept = shards.directory / f"trigram-{windows.sequence_tokens}x{len(windows)}.json"
    if kept.is_file():
        return float(json.loads(kept.read_text(encoding="utf-8"))["nats_per_token"])
    loss = trigram_nats_per_token(
        shards.train.read(0, len(shards.train)), windows.tokens(), shards.manifest.vocab_size
    )
    if os.access(shards.directory, os.W_OK):
        write_json(kept, {"nats_per_token": loss})
    return loss


@dataclass(frozen=True)
class ReferenceRun:
    """A finished run that another is compared with."""

    folder: Path
    summary: Mapping[str, Any]

    @property
    def label(self) -> str:
        """experiment/run."""
        return f"{self.folder.parent.name}/{self.folder.name}"

    @property
    def val_loss(self) -> float:
        return float(self.summary["val_loss"])

    def check_comparable(self, identity: Mapping[str, Any]) -> None:
        """Raises ValueError unless the reference was evaluated on the same tokens."""
        theirs = self.summary["data"]
        # The order of the training samples decides no validation token
        different = {
            k: (theirs.get(k), v) for k, v in identity.items() if theirs.get(k) != v and k != "order"
        }
        if different:
            listed = "; ".join(f"{k}: {a} there, {b} here" for k, (a, b) in different.items())
            raise ValueError(
                f"the baseline {self.folder} was evaluated on other data, so a difference of losses would say nothing "
                f"({listed}); run the baseline again with this run's data, sequence_tokens and eval_windows"
            )


def find_run(name: str, out: str | Path) -> Path:
    """The folder of a finished run: ``name`` itself, ``out/name``, or the latest finished run in ``out/name``.

    Raises ValueError where there is none.
    """
    for folder in (Path(name), Path(out) / name):
        if (folder / SUMMARY).is_file():
            return folder
    finished = [run for run in (Path(out) / name).glob("*") if (run / SUMMARY).is_file()]
    if not finished:
        raise ValueError(
            f"baseline={name}: no finished run (a folder with {SUMMARY}) at {name}, {Path(out) / name} or in it; "
            "train it first, or pass baseline=null"
        )
    return max(finished, key=lambda run: (run / SUMMARY).stat().st_mtime)


def reference_run(name: str, out: str | Path) -> ReferenceRun:
    """The run that ``find_run`` finds; raises ValueError where it is not there or did not complete."""
    folder = find_run(name, out)
    summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    if summary.get("val_loss") is None:
        raise ValueError(f"baseline={name}: the run {folder} has no validation loss; it was stopped early")
    return ReferenceRun(folder, summary)
