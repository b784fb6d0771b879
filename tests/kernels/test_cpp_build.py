"""The C++ kernels are built once, whole or not at all, and a failure says why."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from qtrain_kernels import cpp_build

needs_compiler = pytest.mark.skipif(cpp_build.find_compiler() is None, reason="needs a C++ compiler")
SMALL = 'extern "C" int qtrain_answer() { return %d; }\n'


@pytest.fixture
def room(tmp_path, monkeypatch):
    """A folder of sources and a cache of its own, with a library that builds in no time."""
    sources = tmp_path / "cpp"
    (sources / "small").mkdir(parents=True)
    sources /= "small"
    (sources / "answer.cpp").write_text(SMALL % 42)
    monkeypatch.setattr(cpp_build, "SOURCES", sources.parent)
    monkeypatch.setattr(cpp_build, "BUILDS", {"small": ("small", "sse2")})
    monkeypatch.setattr(cpp_build, "load_library", cpp_build.load_library.__wrapped__)
    monkeypatch.setenv("QTRAIN_CACHE", str(tmp_path / "cache"))
    return sources


def built():
    return sorted(path.name for path in cpp_build.cache_folder().iterdir())


@needs_compiler
def test_built_once_with_a_message_and_again_when_a_source_changes(room, capfd):
    assert cpp_build.load_library("small").qtrain_answer() == 42
    assert "building its CPU kernels with" in capfd.readouterr().err
    assert cpp_build.load_library("small").qtrain_answer() == 42
    assert capfd.readouterr().err == ""
    (room / "answer.cpp").write_text(SMALL % 43)
    assert cpp_build.load_library("small").qtrain_answer() == 43
    names = built()
    assert len(names) == 3
    assert "lock" in names
    assert not [name for name in names if name.endswith(".tmp")]


@needs_compiler
def test_a_source_that_does_not_compile(room):
    (room / "answer.cpp").write_text("int answer() { return nothing; }\n")
    with pytest.raises(cpp_build.BuildError, match=r"does not build the CPU kernels: .*nothing"):
        cpp_build.load_library("small")
    assert built() == ["lock"]


@needs_compiler
def test_processes_that_start_together_build_once(room):
    code = (
        "import sys, pathlib; from qtrain_kernels import cpp_build; cpp_build.SOURCES = pathlib.Path(sys.argv[1]).parent;"
        "cpp_build.BUILDS = {'small': ('small', 'sse2')};"
        "print(cpp_build.load_library('small').qtrain_answer())"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(room)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ,
        )
        for _ in range(3)
    ]
    outputs = [process.communicate() for process in processes]
    assert [out for out, _ in outputs] == ["42\n"] * 3
    assert sum("building" in error for _, error in outputs) == 1


def test_without_a_compiler(room, monkeypatch):
    monkeypatch.setattr(cpp_build, "find_compiler", lambda: None)
    with pytest.raises(cpp_build.BuildError, match="install g"):
        cpp_build.load_library("small")


@needs_compiler
def test_a_cache_that_cannot_be_written(room, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QTRAIN_CACHE", str(tmp_path / "file"))
    with pytest.raises(cpp_build.BuildError, match="QTRAIN_CACHE moves the folder"):
        cpp_build.load_library("small")
