"""Who may import whom, read from the source: imports inside functions count, ``if TYPE_CHECKING`` too.

    commands -> training, methods, analysis -> nn, optim, data, models -> quant -> qtrain_kernels

``cluster`` imports the standard library alone, and training, analysis and commands may import it. Each heavy or
optional library stands in its own place. ``breaches`` takes sources, so that it is tested on sources that break each rule.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIMIT_FILE, LIMIT_FUNCTION = 400, 80  # lines; bodies of Triton kernels are not counted

LOWEST = {"quant", "kernels"}
MIDDLE = {"nn", "optim", "data", "models"}
UPPER = {"training", "methods", "analysis", "cluster"}
# room -> the rooms that it may import besides itself
ROOMS: dict[str, set[str]] = {
    "kernels": set(),
    "quant": {"kernels"},
    "cluster": set(),
    "models": {"kernels"},  # a model knows nothing of quantization
    **dict.fromkeys(("nn", "optim", "data"), LOWEST),
    "methods": LOWEST | MIDDLE,
    "analysis": LOWEST | MIDDLE | {"cluster"},
    "training": LOWEST | MIDDLE | {"analysis", "methods", "cluster"},
    "commands": LOWEST | MIDDLE | UPPER,
    "top": {"commands", "cluster"},
}
# library -> rooms or files that may import it; a library that is not named here may stand anywhere
LIBRARIES: dict[str, tuple[str, ...]] = {
    "lightning": ("training",),
    "pytorch_lightning": (),  # the same library under its old name
    "hydra": ("commands", "top"),
    "omegaconf": ("commands", "top"),
    "bitsandbytes": ("qtrain/optim/bnb.py", "kernels/qtrain_kernels/adamw_problems.py"),
    "wandb": ("training", "qtrain/analysis/wandb_runs.py", "qtrain/analysis/comparison_wandb.py"),
    "wandb_workspaces": ("qtrain/analysis/comparison_wandb.py",),
    "triton": ("kernels",),
}
BAD_NAMES = ("utils.py", "helpers.py", "misc.py", "common.py")
QUANT_MAY = {"torch", "qtrain", "qtrain_kernels", *sys.stdlib_module_names}


def room_of(path: str) -> str:
    parts = path.split("/")
    if parts[0] == "kernels":
        return "kernels"
    return parts[1] if len(parts) > 2 else "top"


def imports(path: str, source: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything imported in ``source``, relative imports made absolute."""
    package = path.removeprefix("kernels/").split("/")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # ``from qtrain import nn`` names a room as much as ``import qtrain.nn``
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).split(".")[-1] == "import_module"
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            yield node.lineno, str(node.args[0].value)


def _import_breach(path: str, name: str) -> str | None:
    room, parts = room_of(path), name.split(".")
    top = parts[0]
    target = None
    if top == "qtrain_kernels":
        target = "kernels"
    elif top == "qtrain" and len(parts) > 1 and parts[1] in ROOMS:
        target = parts[1]
    if room == "kernels" and top == "qtrain":
        return "kernels never import qtrain"
    if room == "quant" and top not in QUANT_MAY:
        return "quant imports torch and the standard library alone"
    if room == "quant" and target == "kernels" and parts[1] != "counter_hash":
        return "of the kernels, quant imports counter_hash alone"
    if room == "cluster" and top not in {"qtrain", *sys.stdlib_module_names}:
        return "cluster imports the standard library alone"
    if target is not None and target != room and target not in ROOMS[room]:
        return f"{room} may import {', '.join(sorted(ROOMS[room])) or 'no other room'}"
    allowed = LIBRARIES.get(top)
    if allowed is not None and room not in allowed and path not in allowed:
        return f"{top} belongs to {', '.join(allowed) or 'nobody'}"
    return None


