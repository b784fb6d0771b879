"""The doctor: every line from a made-up machine, and the real check of quantization."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from qtrain.commands import doctor


def test_this_machine_can_run_the_main_job(capsys: pytest.CaptureFixture[str]) -> None:
    start = time.perf_counter()
    assert doctor.run(OmegaConf.create({"functional": True})) == 0
    text = capsys.readouterr().out
    for subject in ("python", "torch", "lightning", "hydra-core", "wandb", "memory", "cache", "quantization"):
        assert f" {subject} " in text
    assert "The main job can run" in text
    assert time.perf_counter() - start < 60


def test_what_the_main_job_needs_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "lightning" else known(name))
    assert doctor.run(OmegaConf.create({"functional": False})) == 1
    text = capsys.readouterr().out
    assert "missing lightning" in text
    assert "pip install 'lightning>=2.5'" in text
    assert "The main job cannot run: lightning" in text


def test_optional_packages_are_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    line = doctor.package_line("bitsandbytes")
    assert (line.status, line.required) == ("note", False)
    assert "pip install 'bitsandbytes>=0.45'" in line.text


@pytest.mark.parametrize(
    ("capability", "status", "int8", "fp8"),
    [((7, 0), "note", "no", "no"), ((8, 0), "ok", "yes", "no"), ((8, 9), "ok", "yes", "yes"), ((9, 0), "ok", "yes", "yes")],
)  # fmt: skip
def test_gpu_support_by_capability(capability: tuple[int, int], status: str, int8: str, fp8: str) -> None:
    line = doctor.gpu_line(0, "a GPU", capability, 80 << 30)
    assert line.status == status
    assert f"int8 GEMMs {int8}" in line.text
    assert f"fp8 GEMMs {fp8}" in line.text
    assert "80 GiB" in line.text


def test_cpu_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu avx512_vnni amx_int8\n")
    assert doctor.cpu_flags(cpuinfo) == {"fpu", "avx512_vnni", "amx_int8"}
    assert doctor.cpu_flags(tmp_path / "none") is None
    monkeypatch.setattr(doctor, "cpu_flags", lambda: {"fpu"})
    assert doctor.cpu_line().status == "note"


@pytest.mark.parametrize(
    ("environ", "netrc", "status", "text"),
    [
        ({"WANDB_MODE": "offline"}, None, "ok", "WANDB_MODE=offline"),
        ({"WANDB_API_KEY": "k"}, None, "ok", "a key is set"),
        ({}, "machine api.wandb.example login user password k\n", "ok", "a key is set"),
        ({}, "machine elsewhere login user password k\n", "note", "not logged in"),
        ({}, "not a netrc file at all\n", "note", "not logged in"),
        ({}, None, "note", "wandb sync"),
    ],
)
def test_wandb_login(
    tmp_path: Path, environ: dict[str, str], netrc: str | None, status: str, text: str
) -> None:
    path = tmp_path / "netrc"
    if netrc is not None:
        path.write_text(netrc)
        path.chmod(0o600)
    line = doctor.wandb_line({**environ, "NETRC": str(path)})
    assert line.status == status
    assert text in line.text
    assert " k" not in line.text.replace("a key", "")


def test_no_compiler_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    line = doctor.compiler_line()
    assert line.status == "note"
    assert "compile=false" in line.text


def test_an_unwritable_cache_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QTRAIN_CACHE", str(tmp_path / "cache"))
    assert [line.status for line in doctor.storage_lines()][-1] == "ok"
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    lines = {line.subject: line for line in doctor.storage_lines()}
    assert lines["cache"].status == lines["disk"].status == "missing"
    assert "QTRAIN_CACHE" in lines["cache"].text


def test_the_functional_check_lies_in_its_bounds() -> None:
    measured = doctor.functional_check()
    assert set(measured) == {"tensor", "y", "dx", "dW"}
    assert doctor.functional_line().status == "ok"


def test_the_functional_check_fails_without_quantization(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exact result has an infinite SQNR, which one-sided bounds would pass."""
    from qtrain.nn import surgery
    from qtrain.quant import ModelRecipe

    applied = surgery.apply_recipe
    monkeypatch.setattr(surgery, "apply_recipe", lambda model, recipe: applied(model, ModelRecipe()))
    line = doctor.functional_line()
    assert (line.status, line.required) == ("missing", True)
    assert "expected" in line.text


