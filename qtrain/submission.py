"""What is asked of a sweep before it is submitted to SLURM (``hydra/launcher=slurm``), beside what any run is asked.

- **Who says what runs on the nodes.** The launcher's section holds lines of shell, so its file is named on the command line, and the
  section is what that file and the command line say: an experiment or a recipe from elsewhere adds nothing. This is
  asked of every launcher but Hydra's basic one.
- **Names.** Each arm's run has its name from here on, and goes on under it (``resume=auto``), so that a requeued job finds
  it: ``run=TIME-TOKEN-NUMBER``, where neither the command line nor the configs name runs.
- **One shape.** An array's tasks are alike: nodes, tasks and GPUs of all arms must agree, with each other and with the
  launcher's own numbers.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from qtrain.cluster.allocation import Request, Shape
from qtrain.overrides import Overrides, UserError

# Hydra builds plug-ins whose names begin so, and no others; ``register`` says which class this one is
TARGET = "hydra_plugins.qtrain.SlurmLauncher"
# One run after the other, in this process
BASIC = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
RESUME = "resume=auto"
INSTALL = "pip install 'qtrain[slurm]'"


def submits(config: DictConfig) -> bool:
    """Whether the composed ``config`` asks for SLURM."""
    return OmegaConf.select(config, "hydra.launcher._target_") == TARGET


def register() -> None:
    """Makes the launcher known to Hydra. Raises UserError with the pip command where submitit or Hydra's launcher for it
    is missing."""
    try:
        from qtrain.slurm_launcher import SlurmLauncher
    except ImportError as error:
        missing = (error.name or "").split(".")[0]
        if missing not in ("submitit", "hydra_plugins", "cloudpickle"):
            raise
        raise UserError(f"hydra/launcher=slurm needs hydra-submitit-launcher ({error}): {INSTALL}") from error
    from hydra.core.plugins import Plugins

    Plugins.instance().class_name_to_class[TARGET] = SlurmLauncher


def named(words: list[str], checks: Overrides) -> list[str]:
    """``words`` with what gives each arm the name of its run, where nothing gives it one, and lets it go on."""
    runs = checks.combinations(multirun=True)
    # Sweeps of one second, from whatever folders and machines, may share ``out``, where nothing is made before an arm starts: six
    # random hexadecimal digits tell them apart. Then Hydra's own number of the arm: one override for all of them
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}-${{hydra:job.num}}"
    more = {"run": f"run={name}", "resume": RESUME}
    typed = {o.key_or_group for o in checks.parse(words)}
    return words + [
        word
        for key, word in more.items()
        if key not in typed and any(checks.compose(overrides).get(key) is None for overrides in runs)
    ]


def prepare(module: ModuleType, words: list[str], checks: Overrides, *, multirun: bool) -> list[str]:
    """``words``, completed where they submit a sweep. Raises UserError where that cannot be."""
    if not any(o.key_or_group == "hydra/launcher" for o in checks.parse(words)):
        return words  # nothing else may choose the launcher: check_trusted
    if not submits(checks.compose(checks.combinations(multirun=multirun)[0])):
        return words
    if not multirun:
        raise UserError("hydra/launcher=slurm submits sweeps: add -m, which takes a single run as well")
    check_of(module)
    register()
    return named(words, checks)


def section(base: DictConfig, checks: Overrides) -> dict[str, Any] | None:
    """The launcher's section, plain, of a sweep that is submitted; None for another. base: the config from which Hydra
    builds its launcher. Raises UserError for one that the user did not ask for, whosever it is: others run shell too."""
    if OmegaConf.select(base, "hydra.launcher._target_") == BASIC:
        return None
    check_trusted(base, checks)
    if not submits(base):
        return None
    if OmegaConf.select(base, "hydra.sweeper.max_batch_size") is not None:
        raise UserError(
            "hydra.sweeper.max_batch_size cuts a sweep up, and an array is submitted whole: leave it out; "
            "hydra.launcher.array_parallelism says how many arms run at once"
        )
    launcher: Any = OmegaConf.to_container(base.hydra.launcher, resolve=True)
    return launcher


def check_of(module: ModuleType) -> Callable[[DictConfig], None]:
    """What the command asks of an arm that another machine will run. Raises UserError where it is not made for that."""
    check: Callable[[DictConfig], None] | None = getattr(module, "check_elsewhere", None)
    if check is None:
        raise UserError(
            f"hydra/launcher: {module.__name__.split('.')[-1]} is not submitted to a cluster, train is"
        )
    return check


def check_trusted(base: DictConfig, checks: Overrides) -> None:
    """The launcher's section is that of the file named on the command line, and what was typed. base: the config from
    which Hydra builds its launcher. Raises UserError."""
    parsed = checks.parse(checks.overrides)
    chosen = [o for o in parsed if o.key_or_group == "hydra/launcher"]
    if not chosen or chosen[0].is_sweep_override():
        raise UserError(
            f"hydra.launcher._target_={base.hydra.launcher._target_}: where a sweep runs is said on the command line, once for "
            "all of it, and not by a config; write hydra/launcher=NAME"
        )
    typed = [
        str(o.input_line) for o in parsed if o.key_or_group.startswith(("hydra/launcher", "hydra.launcher."))
    ]
    # Without the primary config and what it chooses, experiments and recipes among it
    alone = checks.loader.load_configuration(None, typed, RunMode.RUN)
    mine, said = (OmegaConf.to_container(c.hydra.launcher, resolve=False) for c in (base, alone))
    assert isinstance(mine, dict)
    assert isinstance(said, dict)
    for key in [*mine, *said]:
        if mine.get(key) != said.get(key):
            raise UserError(
                f"hydra.launcher.{key}={mine.get(key)}: a config changes what {chosen[0].input_line} says ({said.get(key)}), and "
                "that may be shell; say it in that file, or on the command line"
            )


def check_arms(configs: Sequence[Mapping[str, Any]], launcher: Mapping[str, Any], *, new: bool) -> None:
    """All arms before they are submitted: of one shape, each a run of its own that can be found again. configs: theirs,
    plain. new: none of the runs may exist. Raises UserError."""
    try:
        asked = Request.of(launcher)
        shape_of(configs, asked)
        _check_places(configs, new)
        if asked.requeue:
            _check_resumable(configs)
    except ValueError as error:
        raise UserError(str(error)) from error


def shape_of(configs: Sequence[Mapping[str, Any]], asked: Request) -> Shape:
    """The shape that all arms have. Raises ValueError."""
    shapes = [asked.shape(config) for config in configs]
    for number, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise ValueError(
                f"run 0 needs {shapes[0]}, run {number} {shape}: the jobs of an array are alike; sweep them by two commands"
            )
    return shapes[0]


def _check_places(configs: Sequence[Mapping[str, Any]], new: bool) -> None:
    places: dict[Path, int] = {}
    for number, config in enumerate(configs):
        if config["run"] is None:
            raise ValueError(
                "run=null: a job that runs again has to find its run; leave run= out, or name it"
            )
        place = run_folder(config)
        if place in places:
            raise ValueError(
                f"runs {places[place]} and {number} would both be {place}: leave run= out, which names each, or name them "
                "by what is swept, as in 'run=seed${seed}'"
            )
        if new and place.exists():
            raise ValueError(
                f"the run {place} exists; go on with it (resume=auto), choose another run=, or remove it"
            )
        places[place] = number


def _check_resumable(configs: Sequence[Mapping[str, Any]]) -> None:
    for config in configs:
        if config["resume"] != "auto":
            raise ValueError(
                f"resume={config['resume']}: a job that is requeued goes on with its own run, which is resume=auto; leave "
                "resume= out, or pass hydra.launcher.requeue=false"
            )


def run_folder(config: Mapping[str, Any]) -> Path:
    """Where the run of an arm's configuration lies."""
    return Path(config["out"]) / config["name"] / config["run"]
