"""Which implementation runs, and that a choice is never silent."""

from __future__ import annotations

import pytest
from qtrain_kernels import cpu_tier
from qtrain_kernels.cpp_build import BUILDS, BuildError

EVERYTHING = frozenset(set().union(*cpu_tier.NEEDS.values()))


class Library:
    def __init__(self, build: str, refuses: int = 0) -> None:
        self.build, self.refuses = build, refuses

    def qtrain_request_amx(self) -> int:
        return self.refuses


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A Linux machine with every instruction and a built library; tests take parts away."""
    monkeypatch.delenv(cpu_tier.VARIABLE, raising=False)
    monkeypatch.setattr(cpu_tier, "_tier", cpu_tier._tier.__wrapped__)  # without its cache
    monkeypatch.setattr(cpu_tier.sys, "platform", "linux")
    monkeypatch.setattr(cpu_tier.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(cpu_tier, "cpu_flags", lambda: EVERYTHING)
    monkeypatch.setattr(cpu_tier, "load_library", Library)


def _no_compiler(build):
    raise BuildError("no C++ compiler ($CXX, g++ or clang++) is found; install g++")


def test_the_best_without_a_reason():
    assert cpu_tier.tier().name == "amx"
    assert str(cpu_tier.tier()) == "amx"


def test_what_lacks_is_said(monkeypatch):
    monkeypatch.setattr(cpu_tier, "cpu_flags", lambda: EVERYTHING - {"amx_int8"})
    assert str(cpu_tier.tier()) == "avx512_vnni (this CPU has no amx_int8)"
    for flags, name in (({"avx2", "avx_vnni"}, "avx2_vnni"), ({"avx2"}, "avx2"), (set(), "torch")):
        monkeypatch.setattr(cpu_tier, "cpu_flags", lambda flags=flags: frozenset(flags))
        assert cpu_tier.tier().name == name
    assert cpu_tier.tier().reason == "this CPU has no avx2"
    monkeypatch.setattr(cpu_tier, "cpu_flags", lambda: EVERYTHING)
    monkeypatch.setattr(cpu_tier, "load_library", _no_compiler)
    assert "install g++" in str(cpu_tier.tier())
    monkeypatch.setattr(cpu_tier.sys, "platform", "darwin")
    assert "needs Linux on x86-64" in cpu_tier.tier().reason


def test_a_system_that_grants_no_tiles(monkeypatch):
    monkeypatch.setattr(cpu_tier, "load_library", lambda build: Library(build, refuses=-1))
    assert str(cpu_tier.tier()) == "avx512_vnni (the system does not grant AMX tiles)"


@pytest.mark.parametrize("name", cpu_tier.TIERS)
def test_a_tier_by_name(monkeypatch, name):
    monkeypatch.setenv(cpu_tier.VARIABLE, name)
    chosen = cpu_tier.tier()
    assert chosen.name == name
    assert chosen.multiplies == (name in ("amx", "avx512_vnni", "avx2_vnni"))
    if name == "torch":
        assert chosen.library is None
    else:  # with no instruction that the tier does not need
        folder, instructions = BUILDS[chosen.library.build]
        # Of AMX and bf16 avx512's sources ask by name, and the compiler never does by itself
        needed = cpu_tier.NEEDS["amx" if folder == "avx512" else name]
        allowed = {flag.replace("_", "") for flag in needed}
        assert {word.replace("-", "") for word in instructions.split()} <= allowed


@pytest.mark.parametrize("name", ["amx", "avx512_vnni", "avx2_vnni", "avx2"])
def test_asked_for_and_impossible_raises(monkeypatch, name):
    monkeypatch.setenv(cpu_tier.VARIABLE, name)
    monkeypatch.setattr(cpu_tier, "load_library", _no_compiler)
    with pytest.raises(ValueError, match=f"QTRAIN_CPU_KERNELS={name}: no C.. compiler"):
        cpu_tier.tier()


def test_an_unknown_tier_raises(monkeypatch):
    monkeypatch.setenv(cpu_tier.VARIABLE, "neon")
    with pytest.raises(ValueError, match="allowed are auto, amx, avx512_vnni, avx2_vnni, avx2, torch"):
        cpu_tier.tier()
