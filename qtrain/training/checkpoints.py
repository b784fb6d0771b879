"""Checkpoints on disk: whole folders with a checksum of every byte, or nothing.

    checkpoints/step-000500/weights.pt     {"state_dict"}: the model
    checkpoints/step-000500/training.pt    all the rest: packed optimizer states, schedule, counters, position in the
                                           data, states of the callbacks, configuration, recipe, plan, census, versions
    checkpoints/step-000500/manifest.json  step, tokens; bytes and sha256 of the two, and of itself

A folder is written as ``.step-000500.partial``, every file synced, and one rename publishes it: a kill leaves what was
there before, or the whole new one. Reading checks every byte first, so that a file that was cut, altered or swapped is
refused by name instead of training on. The two files hold plain containers and tensors, which ``weights_only=True``
loads: a checkpoint from a stranger runs no code.

What is stored does not depend on the number of processes: tensors are whole, moments are packed as one process holds
them. Random bits and dropout masks are functions of (seed, step, place in the batch), so that the seed in the
configuration and the step are their whole state.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch

from qtrain.data.partial_folders import sync_folder

WEIGHTS, TRAINING, MANIFEST = "weights.pt", "training.pt", "manifest.json"
FORMAT_VERSION = 1
_NAME = re.compile(r"step-(\d{6,})")
_READ_BYTES = 1 << 22


class CheckpointError(ValueError):
    """A checkpoint that is missing, cut, altered or of another program."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What manifest.json says. step: optimizer steps applied. tokens: trained on until then. files: name -> {"bytes",
    "sha256"}."""

    step: int
    tokens: int
    files: Mapping[str, Mapping[str, Any]]
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        fields = asdict(self)
        return json.dumps({**fields, "checksum": _checksum(fields)}, indent=1) + "\n"


def _checksum(fields: Mapping[str, Any]) -> str:
    """sha256 of the other fields, in an order of their own."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def checkpoint_name(step: int) -> str:
    return f"step-{step:06d}"


class _Hashed:
    """A file that hashes what is meant to be written, so that what the disk made of it can be told."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.bytes, self.digest = file, 0, hashlib.sha256()
        self.failure: OSError | None = None

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.bytes += len(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.failure = (
                error  # torch closes its archive all the same, and fails with a RuntimeError over this one
            )
            raise

    def flush(self) -> None:
        self._file.flush()


def _write_part(path: Path, part: Mapping[str, Any]) -> dict[str, Any]:
    with path.open("wb") as file:
        hashed = _Hashed(file)
        try:
            torch.save(dict(part), hashed)  # type: ignore[arg-type]
        except RuntimeError as error:
            raise hashed.failure or error from None
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": hashed.bytes, "sha256": hashed.digest.hexdigest()}


def write_checkpoint(folder: Path, checkpoint: Mapping[str, Any], *, step: int, tokens: int) -> Path:
    """Publishes ``folder/step-NNNNNN`` and returns it. checkpoint: containers, numbers, strings and tensors, the
    model's under ``state_dict``.

    What stood there is replaced. Raises OSError as the disk does, and leaves no part then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / checkpoint_name(step)
    partial = folder / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        rest = {key: value for key, value in checkpoint.items() if key != "state_dict"}
        files = {
            WEIGHTS: _write_part(partial / WEIGHTS, {"state_dict": checkpoint["state_dict"]}),
            TRAINING: _write_part(partial / TRAINING, rest),
        }
        manifest = Manifest(step=step, tokens=tokens, files=files)
        with (partial / MANIFEST).open("w", encoding="utf-8") as file:
            file.write(manifest.to_json())
            file.flush()
            os.fsync(file.fileno())
        sync_folder(partial)
        _publish(partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def _publish(partial: Path, final: Path) -> None:
    replaced = final.with_name(f".{final.name}.replaced")
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)  # a folder cannot be renamed onto one with files in it
    partial.rename(final)
    sync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def remove_checkpoint(path: Path) -> None:
    """Removes a checkpoint: it takes another name first, so that a kill leaves no half of one."""
    removed = path.with_name(f".{path.name}.removed")
    shutil.rmtree(removed, ignore_errors=True)
    path.rename(removed)
    shutil.rmtree(removed)


