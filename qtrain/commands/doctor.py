"""What this machine has, what is missing and how to get it. Asks no network.

Each line is ``ok``, ``missing`` (with the remedy) or ``note`` (works, but differently than one may expect). The
exit code is 0 when the main job, pre-training from local text, can run.
"""

from __future__ import annotations

import importlib.metadata
import netrc
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig

CONFIG = "doctor"

# package -> (what it is for, pip's argument, whether the main job needs it)
PACKAGES: dict[str, tuple[str, str, bool]] = {
    "torch": ("everything", "torch>=2.11", True),
    "lightning": ("the training loop", "lightning>=2.5", True),
    "hydra-core": ("configs and sweeps", "hydra-core>=1.3.2", True),
    "wandb": ("logging to W&B", "wandb>=0.19", False),
    "triton": ("kernels on NVIDIA GPUs", "triton>=3.6", False),
    "bitsandbytes": ("its 8-bit optimizers as rivals", "bitsandbytes>=0.45", False),
    "datasets": ("text from Hugging Face datasets", "datasets>=3", False),
}
# Flags of /proc/cpuinfo -> what they speed up
CPU_FLAGS = {
    "avx512_vnni": "int8 dot products",
    "avx_vnni": "int8 dot products on 256-bit vectors",
    "amx_int8": "int8 matrix products",
    "amx_bf16": "bf16 matrix products",
    "avx512_bf16": "bf16 dot products",
}
COMPILERS = ("g++", "clang++", "cl")
# Shards of the standard library's text, its checkpoints and a compile cache; measured below 1 GiB
DISK_GIB = 2.0
MEMORY_GIB = 2.0  # torch imported, a 2M model and its Adam states
# int8 rows of K Gaussian values: of 1024 the largest is near 3.4 sigma, a step 3.4/127 and its error step/sqrt(12):
# 42.2 dB. A GEMM of two such operands loses 3 dB, and gains up to 1.1 dB with K = 256 or 512. The bounds leave 2 dB;
# more than the upper one would mean that nothing was quantized.
SQNR_TENSOR_DB = (40.2, 44.2)
SQNR_GEMM_DB = (37.2, 42.3)


@dataclass(frozen=True)
class Line:
    """One finding. status: ok, missing or note. required: whether the main job fails without it."""

    status: str
    subject: str
    text: str
    required: bool = False

    def __str__(self) -> str:
        return f"{self.status:<8}{self.subject:<16}{self.text}"


def check(cfg: DictConfig) -> None:
    """Raises TypeError where ``functional`` is no boolean."""
    if not isinstance(cfg.functional, bool):
        raise TypeError(f"functional={cfg.functional!r}: allowed are true and false")


def run(cfg: DictConfig) -> int:
    """0 when the main job can run, else 1."""
    broken = []
    for line in findings(functional=cfg.functional):
        print(line, flush=True)
        if line.required and line.status == "missing":
            broken.append(line.subject)
    if broken:
        print(f"\nThe main job cannot run: {', '.join(broken)}. The lines above say what to do.")
        return 1
    print("\nThe main job can run: qtrain train experiment=quickstart")
    return 0


def findings(*, functional: bool) -> Iterator[Line]:
    """Every line, in order, as it is found."""
    yield python_line()
    for name in PACKAGES:
        yield package_line(name)
    torch_here = _version("torch") is not None
    if torch_here:
        yield from device_lines()
    yield cpu_line()
    yield memory_line()
    yield from storage_lines()
    yield compiler_line()
    if torch_here:
        yield cpu_kernels_line()
    yield wandb_line()
    yield slurm_line()
    if functional and torch_here:
        yield functional_line()


def python_line() -> Line:
    return Line("ok", "python", f"{platform.python_version()} at {sys.executable}")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def package_line(name: str) -> Line:
    purpose, requirement, required = PACKAGES[name]
    version = _version(name)
    if version is not None:
        return Line("ok", name, version)
    return Line(
        "missing" if required else "note",
        name,
        f"not installed (for {purpose}): pip install '{requirement}'",
        required,
    )


def device_lines() -> Iterator[Line]:
    """A line a GPU, or that there is none; the CPU's threads."""
    import torch

    if not torch.cuda.is_available():
        built = (
            "this torch is built without CUDA" if torch.version.cuda is None else "no usable NVIDIA device"
        )
        yield Line("note", "gpu", f"none ({built}): runs on the CPU")
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        yield gpu_line(i, properties.name, (properties.major, properties.minor), properties.total_memory)
        yield gpu_kernels_line(i, (properties.major, properties.minor))
    threads, cores = (
        torch.get_num_threads(),
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    )
    yield Line("ok", "threads", f"torch uses {threads} on {cores} cores (OMP_NUM_THREADS changes it)")