def test_a_broken_torch_is_named_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> dict[str, float]:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(doctor, "functional_check", broken)
    assert "RuntimeError: no kernel image" in doctor.functional_line().text


def test_check_refuses_other_values() -> None:
    with pytest.raises(TypeError, match="allowed are true and false"):
        doctor.check(OmegaConf.create({"functional": "yes"}))


def test_it_opens_no_socket() -> None:
    """So it cannot hang where there is no network."""
    code = (
        "import socket\n"
        "def refuse(*a, **k): raise AssertionError('a socket')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from qtrain.commands import doctor\n"
        "from omegaconf import OmegaConf\n"
        "raise SystemExit(doctor.run(OmegaConf.create({'functional': False})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_cpu_kernels_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from qtrain_kernels import cpu_tier

    monkeypatch.setattr(
        cpu_tier, "tier", lambda: cpu_tier.Tier("torch", "no C++ compiler; install g++", None)
    )
    line = doctor.cpu_kernels_line()
    assert (line.status, line.required) == ("note", False)
    assert "install g++" in line.text
    monkeypatch.setattr(cpu_tier, "tier", lambda: cpu_tier.Tier("amx", "", object()))  # type: ignore[arg-type]
    assert str(doctor.cpu_kernels_line()).startswith("ok      int8 kernels    amx: compute=native")

    def refused() -> cpu_tier.Tier:
        raise ValueError("QTRAIN_CPU_KERNELS=amx: this CPU has no amx_int8; take auto or torch")

    monkeypatch.setattr(cpu_tier, "tier", refused)
    assert doctor.cpu_kernels_line().status == "missing"


def test_the_gpu_kernels_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from qtrain.nn import native_ops

    monkeypatch.setattr(doctor, "_version", lambda name: "3.6.0")
    monkeypatch.setattr(native_ops, "kinds_on", lambda device: ["int8", "fp8"] if device == "cuda" else [])
    assert str(doctor.gpu_kernels_line(0, (9, 0))) == (
        "ok      gpu 0 kernels   compute=native multiplies int8 and fp8 codes"
    )
    assert doctor.gpu_kernels_line(0, (8, 0)).text == "compute=native multiplies int8 codes"
    assert doctor.gpu_kernels_line(0, (7, 5)).status == "note"
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    assert "pip install 'triton>=3.6'" in doctor.gpu_kernels_line(0, (9, 0)).text
    monkeypatch.setattr(native_ops, "kinds_on", lambda device: [])
    assert doctor.gpu_kernels_line(0, (9, 0)).text.startswith("compute=native raises here; ")


@pytest.mark.parametrize(
    ("script", "launcher", "said"),
    [
        (
            "echo slurm-wlm 22.05.8",
            "1.2.0",
            "ok      slurm           slurm-wlm 22.05.8 at .*, hydra-submitit-launcher 1.2.0",
        ),
        (
            "echo slurm-wlm 22.05.8",
            None,
            "note .* slurm-wlm 22.05.8 at .*pip install 'hydra-submitit-launcher>=1.2'",
        ),
        (
            "echo 'sbatch: fatal: no slurm.conf' >&2; exit 1",
            "1.2.0",
            "note .*failed: sbatch: fatal: no slurm.conf",
        ),
        (None, "1.2.0", "note .* no sbatch.*hydra-submitit-launcher 1.2.0 is installed"),
        (None, None, "note .* no sbatch.*pip install 'hydra-submitit-launcher>=1.2'"),
    ],
)
def test_the_slurm_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, launcher: str | None, said: str
) -> None:
    if script is not None:
        (tmp_path / "sbatch").write_text(f'#!/bin/sh\n[ "$*" = --version ] || exit 9\n{script}\n')
        (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(doctor, "_version", lambda name: {"hydra-submitit-launcher": launcher}[name])
    line = doctor.slurm_line()
    assert re.match(said, str(line)), line
    assert not line.required


def test_an_sbatch_that_hangs_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*command: object, timeout: float, **options: object) -> None:
        raise subprocess.TimeoutExpired("sbatch", timeout)

    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(doctor.subprocess, "run", hang)
    line = doctor.slurm_line()
    assert line.status == "note"
    assert "timed out after 10 seconds" in line.text
