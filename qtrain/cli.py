"""``qtrain COMMAND key=value ...``: the command line.

    qtrain train recipe=qpt w=int4_row steps=2000        one run
    qtrain train -m w=int8_row,int4_row seed=0,1         every combination
    qtrain train --config-dir my_configs recipe=mine     your own configs beside the package's
    qtrain train --cfg recipe=qpt                        print the composed config and stop

Hydra composes the config and drives sweeps and launchers. Before it does, every override of every run is checked
(``qtrain.overrides``) and the command refuses what cannot run, so that a mistake costs a second and a sweep never
dies in the middle for its own spelling. Exit codes: 2 for such a mistake, 1 for a run that raised, 130 after Ctrl-C and 75
(try again) after SIGTERM or SIGUSR1, else what the command returns (of a sweep the highest).
"""

from __future__ import annotations

import argparse
import functools
import importlib
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import qtrain
from qtrain import interrupts
from qtrain.commands import ENTRIES

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from qtrain.overrides import Overrides

# How Hydra is set for this program, unless the user says otherwise: it writes nothing of its own
HYDRA_DEFAULTS = {
    "hydra/output": "qtrain",
    "hydra/job_logging": "stdout",
    "hydra.output_subdir": "null",
    "hydra.job.chdir": "false",
}


class RunFailed(Exception):
    """A run raised; its trace has been printed."""


