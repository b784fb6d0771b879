"""A real SLURM on this one machine: munged, slurmctld and two slurmd with nodes ``n0`` and ``n1``, on ports and in a
folder of their own, as root.

    with running(folder) as slurm:
        job = slurm.sbatch("job.sh")

Debian: ``apt-get install --no-install-recommends slurm-wlm munge slurm-wlm-basic-plugins``. The daemons stay children
of this process, and on Linux the kernel ends them with it, however it ends. There is no slurmdbd, so ``sacct`` answers
nothing; ``scontrol`` knows finished jobs for an hour.

Partitions: ``main``, and ``high``, for whose jobs those of ``main`` are requeued after two minutes of grace.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
_SECONDS = 120.0  # for one command; SLURM's own patience with its controller is below a minute
NODES, CPUS = 2, 4  # what SLURM believes; the machine may have fewer cores
FINAL = {
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "PREEMPTED",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
}

CONF = """\
ClusterName=qtrain
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
AuthType=auth/munge
AuthInfo=cred_expire=5,socket={root}/munge.sock
SlurmUser=root
SlurmdUser=root
StateSaveLocation={root}/ctld
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0
MinJobAge=3600
InactiveLimit=0
KillWait=60
OverTimeLimit=0
ReturnToService=2
SlurmdParameters=config_overrides
SlurmdTimeout=30
GresTypes=gpu
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=120
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} Boards=1 SocketsPerBoard=1 "
    "CoresPerSocket={cpus} ThreadsPerCore=1 RealMemory=4000 Gres=gpu:fake:2 State=UNKNOWN\n"
)


def why_not() -> str | None:
    """Why no SLURM can run here; None where it can."""
    missing = [name for name in (*DAEMONS, "sbatch") if shutil.which(name, path=_path()) is None]
    if missing:
        return (
            f"needs SLURM's daemons ({', '.join(missing)} missing): apt-get install --no-install-recommends slurm-wlm "
            "munge slurm-wlm-basic-plugins"
        )
    return None if os.geteuid() == 0 else "needs root, as whom SLURM's daemons run"


def _path() -> str:
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


def _own_environment() -> dict[str, str]:
    """Ours, without what a SLURM of this machine says to the jobs and the users of it."""
    theirs = (
        "SLURM",
        "SBATCH_",
        "SRUN_",
        "SALLOC_",
        "SQUEUE_",
        "SINFO_",
        "SCANCEL_",
        "SACCT_",
        "SCONTROL_",
        "MUNGE_",
    )
    return {name: value for name, value in os.environ.items() if not name.startswith(theirs)}


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG, linux/prctl.h


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for held in sockets:
            held.bind(("127.0.0.1", 0))
        return [held.getsockname()[1] for held in sockets]


def until(condition: Callable[[], bool], what: str, seconds: float = 300.0) -> None:
    """Waits for ``condition``; raises TimeoutError that says ``what`` did not come."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what} did not come within {seconds} seconds")
        time.sleep(0.1)


@dataclass(frozen=True)
class Slurm:
    """A running cluster. ``environment``: for whoever talks to it."""

    root: Path
    environment: Mapping[str, str]
    daemons: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, *command: str) -> None:
        """A daemon in the foreground, which ends with this process."""
        with (self.root / "log" / "output.txt").open("ab") as output:
            self.daemons.append(
                subprocess.Popen(
                    command, env=self.environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                    preexec_fn=_end_with_parent,
                )
            )  # fmt: skip

    def start_node(self, node: str) -> None:
        self.start("slurmd", "-D", "-N", node)

    def lose_node(self, node: str, job: str) -> None:
        """As if its power had gone while it ran the job: its daemons and the job's processes are killed, and SLURM told so
        before it finds out."""
        (daemon,) = (d for d in self.daemons if d.poll() is None and list(d.args)[-2:] == ["-N", node])  # type: ignore[arg-type]
        daemon.kill()
        self.kill_processes(job)
        daemon.wait()
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=power")

    def kill_processes(self, job: str | None = None) -> None:
        """Those of the job, or of all jobs, and of this cluster alone: the machine may belong to another one, whose jobs
        have the same numbers."""
        configuration = f"SLURM_CONF={self.root}/slurm.conf".encode()
        named = b"SLURM_JOB_ID=" if job is None else f"SLURM_JOB_ID={job}\0".encode()
        steps = b"slurmstepd: [" if job is None else f"slurmstepd: [{job}.".encode()
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended
                variables = b"\0" + process.joinpath("environ").read_bytes() + b"\0"
                ours = b"\0" + configuration + b"\0" in variables and b"\0" + named in variables
                if ours or (
                    process.joinpath("cmdline").read_bytes().startswith(steps) and self._holds(process)
                ):
                    os.kill(int(process.name), signal.SIGKILL)

    def _holds(self, process: Path) -> bool:
        """Whether the process has a file of this cluster open, as a step's daemon has the log."""
        return any(os.readlink(file).startswith(f"{self.root}/") for file in process.joinpath("fd").iterdir())

    def run(self, *command: str, cwd: Path | None = None) -> str:
        done = subprocess.run(
            command, env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=_SECONDS
        )
        if done.returncode:
            raise RuntimeError(
                f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
            )
        return done.stdout

    def sbatch(self, *arguments: str, cwd: Path) -> str:
        """Submits; the job's number."""
        return self.run("sbatch", "--parsable", *arguments, cwd=cwd).strip().split(";")[0]

    def job(self, name: str) -> dict[str, str]:
        """What ``scontrol show job`` says; {} where it is unknown."""
        with contextlib.suppress(RuntimeError):
            return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "-o", "show", "job", name)))
        return {}

    def state(self, name: str) -> str:
        return self.job(name).get("JobState", "UNKNOWN")

    def wait(self, name: str, state: str, seconds: float = 300.0) -> dict[str, str]:
        """Until the job is in ``state``; what SLURM then says of it. Raises TimeoutError, at once where the job has ended
        otherwise for good."""
        before = ""

        def there() -> bool:
            nonlocal before
            now = self.state(name)
            if now == before != state and now in ("COMPLETED", "FAILED", "TIMEOUT"):
                raise TimeoutError(f"job {name} is not to be {state}")
            before = now
            return now == state

        try:
            until(there, f"job {name} in state {state}", seconds)
        except TimeoutError as error:
            raise TimeoutError(f"{error}; it is {self.job(name)}\n{self.log()}") from None
        return self.job(name)

    def log(self) -> str:
        """The last lines of the controller's log."""
        path = self.root / "log" / "slurmctld.log"
        return "\n".join(path.read_text(errors="replace").splitlines()[-30:])


