"""What may stand on the command line: every override is checked before anything heavy.

A key that nothing reads is the most expensive typing mistake there is: the run goes on with the default and its
curve carries the wrong label. So every key must exist in the composed config, every option in its group, and of
a sweep all combinations must hold before the first one starts. Imports Hydra alone, no torch.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import ConfigCompositionException, HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException


class UserError(Exception):
    """Something the user can put right: printed without a trace, exit code 2, where nothing has been started."""

    exit_code = 2


def near(word: str, names: Sequence[str], count: int = 3) -> list[str]:
    """The names closest to ``word``: those with the same last part first (``lr``: ``optimizer.lr``), then those
    whose last part is close, and for a word without dots those that are close as a whole."""
    tail = word.rsplit(".", 1)[-1]
    by_tail: dict[str, list[str]] = {}
    for name in names:
        by_tail.setdefault(name.rsplit(".", 1)[-1], []).append(name)
    found = list(by_tail.get(tail, []))
    for close in difflib.get_close_matches(tail, list(by_tail), n=count, cutoff=0.65):
        found += by_tail[close]
    found += difflib.get_close_matches(word, list(names), n=count, cutoff=0.8)
    return list(dict.fromkeys(found))[:count]


def did_you_mean(word: str, names: Sequence[str]) -> str:
    found = near(word, names)
    return f"; did you mean {' or '.join(found)}?" if found else ""


def keys_of(node: Any, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a config, nodes and leaves."""
    if not isinstance(node, DictConfig) or node._is_none() or node._is_missing() or node._is_interpolation():
        return
    for key, value in node.items_ex(resolve=False):
        yield f"{prefix}{key!s}"
        yield from keys_of(value, f"{prefix}{key!s}.")


def reason(error: BaseException) -> str:
    """The innermost message of a chain of Hydra's and OmegaConf's errors, with the key that it is about."""
    key = ""
    while True:
        found = re.search(r"full_key: *(\S+)", str(error))
        key = found[1] if found else key
        # What any other package says is the last word: its own causes are details
        if error.__cause__ is None or type(error).__module__.split(".")[0] not in ("hydra", "omegaconf"):
            break
        error = error.__cause__
    text = re.sub(r"\n\s*(full_key|object_type|reference_type)[:=].*", "", str(error))
    text = text.split("\nConfig search path:")[0].strip()
    text = text or type(error).__name__
    return f"{key}: {text}" if key and key not in text else text