def _is_triton(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("triton" in ast.unparse(d) for d in function.decorator_list)


def breaches(sources: Mapping[str, str]) -> list[str]:
    """A line a breach. sources: path from the repository's root, with slashes -> text."""
    found = []
    for path, source in sources.items():
        found += [
            f"{path}:{line}: imports {name}: {why}"
            for line, name in imports(path, source)
            if (why := _import_breach(path, name)) is not None
        ]
        if path.split("/")[-1] in BAD_NAMES:
            found.append(f"{path}: a file is named after what it knows")
        exempt = 0
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if _is_triton(node):
                    exempt += lines
                elif lines > LIMIT_FUNCTION:
                    found.append(f"{path}:{node.lineno}: {node.name} has {lines} lines of {LIMIT_FUNCTION}")
        lines = len(source.splitlines()) - exempt
        if lines > LIMIT_FILE:
            found.append(f"{path}: {lines} lines of {LIMIT_FILE}")
    return found


def the_sources() -> dict[str, str]:
    files = [*(ROOT / "qtrain").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    return {str(p.relative_to(ROOT).as_posix()): p.read_text(encoding="utf-8") for p in sorted(files)}


def test_nobody_imports_what_is_not_theirs() -> None:
    sources = the_sources()
    assert len(sources) > 30
    assert breaches(sources) == []


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("kernels/qtrain_kernels/a.py", "import qtrain.quant", "kernels never import qtrain"),
        ("kernels/qtrain_kernels/a.py", "def f():\n    from qtrain import quant", "kernels never import qtrain"),
        ("qtrain/quant/a.py", "from qtrain.nn import linear", "quant may import kernels"),
        ("qtrain/quant/a.py", "from qtrain import nn", "quant may import kernels"),
        ("qtrain/quant/formats/a.py", "from ...nn.linear import X", "quant may import kernels"),
        ("qtrain/quant/a.py", "import numpy", "torch and the standard library alone"),
        ("qtrain/quant/a.py", "from qtrain_kernels.quantize_rows import X", "counter_hash alone"),
        ("qtrain/quant/a.py", "import qtrain_kernels.op", "counter_hash alone"),
        ("qtrain/models/a.py", "from qtrain.quant import QuantSpec", "models may import kernels"),
        ("qtrain/models/a.py", "from ..nn import surgery", "models may import kernels"),
        ("qtrain/nn/a.py", "from qtrain.optim import AdamW", "nn may import kernels, quant"),
        ("qtrain/nn/a.py", "from qtrain.training import fit", "nn may import"),
        ("qtrain/data/a.py", "import importlib\nimportlib.import_module('qtrain.training.fit')", "data may import"),
        ("qtrain/training/a.py", "from qtrain.commands import train", "training may import"),
        ("qtrain/nn/a.py", "def f():\n    import lightning", "lightning belongs to training"),
        ("qtrain/cluster/a.py", "import numpy", "cluster imports the standard library alone"),
        ("qtrain/cluster/a.py", "from qtrain.training import x", "cluster may import no other room"),
        ("qtrain/nn/a.py", "from qtrain.cluster import queue", "nn may import"),
        ("qtrain/commands/a.py", "from lightning.pytorch import Trainer", "lightning belongs to training"),
        ("qtrain/training/a.py", "import pytorch_lightning", "belongs to nobody"),
        ("qtrain/training/a.py", "from omegaconf import DictConfig", "omegaconf belongs to commands, top"),
        ("qtrain/training/a.py", "def f():\n    import hydra.utils", "hydra belongs to"),
        ("qtrain/optim/adamw.py", "import bitsandbytes as b", "bitsandbytes belongs to qtrain/optim/bnb.py"),
        ("qtrain/analysis/error.py", "import wandb", "wandb belongs to training"),
        ("qtrain/nn/a.py", "import triton.language as tl", "triton belongs to kernels"),
        ("qtrain/nn/utils.py", "", "named after what it knows"),
        ("qtrain/nn/a.py", "x = 1\n" * (LIMIT_FILE + 1), f"{LIMIT_FILE + 1} lines of {LIMIT_FILE}"),
        ("qtrain/nn/a.py", "def f():\n" + "    x = 1\n" * LIMIT_FUNCTION, f"f has {LIMIT_FUNCTION + 1} lines"),
    ],
)  # fmt: skip
def test_a_breach_is_found(path: str, source: str, expected: str) -> None:
    found = breaches({path: source})
    assert len(found) == 1, found
    assert path in found[0]
    assert expected in found[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "qtrain/quant/a.py",
            "from qtrain_kernels.counter_hash import uniform\nimport math, torch\nfrom . import spec",
        ),
        ("qtrain/optim/bnb.py", "import bitsandbytes"),
        ("qtrain/analysis/wandb_runs.py", "import wandb\nfrom qtrain.data import shards"),
        ("qtrain/training/a.py", "import lightning, wandb\nfrom qtrain.nn.surgery import apply_recipe"),
        ("qtrain/commands/a.py", "import hydra\nfrom qtrain.training.fit import train"),
        ("qtrain/cli.py", "import hydra\nfrom qtrain.commands import ENTRIES"),
        ("qtrain/nn/a.py", "from .surgery import X\nfrom qtrain.quant.spec import QuantSpec\nimport qtrain"),
        (
            "kernels/qtrain_kernels/a.py",
            "import triton\n@triton.jit\ndef _k_kernel():\n" + "    x = 1\n" * (LIMIT_FILE + 1),
        ),
    ],
)
def test_what_is_allowed_passes(path: str, source: str) -> None:
    assert breaches({path: source}) == []


HEAVY = (
    "wandb",
    "datasets",
    "bitsandbytes",
    "lightning",
    "transformers",
    "pyarrow",
    "triton",
    "hydra",
    "plotly",
)
IMPORT_ALL = """
import importlib, pkgutil, sys
room = importlib.import_module(sys.argv[1])
if "alone" not in sys.argv:
    for found in pkgutil.walk_packages(room.__path__, room.__name__ + "."):
        importlib.import_module(found.name)
print(*(name for name in sys.modules if "." not in name))
"""


def loaded_after(*arguments: str) -> set[str]:
    """The top-level modules in a fresh process after importing a room with every module of it, or ``alone``."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, *arguments], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(done.stdout.split())


@pytest.mark.parametrize("room", ["cluster", "quant", "nn", "optim", "models", "data", "methods", "analysis"])
def test_rooms_import_nothing_heavy(room: str) -> None:
    assert loaded_after(f"qtrain.{room}") & set(HEAVY) == set()


def test_import_qtrain_costs_nothing() -> None:
    assert loaded_after("qtrain", "alone") & {*HEAVY, "torch", "numpy"} == set()


def test_kernels_import_no_triton_until_a_kernel_runs() -> None:
    """On a machine without it, the eager references work."""
    assert loaded_after("qtrain_kernels", "alone") & {*HEAVY, "torch"} == set()


def test_commands_import_hydra_at_most() -> None:
    """So that a misspelt key is refused before torch is loaded."""
    assert loaded_after("qtrain.commands") & {*HEAVY, "torch"} <= {"hydra"}


def test_training_imports_lightning_and_no_optional_library() -> None:
    # Lightning itself imports torch._dynamo, and that triton; torchmetrics, and that transformers: where installed
    ours = loaded_after("qtrain.training") - loaded_after("lightning", "alone")
    assert ours & set(HEAVY) == set()