def remove_leftovers(folder: Path) -> list[str]:
    """Removes what a killed process left in ``folder``, and puts back a checkpoint that it was about to replace.
    Only for who holds the run's lock. Returns the names removed or put back."""
    found = []
    for path in sorted(folder.glob(".step-*.replaced")):
        original = folder / path.name.removeprefix(".").removesuffix(".replaced")
        found.append(path.name)
        if original.exists():
            shutil.rmtree(path)
        else:
            path.rename(original)
    for path in sorted([*folder.glob(".step-*.partial"), *folder.glob(".step-*.removed")]):
        found.append(path.name)
        shutil.rmtree(path)
    return found


def step_of(path: Path) -> int | None:
    """The step that a checkpoint's name says; None for another name."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of ``folder`` by step, the latest first; unchecked. By name, since clocks jump."""
    found = [(step, path) for path in folder.glob("step-*") if (step := step_of(path)) is not None]
    return [path for _, path in sorted(found, reverse=True)]


def read_manifest(path: Path) -> Manifest:
    """Raises CheckpointError, naming ``path`` and what is wrong, unless it is the manifest of a checkpoint as it was
    written."""
    if not path.is_dir():
        kind = "is a file, and a checkpoint is a folder" if path.exists() else "does not exist"
        raise CheckpointError(f"checkpoint {path} {kind}")
    file = path / MANIFEST
    if not file.is_file():
        raise CheckpointError(f"{path} is no checkpoint of qtrain: it holds no {MANIFEST}")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        checksum = raw.pop("checksum")
        version = raw["format_version"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {path}: {MANIFEST} is cut or no manifest ({error!r})") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"checkpoint {path} has format version {version}, this code reads {FORMAT_VERSION}; read it with the "
            "version of qtrain that wrote it"
        )
    if _checksum(raw) != checksum:
        raise CheckpointError(f"checkpoint {path}: {MANIFEST} was altered (its own checksum differs)")
    manifest = Manifest(**raw)
    named = step_of(path)
    if named is not None and named != manifest.step:
        raise CheckpointError(f"checkpoint {path} is that of step {manifest.step}: it was renamed")
    return manifest


def _verify_file(path: Path, wanted: Mapping[str, Any]) -> None:
    size = path.stat().st_size if path.is_file() else None
    if size != wanted["bytes"]:
        found = "missing" if size is None else f"{size} bytes long"
        raise CheckpointError(
            f"checkpoint {path.parent}: {path.name} is {found}, its manifest says {wanted['bytes']} bytes"
        )
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    if digest.hexdigest() != wanted["sha256"]:
        raise CheckpointError(
            f"checkpoint {path.parent}: {path.name} was altered (its sha256 differs from the manifest's)"
        )


def verify(path: Path) -> Manifest:
    """The manifest, once every byte is found as it was written. Raises CheckpointError, naming the file."""
    manifest = read_manifest(path)
    for name in (WEIGHTS, TRAINING):
        if name not in manifest.files:
            raise CheckpointError(f"checkpoint {path}: its manifest does not name {name}")
        _verify_file(path / name, manifest.files[name])
    return manifest


def _load(path: Path) -> dict[str, Any]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch's advice is to load it anyway
        raise CheckpointError(
            f"checkpoint {path.parent}: {path.name} holds more than plain containers and tensors "
            f"({type(error).__name__}); what it would run is refused"
        ) from error
    if not isinstance(loaded, dict):
        raise CheckpointError(
            f"checkpoint {path.parent}: {path.name} holds a {type(loaded).__name__}, no mapping"
        )
    return loaded


def load_checkpoint(path: Path, *, checked: bool = False) -> dict[str, Any]:
    """What ``write_checkpoint`` was given; tensors on the CPU, mapped from the file until they are used.

    checked: ``verify`` has passed already. Raises CheckpointError.
    """
    if not checked:
        verify(path)
    return {**_load(path / TRAINING), **_load(path / WEIGHTS)}


def verified(folder: Path) -> Iterator[tuple[Path, str | None]]:
    """The checkpoints of ``folder``, the latest first, each read and checked when it is asked for: with None where
    it is whole, else with what is wrong."""
    for path in checkpoints_in(folder):
        try:
            verify(path)
        except CheckpointError as error:
            yield path, str(error)
        else:
            yield path, None
