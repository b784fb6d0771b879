"""Ahead-of-time builds of the Triton kernels, for architectures that need not be present.

``python -m qtrain_kernels.aot [--op NAME] [--json]`` compiles what each op's ``*_triton`` module lists in
``builds()`` down to machine code and reads registers, stack and shared memory out of the binary. It proves that
a kernel compiles and does not spill; it says nothing of values or speed.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qtrain_kernels.op import Op, all_ops, kernel_module

ARCHITECTURES = (80, 90, 100)  # A100; H100 and H200; B200
MAX_SHARED = {80: 166912, 90: 232448, 100: 232448}
"""Bytes of shared memory that one block may have (CUDA C++ programming guide, technical specifications)."""


@dataclass(frozen=True)
class Build:
    """One specialisation of one kernel.

    ``types``: argument -> Triton type, for those not in ``constants``. ``divisible_by_16``: pointers and sizes
    that the launcher's arguments satisfy in this specialisation (they decide vectorised loads). ``forbidden_ptx``:
    instruction fragments whose presence would make the kernel wrong. ``required_ptx``: architecture -> regular
    expressions of instructions without which it would be slow; its keys are the architectures that are built.
    ``max_registers``: a guard against silent growth; at 128 a multiprocessor (65536 registers) still holds 16 warps.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    divisible_by_16: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    forbidden_ptx: tuple[str, ...] = ()
    max_registers: int = 128
    required_ptx: Mapping[int, tuple[str, ...]] = field(
        default_factory=lambda: dict.fromkeys(ARCHITECTURES, ())
    )


@dataclass(frozen=True)
class Result:
    """What the binary holds. ``registers`` a thread; ``stack`` and ``local`` bytes a thread, where spills would
    live; ``shared`` bytes a block as the launch asks for it; ``forbidden`` what of ``forbidden_ptx`` was found, ``missing``
    what of ``required_ptx`` was not."""

    op: str
    build: str
    arch: int
    registers: int
    max_registers: int
    stack: int
    local: int
    shared: int
    warps: int
    ptx_local: bool
    forbidden: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def problems(self) -> list[str]:
        found = [f"PTX holds {text!r}" for text in self.forbidden]
        found += [f"PTX lacks {text!r}" for text in self.missing]
        if self.shared > MAX_SHARED[self.arch]:
            found.append(
                f"{self.shared} bytes of shared memory, more than the {MAX_SHARED[self.arch]} of a block"
            )
        if self.stack or self.local or self.ptx_local:
            found.append(f"local memory: stack {self.stack}, local {self.local}, in PTX: {self.ptx_local}")
        if self.registers > self.max_registers:
            found.append(f"{self.registers} registers, more than {self.max_registers}")
        return found


def compile_build(op: str, build: Build, arch: int) -> Result:
    """Compile ``build`` for ``arch``; needs triton and no GPU, and a process without TRITON_INTERPRET."""
    import triton
    from triton.backends.compiler import GPUTarget

    names = build.kernel.arg_names
    source = _source_type(build.kernel)(
        build.kernel,
        signature={n: "constexpr" if n in build.constants else build.types[n] for n in names},
        constexprs={(names.index(n),): value for n, value in build.constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in build.divisible_by_16},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(build.options))
    ptx, usage = compiled.asm["ptx"], _resource_usage(compiled.asm["cubin"])
    return Result(
        op,
        build.name,
        arch,
        registers=usage["REG"],
        max_registers=build.max_registers,
        stack=usage["STACK"],
        local=usage["LOCAL"],
        shared=compiled.metadata.shared,
        warps=compiled.metadata.num_warps,
        ptx_local=re.search(r"\.local\b", ptx) is not None,
        forbidden=tuple(text for text in build.forbidden_ptx if text in ptx),
        missing=tuple(text for text in build.required_ptx[arch] if not re.search(text, ptx)),
    )


def _source_type(kernel: Any) -> Any:
    """Triton's front end, or that of its language Gluon."""
    import triton

    if not kernel.is_gluon():
        return triton.compiler.ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    return GluonASTSource


def _resource_usage(cubin: bytes) -> dict[str, int]:
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(cuobjdump), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}


def results(
    ops: Mapping[str, Op[Any, Any]], architectures: tuple[int, ...] = ARCHITECTURES
) -> Iterator[Result]:
    """Compile every build of every op that has a Triton kernel."""
    for name, op in ops.items():
        if "cuda" in op.kernels:
            for build in kernel_module(op, "cuda").builds():
                for arch in (a for a in architectures if a in build.required_ptx):
                    yield compile_build(name, build, arch)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m qtrain_kernels.aot", description=__doc__)
    parser.add_argument("--op", help="one op (default: all)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of the table")
    args = parser.parse_args(argv)
    ops = all_ops()
    if args.op is not None and args.op not in ops:
        parser.error(f"unknown op {args.op!r}; the ops are {', '.join(ops)}")
    if not args.json:
        print("| op | build | sm | registers | stack and local bytes | shared bytes | warps |")
        print("|---|---|---|---|---|---|---|")
    failed = False
    for r in results(ops if args.op is None else {args.op: ops[args.op]}):
        failed |= bool(r.problems)
        if args.json:
            print(json.dumps({**asdict(r), "problems": r.problems}), flush=True)
        else:
            memory = r.stack + r.local
            print(
                f"| {r.op} | {r.build} | {r.arch} | {r.registers} | {memory} | {r.shared} | {r.warps} |",
                flush=True,
            )
            for problem in r.problems:
                print(f"PROBLEM: {r.op}, {r.build}, sm_{r.arch}: {problem}")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