def gpu_line(index: int, name: str, capability: tuple[int, int], memory_bytes: int) -> Line:
    """Tensor cores multiply int8 from compute capability 7.5 and fp8 from 8.9 on (CUDA programming guide)."""
    support = [
        f"int8 GEMMs {'yes' if capability >= (7, 5) else 'no'}",
        f"fp8 GEMMs {'yes' if capability >= (8, 9) else 'no'}",
        f"bf16 {'yes' if capability >= (8, 0) else 'no'}",
    ]
    text = f"{name}, sm_{capability[0]}{capability[1]}, {memory_bytes / 2**30:.0f} GiB: {', '.join(support)}"
    return Line("ok" if capability >= (8, 0) else "note", f"gpu {index}", text)


# Kind of codes -> the first compute capability whose tensor cores multiply them (CUDA programming guide). Triton 3.6
# builds for 8.0 and later.
TENSOR_CORES = {"int8": (8, 0), "fp8": (8, 9)}


def gpu_kernels_line(index: int, capability: tuple[int, int]) -> Line:
    """What ``compute=native`` can multiply on that GPU."""
    from qtrain.nn.native_ops import kinds_on

    kinds = [kind for kind in kinds_on("cuda") if capability >= TENSOR_CORES[kind]]
    if kinds and _version("triton") is not None:
        return Line("ok", f"gpu {index} kernels", f"compute=native multiplies {' and '.join(kinds)} codes")
    why = "" if not kinds else " without triton: pip install 'triton>=3.6'"
    return Line("note", f"gpu {index} kernels", f"compute=native raises here{why}; compute=simulated runs")


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> set[str] | None:
    """The CPU's flags, None where the system does not tell."""
    if not cpuinfo.is_file():
        return None
    for line in cpuinfo.read_text().splitlines():
        if line.startswith("flags"):
            return set(line.split(":", 1)[1].split())
    return None


def cpu_line() -> Line:
    flags = cpu_flags()
    if flags is None:
        return Line("note", "cpu", f"{platform.machine()}; its flags are not readable on this system")
    found = [f"{flag} ({use})" for flag, use in CPU_FLAGS.items() if flag in flags]
    return Line(
        "ok" if found else "note",
        "cpu",
        ", ".join(found) or "no int8 or bf16 dot products: low precision saves no time here",
    )