class Overrides:
    """The checks of one command's configuration. ``overrides``: as on the command line, sweeps included."""

    def __init__(self, loader: ConfigLoaderImpl, config_name: str, overrides: Sequence[str]) -> None:
        self.loader, self.config_name = loader, config_name
        self.overrides = list(overrides)
        self._bases: dict[tuple[str, ...], DictConfig] = {}
        self._composed: dict[tuple[str, ...], DictConfig] = {}

    def options(self, group: str) -> list[str]:
        return sorted(self.loader.get_group_options(group, ObjectType.CONFIG))

    def groups(self, parent: str = "") -> list[str]:
        """Every config group that has options, nested ones too, Hydra's own left out."""
        names = [f"{parent}/{g}".lstrip("/") for g in self.loader.list_groups(parent)]
        names = [name for name in names if name != "hydra"]
        return [g for name in names for g in ([name] if self.options(name) else []) + self.groups(name)]

    def _is_group(self, key: str) -> bool:
        return bool(self.options(key)) or bool(self.loader.list_groups(key))

    def parse(self, overrides: Sequence[str]) -> list[Override]:
        """Raises UserError for what is no ``key=value``."""
        parsed = []
        for text in overrides:
            try:
                parsed += OverridesParser.create(config_loader=self.loader).parse_overrides([text])
            except HydraException as error:
                detail = str(error).splitlines()[0]
                raise UserError(
                    f"{text!r} is no key=value: {detail}; quote values with special characters: '{text.split('=')[0]}=\"...\"'"
                ) from error
        return parsed

    def combinations(self, *, multirun: bool) -> list[list[str]]:
        """The overrides of every run: one without ``multirun``, else what the basic sweeper will make of them.

        Values that only a sampler can choose (``interval(...)``) are left at their defaults here.
        """
        parsed = self.parse(self.overrides)
        if not multirun:
            for override in parsed:
                if override.is_sweep_override():
                    text = override.input_line
                    raise UserError(
                        f"{text} sweeps: add -m to run every value, or quote it to mean one value, '{override.key_or_group}=\"{override.get_value_string()}\"'"
                    )
        hydra_overrides = [str(o.input_line) for o in parsed if o.is_hydra_override()]
        params = self._sweeper_params(hydra_overrides)
        if not multirun:
            if params:
                raise UserError(f"the configs sweep {', '.join(params)}: add -m to run every combination")
            return [self.overrides]
        self._check_swept_once(params, parsed)
        swept = [o for o in self.parse(params) + parsed if not o.is_hydra_override()]
        discrete = [o for o in swept if not o.is_sweep_override() or o.is_discrete_sweep()]
        runs = BasicSweeper.split_arguments(discrete, None)[0]
        return [hydra_overrides + list(run) for run in runs]

    def _sweeper_params(self, hydra_overrides: list[str]) -> list[str]:
        """What configs, rather than the command line, sweep."""
        groups = [str(o.input_line) for o in self.parse(self.overrides) if self._chooses(o)]
        groups = [group for group in groups if group not in hydra_overrides]
        try:
            config = self.loader.load_configuration(
                self.config_name, hydra_overrides + groups, RunMode.MULTIRUN
            )
        except (ConfigCompositionException, HydraException, ValueError):
            return []  # the same fault shows in the check of the runs, which explains it
        params = OmegaConf.select(config, "hydra.sweeper.params") or {}
        return [f"{key}={value}" for key, value in params.items()]

    def _check_swept_once(self, params: list[str], typed: list[Override]) -> None:
        """A key that configs sweep and the command line sets would run one combination many times. Raises UserError."""
        keys = {o.key_or_group for o in typed}
        for param in params:
            key = param.split("=")[0]
            if key in keys:
                raise UserError(
                    f"{key} is swept by the configs ({param}) and set on the command line too: leave one of them out, "
                    f"or sweep other values with hydra.sweeper.params.{key}=..."
                )

    def _chooses(self, override: Override) -> bool:
        return override.package is not None or self._is_group(override.key_or_group)

    def compose(self, overrides: list[str]) -> DictConfig:
        """The config of one run, Hydra's part included; the same one for the same overrides, since a sweep's arms are asked
        for more than once. Raises UserError with one line a problem."""
        known = tuple(overrides)
        if known in self._composed:
            return self._composed[known]
        problems = [text for o in self.parse(overrides) if (text := self._option_problem(o)) is not None]
        if not problems:
            base = self._base(overrides)
            problems = [
                text for o in self.parse(overrides) if (text := self._key_problem(o, base)) is not None
            ]
        if problems:
            raise UserError("\n".join(dict.fromkeys(problems)))
        self._composed[known] = self._load(overrides)
        return self._composed[known]

    def _load(self, overrides: list[str]) -> DictConfig:
        try:
            return self.loader.load_configuration(self.config_name, list(overrides), RunMode.RUN)
        except (HydraException, OmegaConfBaseException) as error:
            detail = reason(error)
            shown = str(error).strip().splitlines()
            prefix = f"{shown[0]}: " if shown and shown[0] not in detail else ""
            raise UserError(f"{prefix}{detail}") from error

    def _base(self, overrides: list[str]) -> DictConfig:
        """The config of the chosen options without values from the command line."""
        chosen = tuple(str(o.input_line) for o in self.parse(overrides) if self._chooses(o))
        if chosen not in self._bases:
            self._bases[chosen] = self._load(list(chosen))
        return self._bases[chosen]

    def _option_problem(self, override: Override) -> str | None:
        group = override.key_or_group
        options = self.options(group)
        if not options or override.is_delete():
            return None
        value = override.value()
        values = value if isinstance(value, list) else [value]
        for option in values:
            if not isinstance(option, str) or option not in options:
                close = did_you_mean(str(option), options) or "."
                return f"{group}={option}: no such option{close} Options of {group}: {', '.join(options)}"
        return None

    def _key_problem(self, override: Override, base: DictConfig) -> str | None:
        if self._chooses(override):
            return None
        key = override.key_or_group
        if _has(base, key):
            return None
        added = override.type in (OverrideType.ADD, OverrideType.FORCE_ADD)
        # Below a node, its class says what it takes; a new key at the top would be read by nothing
        if added and "." in key and _has(base, key.split(".")[0]):
            return None
        known = [k for k in keys_of(base) if k != "hydra" and not k.startswith("hydra.")]
        if key.startswith("hydra."):
            known = [k for k in keys_of(base) if k.startswith("hydra.")]
        return self._unknown_key(override, base, known)

    def _unknown_key(self, override: Override, base: DictConfig, known: list[str]) -> str:
        key = override.key_or_group
        text = f"{override.get_key_element()}: no such key in {self.config_name}"
        parent = key.rsplit(".", 1)[0] if "." in key else ""
        inside = bool(parent) and _has(base, parent)
        target = OmegaConf.select(base, f"{parent}._target_") if inside else None
        added = (
            f". An argument of {target} that the config leaves out is set with +{key}=..." if target else ""
        )
        owners = self._owners(key)
        if owners:
            shown = []
            for group, options in owners.items():
                chosen = OmegaConf.select(base, f"hydra.runtime.choices.{group}")
                now = f" (this is {group}={chosen})" if chosen is not None else ""
                shown.append(f"{group}={'|'.join(options)} has it{now}")
            return f"{text}; {'; '.join(shown)}{added}"
        if inside:
            siblings = [k for k in known if k.startswith(f"{parent}.") and "." not in k[len(parent) + 1 :]]
            close = did_you_mean(key, siblings) or f"; {parent} has {', '.join(_tails(siblings))}"
            return f"{text}{close}{added if close.startswith('; ' + parent) else ''}"
        close = did_you_mean(key, known + self.groups())
        return text + (close or f"; the top-level keys are {', '.join(k for k in known if '.' not in k)}")

    def _owners(self, key: str) -> dict[str, list[str]]:
        """Group -> the options that define ``key`` where they are chosen."""
        owners: dict[str, list[str]] = {}
        for group in self.groups():
            for option in self.options(group):
                loaded = self.loader.repository.load_config(f"{group}/{option}")
                if loaded is None:
                    continue
                package = loaded.header.get("package") or group.replace("/", ".")
                prefix = "" if package == "_global_" else f"{package}."
                if key.startswith(prefix) and _has(loaded.config, key[len(prefix) :]):
                    owners.setdefault(group, []).append(option)
        return owners


