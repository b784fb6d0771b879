"""Arms: runs that are the same but for their seed. Which one is the baseline, and which may be held against it.

Losses of two arms say something of the recipe when the arms saw the same tokens in the same order, have the same
parameters, and were trained under the same schedule. What differs is refused by its name, unless ``allow`` has it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .run_records import RunRecord

# Keys of a config that no loss depends on, or that a seed or a place sets
NOT_OF_THE_ARM = frozenset((
    "seed", "run", "out", "resume", "allow_changed", "allow_targets", "baseline", "logger", "callbacks", "trainer",
    "device", "compile", "sample", "checkpoint_every_steps", "micro_batch_sequences", "activation_checkpointing", "sweep",
))  # fmt: skip
_NOT_OF_THE_DATA = frozenset(("folder", "num_workers"))
# Facts that must agree, and what else of the optimizer
_SAME = ("steps", "batch_sequences", "sequence_tokens", "precision", "eval_windows")
_SAME_OPTIMIZER = ("lr", "betas", "eps", "weight_decay", "clip_norm")
# Parameters that a recipe brings along (learned steps) are fewer: 1 % of the parameters is worth 0.08 % of the loss,
# L ~ N^-0.076 (arXiv 2001.08361)
_PARAMETERS_ALIKE = 0.01
_UNQUANTIZED = (None, "none")


class NotComparable(ValueError):
    """These runs cannot be held against each other; the message names what differs, and the remedy."""


@dataclass(frozen=True)
class Arm:
    """runs: every run of the arm, whatever became of it, by seed (of several of a seed the last by name). earlier: the
    others. Unreadable runs belong to no arm."""

    label: str
    runs: Mapping[int, RunRecord]
    earlier: Sequence[RunRecord] = field(default=())

    @property
    def completed(self) -> dict[int, RunRecord]:
        return {seed: run for seed, run in self.runs.items() if run.completed}

    @property
    def first(self) -> RunRecord:
        """The run that speaks for the arm: a completed one where there is one."""
        return next(iter(self.completed.values()), next(iter(self.runs.values())))


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by dots; "none" and None are the same."""
    if not isinstance(value, Mapping):
        return {prefix: None if value == "none" else value}
    inner = [flat(v, f"{prefix}.{k}" if prefix else str(k)) for k, v in value.items()]
    return {k: v for part in inner for k, v in part.items()}


def _low_bit_communication(run: RunRecord) -> dict[str, Any]:
    """What travelled between the run's processes in low bits; of the rest of the trainer no loss depends."""
    trainer = run.config.get("trainer") or {}
    names = [
        "gather_weights",
        *(["reduce_gradients", "error_feedback"] if trainer.get("reduce_gradients") else []),
    ]
    return {name: trainer[name] for name in names if trainer.get(name) is not None}


def _own(run: RunRecord) -> dict[str, Any]:
    config = {k: v for k, v in run.config.items() if k not in NOT_OF_THE_ARM}
    data = config.get("data")
    if isinstance(data, Mapping):
        config["data"] = {k: v for k, v in data.items() if k not in _NOT_OF_THE_DATA}
    config.update(_low_bit_communication(run))
    return flat(config)


def arms_of(records: Iterable[RunRecord]) -> list[Arm]:
    """The arms, in the order of their first runs. Labels are the experiments' names, with the keys that tell them apart
    where one experiment has several."""
    groups: dict[str, list[RunRecord]] = {}
    for run in records:
        if run.state != "unreadable" or run.seed >= 0:
            groups.setdefault(json.dumps(_own(run), sort_keys=True, default=str), []).append(run)
    names = [runs[0].name for runs in groups.values()]
    owns = [_own(runs[0]) for runs in groups.values()]
    arms = []
    for runs, own in zip(groups.values(), owns, strict=True):
        siblings = [o for o, n in zip(owns, names, strict=True) if n == runs[0].name]
        by_seed: dict[int, RunRecord] = {}
        earlier = []
        for run in sorted(runs, key=lambda r: (r.folder.name, str(r.folder))):
            if run.seed in by_seed:
                earlier.append(by_seed[run.seed])
            by_seed[run.seed] = run
        arms.append(Arm(_label(runs[0].name, own, siblings), dict(sorted(by_seed.items())), earlier))
    return arms


def _label(name: str, own: Mapping[str, Any], siblings: Sequence[Mapping[str, Any]]) -> str:
    keys = sorted({k for o in siblings for k in {*o, *own} if o.get(k) != own.get(k)})
    # The short knobs say what the keys under recipe and optimizer say again
    short = [k for k in keys if "." not in k] or [k for k in keys if not k.endswith("_target_")] or keys
    return " ".join([name, *(f"{k}={own.get(k)}" for k in short[:5])])


def unquantized(run: RunRecord) -> tuple[bool, bool]:
    """Whether (linear layers and what processes send each other, optimizer states) are in high precision, by the run's
    config."""
    recipe, optimizer = run.config.get("recipe") or {}, run.config.get("optimizer") or {}
    gemms = [v for k, v in flat(recipe.get("linear") or {}).items() if k.count(".")]
    linear = all(v in _UNQUANTIZED for v in gemms) and not recipe.get("rules") and not recipe.get("kv_cache")
    states = optimizer.get("states") or {}
    moments = [states.get("exp_avg"), states.get("exp_avg_sq")]
    low_bit_class = "8bit" in str(optimizer.get("_target_", "")).lower() or optimizer.get("bits") in (4, 8)
    linear = linear and not _low_bit_communication(run)
    return linear, all(m in _UNQUANTIZED for m in moments) and not low_bit_class