def memory_line() -> Line:
    if not hasattr(os, "sysconf") or "SC_AVPHYS_PAGES" not in os.sysconf_names:
        return Line("note", "memory", "not readable on this system")
    page = os.sysconf("SC_PAGE_SIZE")
    total, free = (page * os.sysconf(n) / 2**30 for n in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
    enough = total >= MEMORY_GIB
    text = f"{total:.1f} GiB, {free:.1f} GiB unused"
    return Line(
        "ok" if enough else "missing",
        "memory",
        text if enough else f"{text}; the main job needs {MEMORY_GIB:.0f} GiB",
        True,
    )


def storage_lines() -> Iterator[Line]:
    """Disk below the working folder and the folder of prepared text."""
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    writable = os.access(Path.cwd(), os.W_OK)
    if not writable:
        yield Line(
            "missing", "disk", f"{Path.cwd()} is not writable: start qtrain in a folder of yours", True
        )
    else:
        enough = free >= DISK_GIB
        yield Line(
            "ok" if enough else "note",
            "disk",
            f"{free:.1f} GiB free" + ("" if enough else f"; a few checkpoints need {DISK_GIB:.0f} GiB"),
        )
    from qtrain.data.cache import cache_root

    cache = cache_root()
    parent = next(p for p in (cache, *cache.parents) if p.exists())
    if os.access(parent, os.W_OK):
        yield Line(
            "ok",
            "cache",
            f"{cache} ({'exists' if cache.exists() else 'made when first needed'}; QTRAIN_CACHE moves it)",
        )
    else:
        yield Line(
            "missing", "cache", f"{cache} cannot be written: set QTRAIN_CACHE to a folder of yours", True
        )


def compiler_line() -> Line:
    """torch.compile on a CPU writes C++; on a GPU Triton needs a C compiler for its launcher."""
    chosen = os.environ.get("CXX")
    candidates = (chosen, *COMPILERS) if chosen else COMPILERS
    for name in candidates:
        path = shutil.which(name)
        if path is not None:
            return Line("ok", "c++ compiler", path)
    return Line(
        "note", "c++ compiler", "none: torch.compile on the CPU needs one; install g++ or give compile=false"
    )


def cpu_kernels_line() -> Line:
    """What ``compute=native`` runs on; builds the kernels where they are not built yet."""
    from qtrain_kernels.cpu_tier import tier

    try:
        chosen = tier()
    except ValueError as error:
        return Line("missing", "int8 kernels", str(error), True)
    if chosen.library is not None:
        return Line("ok", "int8 kernels", f"{chosen}: compute=native multiplies int8 codes on the CPU")
    return Line(
        "note",
        "int8 kernels",
        f"torch's alone ({chosen.reason}): compute=native quantizes by torch's operations; compute=auto measures",
    )


def wandb_line(environ: Any = os.environ) -> Line:
    """Whether a key is at hand; nothing is asked over the network."""
    if _version("wandb") is None:
        return Line("note", "wandb login", "wandb is not installed: metrics stay in the run's folder")
    mode = environ.get("WANDB_MODE")
    if mode in ("offline", "disabled", "dryrun"):
        return Line("ok", "wandb login", f"WANDB_MODE={mode}")
    if environ.get("WANDB_API_KEY") or _netrc_names_wandb(environ):
        return Line("ok", "wandb login", "a key is set: runs can be uploaded")
    return Line(
        "note", "wandb login", "not logged in: runs are logged offline; wandb login, later wandb sync FOLDER"
    )


def _netrc_names_wandb(environ: Any) -> bool:
    path = Path(environ.get("NETRC") or Path.home() / ".netrc")
    if not path.is_file():
        return False
    try:
        return any("wandb" in host for host in netrc.netrc(str(path)).hosts)
    except (netrc.NetrcParseError, OSError):
        return False


def slurm_line() -> Line:
    """Whether sweeps can be submitted from here. The controller is not asked: it may be down, or busy."""
    program, launcher = shutil.which("sbatch"), _version("hydra-submitit-launcher")
    install = "pip install 'hydra-submitit-launcher>=1.2'"
    if program is None:
        there = f"hydra-submitit-launcher {launcher} is installed" if launcher else f"there also {install}"
        return Line(
            "note", "slurm", f"no sbatch: hydra/launcher=slurm submits on a cluster's login node ({there})"
        )
    try:
        done = subprocess.run(
            [program, "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Line("note", "slurm", f"{program} --version gives no answer ({error})")
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        return Line("note", "slurm", f"{program} --version failed: {said[-1]}")
    found = f"{done.stdout.strip()} at {program}"
    if launcher is None:
        return Line(
            "note", "slurm", f"{found}; hydra/launcher=slurm needs hydra-submitit-launcher: {install}"
        )
    return Line(
        "ok", "slurm", f"{found}, hydra-submitit-launcher {launcher}: hydra/launcher=slurm submits sweeps"
    )


def functional_line() -> Line:
    """Quantize a tensor and run one quantized linear forward and backward, each within two-sided SQNR bounds."""
    try:
        measured = functional_check()
    except Exception as error:
        return Line("missing", "quantization", f"failed: {type(error).__name__}: {error}", True)
    bounds = {name: SQNR_TENSOR_DB if name == "tensor" else SQNR_GEMM_DB for name in measured}
    bad = [n for n, db in measured.items() if not bounds[n][0] <= db <= bounds[n][1]]
    text = ", ".join(f"{name} {db:.1f} dB" for name, db in measured.items())
    if bad:
        expected = ", ".join(f"{n} in {bounds[n][0]:g}..{bounds[n][1]:g} dB" for n in bad)
        return Line(
            "missing", "quantization", f"SQNR {text}; expected {expected}: this torch computes wrongly", True
        )
    return Line("ok", "quantization", f"int8 per row, SQNR: {text}")


def functional_check() -> dict[str, float]:
    """SQNR in dB of an int8 tensor, and of y, dx and dW of one W8A8G8 linear layer, against float32."""
    import torch
    from torch import nn

    from qtrain.nn.surgery import apply_recipe
    from qtrain.quant import ModelRecipe, QuantSpec, dequantize, quantize

    def sqnr_db(exact: torch.Tensor, got: torch.Tensor) -> float:
        exact, got = exact.double(), got.double()
        return float(10 * torch.log10(exact.square().sum() / (exact - got).square().sum()))

    generator = torch.Generator().manual_seed(0)
    x, w, g = (torch.randn(shape, generator=generator) for shape in ((256, 1024), (512, 1024), (256, 512)))
    measured = {"tensor": sqnr_db(x, dequantize(quantize(x, QuantSpec.parse("int8_row"))))}
    linear: Any = {
        "fprop": {"input": "int8_row", "weight": "int8_row"},
        "dgrad": {"grad_output": "int8_row", "weight": "int8_row"},
        "wgrad": {"grad_output": "int8_row", "input": "int8_row"},
    }
    layer = nn.Linear(1024, 512, bias=False)
    with torch.no_grad():
        layer.weight.copy_(w)
    apply_recipe(nn.Sequential(layer), ModelRecipe(linear=linear))
    entered = x.clone().requires_grad_()
    y = layer(entered)
    y.backward(g)
    assert entered.grad is not None
    assert layer.weight.grad is not None
    measured |= {"y": sqnr_db(x @ w.t(), y.detach()), "dx": sqnr_db(g @ w, entered.grad)}
    measured["dW"] = sqnr_db(g.t() @ x, layer.weight.grad)
    return measured