def _tails(keys: Sequence[str]) -> list[str]:
    return [key.rsplit(".", 1)[-1] for key in keys if not key.endswith("._target_")]


def _has(config: Any, key: str) -> bool:
    """Whether the dotted ``key`` exists, whatever its value (null, ??? and interpolations are values)."""
    node = config
    for part in key.replace("[", ".").replace("]", "").split("."):
        if node is not None and node._is_interpolation():
            node = node._dereference_node()
        if isinstance(node, ListConfig) and part.isdigit() and int(part) < len(node):
            node = node._get_node(int(part))
        elif isinstance(node, DictConfig) and part in _keys(node):
            node = node._get_node(part)
        else:
            return False
    return True


def _keys(node: DictConfig) -> list[Any]:
    """The keys of a node; ``key in node`` would leave out those without a value."""
    return [] if node._is_none() or node._is_missing() else list(node.keys())


def resolved(config: DictConfig) -> dict[str, Any]:
    """The command's part of a config, every interpolation resolved. Raises UserError for what is missing."""
    shown = OmegaConf.masked_copy(config, [str(k) for k in config if k != "hydra"])
    try:
        missing = sorted(map(str, OmegaConf.missing_keys(shown)))
        container = None if missing else OmegaConf.to_container(shown, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(reason(error)) from error
    if missing:
        raise UserError("\n".join(f"{key} has no value and no default: give {key}=..." for key in missing))
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def literal(config: DictConfig) -> DictConfig:
    """The command's part of a config with every interpolation replaced by its value of this moment: what is checked
    is then what is used. Raises UserError for what is missing, or would be read as something else."""
    values = resolved(config)
    fixed = OmegaConf.create(_escaped(values))
    if repr(OmegaConf.to_container(fixed, resolve=True)) != repr(values):
        raise UserError(
            "a value of the config is neither text nor number nor list nor mapping; write it plainly"
        )
    OmegaConf.set_struct(fixed, True)
    return fixed


def _escaped(value: Any) -> Any:
    """``${`` in texts becomes ``\\${``, and backslashes before it are doubled: no interpolation."""
    if isinstance(value, dict):
        return {key: _escaped(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_escaped(inner) for inner in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value
