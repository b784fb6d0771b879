"""qtrain train: train a model under a recipe, and leave a folder that says everything about it."""

from __future__ import annotations

import json
import os
import re
import sys
import traceback
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

CONFIG = "train"
# Exit status of a run that ended with a verdict instead of a result: not an error of the program.
VERDICT_EXIT = 3
_SECRET = re.compile(
    r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|(^|_)(PASS|PAT|AUTH))$", re.IGNORECASE
)
# Shorter values would be found in ordinary words and numbers.
_SECRET_CHARACTERS = 8


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The resolved configuration as dicts, lists, strings and numbers.

    Raises ValueError for a value that is still missing (???), and for one that holds the value of an environment
    variable whose name says that it is secret: the configuration is saved with the run.
    """
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise ValueError(f"{', '.join(missing)}: a value is missing; give it as {missing[0]}=...")
    config: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    secrets = {
        name: value
        for name, value in os.environ.items()
        if _SECRET.search(name) and len(value) >= _SECRET_CHARACTERS
    }
    for key, text in _strings(config):
        for name, value in secrets.items():
            if value in text:
                raise ValueError(
                    f"{key} holds the value of ${name}, and the configuration is saved with the run; leave it to the "
                    "environment, where the program that needs it finds it"
                )
    return config


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, string) of every string in nested containers."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _strings(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner, key)


def check(cfg: DictConfig) -> None:
    """Everything that can be wrong with the values, before data are read. Raises ValueError or TypeError."""
    _check(cfg, here=True)


def check_elsewhere(cfg: DictConfig) -> None:
    """``check`` for a run of another machine, whose devices and processes are not asked of this one."""
    _check(cfg, here=False)


def _check(cfg: DictConfig, *, here: bool) -> None:
    from qtrain.models.decoder import DecoderConfig
    from qtrain.models.hf_folder import check_pretrained
    from qtrain.training.assembly import assemble, resolved_device
    from qtrain.training.baselines import reference_run
    from qtrain.training.saved import check_resume
    from qtrain.training.wandb_logger import check_logger

    config = plain(cfg)
    check_logger(config["logger"])
    parts = assemble(config, here=here)
    settings = parts.settings
    if here:
        parts.processes.check(resolved_device(settings.device))
    if settings.baseline is not None:
        reference_run(settings.baseline, settings.out)
    check_resume(settings)
    if settings.resume is None and isinstance(parts.model_config, DecoderConfig):
        check_pretrained(parts.model_config)


def started_with(run: str | None) -> list[str] | None:
    """The words of the command line that this run, of a sweep this arm, was started with; None outside of a command. run: its
    name, in the place of a template that means something to the sweep alone."""
    from hydra.core.hydra_config import HydraConfig

    if not HydraConfig.initialized():
        return None
    words = HydraConfig.get().overrides.task
    return [f"run={run}" if word.startswith("run=") and "$" in word else word for word in words]


def run(cfg: DictConfig) -> int:
    """Train, in one process or in as many as ``trainer`` says. 0 where the run completed, 3 where it ended with a
    verdict. Raises Interrupted after a signal, once the state is saved."""
    from qtrain.training.launcher import launch
    from qtrain.training.processes import ProcessSettings
    from qtrain.training.run_folder import STARTED_WITH

    config = plain(cfg)
    os.environ[STARTED_WITH] = json.dumps(started_with(config["run"]))
    processes = ProcessSettings.of(config["trainer"])
    if processes.starts_others:
        return launch(config, f"{__name__}:run_rank", processes.devices)
    return run_rank(config)


def run_rank(config: dict[str, Any]) -> int:
    """``run`` in one of the processes, on a configuration that ``plain`` gave. 2 where the run was refused."""
    from qtrain.data.read_ahead import StreamError
    from qtrain.data.shards import ShardError
    from qtrain.data.sources import SourceError
    from qtrain.data.tokenizers import TokenizerError
    from qtrain.interrupts import Interrupted
    from qtrain.training.assembly import assemble, resolved_device
    from qtrain.training.fit import train
    from qtrain.training.processes import RankZeroFailed, connected, rank
    from qtrain.training.resume import StartRefused, refusing

    try:
        with refusing():  # once more: the machine that checked it may have been another
            parts = assemble(config)
        with connected(parts.processes, resolved_device(parts.settings.device)):
            verdict, folder = train(parts)
    except (StartRefused, ShardError, SourceError, StreamError, TokenizerError) as error:
        if os.environ.get("QTRAIN_DEBUG") == "1":
            traceback.print_exc()
        print(f"qtrain: {error}", file=sys.stderr)
        return 2
    except RankZeroFailed:
        return 0  # rank 0 says what it was, and its exit status is the one that counts
    if verdict.good:
        return 0
    if rank() == 0:
        print(f"stopped: {verdict.message}\nwhat is left lies in {folder}", file=sys.stderr)
    if verdict.signal is not None:
        raise Interrupted(verdict.signal)  # no exit code: a sweep ends here
    return VERDICT_EXIT