def find_baseline(arms: Sequence[Arm], named: str | None) -> Arm:
    """The arm with this label, of this experiment or with this run; None: the one that nothing is quantized in, else
    the one whose linear layers are not. Raises NotComparable where there is none, or more than one."""
    listed = ", ".join(arm.label for arm in arms)
    if named is not None:
        found = [a for a in arms if named == a.label] or [
            a
            for a in arms
            if any(
                named in (r.name, str(r.folder), f"{r.folder.parent.name}/{r.folder.name}")
                for r in a.runs.values()
            )
        ]
        what = f"baseline={named}"
    else:
        kinds = [(arm, unquantized(arm.first)) for arm in arms]
        found = [a for a, (linear, states) in kinds if linear and states] or [
            a for a, (linear, _) in kinds if linear
        ]
        what = "no baseline is named, and of unquantized arms"
    if len(found) != 1:
        which = f"there are {len(found)}: {', '.join(a.label for a in found)}" if found else "there is none"
        raise NotComparable(f"{what}: {which}; name one with baseline=, of: {listed}")
    return found[0]


def facts(run: RunRecord) -> dict[str, Any]:
    """What must be the same in two runs, as far as this one says it."""
    config, optimizer = run.config, run.config.get("optimizer") or {}
    found: dict[str, Any] = {k: config[k] for k in _SAME if k in config}
    found |= {f"optimizer.{k}": optimizer[k] for k in _SAME_OPTIMIZER if k in optimizer}
    data = {k: v for k, v in (config.get("data") or {}).items() if k not in _NOT_OF_THE_DATA}
    for name, part in (("model", config.get("model")), ("schedule", config.get("schedule")), ("data", data)):
        found |= flat(part, name) if part else {}
    if "tie_embeddings" in (config.get("model") or {}):
        found["tying"] = found.pop("model.tie_embeddings")
    if "batch_sequences" in config and "sequence_tokens" in config:
        found["tokens_per_step"] = config["batch_sequences"] * config["sequence_tokens"]
    found |= flat(run.summary["data"], "tokens_read") if run.summary.get("data") else {}
    if run.summary.get("parameters"):
        found["parameters"] = run.summary["parameters"]
    return found


def _same(key: str, a: Any, b: Any) -> bool:
    if key == "parameters":
        return abs(a - b) <= _PARAMETERS_ALIKE * b
    return bool(a == b)


def differences(run: RunRecord, standard: RunRecord) -> dict[str, tuple[Any, Any]]:
    """key -> (this run's, the standard's), of the facts that both have. An option that one model lacks is a difference
    of models; a summary that a run lacks since it did not complete is none."""
    mine, theirs = facts(run), facts(standard)
    rooms = (
        {k.split(".")[0] for k in mine} & {k.split(".")[0] for k in theirs} & {"model", "schedule", "data"}
    )
    keys = [k for k in {**theirs, **mine} if (k in mine and k in theirs) or k.split(".")[0] in rooms]
    return {k: (mine.get(k), theirs.get(k)) for k in keys if not _same(k, mine.get(k), theirs.get(k))}


def check_allowed(allow: Sequence[str], arms: Sequence[Arm]) -> None:
    """Raises NotComparable for a name in ``allow`` that is no fact of these runs."""
    known = {key for arm in arms for key in facts(arm.first)}
    known |= {key.split(".")[0] for key in known}
    unknown = [name for name in allow if name not in known]
    if unknown:
        raise NotComparable(
            f"allow={list(allow)}: {', '.join(unknown)} is nothing that is compared; known are {', '.join(sorted(known))}"
        )


def allowed_differences(
    arms: Sequence[Arm], baseline: Arm, allow: Sequence[str]
) -> dict[str, dict[str, tuple[Any, Any]]]:
    """label -> what differs from the baseline and is allowed. Raises NotComparable, naming every arm and everything
    that differs, where something is not."""
    check_allowed(allow, arms)
    accepted: dict[str, dict[str, tuple[Any, Any]]] = {}
    refused: list[str] = []
    remedy: set[str] = set()
    for arm in arms:
        found: dict[str, tuple[Any, Any]] = {}
        for run in arm.runs.values():
            found |= differences(run, baseline.first)
        ok = {k: v for k, v in found.items() if k in allow or k.split(".")[0] in allow}
        bad = {k: v for k, v in found.items() if k not in ok}
        accepted[arm.label] = ok
        if bad:
            remedy |= {
                k.split(".")[0] if k.startswith(("model.", "data.", "tokens_read.")) else k for k in bad
            }
            listed = "; ".join(f"{k} is {a}, there {b}" for k, (a, b) in bad.items())
            refused.append(f"{arm.label} cannot be compared with {baseline.label}: {listed}")
    if refused:
        raise NotComparable(
            "\n".join([*refused, f"to compare them all the same: allow=[{','.join(sorted(remedy))}]"])
        )
    return accepted


def learning_rates(arms: Sequence[Arm]) -> str:
    """A sentence on whether learning rates were tuned: a recipe compared at the baseline's best rate alone is compared
    at a disadvantage, and the other way round."""
    rates = sorted(
        {rate for arm in arms if (rate := (arm.first.config.get("optimizer") or {}).get("lr")) is not None}
    )
    if not rates:
        return "The runs do not say their learning rates."
    if len(rates) == 1:
        return f"All arms have the learning rate {rates[0]:g}; it was not tuned arm by arm."
    return f"Learning rates differ ({', '.join(f'{r:g}' for r in rates)}): an arm's gap holds for its rate, tuned or not."
