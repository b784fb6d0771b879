"""Which ``_target_`` a config may name: classes and functions of this package, and of packages the user allows.

A config names code that will run, so a config from elsewhere may not name code of its choice. Names are looked up
in the source, so that nothing is imported; ``qtrain.data.prepare.os.remove`` has the right prefix as well.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from qtrain.overrides import UserError, did_you_mean

PACKAGE = Path(__file__).parent
HYDRA_TARGETS = ("hydra.", "hydra_plugins.")  # allowed below ``hydra`` alone, where Hydra checks them again


def targets(node: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, value) of every ``_target_`` in a plain container."""
    if isinstance(node, dict):
        for key, value in node.items():
            here = f"{where}.{key}" if where else str(key)
            if key == "_target_":
                yield here, str(value)
            yield from targets(value, here)
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from targets(value, f"{where}[{i}]")


def check_targets(container: dict[str, Any], allowed: Sequence[str] = ()) -> None:
    """Every ``_target_`` is a class or function of qtrain, or lies in a package of ``allowed``. Raises UserError."""
    for key, target in targets(container):
        if any(target.startswith(f"{package}.") for package in allowed):
            continue
        if key.startswith("hydra.") and target.startswith(HYDRA_TARGETS):
            continue
        if not target.startswith("qtrain."):
            package = target.split(".")[0]
            raise UserError(
                f"{key}={target}: configs may name classes of qtrain only; if you trust this one, allow its package with "
                f"--allow-target {package}"
            )
        problem = _target_problem(target)
        if problem is not None:
            raise UserError(f"{key}={target}: {problem}")


def _target_problem(target: str) -> str | None:
    """Why ``target`` is no class or function of this package; None where it is one."""
    folder, parts = PACKAGE, target.split(".")[1:]
    while parts and (folder / parts[0]).is_dir():
        folder, parts = folder / parts[0], parts[1:]
    module = folder / "__init__.py"
    if parts and (folder / f"{parts[0]}.py").is_file():
        module, parts = folder / f"{parts[0]}.py", parts[1:]
    if not module.is_file():
        return "no such module in this installation"
    names = _public_names(module)
    where = ".".join(["qtrain", *module.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")
    if not parts or parts[0] not in names:
        wanted = parts[0] if parts else ""
        return f"{where} has no class or function {wanted!r}{did_you_mean(wanted, names)}"
    return None


@lru_cache
def _public_names(module: Path) -> tuple[str, ...]:
    """Classes and functions that ``module`` defines or takes over from this package."""
    names = []
    for node in ast.parse(module.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.append(node.name)
        elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("qtrain.")):
            names += [alias.asname or alias.name for alias in node.names]
    return tuple(names)
