"""Hydra's launcher for SLURM: the arms of a sweep as one job array, by submitit.

An arm is a pickled call of this launcher with the arm's config, which runs the command on the node. What differs from
hydra-submitit-launcher's own:

- The config is the one that was composed, checked and submitted here. It is not composed again on the node, hours later
  and at each requeue, out of YAML that may have been edited since. Its interpolations (``${oc.env:...}``) are the node's to resolve.
- The array's shape follows from the runs (``qtrain.cluster.allocation``).
- A signal is the run's to answer, not submitit's: USR1, which qtrain takes (submitit's own is USR2), and the batch script
  asks for another attempt where one is due (``qtrain.cluster.requeue``).
- An arm's exit status is that of its job, so that SLURM's accounts say what failed, and no result is unpickled.
- ``SWEEP/sweep.json`` says which job is which run, and waiting shows what becomes of them.

Only ``qtrain.submission.register`` imports this, since both libraries are optional.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import submitit
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, filter_overrides, run_job, setup_globals
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher as Base
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from qtrain import interrupts
from qtrain.cluster.allocation import Request, Shape
from qtrain.cluster.sweep_file import SWEEP, Arm, write_sweep
from qtrain.cluster.waiting import wait_for
from qtrain.overrides import UserError
from qtrain.submission import run_folder, shape_of


class Taken(UserError):
    """SLURM has jobs of this sweep, or may have: not exit code 2, after which a script would submit them again."""

    exit_code = 1


class Refused(UserError):
    """No job was submitted."""


class SlurmLauncher(Base):
    """See configs/hydra/launcher/slurm.yaml for its arguments."""

    def __call__(self, composed: DictConfig, number: int, state: Any) -> JobReturn:
        """On a node: one process of arm ``number``, whose config is ``composed``, under Hydra's global ``state``. Ends the process,
        unless the exit status is 0."""
        try:
            with interrupts.listen():
                done = self._run(composed, number, state)
        except interrupts.Interrupted as stop:
            print(stop, file=sys.stderr)
            code = interrupts.exit_code(stop.signum)
            interrupts.end_soon(code)
            sys.exit(code)
        if done.status != JobStatus.COMPLETED:
            sys.exit(1)  # it has printed its trace
        if done.return_value:
            sys.exit(done.return_value)
        return done

    def _run(self, composed: DictConfig, number: int, state: Any) -> JobReturn:
        Singleton.set_state(state)
        setup_globals()
        with read_write(composed.hydra), open_dict(composed.hydra.job):
            composed.hydra.job.id, composed.hydra.job.num = submitit.JobEnvironment().job_id, number
        return run_job(
            hydra_context=self.hydra_context,
            task_function=self.task_function,
            config=composed,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Submits, and waits where that is asked for. Raises Refused where SLURM refuses the jobs, and Taken where it has taken them and
        that cannot be written down."""
        assert self.config is not None
        if initial_job_idx:
            raise UserError(
                "hydra.sweeper.max_batch_size cuts the sweep up, and an array is submitted whole: leave it out; "
                "hydra.launcher.array_parallelism says how many arms run at once"
            )
        composed, configs = zip(*(self._arm(i, words) for i, words in enumerate(job_overrides)), strict=True)
        asked = Request.of(self.params)
        shape = shape_of(configs, asked)
        sweep = Path(str(self.config.hydra.sweep.dir)).absolute()
        try:
            jobs = self._submit(composed, asked, shape)
        except Refused:
            (sweep / "multirun.yaml").unlink(missing_ok=True)  # Hydra's, of a sweep that is none
            with suppress(OSError):  # somebody has put something in it
                sweep.rmdir()
            raise
        arms = [
            Arm(number, job.job_id, _words(overrides, config), str(run_folder(config)), str(job.paths.stdout))
            for number, (job, overrides, config) in enumerate(zip(jobs, job_overrides, configs, strict=True))
        ]
        array = jobs[0].job_id.partition("_")[0]
        try:
            path = write_sweep(sweep, str(self.config.hydra.job.name), array, arms, Path.cwd())
        except OSError as error:
            raise Taken(_unrecorded(array, arms, sweep / SWEEP, error)) from error
        print(f"submitted job {array}: {len(arms)} run(s), {path}", flush=True)
        if asked.wait:
            codes = wait_for(arms, asked.poll_seconds)
        else:
            print(f"they run by themselves: qtrain status shows them, scancel {array} ends them")
            codes = [0] * len(arms)
        return [_ended(overrides, code) for overrides, code in zip(job_overrides, codes, strict=True)]

    def _arm(self, number: int, overrides: Sequence[str]) -> tuple[DictConfig, dict[str, Any]]:
        """The config of one arm, as Hydra composes it and plain."""
        from hydra.core.hydra_config import HydraConfig

        assert self.hydra_context is not None
        config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config.hydra.job):
            config.hydra.job.id, config.hydra.job.num = str(number), number
        HydraConfig.instance().set_config(config)
        shown = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
        container: Any = OmegaConf.to_container(shown, resolve=True)
        return config, container

    def _submit(self, composed: Sequence[DictConfig], asked: Request, shape: Shape) -> list[Any]:
        assert self.config is not None
        try:
            executor = submitit.SlurmExecutor(
                folder=asked.folder, max_num_timeout=0, python=asked.interpreter()
            )
        except RuntimeError as error:
            raise Refused(
                f"hydra/launcher=slurm: {error} hydra/launcher=submitit_local runs the sweep on this machine"
            ) from error
        place = submitit.core.utils.JobPaths.get_first_id_independent_folder(executor.folder)
        existed = place.exists()  # others' jobs may lie there, and wait
        options = asked.options(shape, str(self.config.hydra.job.name))
        executor.update_parameters(
            # What submitit counts with; the others go to the script as they are
            nodes=options.pop("nodes"),
            ntasks_per_node=options.pop("ntasks-per-node"),
            time=options.pop("time"),
            job_name=options.pop("job-name"),
            array_parallelism=asked.array_parallelism,
            stderr_to_stdout=True,
            wckey="qtrain",
            setup=asked.before(),
            teardown=asked.after(),
            srun_args=asked.srun_arguments(),
            additional_parameters=options,
        )
        state = Singleton.get_state()
        calls = [(config, number, state) for number, config in enumerate(composed)]
        try:
            return executor.map_array(self, *zip(*calls, strict=True))
        except submitit.core.utils.FailedJobError as error:
            if not existed:
                shutil.rmtree(place, ignore_errors=True)
            said = str(error).strip().splitlines()
            raise Refused(f"SLURM did not take the jobs: {said[-1] if said else error}") from error
        except (OSError, submitit.core.utils.FailedSubmissionError) as error:
            # Before sbatch or after it: submitit writes files at both times
            raise Taken(
                f"the sweep could not be submitted to the end ({error}); where sbatch had taken it already, squeue --me shows its job, "
                f"and scancel ends it: its arms cannot run without their files in {place}"
            ) from error


def _words(overrides: Sequence[str], config: Mapping[str, Any]) -> tuple[str, ...]:
    """The arm's overrides, the run's name written out: by hand they go on with the very run."""
    return (
        *(word for word in filter_overrides(overrides) if not word.startswith("run=")),
        f"run={config['run']}",
    )


def _unrecorded(array: str, arms: Sequence[Arm], path: Path, error: OSError) -> str:
    """What is said where the jobs run and nothing on disk says which is which."""
    lines = [
        f"SLURM has taken the sweep as job {array}, and {path} could not be written ({error}): qtrain status will not know it"
    ]
    lines += [f"{arm.job}: {arm.folder}  {' '.join(arm.overrides)}" for arm in arms]
    return "\n".join(
        [*lines, f"they run all the same: squeue -j {array} shows them, scancel {array} ends them"]
    )


def _ended(overrides: Sequence[str], code: int) -> JobReturn:
    done = JobReturn(overrides=list(filter_overrides(overrides)), status=JobStatus.COMPLETED)
    done.return_value = code
    return done