def config_dir() -> Path:
    """The folder of the configs: ``qtrain/configs`` of an installed wheel, ``configs`` of a checkout.

    Raises FileNotFoundError where neither exists.
    """
    package = Path(__file__).parent
    installed, checkout = package / "configs", package.parent / "configs"
    if installed.is_dir():
        return installed
    if checkout.is_dir() and (package.parent / "pyproject.toml").is_file():
        return checkout
    raise FileNotFoundError(
        f"no configs at {installed} (an installed wheel) nor {checkout} (a checkout): install qtrain again"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point. Returns the exit code. argv: None where this is the program; it then ends within seconds of a
    signal that stopped it."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = os.environ.get("QTRAIN_DEBUG") == "1"
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"qtrain {qtrain.__version__}")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in ENTRIES:
        import difflib

        close = difflib.get_close_matches(name, ENTRIES, n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        return _refuse(f"unknown command {name!r}{hint} Commands: {', '.join(ENTRIES)} (qtrain --help)")
    from qtrain.overrides import UserError

    try:
        with interrupts.listen():
            return _command(name, rest)
    except interrupts.Interrupted as stop:
        print(stop, file=sys.stderr)
        code = interrupts.exit_code(stop.signum)
        if argv is None:
            interrupts.end_soon(code)
        return code
    except UserError as error:
        if debug:
            traceback.print_exc()
        _refuse(str(error))
        return error.exit_code
    except RunFailed:
        return 1
    except BrokenPipeError:
        # The reader of a pipe (| head) has gone; Python would complain again when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # 128 + SIGPIPE, as shells have it


def _refuse(message: str) -> int:
    print("\n".join(f"qtrain: {line}" for line in message.splitlines()), file=sys.stderr)
    return 2


def _help() -> str:
    width = max(map(len, ENTRIES))
    lines = [f"  {name:<{width}}  {line}" for name, (_, line) in ENTRIES.items()]
    return "\n".join(
        [
            "usage: qtrain COMMAND [key=value ...]",
            "",
            *lines,
            "",
            "  qtrain COMMAND --help             its keys and config groups",
            "  qtrain COMMAND -m key=a,b         every combination of the values, one run each",
            "  qtrain COMMAND --cfg              print the composed config and stop",
            "  qtrain COMMAND --config-dir DIR   your own configs, searched before the package's",
            "  qtrain COMMAND --allow-target P   let configs name classes of the package P (repeatable)",
            "",
            "QTRAIN_DEBUG=1 shows the stack trace of every error.",
        ]
    )


def _parser(name: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"qtrain {name}", add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("-m", "--multirun", action="store_true")
    parser.add_argument("-cd", "--config-dir", metavar="DIR")
    parser.add_argument("--allow-target", action="append", default=[], metavar="PACKAGE")
    parser.add_argument("--cfg", action="store_true")
    parser.add_argument("overrides", nargs="*")
    return parser


def _command(name: str, rest: list[str]) -> int:
    from qtrain import submission
    from qtrain.hydra_section import check_primary
    from qtrain.overrides import Overrides, UserError

    module = importlib.import_module(ENTRIES[name][0])
    forwards = getattr(module, "FORWARDS", {})
    if rest and rest[0] in forwards:
        return forwards[rest[0]](rest[1:])
    options, unknown = _parser(name).parse_known_intermixed_args(rest)
    flags = [word for word in unknown if word.startswith("-")]
    if flags:
        raise UserError(
            f"unknown option {flags[0]}; qtrain {name} takes key=value, -m, --cfg, --config-dir, --allow-target, --help"
        )
    if options.config_dir is not None and not Path(options.config_dir).is_dir():
        raise UserError(f"--config-dir {options.config_dir}: no such folder")
    words = _overrides(module, name, options.overrides + unknown)
    with _hydra(name, options.config_dir) as hydra:
        check_primary(hydra.config_loader, module.CONFIG, options.allow_target)
        checks = Overrides(hydra.config_loader, module.CONFIG, words)
        if options.help:
            print(_command_help(name, module, checks))
            return 0
        if options.cfg:
            return _print_config(checks, options.multirun)
        typed = words
        words = submission.prepare(module, words, checks, multirun=options.multirun)
        checks = Overrides(hydra.config_loader, module.CONFIG, words)
        _check_all(module, checks, options.multirun, options.allow_target, typed)
        job = functools.partial(_job, ENTRIES[name][0], tuple(options.allow_target))
        return _launch(hydra, job, module.CONFIG, words, checks, options.multirun)


def _overrides(module: ModuleType, name: str, words: list[str]) -> list[str]:
    """The overrides: bare words become the command's positional key, Hydra's defaults of this program are added."""
    from qtrain.overrides import UserError

    positional = getattr(module, "POSITIONAL", None)
    overrides = []
    for word in words:
        if "=" in word or word.startswith("~"):
            overrides.append(word)
        elif positional is not None and not any(o.startswith(f"{positional}=") for o in overrides):
            overrides.append(f"{positional}={word}")
        else:
            raise UserError(f"{word!r} is no key=value; see qtrain {name} --help")
    given = {o.split("=")[0].lstrip("+") for o in overrides}
    defaults = [f"{key}={value}" for key, value in HYDRA_DEFAULTS.items() if key not in given]
    return defaults + overrides


@contextmanager
def _hydra(name: str, users_configs: str | None) -> Iterator[Any]:
    """Hydra over the package's configs, the user's before them; its global state ends with the command."""
    from hydra import version
    from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
    from hydra._internal.hydra import Hydra
    from hydra._internal.utils import create_config_search_path
    from hydra.core.global_hydra import GlobalHydra

    version.setbase("1.3")
    GlobalHydra.instance().clear()
    path = create_config_search_path(str(config_dir()))
    assert isinstance(path, ConfigSearchPathImpl)
    if users_configs is not None:
        path.prepend("command-line", f"file://{Path(users_configs).resolve()}")
    try:
        yield Hydra.create_main_hydra2(name, path)
    finally:
        GlobalHydra.instance().clear()


def _check_all(
    module: ModuleType, checks: Overrides, multirun: bool, allowed: Sequence[str], typed: Sequence[str]
) -> None:
    """Every run of the command line, before the first one starts. typed: the overrides without those that a submission
    adds. Raises UserError."""
    from qtrain import submission
    from qtrain.hydra_section import check_hydra, is_typed
    from qtrain.overrides import UserError, reason, resolved
    from qtrain.targets import check_targets

    runs = checks.combinations(multirun=multirun)
    composed, plain = [], []
    for i, overrides in enumerate(runs):
        config = checks.compose(overrides)
        _as_job(config, i)
        plain.append(resolved(config))
        check_targets(plain[-1], allowed)
        check_hydra(config.hydra, allowed, checks.overrides)
        if config.get("allow_targets") and not is_typed("allow_targets", checks.overrides):
            raise UserError("allow_targets: what is trusted is said on the command line, not in a config")
        composed.append(config)
    launcher = submission.section(_base(checks), checks) if multirun else None
    check = module.check if launcher is None else submission.check_of(module)
    for overrides, config in zip(runs, composed, strict=True):
        _set_hydra_config(config)
        try:
            check(_task_config(config))
        except Exception as error:
            if not _is_users(error):
                raise
            which = " ".join(o for o in overrides if not o.startswith("hydra"))
            where = f" (in the run {which})" if len(runs) > 1 else ""
            raise UserError(f"{reason(error)}{where}") from error
    if launcher is not None:
        submission.check_arms(plain, launcher, new=submission.RESUME in set(checks.overrides) - set(typed))


def _base(checks: Overrides) -> DictConfig:
    """The config from which Hydra builds launcher and sweeper of a sweep."""
    from hydra.types import RunMode

    words = _deferred(checks.overrides, checks)
    return checks.loader.load_configuration(checks.config_name, words, RunMode.MULTIRUN)


def _is_users(error: BaseException) -> bool:
    """Whether a refused value lies behind ``error``, at whatever depth of Hydra's wrapping."""
    from hydra.errors import InstantiationException
    from omegaconf.errors import OmegaConfBaseException

    while isinstance(error, InstantiationException) and error.__cause__ is not None:
        error = error.__cause__
    return isinstance(error, ValueError | TypeError | InstantiationException | OmegaConfBaseException)


def _as_job(config: DictConfig, number: int) -> None:
    """What a launcher sets in a run's config, for configs that refer to it."""
    from omegaconf import open_dict, read_write

    with read_write(config.hydra), open_dict(config.hydra):
        config.hydra.job.id = str(number)
        config.hydra.job.num = number
        config.hydra.runtime.output_dir = str(Path.cwd())
    _set_hydra_config(config)


def _set_hydra_config(config: DictConfig) -> None:
    from hydra.core.hydra_config import HydraConfig

    HydraConfig.instance().set_config(config)


def _task_config(config: DictConfig) -> DictConfig:
    """The command's own part."""
    import copy

    from omegaconf import open_dict, read_write

    task = copy.deepcopy(config)
    with read_write(task), open_dict(task):
        del task["hydra"]
    return task


def _job(module_name: str, allowed: Sequence[str], config: DictConfig) -> int:
    """One run; a plain function of the module, so that launchers can send it to other machines."""
    from qtrain.overrides import literal, resolved
    from qtrain.targets import check_targets

    try:
        with interrupts.listen():  # a launcher may have brought it to a process of its own
            # Once more, and for good: ${now:...} and what a launcher sets may have given something else before
            config = literal(config)
            check_targets(resolved(config), allowed)
            return importlib.import_module(module_name).run(config)
    except Exception:
        # Now, since a sweep raises the first failure only, and that when all runs are done
        traceback.print_exc()
        raise RunFailed from None


def _launch(
    hydra: Any, job: Any, config_name: str, words: list[str], checks: Overrides, multirun: bool
) -> int:
    if not multirun:
        return hydra.run(config_name, job, [*words, "hydra.mode=RUN"]).return_value
    if config_name == "train":
        from qtrain import sweep_folder

        words = [*words, *sweep_folder.announce(config_name, checks, _as_job)]
    batches = hydra.multirun(config_name, job, [*_deferred(words, checks), "hydra.mode=MULTIRUN"])
    worst = 0
    for number, run in enumerate(run for batch in batches or [] for run in batch):
        if run.return_value:
            which = " ".join(run.overrides or [])
            print(f"run {number} ({which}) ended with exit code {run.return_value}", file=sys.stderr)
            worst = max(worst, run.return_value)
    return worst


def _deferred(words: list[str], checks: Overrides) -> list[str]:
    """Where a group is swept, Hydra applies the values that are not swept to the group's default option first,
    which may lack the key (``recipe=a,b w=int4_row``). A choice of one reaches the runs alone."""
    parsed = checks.parse(words)
    if not any(o.is_sweep_override() and checks.options(o.key_or_group) for o in parsed):
        return words
    return [
        f"{o.key_or_group}=choice({o.get_value_string()})"
        if o.type.name == "CHANGE"
        and not (o.is_hydra_override() or o.is_sweep_override() or checks.options(o.key_or_group))
        else word
        for word, o in zip(words, parsed, strict=True)
    ]


def _print_config(checks: Overrides, multirun: bool) -> int:
    from omegaconf import OmegaConf

    for overrides in checks.combinations(multirun=multirun):
        config = checks.compose(overrides)
        if multirun:
            print(f"# {' '.join(o for o in overrides if not o.startswith('hydra'))}")
        print(OmegaConf.to_yaml(_task_config(config)), end="")
    return 0


def _command_help(name: str, module: ModuleType, checks: Overrides) -> str:
    """The command's docstring, its config and the options of the groups that are in it."""
    from omegaconf import OmegaConf

    config = checks.compose(checks.combinations(multirun=False)[0])
    chosen = {k: v for k, v in config.hydra.runtime.choices.items() if not str(k).startswith("hydra/")}
    lines = [f"qtrain {name}: {ENTRIES[name][1]}", "", (module.__doc__ or "").strip(), ""]
    if chosen:
        lines.append("config groups (group=option):")
        lines += [f"  {g}={v}   of {', '.join(checks.options(str(g)))}" for g, v in chosen.items()]
        lines.append("")
    return "\n".join([*lines, "keys and their values:", OmegaConf.to_yaml(_task_config(config)).rstrip()])


if __name__ == "__main__":
    # What a launcher sends to other machines then lies in qtrain.cli, which they can import
    from qtrain.cli import main as imported

    sys.exit(imported())
