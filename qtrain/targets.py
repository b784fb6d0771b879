"""Which code a config may name: classes of this package that are there to be built, and packages the user allows.

A config names code that will run, so a config from elsewhere may not name code of its choice. ``_target_`` names a
class of BUILDABLE, where it is defined or taken over: the rest of the package holds what runs a command line (which
would bring its own ``--allow-target``), imports or writes what its arguments say, and a function of it, called by a
config, is as good as any other code. ``module:Name`` in a spec names a plug-in. Names are looked up in the source, so
that nothing is imported; ``qtrain.data.sources.glob.os.remove`` has the right prefix as well.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from qtrain.overrides import UserError, did_you_mean

PACKAGE = Path(__file__).parent
# Where the classes are defined that configs may build: their constructors keep what they are given, or read text.
BUILDABLE = (
    "qtrain.data.prepared_folder",
    "qtrain.data.sources",
    "qtrain.data.streamed_text",
    "qtrain.data.token_files",
    "qtrain.models",
    "qtrain.optim",
    "qtrain.quant",
    "qtrain.training.callbacks",
)
# The shape of a plug-in; the numbers of group:128 or percentile:99 are no names.
_PLUG_IN = re.compile(r"([\w.]+):[^\W\d]\w*")
# Keys of free text, which nothing takes for a spec.
_TEXT = frozenset(
    {
        "baseline", "checkpoint", "data_folder", "entity", "folder", "init_from", "name", "out", "path", "paths", "project",
        "prompt", "resume", "root", "run", "separator", "tags", "tokenizer", "train", "val",
    }
)  # fmt: skip


def strings(node: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, value) of every value in a plain container that is no container; of ``_target_`` always."""
    if isinstance(node, dict):
        for key, value in node.items():
            here = f"{where}.{key}" if where else str(key)
            if key == "_target_":
                yield here, str(value)
            else:
                yield from strings(value, here)
    elif isinstance(node, list | tuple):
        for i, value in enumerate(node):
            yield from strings(value, f"{where}[{i}]")
    elif isinstance(node, str):
        yield where, node


def last_key(where: str) -> str:
    """``c`` of ``a.b.c`` and of ``a.b.c[0]``."""
    return where.rsplit(".", 1)[-1].split("[", 1)[0]


def is_allowed(name: str, allowed: Sequence[str]) -> bool:
    """Whether ``name`` lies in a package that the user allows."""
    return any(name.startswith(f"{package}.") or name == package for package in allowed)


def check_targets(container: dict[str, Any], allowed: Sequence[str] = ()) -> None:
    """Every ``_target_`` is a class of BUILDABLE and every plug-in of qtrain, or lies in a package of ``allowed``.
    Raises UserError. ``container``: plain and resolved."""
    for key, value in strings(container):
        if last_key(key) == "_target_":
            if not is_allowed(value, allowed):
                _check_target(key, value)
        elif (found := _PLUG_IN.fullmatch(value)) and last_key(key) not in _TEXT:
            module = found[1]
            if not is_allowed(module, (*allowed, "qtrain.quant.formats")):
                raise UserError(_foreign(key, value, module))


def _foreign(key: str, value: str, name: str) -> str:
    return (
        f"{key}={value}: configs may name classes of qtrain only; if you trust this one, allow its package with "
        f"--allow-target {name.split('.')[0]}"
    )


def _check_target(key: str, target: str) -> None:
    if not target.startswith("qtrain."):
        raise UserError(_foreign(key, target, target))
    problem = _target_problem(target)
    if problem is not None:
        raise UserError(f"{key}={target}: {problem}")


def _target_problem(target: str) -> str | None:
    """Why ``target`` is no class that configs may build; None where it is one."""
    if not all(part.isidentifier() for part in target.split(".")):
        return "no dotted name"
    module, parts = _split(target)
    if not module.is_file():
        return "no such module in this installation"
    where = _dotted(module)
    names = _names(module)
    if len(parts) != 1 or parts[0] not in names:
        wanted = ".".join(parts)
        classes = [name for name, kind in names.items() if kind != "function"]
        return f"{where} has no class {wanted!r}{did_you_mean(wanted, classes)}"
    kind = names[parts[0]]
    if kind == "function":
        return f"{parts[0]} is a function, and configs build classes only"
    if kind != "class":
        return _target_problem(kind)
    if not is_allowed(where, BUILDABLE):
        return f"configs build classes of {', '.join(BUILDABLE)} only"
    return None


def _split(target: str) -> tuple[Path, list[str]]:
    """(the file of the module, the names behind it) of ``qtrain.a.b.Name``."""
    folder, parts = PACKAGE, target.split(".")[1:]
    while parts and (folder / parts[0]).is_dir():
        folder, parts = folder / parts[0], parts[1:]
    if parts and (folder / f"{parts[0]}.py").is_file():
        return folder / f"{parts[0]}.py", parts[1:]
    return folder / "__init__.py", parts


def _dotted(module: Path) -> str:
    inside = module.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(["qtrain", *inside]).removesuffix(".__init__")


@lru_cache
def _names(module: Path) -> dict[str, str]:
    """Of a module: class -> "class", function -> "function", name taken over from this package -> where from."""
    names: dict[str, str] = {}
    package = _dotted(module) if module.name == "__init__.py" else _dotted(module).rpartition(".")[0]
    for node in ast.parse(module.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            names[node.name] = "class"
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names[node.name] = "function"
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            if origin == "qtrain" or origin.startswith("qtrain."):
                names.update({alias.asname or alias.name: f"{origin}.{alias.name}" for alias in node.names})
    return names
