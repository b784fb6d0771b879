"""Runs as W&B holds them: in offline folders, read without W&B's service, or in a project online.

An offline run is a file of protobuf messages in the log format of LevelDB: blocks of 32 KiB, in them records of a masked
crc, a length and a kind (1 whole, 2 first, 3 middle, 4 last part of a message); wandb puts seven bytes of its own before
the first. A killed run's file ends in the middle of a record, which is left out. A resumed run has a folder for every
attempt, with one id; their rows are joined on the step that was logged with them, the later attempt's counting.

W&B keeps neither the losses of validation windows nor the census, so that such runs have no interval over windows.
"""

from __future__ import annotations

import json
import math
import re
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .curves import curves_of
from .instrument_records import Alert
from .run_records import RunRecord, state_of, unreadable

_BLOCK, _HEADER, _PREFIX, _MAGIC = 1 << 15, 7, 7, b":W&B"
_WHOLE, _LAST = 1, 4
ONLINE = "wandb:"
_AXES = ("step", "tokens")
# As ``Instrument.alert_where`` writes it
_ALERT = re.compile(r"step (?P<step>\d+): (?P<message>.*)", re.DOTALL)
# First parts of the instruments' names (docs/instruments.md)
_INSTRUMENTS = ("stability", "quant", "optim", "weights", "attention")


def messages(path: Path) -> Iterator[bytes]:
    """The messages of a ``.wandb`` file, until its end or the record that a kill cut.

    Raises ValueError for a file of another kind, or a record whose crc is wrong."""
    data = path.read_bytes()
    if not data.startswith(_MAGIC):
        raise ValueError(f"{path.name} is no file of W&B")
    place, message = _PREFIX, b""
    while place + _HEADER <= len(data):
        left = _BLOCK - place % _BLOCK
        crc, length, kind = struct.unpack("<IHB", data[place : place + _HEADER])
        if left < _HEADER or not (length or kind):  # padding up to the next block
            place += left
            continue
        part = data[place + _HEADER : place + _HEADER + length]
        if len(part) < length:
            return
        if zlib.crc32(bytes([kind]) + part) & 0xFFFFFFFF != crc:
            raise ValueError(f"{path.name}: the record at byte {place} was altered")
        place, message = place + _HEADER + length, message + part
        if kind in (_WHOLE, _LAST):
            yield message
            message = b""


def _put(into: dict[str, Any], item: Any) -> None:
    *path, last = list(item.nested_key) or [item.key]
    for key in path:
        into = into.setdefault(key, {})
    into[last] = json.loads(item.value_json)


def _attempt(path: Path) -> dict[str, Any]:
    """One ``.wandb`` file: id, name, group, config, summary, rows, alerts, exit (None: it has not ended)."""
    from wandb.proto import wandb_internal_pb2

    config: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    found: dict[str, Any] = {
        "id": path.stem.removeprefix("run-"),
        "name": path.stem,
        "group": "",
        "exit": None,
    }
    alerts: list[Alert] = []
    found |= {"config": config, "summary": summary, "rows": rows, "alerts": alerts}
    for message in messages(path):
        record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
        record.ParseFromString(message)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run
            found.update(id=run.run_id, name=run.display_name or run.run_id, group=run.run_group)
            for item in run.config.update:
                _put(config, item)
        elif kind in ("config", "summary"):
            for item in getattr(record, kind).update:
                _put(config if kind == "config" else summary, item)
        elif kind == "history":
            row: dict[str, Any] = {}
            for item in record.history.item:
                _put(row, item)
            rows.append(row)
        elif kind == "alert":
            text = _ALERT.fullmatch(record.alert.text)
            if text:
                step = int(text["step"])
                alerts.append(Alert(step, 0, record.alert.title, math.nan, math.nan, text["message"]))
        elif kind == "exit":
            found["exit"] = record.exit.exit_code
    return found


