"""The Triton kernels compiled ahead of time for GPUs that need not be there: what ptxas says of each.

    python tests/triton/aot.py        writes the table of docs/gpu-kernels.md

Which kernels, with which constants, is recorded from the launches of real calls, so that no list can go stale.
"""

import functools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from saml_kernels.backends import fused
from saml_kernels.backends.triton import backward, forward, mutual, product

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int64: "i64"}


@dataclass(frozen=True)
class Chip:
    """A target, and the shared memory (bytes) that one program may use there."""

    name: str
    target: GPUTarget
    shared_memory: int
    tensor_core: str
    """A pattern of the instruction in the assembly that shows the matrix unit at work."""


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("sm_80", GPUTarget("cuda", 80, 32), 166912, r"\bHMMA\b"),
        Chip("sm_90", GPUTarget("cuda", 90, 32), 232448, r"\bHGMMA\b"),
        Chip("sm_100", GPUTarget("cuda", 100, 32), 232448, r"tcgen05\.mma|mma\.sync"),
        Chip("gfx942", GPUTarget("hip", "gfx942", 64), 65536, r"v_mfma"),
    )
}


@dataclass(frozen=True)
class Recorded:
    """One distinct launch: the kernel and everything its compilation depends on."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]
    warps: int
    stages: int

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)

    def constant(self, name: str) -> Any:
        return dict(self.constants).get(name)


@dataclass(frozen=True)
class Report:
    """What compiling gave."""

    registers: int | None
    spilled_bytes: int | None
    shared_memory: int
    tensor_core: bool


@contextmanager
def _recording(into: dict[Recorded, None]) -> Iterator[None]:
    def record(kernel: Any, grid: Any, *arguments: Any, **options: Any) -> None:
        names = [parameter.name for parameter in kernel.params]
        free = {p.name for p in kernel.params if p.do_not_specialize}
        signature, constants, divisible = [], [], []
        warps, stages = options.pop("num_warps"), options.pop("num_stages", 3)
        values = dict(zip(names, arguments, strict=False)) | options
        assert list(values) == names or set(values) == set(names)
        for index, name in enumerate(names):
            value = values[name]
            if kernel.params[index].is_constexpr or (type(value) is int and value == 1 and name not in free):
                signature.append((name, "constexpr"))
                constants.append((name, value))
                continue
            if isinstance(value, torch.Tensor):
                signature.append((name, "*" + TYPES[value.dtype]))
                divisible.append(index)
            else:
                wide = isinstance(value, int) and (name == "second" or value >= 2**31)
                signature.append((name, "fp32" if isinstance(value, float) else "i64" if wide else "i32"))
                if isinstance(value, int) and value % 16 == 0 and name not in free:
                    divisible.append(index)
        into[Recorded(kernel, tuple(signature), tuple(constants), tuple(divisible), warps, stages)] = None

    modules = (product, mutual, backward)
    before = [module.launch for module in modules]
    for module in modules:
        module.launch = record
    try:
        yield
    finally:
        for module, launch in zip(modules, before, strict=True):
            module.launch = launch


@functools.cache
def recorded(dtype: torch.dtype, hidden_dims: tuple[int, ...] = (512, 256, 128), M: int = 8) -> tuple[Recorded, ...]:
    """Every launch of a training step of the trunk with mutual units after layers 1 and 2, D_l = D_g = 256."""
    rows = 4096
    kinds: dict[Recorded, None] = {}
    widths = (256, *hidden_dims)

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    offsets, permutation = torch.arange(M + 1) * (rows // M), torch.arange(rows)
    gates = hidden_dims[:2]
    arguments = (
        [empty(M, i + o, o) for i, o in zip(widths, hidden_dims, strict=False)],
        [empty(M, o) for o in hidden_dims],
        [empty(i, o) for i, o in zip(widths, hidden_dims, strict=False)],
        [empty(o) for o in hidden_dims],
        [empty(M, d, d) for d in gates],
        [empty(M, d) for d in gates],
        (0, 1),
        (fused.ACTIVATION_IDS["relu"],) * len(hidden_dims),
        fused.SCORE_IDS["ratio"],
        0.1,
        dtype == torch.bfloat16,
        True,
    )
    with _recording(kinds):
        own, aux, scores, kept = forward.trunk_forward(
            empty(rows, 256), empty(rows, 256), permutation, offsets, *arguments, True, False, False
        )
        backward.trunk_backward(
            own,
            aux,
            scores,
            kept,
            empty(rows, 256),
            empty(rows, 256),
            permutation,
            offsets,
            *arguments,
            False,
            True,
            True,
        )
    return tuple(kinds)


def compile_for(launch: Recorded, chip: Chip) -> Report:
    """Compiles, and for NVIDIA asks ptxas about registers and spills."""
    names = [name for name, _ in launch.signature]
    constants = {(names.index(name),): value for name, value in launch.constants}
    source = ASTSource(
        fn=launch.kernel,
        signature=dict(launch.signature),
        constexprs=constants,
        attrs={(index,): [["tt.divisibility", 16]] for index in launch.divisible},
    )
    compiled = triton.compile(
        source, target=chip.target, options={"num_warps": launch.warps, "num_stages": launch.stages}
    )
    if chip.target.backend == "hip":
        assembly = compiled.asm["amdgcn"]
        spills = re.search(r"\.vgpr_spill_count:\s*(\d+)", assembly)
        registers = re.search(r"\.vgpr_count:\s*(\d+)", assembly)
        return Report(
            int(registers[1]) if registers else None,
            int(spills[1]) if spills else None,
            compiled.metadata.shared,
            re.search(chip.tensor_core, assembly) is not None,
        )
    blackwell = chip.name == "sm_100"
    architecture = {"sm_90": "sm_90a", "sm_100": "sm_100a"}.get(chip.name, chip.name)
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        ptx.write_text(compiled.asm["ptx"])
        told = subprocess.run(
            [TOOLS / ("ptxas-blackwell" if blackwell else "ptxas"), "-v", f"-arch={architecture}", ptx, "-o", cubin],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
        if blackwell:
            assembly = compiled.asm["ptx"]
        else:
            assembly = subprocess.run([TOOLS / "nvdisasm", cubin], capture_output=True, text=True, check=True).stdout
    registers = re.search(r"Used (\d+) registers", told)
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", told)]
    return Report(
        int(registers[1]) if registers else None,
        sum(spills),
        compiled.metadata.shared,
        re.search(chip.tensor_core, assembly) is not None,
    )


def kind(launch: Recorded) -> str:
    """What sets launches of one kernel apart besides widths."""
    own, gate, grouped = (launch.constant(name) for name in ("OWN", "GATE", "GROUPED"))
    parts = [launch.name.removesuffix("_kernel")]
    parts += [] if own is None else ["own branches" if own else "all branches"]
    parts += ["accumulating"] if launch.constant("ACCUMULATE") else []
    parts += ["rounding"] if launch.constant("ROUND") else []
    parts += [] if grouped is None else ["by scenario" if grouped else "all rows"]
    parts += [] if gate is None else [f"d = {launch.constant('D')}"]
    return ", ".join(parts)


def representatives(dtype: torch.dtype) -> dict[str, Recorded]:
    """The first launch of every kind."""
    chosen: dict[str, Recorded] = {}
    for launch in recorded(dtype):
        chosen.setdefault(kind(launch), launch)
    return chosen


def table() -> str:
    """Registers and shared memory of every kind on every chip, in Markdown."""
    lines = [
        "| kernel | type | " + " | ".join(CHIPS) + " |",
        "| --- | --- |" + " --- |" * len(CHIPS),
    ]
    for dtype in (torch.bfloat16, torch.float32):
        for name, launch in representatives(dtype).items():
            reports = [compile_for(launch, chip) for chip in CHIPS.values()]
            cells = [f"{r.registers} / {r.shared_memory / 1024:.0f}{' ●' if r.tensor_core else ''}" for r in reports]
            lines.append(f"| {name} | {TYPES[dtype]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


PAGE = Path(__file__).parents[2] / "docs" / "gpu-kernels.md"
BETWEEN = re.compile(r"(?<=<!-- compiled -->\n).*?(?=<!-- end -->)", re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(BETWEEN.sub(lambda _: table() + "\n", PAGE.read_text(encoding="utf-8")), encoding="utf-8")
