"""What a sweep asks SLURM for: the launcher's section (configs/hydra/launcher/slurm.yaml says what each key means), the
shape of an arm, and the batch script's lines that follow from both.

    tasks = trainer.devices (on each node) * trainer.num_nodes,   one process a task, started by srun

Every value becomes a line of a batch script, so all are checked here: an option of sbatch is one line of printable
characters. ``modules``, ``setup``, ``environment``, ``scratch``, ``container`` and ``python`` are shell, as their writer means them
to be; that he is the user is ``qtrain.submission``'s business.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OPTION = re.compile(r"[a-z][a-z0-9-]*")
_COUNTS = {
    "timeout_min": 1, "signal_delay_s": 1, "array_parallelism": 1, "max_requeues": 0, "nodes": 1, "tasks_per_node": 1,
    "cpus_per_task": 1, "mem_gb": 1,
}  # fmt: skip
_FLAGS = ("requeue", "wait", "gpus")
_WORDS = ("folder", "account", "partition", "qos", "constraint", "gpu_type", "scratch", "container", "python")
_LISTS = ("modules", "setup", "srun")
# Options of sbatch that other keys decide
_DECIDED = {
    "signal": "signal_delay_s", "requeue": "requeue", "no-requeue": "requeue", "time": "timeout_min", "nodes": "nodes",
    "ntasks-per-node": "tasks_per_node", "ntasks": "tasks_per_node", "array": "array_parallelism", "output": "folder",
    "error": "folder", "open-mode": "requeue", "account": "account", "partition": "partition", "qos": "qos",
    "constraint": "constraint", "cpus-per-task": "cpus_per_task", "mem": "mem_gb", "gpus-per-node": "gpu_type", "wait": "wait",
}  # fmt: skip
# Options of sbatch that nothing here can be right beside, and the remedy
_REFUSED = {
    "chdir": "out=, the sweep's folder and prepared data are named from where the sweep is submitted, and the jobs start there: "
    "leave it out, and submit from that folder, or give out= and hydra.launcher.scratch as whole paths",
    "parsable": "sbatch's answer is read as it prints it by default: leave it out",
    "quiet": "the job's number is read from sbatch's answer: leave it out",
    "test-only": "nothing would be submitted: leave it out; the arms are checked before they are submitted",
}


def _word(key: str, value: Any) -> str:
    """An option's value: one line of printable characters."""
    text = str(value)
    if isinstance(value, Mapping | list | bool) or not text or not text.isprintable():
        raise ValueError(f"hydra.launcher.{key}={value!r}: must be one line of text")
    return text


