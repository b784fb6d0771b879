"""train: a run from its parts to its folder."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import WandbLogger

from qtrain.data.corpus import PreparedCorpus
from qtrain.data.manifest import TOKENIZER
from qtrain.data.read_ahead import StreamError
from qtrain.data.shards import ShardError

from .assembly import Assembly, build, resolved_device
from .baselines import ReferenceRun, reference_run, trigram_loss
from .callbacks.checkpoint import CheckpointWriter, of_storage, storage_verdict
from .callbacks.metrics_jsonl import METRICS, MetricsJSONL, read_metrics
from .checkpoints import checkpoint_name
from .datamodule import WindowsDataModule, open_corpus
from .host_memory import keep_freed_memory
from .low_bit import summary_of
from .module import QuantizedTransformer
from .plot import plot_losses
from .processes import ProcessSettings, by_rank_zero, rank, rank_zero_first, world_size
from .report import (
    NO_TOKENIZER,
    fused_tensors,
    optimizer_state_bytes,
    print_report,
    sample_text,
    summarize,
)
from .resume import Start, refusing, start_run
from .run_folder import (
    CENSUS,
    CHECKPOINTS,
    SUMMARY,
    VERDICT,
    WINDOW_LOSSES,
    write_array,
    write_json,
    write_text,
)
from .settings import PRECISIONS
from .strategy import ConnectedProcesses, make_strategy
from .verdict import RunStopped, Verdict
from .wandb_logger import make_logger

# Of Lightning's warnings, those that do not concern windows out of shards.
_NOT_OURS = (".*does not have many workers.*", ".*LeafSpec.*", ".*TreeSpec.*", ".*srun.*")


def quiet_lightning() -> None:
    """Lightning's banners and hints off; its warnings stay, but for those about loaders without workers."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in _NOT_OURS:
        warnings.filterwarnings("ignore", message=message)


def make_trainer(parts: Assembly, folder: Path, **more: Any) -> Trainer:
    """The Trainer of a run, an evaluation or a sample, in one process unless ``more`` says otherwise. more: further
    arguments of Lightning's Trainer."""
    quiet_lightning()
    settings, device = parts.settings, resolved_device(parts.settings.device)
    arguments = {
        "accelerator": {"cuda": "gpu", "cpu": "cpu"}[device],
        "devices": 1,
        "precision": PRECISIONS[settings.precision],
        "default_root_dir": folder,
        "plugins": [CheckpointWriter()],
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "inference_mode": False,  # validation under no_grad, as the compiled graph knows it
        "num_sanity_val_steps": 0,
        **ProcessSettings.others(parts.config["trainer"]),
        "logger": False,
    }
    return Trainer(**{**arguments, **more})


def _training_trainer(parts: Assembly, folder: Path, logger: Any, callbacks: list[Callback]) -> Trainer:
    settings, processes = parts.settings, parts.processes
    accumulate = settings.accumulate(parts.world_size)
    return make_trainer(
        parts,
        folder,
        devices=processes.devices,
        num_nodes=processes.num_nodes,
        strategy=make_strategy(processes),
        plugins=[CheckpointWriter(), ConnectedProcesses()],
        max_steps=settings.steps,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        check_val_every_n_epoch=None,
        val_check_interval=settings.eval_every_steps * accumulate,
        log_every_n_steps=1,
        logger=logger if logger is not None else False,
        callbacks=callbacks,
    )


def train(parts: Assembly) -> tuple[Verdict, Path]:
    """Trains, evaluates and reports. Returns how it ended and the run's folder. Of several processes, which are
    connected already, all call this; rank 0 alone writes and prints.

    Raises StartRefused, before anything is trained, for data, a baseline or a checkpoint that do not fit.
    """
    begun, settings = time.perf_counter(), parts.settings
    if resolved_device(settings.device) == "cpu":
        keep_freed_memory()
    with refusing():
        reference = None if settings.baseline is None else reference_run(settings.baseline, settings.out)
        data = WindowsDataModule(parts, rank_zero_first(lambda: open_corpus(parts)))
        data.train_windows()
        if reference is not None:
            reference.check_comparable(data.identity())
    callbacks = [build(c) for c in parts.config["callbacks"].values()]
    with ExitStack() as held:
        start = by_rank_zero(lambda: start_run(parts, data.identity(), held))
        if start.finished:
            message = f"the run was completed before, at step {start.step}"
            return Verdict(outcome="completed", step=start.step, message=message), start.folder
        return _run(parts, data, callbacks, reference, start, begun), start.folder


def _run(
    parts: Assembly,
    data: WindowsDataModule,
    callbacks: list[Callback],
    reference: ReferenceRun | None,
    start: Start,
    begun: float,
) -> Verdict:
    folder, config, first = start.folder, parts.config, rank() == 0
    logger = (
        make_logger(config["logger"], config, folder, parts.settings.name, start.run_id) if first else None
    )
    if first and data.corpus.tokenizer is not None:
        data.corpus.tokenizer.save(folder / TOKENIZER)
    module = QuantizedTransformer(parts, continues=start.checkpoint is not None)
    trainer = _training_trainer(parts, folder, logger, callbacks)
    try:
        verdict = _fit(trainer, module, data, start)
        if verdict.good:
            broken = _reported(parts, trainer, module, data, reference, start, begun)
            verdict = broken or verdict
        if first:
            verdict = _written(trainer, verdict)
    finally:
        data.close()
        _close(trainer)
    return verdict


