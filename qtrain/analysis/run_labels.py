"""Short names of runs beside each other: what tells them apart, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .arms import NOT_OF_THE_ARM, flat

# The short knobs, in the order of the command line
FIRST = ("w", "a", "g", "m1", "m2")
# How often something is measured tells no arm apart
_MEASURING = ("eval_every_steps", "eval_windows")
# At most so many knobs in a name; the rest is in the config
_KNOBS = 5


def short_labels(
    names: Sequence[str], configs: Sequence[Mapping[str, Any]], runs: Sequence[str]
) -> list[str]:
    """A label a run: its experiment, where there are several, and the keys that differ within it, the shortest that say it
    (``w=int4_row``, not ``recipe.linear.fprop.weight=...``). names: of the experiments. runs: of the folders; they tell apart
    what else would have the same label, and name runs without a config."""
    owns = [_own(config) for config in configs]
    several = len(set(names)) > 1
    labels = []
    for name, own, run in zip(names, owns, runs, strict=True):
        siblings = [o for o, n in zip(owns, names, strict=True) if n == name and o]
        knobs = [f"{_short(k)}={_value(own.get(k))}" for k in _differing(own, siblings)] if own else []
        words = [*([name] if several else []), *(knobs or ([] if several and own else [run]))]
        labels.append(" ".join(words))
    counts = {label: labels.count(label) for label in labels}
    return [
        f"{label} {run}" if counts[label] > 1 and run not in label.split() else label
        for label, run in zip(labels, runs, strict=True)
    ]


def _own(config: Mapping[str, Any]) -> dict[str, Any]:
    return flat({k: v for k, v in config.items() if k == "seed" or k not in NOT_OF_THE_ARM})


def _differing(own: Mapping[str, Any], siblings: Sequence[Mapping[str, Any]]) -> list[str]:
    keys = [
        k for k in {k: None for o in siblings for k in o} if any(o.get(k) != own.get(k) for o in siblings)
    ]
    top = [k for k in keys if "." not in k and k not in ("name", "seed", *_MEASURING)]
    # A short knob says what the keys under recipe and optimizer say again
    deep = [k for k in keys if "." in k and not k.endswith("_target_")] if not top else []
    return [*sorted(top, key=_rank), *sorted(deep)][:_KNOBS] + (["seed"] if "seed" in keys else [])


def _rank(key: str) -> tuple[int, str]:
    """What a sweep asks about first."""
    order = FIRST.index(key) if key in FIRST else len(FIRST)
    return (order, key)


def _short(key: str) -> str:
    return key.rsplit(".", 1)[-1]


def _value(value: Any) -> str:
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
