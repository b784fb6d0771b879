"""qtrain analyze: what quantization does at a checkpoint, at fixed weights on a fixed batch, in float32.

    qtrain analyze gradients run=FOLDER "recipes=[trained,'all_gemms w=int4_row',quest_w4a4]"
    qtrain analyze sharpness run=[FOLDER,FOLDER]

gradients: cosine, magnitude alignment, bias and variance over draws of y, dx and dW against high precision, layer by layer.
sharpness: m-sharpness and the top eigenvalue of the Hessian, of each run under each recipe. A recipe is a name of
configs/recipe with its knobs behind it, or ``trained``: the one of the run. The batch are the run's first validation windows.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from .evaluate import trusted_config
from .named_recipes import TRAINED, recipe_config
from .train import plain

if TYPE_CHECKING:
    from torch import Tensor, nn

    from qtrain.analysis.sharpness_page import Sharpness
    from qtrain.training.saved import TrainedRun

CONFIG = "analyze"
POSITIONAL = "what"
DEFAULT_RECIPES = {"gradients": [TRAINED], "sharpness": [TRAINED, "none"]}
_SIZES = ("batch_sequences", "micro_batches", "draws", "rows", "ascent_steps", "iterations")


def _runs(config: dict[str, Any]) -> list[str]:
    return list(config["run"]) if isinstance(config["run"], list) else [config["run"]]


def _recipes(config: dict[str, Any]) -> list[str]:
    return list(config["recipes"] or DEFAULT_RECIPES[config["what"]])


def check(cfg: DictConfig) -> None:
    """Raises ValueError for values that cannot be right, among them runs that are not there, UserError for recipes."""
    from qtrain.quant import ModelRecipe
    from qtrain.training.assembly import build
    from qtrain.training.saved import chosen_checkpoint

    config = plain(cfg)
    if config["what"] not in DEFAULT_RECIPES:
        raise ValueError(f"what={config['what']!r}: allowed are {' and '.join(DEFAULT_RECIPES)}")
    runs = _runs(config)
    if config["what"] == "gradients" and len(runs) != 1:
        raise ValueError(f"run={runs}: gradients are those of one checkpoint; name one run")
    for run in runs:
        chosen_checkpoint(run, config["checkpoint"])
    for key in _SIZES:
        least = {"iterations": 2, "rows": 0}.get(key, 1)
        if not isinstance(config[key], int) or config[key] < least:
            raise ValueError(f"{key}={config[key]!r}: must be a whole number of at least {least}")
    for key in ("rho", "difference_step"):
        if not isinstance(config[key], int | float) or not 0 < config[key] < 1:
            raise ValueError(
                f"{key}={config[key]!r}: a share of the weights' norm, between 0 and 1, such as 0.005"
            )
    for text in _recipes(config):
        if text != TRAINED and not isinstance(
            build(recipe_config(text, config["allow_targets"])), ModelRecipe
        ):
            raise TypeError(
                f"recipes: {text!r} is no qtrain.quant.ModelRecipe, as the files in configs/recipe are"
            )


def run(cfg: DictConfig) -> int:
    """Analyze, print and save."""
    from rich.console import Console

    from qtrain.training.run_folder import versions, write_json

    config = plain(cfg)
    analysis = {"gradients": _gradients, "sharpness": _sharpness}[config["what"]]
    folder, shown, numbers, draw = analysis(config)
    folder.mkdir(parents=True, exist_ok=True)
    name = config["what"]
    write_json(folder / f"{name}.json", {**numbers, "config": config, "versions": versions()})
    partial = folder / f".{name}.partial.png"
    draw(partial)
    partial.replace(folder / f"{name}.png")
    Console(width=None if Console().is_terminal else 170, markup=False).print(shown)
    print(f"files: {folder / name}.json, {folder / name}.png")
    return 0


_Analysis = tuple[Path, Any, dict[str, Any], Callable[[Path], None]]


def _opened(config: dict[str, Any], run: str | None, recipe: str) -> TrainedRun:
    """The checkpoint of ``run``, to be built under that recipe."""
    from qtrain.training.saved import chosen_checkpoint, trained_run

    path = chosen_checkpoint(run, config["checkpoint"])
    trusted_config(path, config["allow_targets"])
    changes: dict[str, Any] = {"device": config["device"]}
    if recipe != TRAINED:
        changes["recipe"] = recipe_config(recipe, config["allow_targets"])
    return trained_run(path, changes)


def _batches(trained: TrainedRun, sizes: list[int]) -> list[dict[str, Tensor]]:
    """Micro-batches of the first validation windows: ``input`` and ``target`` [B, S]. Raises ValueError for too few."""
    import torch

    from qtrain.training.assembly import resolved_device
    from qtrain.training.datamodule import WindowsDataModule, open_corpus

    data = WindowsDataModule(trained.parts, open_corpus(trained.parts, trained.checkpoint["qtrain"]["data"]))
    if sum(sizes) > len(data.val):
        raise ValueError(
            f"{sum(sizes)} sequences wanted, and the run has {len(data.val)} validation windows; lower batch_sequences or micro_batches"
        )
    device, found, at = resolved_device(trained.parts.settings.device), [], 0
    for size in sizes:
        windows = [data.val[i] for i in range(at, at + size)]
        found.append({k: torch.stack([w[k] for w in windows]).to(device) for k in ("input", "target")})
        at += size
    return found


def _loss_on(batch: dict[str, Tensor]) -> Callable[[nn.Module], Tensor]:
    from torch.nn.functional import cross_entropy

    def loss_of(model: nn.Module) -> Tensor:
        return cross_entropy(model(batch["input"]).float().flatten(0, 1), batch["target"].flatten())

    return loss_of


def _model(trained: TrainedRun) -> nn.Module:
    from qtrain.training.assembly import resolved_device
    from qtrain.training.evaluation import trained_module

    module = trained_module(trained)
    return module.model.to(resolved_device(trained.parts.settings.device)).eval()


def _gradients(config: dict[str, Any]) -> _Analysis:
    from qtrain.analysis import gradients_page as page
    from qtrain.analysis.gradients import gradient_study
    from qtrain.training.assembly import build

    (run,) = _runs(config)
    trained = _opened(config, run, TRAINED)
    recipes = {}
    for text in _recipes(config):
        recipes[text] = (
            trained.parts.recipe if text == TRAINED else build(recipe_config(text, config["allow_targets"]))
        )
    batch = _batches(trained, [config["batch_sequences"]])[0]
    model = _model(_opened(config, run, "none"))
    study = gradient_study(model, recipes, _loss_on(batch), draws=config["draws"], seed=config["seed"])
    folder = Path(config["out"] or trained.folder / "analysis")
    title = f"{trained.path}: {batch['input'].numel():,} tokens"
    numbers = {"checkpoint": str(trained.path), "step": trained.step, "recipes": page.as_json(study)}
    return (
        folder,
        page.table(study, config["rows"]),
        numbers,
        lambda path: page.picture(study, title, path),
    )


def _sharpness(config: dict[str, Any]) -> _Analysis:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from qtrain.analysis import sharpness_page as page

    found = []
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        for run in _runs(config):
            found += [_of_checkpoint(config, run, recipe) for recipe in _recipes(config)]
    folder = Path(config["out"] or _opened(config, _runs(config)[0], TRAINED).folder / "analysis")
    title = f"{config['micro_batches']} micro-batches of {config['batch_sequences']} sequences, rho = {config['rho']:g}"
    numbers = {"found": page.as_json(found)}
    return folder, page.table(found), numbers, lambda path: page.picture(found, title, path)


def _of_checkpoint(config: dict[str, Any], run: str | None, recipe: str) -> Sharpness:
    from qtrain.analysis.sharpness import m_sharpness, top_eigenvalue
    from qtrain.analysis.sharpness_page import Sharpness

    trained = _opened(config, run, recipe)
    model = _model(trained)
    losses = [_loss_on(b) for b in _batches(trained, [config["batch_sequences"]] * config["micro_batches"])]
    sharpness = m_sharpness(
        model, losses, rho=config["rho"], steps=config["ascent_steps"], seed=config["seed"]
    )
    top = top_eigenvalue(
        model,
        losses,
        iterations=config["iterations"],
        step=config["difference_step"],
        seed=config["seed"],
    )
    folder = trained.folder
    return Sharpness(f"{folder.parent.name}/{folder.name}", recipe, sharpness, top)