def _write_configuration(root: Path) -> None:
    host = socket.gethostname().split(".")[0]
    ctld_port, *ports = _free_ports(1 + NODES)
    text = CONF.format(root=root, host=host, ctld_port=ctld_port)
    nodes = "".join(
        NODE.format(name=f"n{i}", host=host, port=port, cpus=CPUS) for i, port in enumerate(ports)
    )
    head, partitions = text.split("PartitionName=", 1)
    (root / "slurm.conf").write_text(f"{head}{nodes}PartitionName={partitions}")
    # A fake GPU is any file of a device; what counts them sets CUDA_VISIBLE_DEVICES
    lines = [f"NodeName=n{i} Name=gpu Type=fake File={root}/gpu[0-1]" for i in range(NODES)]
    (root / "gres.conf").write_text("\n".join(lines) + "\n")
    for i in range(2):
        with contextlib.suppress(FileExistsError):
            os.mknod(root / f"gpu{i}", 0o20666, os.makedev(1, 3))


@contextmanager
def running(root: Path) -> Iterator[Slurm]:
    """The cluster, until the block ends. root: an empty folder with a short path, since a socket is made in it."""
    for folder in ("ctld", "log", "spool/n0", "spool/n1"):
        (root / folder).mkdir(parents=True)
    _write_configuration(root)
    environment = {**_own_environment(), "PATH": _path(), "SLURM_CONF": str(root / "slurm.conf")}
    key = root / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    munged = ["munged", "--foreground", "--force", f"--socket={root}/munge.sock", f"--key-file={key}"]
    munged += [
        f"--pid-file={root}/munged.pid",
        f"--log-file={root}/log/munged.log",
        f"--seed-file={root}/munge.seed",
    ]
    slurm = Slurm(root, environment)
    try:
        slurm.start(*munged)
        until(lambda: (root / "munge.sock").exists(), "munged's socket", 20)
        slurm.start("slurmctld", "-D")
        for i in range(NODES):
            slurm.start_node(f"n{i}")
        idle = ("sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N")

        def ready() -> bool:
            with contextlib.suppress(RuntimeError):
                return len(slurm.run(*idle).split()) == NODES
            return False

        try:
            until(ready, "two idle nodes", 30)
        except TimeoutError as error:
            output = (root / "log" / "output.txt").read_text(errors="replace")
            raise TimeoutError(f"{error}\n{output[-3000:]}") from None
        yield slurm
    finally:
        with contextlib.suppress(Exception):
            slurm.run("scancel", "--user=root")
            until(lambda: not slurm.run("squeue", "-h").strip(), "the end of all jobs", 15)
        for daemon in reversed(slurm.daemons):
            daemon.terminate()
        for daemon in slurm.daemons:
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(5)
            daemon.kill()
            daemon.wait()
        slurm.kill_processes()  # what did not end in time