def _words(key: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ValueError(f"hydra.launcher.{key}={value!r}: must be a list of texts, as in {key}=[{value}]")
    return tuple(_word(f"{key}[{i}]", line) for i, line in enumerate(value))


def _count(key: str, value: Any, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{key}={value!r}: must be a whole number, {least} or more")
    return value


def _environment(value: Any) -> dict[str, str]:
    if not isinstance(value, Mapping):
        raise ValueError(f"hydra.launcher.environment={value!r}: must be a mapping, NAME: value")
    for name in value:
        if not _NAME.fullmatch(str(name)):
            raise ValueError(f"hydra.launcher.environment: {name!r} is no name of a variable")
    return {str(name): _word(f"environment.{name}", text) for name, text in value.items()}


def _sbatch(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"hydra.launcher.sbatch={value!r}: must be a mapping, option: value")
    for name, given in value.items():
        if not _OPTION.fullmatch(str(name)):
            raise ValueError(
                f"hydra.launcher.sbatch: {name!r} is no long option of sbatch, written without its dashes"
            )
        if name in _DECIDED:
            raise ValueError(
                f"hydra.launcher.sbatch.{name}={given!r}: set hydra.launcher.{_DECIDED[name]}, which decides that"
            )
        if name in _REFUSED:
            raise ValueError(f"hydra.launcher.sbatch.{name}={given!r}: {_REFUSED[name]}")
        if given is not True:
            _word(f"sbatch.{name}", given)
    return dict(value)


@dataclass(frozen=True)
class Shape:
    """Of an arm: nodes, tasks on each, and GPUs on each (0: none asked for)."""

    nodes: int
    tasks_per_node: int
    gpus_per_node: int

    def __str__(self) -> str:
        return f"{self.nodes} node(s) of {self.tasks_per_node} task(s) and {self.gpus_per_node} GPU(s)"


@dataclass(frozen=True, kw_only=True)
class Request:
    """The launcher's section, checked."""

    timeout_min: int
    signal_delay_s: int
    array_parallelism: int
    requeue: bool
    max_requeues: int
    wait: bool
    poll_seconds: float
    nodes: int | None
    tasks_per_node: int | None
    folder: str
    account: str | None
    partition: str | None
    qos: str | None
    constraint: str | None
    gpus: bool
    gpu_type: str | None
    cpus_per_task: int | None
    mem_gb: int | None
    modules: tuple[str, ...]
    environment: Mapping[str, str]
    scratch: str | None
    setup: tuple[str, ...]
    container: str | None
    python: str | None
    srun: tuple[str, ...]
    sbatch: Mapping[str, Any]

    @classmethod
    def of(cls, section: Mapping[str, Any]) -> Request:
        """Raises ValueError, naming the key, for a value that cannot be, or be a line of a batch script."""
        known = [f.name for f in fields(cls)]
        given = {str(key): value for key, value in section.items() if key != "_target_"}
        for key in sorted(set(given) ^ set(known)):
            raise ValueError(
                f"hydra.launcher.{key} is {'unknown' if key in given else 'missing'}; the keys are {', '.join(known)}"
            )
        for key, least in _COUNTS.items():
            if given[key] is not None or key in (
                "timeout_min",
                "signal_delay_s",
                "array_parallelism",
                "max_requeues",
            ):
                _count(f"hydra.launcher.{key}", given[key], least)
        for key in _FLAGS:
            if not isinstance(given[key], bool):
                raise ValueError(f"hydra.launcher.{key}={given[key]!r}: must be true or false")
        for key in _WORDS:
            given[key] = None if given[key] is None else _word(key, given[key])
        for key in _LISTS:
            given[key] = _words(key, given[key])
        given["environment"], given["sbatch"] = _environment(given["environment"]), _sbatch(given["sbatch"])
        poll = given["poll_seconds"]
        if isinstance(poll, bool) or not isinstance(poll, int | float) or not poll > 0:
            raise ValueError(f"hydra.launcher.poll_seconds={poll!r}: must be a positive number of seconds")
        return cls(**given)

    def __post_init__(self) -> None:
        if 60 * self.timeout_min <= self.signal_delay_s:
            raise ValueError(
                f"hydra.launcher.signal_delay_s={self.signal_delay_s} leaves nothing of hydra.launcher.timeout_min="
                f"{self.timeout_min}: each attempt would be asked to stop when it starts; raise the one or lower the other"
            )

    def shape(self, config: Mapping[str, Any]) -> Shape:
        """Of the run that ``config`` describes. Raises ValueError where the section says otherwise."""
        trainer, device = config["trainer"], config["device"]
        found = {
            "nodes": ("trainer.num_nodes", _count("trainer.num_nodes", trainer["num_nodes"])),
            "tasks_per_node": ("trainer.devices", _count("trainer.devices", trainer["devices"])),
        }
        for key, (whose, mine) in found.items():
            given = getattr(self, key)
            if given is not None and given != mine:
                raise ValueError(
                    f"hydra.launcher.{key}={given}, and {whose}={mine}: a task is a process of the run; leave "
                    f"hydra.launcher.{key} out, which then follows {whose}, or set {whose}={given}"
                )
        if device == "cuda" and not self.gpus:
            raise ValueError(
                "device=cuda, and hydra.launcher.gpus=false: the nodes have none; take device=cpu, or another cluster's file"
            )
        tasks = found["tasks_per_node"][1]
        return Shape(found["nodes"][1], tasks, tasks if self.gpus and device != "cpu" else 0)

    def options(self, shape: Shape, name: str) -> dict[str, Any]:
        """Those of sbatch by their long names, without those of array and log."""
        count = shape.gpus_per_node
        options = {
            "job-name": _word("job.name", name),
            "time": self.timeout_min,
            "nodes": shape.nodes,
            "ntasks-per-node": shape.tasks_per_node,
            "gpus-per-node": (f"{self.gpu_type}:{count}" if self.gpu_type else count) if count else None,
            "cpus-per-task": self.cpus_per_task,
            "mem": None if self.mem_gb is None else f"{self.mem_gb}G",
            "signal": f"USR1@{self.signal_delay_s}",
            "requeue" if self.requeue else "no-requeue": True,
            "open-mode": "append",
            **{key: getattr(self, key) for key in ("account", "partition", "qos", "constraint")},
            **self.sbatch,
        }
        return {key: value for key, value in options.items() if value is not None}

    def before(self) -> list[str]:
        """The script's lines before srun."""
        lines = [
            "trap : TERM",  # of which bash would die, and it has to ask whether the job runs again
            # sbatch passes the environment on: where W&B runs in it, its process is that of another machine, or has ended
            "unset WANDB_SERVICE",
        ]
        lines += [f"module load {shlex.quote(module)}" for module in self.modules]
        # In double quotes, so that $USER and its like are the node's
        if self.scratch is not None:
            lines.append(f'export QTRAIN_CACHE="{self.scratch}/qtrain"')
        lines += [f'export {name}="{value}"' for name, value in self.environment.items()]
        if self.cpus_per_task is not None:
            # Since SLURM 22.05 srun does not take it from sbatch any more
            lines.append("export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK")
            lines.append("export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}")
        return [*lines, *self.setup, "set +e"]  # a script that ends with srun asks for no other attempt

    def srun_arguments(self) -> list[str]:
        # When one process has ended, the others have a minute; --kill-on-bad-exit would end those that still save
        return ["--wait=60", *self.srun]

    def interpreter(self) -> str:
        """The shell's words that start Python in a task."""
        python = shlex.quote(sys.executable) if self.python is None else self.python
        return python if self.container is None else f"{self.container} {python}"

    def after(self) -> list[str]:
        """The script's lines after srun, whose exit status the first of them reads; outside of a container."""
        return [f"exec {shlex.quote(sys.executable)} -m qtrain.cluster.requeue --most {self.max_requeues} $?"]
