"""Whether a saved optimizer state belongs to these parameters in these formats; nothing is converted.

A checkpoint of other state formats is refused: the moments would have to be decoded and quantized again, which
is another training run than the one that was saved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from qtrain.quant import QuantSpec

from .sharding import local, row_shard
from .states import StateLayout, described, held_by_rows

Named = tuple[str, Tensor, tuple[StateLayout, StateLayout]]  # layouts of the whole parameter
ELSEWHERE = (
    "states_on_rank"  # the key that tells an empty part of a full state dict from one before the first step
)


def refuse_empty(state_dict: Mapping[str, Any]) -> None:
    """Raises ValueError for what ``AdamW.full_state_dict`` gives where the states are not put together."""
    if ELSEWHERE in state_dict:
        raise ValueError(
            f"this is what full_state_dict() gives on every rank but {state_dict[ELSEWHERE]}, without states: load what "
            f"rank {state_dict[ELSEWHERE]} got, or the file that it saved, on every rank"
        )


def matched_groups(
    groups: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The saved groups with what this optimizer decides itself (states, quantize_states, names) put in.

    Raises ValueError where groups, their sizes or the parameters' names differ, and for torch options that have
    no counterpart here.
    """
    sizes, saved_sizes = ([len(g["params"]) for g in some] for some in (groups, saved))
    if sizes != saved_sizes:
        raise ValueError(
            f"the checkpoint's parameter groups hold {saved_sizes} parameters, this optimizer's {sizes}: build the "
            "same model and groups as the run that saved it"
        )
    matched = []
    for group, stored in zip(groups, saved, strict=True):
        for option in ("amsgrad", "maximize"):
            if stored.get(option):
                raise ValueError(
                    f"the checkpoint was trained with {option}=True, which this AdamW does not have"
                )
        for name, other in zip(group.get("names") or (), stored.get("names") or (), strict=False):
            if name != other:
                raise ValueError(
                    f"parameter {name!r} meets the state of {other!r} in the checkpoint: their order differs; build "
                    "the model and its groups as in the run that saved it"
                )
        own: dict[str, Any] = {key: value for key, value in group.items() if key != "params"}
        merged: dict[str, Any] = {**own, **stored}
        merged.update((key, own[key]) for key in ("states", "quantize_states", "names") if key in own)
        matched.append(merged)
    return matched


def _stored_format(kind: str, held: Mapping[str, Any], group: Mapping[str, Any]) -> str:
    """What the checkpoint holds of a moment, as ``StateLayout.describe`` says it."""
    packed = f"{kind}.codes" in held
    if not packed and f"{kind}.dequantized" not in held:
        return "float32"
    formats: Mapping[str, Any] = group.get("states", {})
    fields = formats.get(kind)
    return "codes of an unnamed format" if fields is None else described(QuantSpec(**fields), packed)


def _check(name: str, layout: StateLayout, held: Mapping[str, Any], group: Mapping[str, Any]) -> None:
    expected, stored = layout.expected(), _stored_format(layout.kind, held, group)
    wanted = layout.describe()
    if stored != wanted:
        raise ValueError(
            f"{name}: the checkpoint stores {layout.kind} as {stored}, this optimizer keeps it as {wanted}; resume with "
            "the states (formats, min_numel, packed, quantize_states) of the checkpoint, or start from its weights alone"
        )
    found = {key: t for key, t in held.items() if key.split(".")[0] == layout.kind}
    if set(found) != set(expected):
        raise ValueError(f"{name}: the checkpoint holds {sorted(found)}, expected {sorted(expected)}")
    for key, (shape, dtype) in expected.items():
        if tuple(found[key].shape) != shape or found[key].dtype != dtype:
            raise ValueError(
                f"{name}: {key} in the checkpoint is {found[key].dtype} {tuple(found[key].shape)}, expected {dtype} "
                f"{shape}; the model or its parameter groups differ from those of the run that saved it, something "
                "cast the states, or it is the state_dict() of one shard, where full_state_dict() has all rows"
            )


def matched_state(named: Sequence[Named], state_dict: Mapping[str, Any]) -> dict[Tensor, dict[str, Tensor]]:
    """Copies of the saved tensors, on their parameters' devices and in their own dtypes; of a sharded parameter the
    rows that this process holds.

    Raises ValueError for anything that is not exactly what ``StateLayout.expected`` says.
    """
    groups = state_dict["param_groups"]
    ids = list(chain.from_iterable(group["params"] for group in groups))
    group_of = {i: group for group in groups for i in group["params"]}
    unknown = set(state_dict["state"]) - set(ids)
    if unknown:
        raise ValueError(
            f"the checkpoint holds states of parameters that no group names: {sorted(unknown)[:4]}"
        )
    loaded = {}
    for i, (name, p, layouts) in zip(ids, named, strict=True):
        held = state_dict["state"].get(i)
        if not held:
            continue
        if "step" not in held:
            raise ValueError(f"{name}: the checkpoint holds no step count; it is no state of Adam")
        for layout in layouts:
            _check(name, layout, held, group_of[i])
        by_rows = held_by_rows(layouts)
        if set(held) != {"step", *by_rows}:
            raise ValueError(
                f"{name}: the checkpoint holds {sorted(held)}, expected {sorted(['step', *by_rows])}"
            )
        shard, device = row_shard(name, p), local(p).device
        loaded[p] = {"step": torch.as_tensor(held["step"], dtype=torch.float32, device="cpu").clone()}
        for key, cut in by_rows.items():
            rows = shard.take(held[key]) if cut else held[key]
            loaded[p][key] = rows.to(device=device, copy=True)
    return loaded