def _split(row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of metrics.jsonl that one row of W&B holds, and, of the kind "sample", the instruments' numbers; W&B
    merges all that is logged in a step."""
    if row.get("step") is None:
        return
    axes = {key: row.get(key) for key in _AXES}
    train = {k.removeprefix("train/"): v for k, v in row.items() if k.startswith("train/")}
    val = {f"val_{k.removeprefix('val/')}": v for k, v in row.items() if k.startswith("val/")}
    others = {k: v for k, v in row.items() if k.split("/")[0] in _INSTRUMENTS and _number(v)}
    for kind, values in (("train", train), ("val", val), ("sample", others)):
        if values:
            yield {"kind": kind, **axes, **values}


def _number(value: Any) -> bool:
    return isinstance(value, int | float) or value in ("NaN", "Infinity", "-Infinity")


def merged(attempts: Iterable[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """The rows of a run out of its attempts, oldest first: of each step the latest."""
    kept: dict[tuple[str, int], dict[str, Any]] = {}
    for rows in attempts:
        for row in (part for whole in rows for part in _split(whole)):
            key = (row["kind"], int(row["step"]))
            kept[key] = {**kept.get(key, {}), **row}
    return [kept[key] for key in sorted(kept, key=lambda k: k[1])]


def _alerts(attempts: Sequence[Mapping[str, Any]]) -> tuple[Alert, ...]:
    """Of all attempts of a run; those of steps that a later attempt did again are that one's."""
    kept: list[Alert] = []
    for attempt in attempts:
        first = min(
            (int(row["step"]) for row in attempt["rows"] if row.get("step") is not None), default=None
        )
        kept = [a for a in kept if first is None or a.step < first] + attempt["alerts"]
    return tuple(kept)


def _samples(rows: Iterable[Mapping[str, Any]]) -> dict[int, dict[str, float]]:
    return {
        int(row["step"]): {k: float(v) for k, v in row.items() if "/" in k}
        for row in rows
        if row["kind"] == "sample"
    }


def _record(
    place: Path,
    name: str,
    config: Any,
    summary: Mapping[str, Any],
    rows: Any,
    ended: bool,
    label: str,
    alerts: tuple[Alert, ...] = (),
) -> RunRecord:
    """ended: without an error, as W&B knows it. alerts: W&B's API online does not give them."""
    config = {k: v for k, v in config.items() if k != "_wandb"}
    if "seed" not in config or "steps" not in config:
        raise ValueError("its configuration has no seed or steps: not a run of qtrain")
    final = summary.get("final", summary)
    numbers = {k.removeprefix("final/"): v for k, v in final.items() if not isinstance(v, Mapping)}
    tokens = float(config.get("batch_sequences", 0)) * float(config.get("sequence_tokens") or 0)
    curves = curves_of(rows, tokens, _samples(rows))
    done = ended and "val_loss" in numbers and curves.last_step == config["steps"]
    verdict = {"outcome": "completed", "step": config["steps"]} if done else None
    state, problem = state_of(config, verdict, numbers if done else None, curves)
    if not done and ended:
        problem = f"it ended at step {curves.last_step} of {config['steps']}, without a final validation"
    return RunRecord(
        folder=place,
        name=str(config.get("name") or label or name),
        seed=int(config["seed"]),
        state=state,
        problem=problem,
        config=config,
        summary=numbers if done else {},
        curves=curves,
        verdict=verdict or {},
        alerts=alerts,
    )


def read_offline(folders: Sequence[Path]) -> list[RunRecord]:
    """folders: ``offline-run-TIME-ID`` and the like, or ``.wandb`` files. A record for each run, its attempts joined."""
    runs: dict[str, list[tuple[Path, dict[str, Any]]]] = {}
    records = []
    for folder in sorted(folders, key=lambda f: f.name):
        for file in [folder] if folder.is_file() else sorted(folder.glob("*.wandb")):
            try:
                found = _attempt(file)
            except (ValueError, OSError) as error:
                records.append(unreadable(file.parent, error))
                continue
            runs.setdefault(found["id"], []).append((file.parent, found))
    for attempts in runs.values():
        place, last = attempts[-1]
        config = {k: v for _, a in attempts for k, v in a["config"].items()}
        summary = {k: v for _, a in attempts for k, v in a["summary"].items()}
        rows = merged([a["rows"] for _, a in attempts])
        try:
            cried = _alerts([a for _, a in attempts])
            records.append(
                _record(place, last["name"], config, summary, rows, last["exit"] == 0, last["group"], cried)
            )
        except (ValueError, KeyError, TypeError) as error:
            records.append(unreadable(place, error))
    return records


def read_online(address: str) -> list[RunRecord]:
    """address: ``wandb:ENTITY/PROJECT`` or ``wandb:ENTITY/PROJECT/GROUP``. Asks W&B's service, with the user's key.

    Raises ValueError for another address, and where the project or group has no run."""
    parts = address.removeprefix(ONLINE).split("/", 2)
    if len(parts) < 2 or not all(parts):
        raise ValueError(f"runs={address}: give wandb:ENTITY/PROJECT or wandb:ENTITY/PROJECT/GROUP")
    import wandb

    entity, project, *group = parts
    try:
        found = list(wandb.Api().runs(f"{entity}/{project}", filters={"group": group[0]} if group else {}))
    except Exception as error:  # wandb has no common class for no key, no network and no such project
        raise ValueError(f"runs={address}: W&B refused ({type(error).__name__}: {error})") from error
    if not found:
        raise ValueError(f"runs={address}: there is no run")
    records = []
    for run in found:
        place = Path(f"{ONLINE}{entity}/{project}/{run.id}")
        try:
            rows = merged([list(run.scan_history())])
            ended = run.state == "finished"
            records.append(
                _record(place, run.name, dict(run.config), dict(run.summary), rows, ended, run.group or "")
            )
        except (ValueError, KeyError, TypeError) as error:
            records.append(unreadable(place, error))
    return records
