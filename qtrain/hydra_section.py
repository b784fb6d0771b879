"""What the ``hydra`` part of a config may name. Hydra builds its launcher, sweeper, callbacks and loggers from it.

A config folder from elsewhere can hold that part too, and Hydra resolves it by itself, after any check. So where it
is built from:

- interpolations only of Hydra's own texts (``${hydra.job.name}``): others could become a mapping with a ``_target_``;
- launcher and sweeper are Hydra's or plug-ins that Hydra has registered; callbacks are Hydra's;
- logging has handlers that write to the terminal or to a ``.log`` in the output folder, and no factories: a line of a
  log, in a file of one's choice, can be a program;
- the environment is set in the shell or on the command line, and search paths name no Python packages.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from omegaconf import Container, DictConfig, OmegaConf

from qtrain.overrides import UserError
from qtrain.targets import is_allowed, last_key, strings

_BUILT = ("callbacks", "launcher", "sweeper", "job_logging", "hydra_logging")
_LOGGING = ("job_logging", "hydra_logging")
# Fields of Hydra that are texts or numbers by their type.
_TEXTS = r"(job[.](name|id|num|override_dirname|config_name)|runtime[.](output_dir|cwd|version)|(run|sweep)[.](sub)?dir)"
_INTERPOLATION = re.compile(rf"\$\{{hydra[.:]{_TEXTS}\}}")
_PLUGIN = re.compile(r"(hydra\._internal\.core_plugins|hydra_plugins)\.[\w.]+")
_CALLBACK = re.compile(r"hydra\.experimental\.callbacks\.[A-Z]\w*")
_LOG_CLASSES = frozenset(
    {"logging.StreamHandler", "logging.FileHandler", "logging.NullHandler", "logging.Formatter"}
)
_LOG_FILE = re.compile(r"\$\{hydra[.:]runtime[.]output_dir\}/[^/]*\.log")
_OBJECT = re.compile(r"[a-z]+://")
_STREAMS = ("ext://sys.stdout", "ext://sys.stderr")


def _as_written(config: Container) -> dict[str, Any]:
    """A plain container with its interpolations unresolved. Raises UserError where it is one itself."""
    container = OmegaConf.to_container(config, resolve=False)
    if not isinstance(container, dict):
        raise UserError(f"hydra={container}: write the mapping itself")
    return {str(key): value for key, value in container.items()}


def check_hydra(config: DictConfig, allowed: Sequence[str], overrides: Sequence[str]) -> None:
    """Raises UserError. config: the value of ``hydra``. allowed: packages that the user trusts. overrides: as on the
    command line, which the user wrote."""
    container = _as_written(config)
    for section in _BUILT:
        for key, value in strings(container.get(section), f"hydra.{section}"):
            if section in _LOGGING:
                _check_logging(key, value, allowed)
                continue
            _check_interpolation(key, value)
            if last_key(key) == "_target_":
                _check_target(key, value, allowed)
    job = container.get("job")
    environment = job.get("env_set") if isinstance(job, dict) else job
    if environment and not is_typed("hydra.job.env_set", overrides):
        raise UserError(
            f"hydra.job.env_set={environment}: a config may not set the environment, in which libraries and keys are "
            "found; set it in the shell, or as hydra.job.env_set.NAME=value on the command line"
        )


def is_typed(key: str, overrides: Sequence[str]) -> bool:
    """Whether the user wrote ``key``, or a key below it, on the command line."""
    return any(re.match(rf"[+~]*{re.escape(key)}([.=]|$)", override) for override in overrides)


def _check_interpolation(key: str, value: str) -> None:
    if "${" in _INTERPOLATION.sub("", value):
        raise UserError(
            f"{key}={value}: here Hydra builds what stands in the config, so only its own texts may be referred to "
            "(hydra.job.name, hydra.runtime.output_dir, hydra.sweep.dir); write the value itself"
        )


def _check_target(key: str, target: str, allowed: Sequence[str]) -> None:
    # Hydra itself takes only registered plug-ins for these two keys; what lies deeper is built like anything else
    if key in ("hydra.launcher._target_", "hydra.sweeper._target_"):
        fine = _PLUGIN.fullmatch(target)
    else:
        fine = _CALLBACK.fullmatch(target) if key.startswith("hydra.callbacks.") else None
    if not fine and not is_allowed(target, allowed):
        raise UserError(
            f"{key}={target}: configs may name Hydra's own launchers, sweepers and callbacks only; if you trust this "
            f"one, allow its package with --allow-target {target.split('.')[0]}"
        )


def _check_logging(key: str, value: str, allowed: Sequence[str]) -> None:
    name = last_key(key)
    if name == "filename":
        fine = _LOG_FILE.fullmatch(value) is not None
        remedy = "a log lies in the output folder, as ${hydra.runtime.output_dir}/NAME.log"
    elif name in ("()", "class", "_target_", "factory", "queue", "listener"):
        fine = (name == "class" and value in _LOG_CLASSES) or is_allowed(value, allowed)
        remedy = f"allowed are {', '.join(sorted(_LOG_CLASSES))}, and others with --allow-target PACKAGE"
    else:
        # A key "." sets attributes of what was built, ext:// and cfg:// name Python objects
        fine = ".." not in key and "${" not in value and (not _OBJECT.match(value) or value in _STREAMS)
        remedy = f"write the value itself; of objects, {' and '.join(_STREAMS)} may be named"
    if not fine:
        raise UserError(f"{key}={value}: {remedy}")


def check_primary(loader: ConfigLoaderImpl, config_name: str, allowed: Sequence[str]) -> None:
    """What must be known of the primary config before anything is composed, since search paths are read then. Raises
    UserError for one that would import a package."""
    found = loader.repository.load_config(config_name)
    primary = _as_written(found.config).get("hydra") if found is not None else None
    entries = primary.get("searchpath") if isinstance(primary, dict) else primary
    for entry in entries if isinstance(entries, list) else [] if entries is None else [entries]:
        text = str(entry)
        scheme, _, rest = text.rpartition("://")
        package = rest.replace("/", ".")
        if "${" in text or not (scheme in ("", "file") or (scheme == "pkg" and is_allowed(package, allowed))):
            raise UserError(
                f"hydra.searchpath={text}: a config may add folders only (file://...); if you trust a package, allow "
                f"it with --allow-target {package.split('.')[0]}"
            )