def _fit(trainer: Trainer, module: QuantizedTransformer, data: Any, start: Start) -> Verdict:
    try:
        trainer.fit(module, data, ckpt_path=start.checkpoint, weights_only=True)
        step = trainer.global_step
        if len(module.window_losses) == 0 or step % module.settings.eval_every_steps:
            trainer.validate(module, data, verbose=False)
    except RunStopped as stopped:
        return stopped.verdict
    except (ShardError, StreamError) as error:  # cut while they were read; out of reach
        outcome = "data_changed" if isinstance(error, ShardError) else "data_unavailable"
        verdict = Verdict(outcome=outcome, step=trainer.global_step, message=str(error))
        if world_size() > 1:  # the others have not met it and wait for this process: its end ends them
            _written(trainer, verdict)
            raise
        return verdict
    except OSError as error:
        if not of_storage(trainer, error):
            raise
        return storage_verdict(trainer, str(error))
    return Verdict(outcome="completed", step=step, message=f"completed {step} steps")


def _reported(parts: Assembly, trainer: Trainer, *more: Any) -> Verdict | None:
    """``_report``, and a last look at the tokens: the final validation read them after the last checkpoint. A verdict
    where they, or the disk, do not let the run complete."""
    try:
        _report(parts, trainer, *more)
        if rank() == 0:
            trainer.datamodule.corpus.check_unchanged()  # type: ignore[attr-defined]
    except ShardError as error:
        return Verdict(outcome="data_changed", step=trainer.global_step, message=str(error))
    except OSError as error:
        if not of_storage(trainer, error):
            raise
        return storage_verdict(trainer, str(error))
    return None


def _written(trainer: Trainer, verdict: Verdict) -> Verdict:
    """``verdict``, once it is in the run's folder; where the disk refuses that, the verdict on it."""
    path = Path(trainer.default_root_dir) / VERDICT
    try:
        write_json(path, verdict.as_dict())
    except OSError as error:
        print(f"{path} could not be written: {error}", file=sys.stderr)
        return storage_verdict(trainer, str(error)) if verdict.good else verdict
    return verdict


def _close(trainer: Trainer) -> None:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, MetricsJSONL):
            callback.close()
    for logger in trainer.loggers:
        assert isinstance(logger, WandbLogger)
        logger.experiment.finish()


def _report(
    parts: Assembly,
    trainer: Trainer,
    module: QuantizedTransformer,
    data: WindowsDataModule,
    reference: ReferenceRun | None,
    start: Start,
    begun: float,
) -> None:
    # By all ranks: where the model is sharded, its forward is an act of all, and so is a sum over its states
    sample = NO_TOKENIZER
    if data.corpus.tokenizer is not None:
        sample = sample_text(module, data.corpus.tokenizer, parts.settings.sample, parts.settings.seed)
    low_bit = module.communication
    communication = None if low_bit is None else summary_of(parts, module.model, low_bit)
    sharded = parts.processes.sharding == "fsdp2"
    state_bytes = optimizer_state_bytes(trainer.optimizers[0], sharded=sharded)
    if rank() != 0:
        return
    folder = start.folder
    rows = read_metrics(folder / METRICS)
    # The n-gram counts grow with the vocabulary; on bytes they take seconds
    trigram = None
    corpus = data.corpus
    if isinstance(corpus, PreparedCorpus) and corpus.at_hand and corpus.tokenizer.kind == "byte":
        trigram = trigram_loss(corpus.shards, data.val)
    census = (
        json.loads((folder / CENSUS).read_text(encoding="utf-8")) if (folder / CENSUS).is_file() else None
    )
    summary = summarize(
        module,
        rows,
        data=data.identity(),
        tokens_per_byte=data.val.tokens_per_byte,
        trigram=trigram,
        reference=reference,
        state_bytes=state_bytes,
        fused_step=fused_tensors(trainer.optimizers[0]),
        census=None if census is None else census["summary"],
        communication=communication,
        linear_flops=None if census is None else census["eager"]["flops_summary"],
    )
    lines = {} if trigram is None else {"trigram": trigram}
    if reference is not None:
        lines[reference.label] = reference.val_loss
    subtitle = f"{describe_knobs(parts.config)}   validation {summary['val_loss']:.4f} nats/token"
    plot_losses(rows, lines, parts.settings.name, subtitle, folder / "loss.png")
    write_text(folder / "sample.txt", sample)
    write_array(folder / WINDOW_LOSSES, module.window_losses.cpu().numpy())
    summary.update(
        folder=str(folder),
        checkpoint=f"{CHECKPOINTS}/{checkpoint_name(trainer.global_step)}",
        resumed_from=None if start.checkpoint is None else str(start.checkpoint),
        wall_seconds=time.perf_counter() - begun,
    )
    write_json(folder / SUMMARY, summary)
    for logger in trainer.loggers:
        assert isinstance(logger, WandbLogger)
        finals = {k: v for k, v in summary.items() if isinstance(v, int | float) and math.isfinite(v)}
        logger.experiment.summary.update({f"final/{k}": v for k, v in finals.items()})
    print_report(summary, sample)


def describe_knobs(config: Mapping[str, Any]) -> str:
    """``w=.. a=.. g=.. m1=.. m2=..``: those of the short knobs that the recipe has."""
    found = {k: config[k] for k in ("w", "a", "g", "m1", "m2") if k in config}
    shown = {k: v.get("format") if isinstance(v, Mapping) else v for k, v in found.items()}
    return "  ".join(f"{k}={v}" for k, v in shown.items())
