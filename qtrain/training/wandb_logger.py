"""Weights & Biases through Lightning's logger: offline unless the user is logged in or asks for online.

An offline run lies in the run's folder and is uploaded with ``wandb sync <folder>/wandb/offline-run-*``. The axis
of every curve is the number of tokens; ``step`` is logged beside it. No key is read here or written anywhere:
wandb finds it itself. Of its own accord wandb would also report on itself, over the network even where the run is
offline, and keep the URL of the git remote and every SLURM_ variable, in which tokens stand: that is off. What a
run is, its config and ``versions.json`` say.
"""

from __future__ import annotations

import netrc
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

from qtrain import interrupts

from .run_folder import versions

MODES = ("auto", "online", "offline")
KINDS = ("wandb", "none")
KINDS_OF_METRICS = ("train", "val", "stability", "quant", "optim", "weights", "attention")
if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

# Of the service, which has changed its name; wandb looks for both.
_DEFAULT_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")


def logged_in() -> bool:
    """Whether wandb would find a key: WANDB_API_KEY, or an entry of its server in the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    path = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    server = os.environ.get("WANDB_BASE_URL")
    hosts = (urlparse(server).netloc,) if server else _DEFAULT_HOSTS
    try:
        return path.is_file() and any(netrc.netrc(path).authenticators(host) is not None for host in hosts)
    except netrc.NetrcParseError as error:
        raise ValueError(f"{path} cannot be read: {error}; mend it, or pass logger.mode=offline") from error


def resolved_mode(mode: str) -> str:
    """``online`` or ``offline`` (or what WANDB_MODE says) for ``auto``, itself for the others."""
    if mode != "auto":
        return mode
    return os.environ.get("WANDB_MODE") or ("online" if logged_in() else "offline")


def check_logger(config: Mapping[str, Any]) -> None:
    """Raises ValueError for an unknown kind or mode."""
    if config["kind"] not in KINDS:
        raise ValueError(f"logger.kind={config['kind']!r}: allowed are {', '.join(KINDS)}")
    if config["kind"] == "wandb" and config["mode"] not in MODES:
        raise ValueError(f"logger.mode={config['mode']!r}: allowed are {', '.join(MODES)}")


class Segment:
    """A W&B run whose own process may end before this one: SLURM signals every process of a job that it cancels or preempts,
    and W&B's dies of that at once. Then the rest of this attempt is not in W&B, the step is still saved, and the next
    attempt goes on with the curve. Without a signal such an end raises ConnectionError, as W&B has it."""

    def __init__(self, run: Any) -> None:
        self._run, self._lost = run, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._run, name)

    def log(self, *values: Any, **more: Any) -> None:
        try:
            self._run.log(*values, **more)
        except ConnectionError as error:
            if interrupts.pending() is None:
                raise
            self._lose(error)

    def finish(self) -> None:
        """Raises nothing: what it had is on disk, and the run's verdict is not W&B's."""
        try:
            self._run.finish()
        except ConnectionError as error:
            self._lose(error)

    def _lose(self, error: ConnectionError) -> None:
        if not self._lost:
            print(
                f"W&B's process has ended before the run ({error}): the last steps of this attempt are in metrics.jsonl alone",
                file=sys.stderr,
            )
        self._lost = True


def make_logger(
    logger: Mapping[str, Any], config: Mapping[str, Any], folder: Path, experiment: str, run_id: str
) -> Logger | None:
    """The logger that the ``logger`` part of a configuration asks for, None for ``none``.

    config: the whole configuration, which becomes the run's. folder: the run's. experiment: the group. run_id: of all
    attempts of the run: online they go on with one curve, offline ``wandb sync`` joins their segments, whose rows
    have steps of their own.
    """
    check_logger(logger)
    if logger["kind"] == "none":
        return None
    # Read when wandb is imported and by the process that it starts; what the user has set stays
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    run = wandb.init(
        id=run_id,
        resume="allow",
        name=folder.name,
        group=experiment,
        dir=folder,
        project=logger["project"],
        entity=logger["entity"],
        tags=list(logger["tags"]),
        mode=resolved_mode(logger["mode"]),  # type: ignore[arg-type]
        config=dict(config),
        settings=wandb.Settings(
            silent=True,
            console="off",
            save_code=False,
            disable_git=True,
            x_disable_meta=True,  # the command, the host, SLURM_JWT; metrics of the machine stay
            git_commit=versions()["git_commit"],
        ),
    )
    run.define_metric("tokens")
    for kind in KINDS_OF_METRICS:
        run.define_metric(f"{kind}/*", step_metric="tokens")
    return WandbLogger(experiment=Segment(run))  # type: ignore[arg-type]
