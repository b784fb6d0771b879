"""A tiny corpus, and configurations of runs on it that take a second."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from composition import composed
from omegaconf import OmegaConf

sys.path.insert(0, str(Path(__file__).parent))  # ``ranks``, which processes of their own import too
WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "bird",
    "sees",
    "hears",
    "chases",
    "small",
    "old",
    "quick",
    "river",
    "tree",
    "house",
    "and",
    "then",
    "while",
    "under",
    "over",
]


def write_corpus(folder: Path) -> None:
    """120 documents of 60 random words: enough structure for a loss to fall in a few steps."""
    draw = random.Random(0)
    for i in range(120):
        (folder / f"{i:03d}.txt").write_text(" ".join(draw.choice(WORDS) for _ in range(60)) + ".\n")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


@pytest.fixture(scope="session")
def shards_root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("shards")


@pytest.fixture(scope="session")
def configure(corpus, shards_root) -> Callable[..., dict[str, Any]]:
    """configure(out, *overrides) -> the plain configuration of a tiny run."""

    def make(out: Path, *overrides: str) -> dict[str, Any]:
        base = [
            "data=text",
            f"data.source.paths=[{corpus}]",
            f"data.folder={shards_root}",
            "data.val_fraction=0.2",
            "model=gpt_1m",
            "model.layers=1",
            "sequence_tokens=32",
            "batch_sequences=4",
            "eval_windows=8",
            "schedule=constant",
            "schedule.warmup_steps=1",
            "logger=none",
            "compile=false",
            "device=cpu",
            "steps=4",
            "sample.max_new_tokens=4",
            f"out={out}",
        ]
        cfg = composed("train", *base, *overrides)
        return OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)  # type: ignore[return-value]

    return make
