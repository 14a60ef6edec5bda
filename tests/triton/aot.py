"""The Triton kernels compiled ahead of time for GPUs that need not be there: what the code of each takes.

    python tests/triton/aot.py        writes the table of docs/gpu-kernels.md

Which kernels, with which constants, is recorded from the launches of real calls, so that no list can go stale.
"""

import dataclasses
import functools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from assembly import PRODUCT, Code, count
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from saml_kernels.autograd import ParameterLists, Plan
from saml_kernels.backends.triton import configs, engine
from saml_kernels.backends.triton import launch as launching
from saml_kernels.backends.triton.configs import Choice, Config
from saml_kernels.backends.triton.stages import InputGradient, Layer, MutualOwnRow, QuantizedLayer

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.float8_e4m3fn: "fp8e4nv",
}
MULTIPROCESSORS = 132
DISASSEMBLED = "sm_80", "sm_90"
"""Chips whose code Triton's disassembler reads."""


@dataclass(frozen=True)
class Chip:
    """A target, and the shared memory (bytes) that one program may use there."""

    name: str
    target: GPUTarget
    shared_memory: int
    family: str
    """As configs.py files it."""
    tensor_core: str
    """A pattern of the instruction, in PTX or AMD's assembly, that shows the matrix unit at work."""


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("sm_80", GPUTarget("cuda", 80, 32), 166912, "sm_80", r"\bmma\.sync"),
        Chip("sm_90", GPUTarget("cuda", 90, 32), 232448, "sm_90", r"\bwgmma\.mma_async"),
        Chip("sm_100", GPUTarget("cuda", 100, 32), 232448, "sm_100", r"tcgen05\.mma|mma\.sync"),
        Chip("gfx942", GPUTarget("hip", "gfx942", 64), 65536, configs.AMD, r"v_mfma"),
    )
}


@dataclass(frozen=True)
class Recorded:
    """One distinct launch: the kernel and everything its compilation depends on."""

    kernel: Any
    signature: tuple[tuple[str, Any], ...]
    constants: tuple[tuple[tuple[int, ...], Any], ...] = field(compare=False)
    """By place."""
    identity: str = field(repr=False)
    """Equal for equal constants."""
    divisible: tuple[tuple[int, ...], ...]
    """Places of arguments that are multiples of 16, as Triton's compiler names them."""
    options: tuple[tuple[str, int], ...]
    """What Triton's compiler is told beside: warps, stages of the software pipeline."""
    stages: tuple[str, ...] = field(compare=False)
    """Names of those it runs."""

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)

    @property
    def plan(self) -> Any:
        """The description it is compiled for; None of a kernel that runs no stages."""
        found = [value for _, value in self.constants if isinstance(value, launching.Launch | launching.WeightLaunch)]
        return found[0] if found else None

    @property
    def kinds(self) -> frozenset[type]:
        """Kinds of stages in it."""
        return frozenset(type(body.stage.value) for body in self.plan.bodies.value) if self.plan else frozenset()


@dataclass(frozen=True)
class Report:
    """What compiling gave."""

    registers: int
    """A thread's."""
    spilled_bytes: int
    """On NVIDIA's chips those of a thread's stack, which nothing else uses."""
    shared_memory: int
    """Bytes of a program."""
    tensor_core: bool


@contextmanager
def _recording(into: dict[Recorded, None], choice: Choice) -> Iterator[None]:
    """Records launches instead of making them; every call gets ``choice``."""
    named: dict[Any, tuple[str | None, ...]] = {}
    plan, plan_weights = launching.planned, launching.planned_weights

    def planned(*arguments: Any) -> Any:
        found = plan(*arguments)
        named.update((each.launch, each.names) for each in found)
        return found

    def planned_weights(gradients: Any, *arguments: Any) -> Any:
        found = plan_weights(gradients, *arguments)
        named[found.launch] = tuple(stage.name for stage in gradients.stages)
        return found

    def record(kernel: Any, grid: Any, *arguments: Any, device: Any, **options: Any) -> None:
        names = [parameter.name for parameter in kernel.params]
        free = {p.name for p in kernel.params if p.do_not_specialize}
        signature: list[tuple[str, Any]] = []
        constants: list[tuple[tuple[int, ...], Any]] = []
        divisible: list[tuple[int, ...]] = []
        told = tuple((name, options.pop(name)) for name in tuple(options) if name not in names)
        values = dict(zip(names, arguments, strict=False)) | options
        assert set(values) == set(names)

        def type_of(value: Any, place: tuple[int, ...]) -> Any:
            """As Triton's launcher has it; the NamedTuples keep their names."""
            if isinstance(value, torch.Tensor):
                divisible.append(place)
                return "*" + TYPES[value.dtype]
            if isinstance(value, tuple):
                types = [type_of(entry, (*place, number)) for number, entry in enumerate(value)]
                return type(value)(*types) if hasattr(value, "_fields") else tuple(types)
            if value is None or kernel.params[place[0]].is_constexpr:
                constants.append((place, value))
                return "constexpr"
            name = names[place[0]]
            assert name in free, f"{name} would be compiled in where it is 1 or a multiple of 16"
            return "fp32" if isinstance(value, float) else "i32"

        for index, name in enumerate(names):
            signature.append((name, type_of(values[name], (index,))))
        identity = repr([(place, getattr(value, "cache_key", value)) for place, value in constants])
        names = tuple(map(str, named.get(values.get("LAUNCH"), ())))
        recorded = Recorded(kernel, tuple(signature), tuple(constants), identity, tuple(divisible), told, names)
        into[recorded] = None

    replaced = configs.choice, configs.multiprocessors, launching.start
    launching.planned, launching.planned_weights = planned, planned_weights
    configs.choice = lambda *arguments, **options: choice
    configs.multiprocessors = lambda index: MULTIPROCESSORS
    launching.start = record
    try:
        yield
    finally:
        configs.choice, configs.multiprocessors, launching.start = replaced
        launching.planned, launching.planned_weights = plan, plan_weights


@dataclass(frozen=True)
class Trunk:
    """An architecture to compile for, D_l = 256."""

    global_dim: int = 256
    hidden_dims: tuple[int, ...] = (512, 256, 128)
    M: int = 8
    mutual_layers: tuple[int, ...] = (0,)
    activation: str = "relu"
    score: str = "ratio"
    gate: str = "vector"
    per_branch: bool = False
    foreign_dtype: torch.dtype | None = None
    all_branches: bool = False
    gated: bool = False
    """A grouped MLP that gates."""
    experts: bool = False


@functools.cache
def recorded(
    dtype: torch.dtype, trunk: Trunk, schedule: str, config: Config | Choice | None = None, chip: str = "sm_90"
) -> tuple[Recorded, ...]:
    """Every launch of a training step of a trunk; ``config`` for forward and backward or for all, else the built-in."""
    rows, m = 4096, trunk.M
    found: dict[Recorded, None] = {}
    dims, widths = trunk.hidden_dims, (256, *trunk.hidden_dims)
    aux_widths = (trunk.global_dim, *dims)
    chosen = configs.built_in(configs.Bucket.of(rows, m, max(dims)), dtype.itemsize, CHIPS[chip].family)
    if isinstance(config, Choice):
        chosen = config
    elif config is not None:
        chosen = Choice(schedule, config, config, chosen.weights, config)

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    auxiliary = not (trunk.all_branches or trunk.gated or trunk.experts)
    gates = [(dims[layer], dims[layer] if trunk.gate == "vector" else 1) for layer in trunk.mutual_layers]
    lists = ParameterLists(
        [empty(m, i + (o if auxiliary else 0), o) for i, o in zip(widths, dims, strict=False)],
        [empty(m, o) for o in dims],
        [empty(i, o) for i, o in zip(aux_widths, dims, strict=False)] if auxiliary else [],
        [empty(o) for o in dims] if auxiliary else [],
        [empty(m, d, width) for d, width in gates],
        [empty(m, width) for _, width in gates],
        [],
    )
    plan = Plan(
        activations=(trunk.activation,) * (len(dims) - trunk.gated) + ("identity",) * trunk.gated,
        mutual_layers=trunk.mutual_layers,
        score=trunk.score,
        temperature=0.1,
        foreign_dtype=trunk.foreign_dtype,
        recompute=False,
        reference_options={},
        all_branches=trunk.all_branches,
        schedule=schedule,
        gate_scale=2.0 if trunk.gated else None,
    )
    x_local = empty(rows, m, 256) if trunk.per_branch else empty(rows, 256)
    x_global = empty(rows, trunk.global_dim if auxiliary else 0)
    scenario = torch.arange(rows) % m
    with _recording(found, chosen):
        if trunk.experts:
            experts = x_local, *lists[:2]
            out, kept = engine.experts_forward(*experts, plan.activations, True)
            engine.experts_backward(out, out, *experts, kept, plan.activations, True)
        else:
            inputs = x_local, x_global, empty(rows, dims[-1]) if trunk.gated else None, scenario, lists
            own, aux, _, kept = engine.trunk_forward(*inputs, plan, True)
            engine.trunk_backward(own, aux, *inputs, kept, plan, True, True)
    return tuple(found)


@functools.cache
def compiled(launch: Recorded, chip: Chip) -> Any:
    """What Triton's compiler makes of a launch, its own assembler's code included."""
    source = ASTSource(
        fn=launch.kernel,
        signature=dict(launch.signature),
        constexprs=dict(launch.constants),
        attrs={place: [["tt.divisibility", 16]] for place in launch.divisible},
    )
    return triton.compile(source, target=chip.target, options=dict(launch.options))


def compile_for(launch: Recorded, chip: Chip) -> Report:
    """Compiles, and reads from the code what it takes."""
    code = compiled(launch, chip)
    if chip.target.backend == "hip":
        text = resources = code.asm["amdgcn"]
        patterns = r"\.vgpr_count:\s*(\d+)", r"\.vgpr_spill_count:\s*(\d+)"
    else:
        text, resources = code.asm["ptx"], tool("cuobjdump", code.asm["cubin"], "-res-usage")
        patterns = r"\bREG:(\d+)", r"\bSTACK:(\d+)"
    registers, spilled = (int(re.findall(pattern, resources)[0]) for pattern in patterns)
    tensor_core = re.search(chip.tensor_core, text) is not None
    return Report(registers, spilled, code.metadata.shared, tensor_core)


def tool(name: str, cubin: bytes, *options: str) -> str:
    """What a tool that comes with Triton prints of a kernel's code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([TOOLS / name, *options, file.name], capture_output=True, text=True, check=True).stdout


def plain(part: Any) -> Any:
    """A sealed description as it was before it was sealed."""
    part = getattr(part, "value", part) if isinstance(part, launching.Sealed) else part
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        return dataclasses.replace(part, **{f.name: plain(getattr(part, f.name)) for f in dataclasses.fields(part)})
    return tuple(map(plain, part)) if isinstance(part, tuple) and not hasattr(part, "_fields") else part


@functools.cache
def disassembled(launch: Recorded, chip: Chip) -> Code:
    """A launch's machine code, with the lines of its source."""
    return Code(tool("nvdisasm", compiled(launch, chip).asm["cubin"], "-gi"))


def main_loop(launch: Recorded, chip: Chip) -> int | None:
    """Instructions of the shortest loop with products, where the code can be disassembled."""
    if chip.name not in DISASSEMBLED:
        return None
    loops = (loop.every for loop in disassembled(launch, chip).all_loops() if not loop.inner)
    return min((len(loop) for loop in loops if count(loop, PRODUCT)), default=None)


FP8 = torch.float8_e4m3fn
# What docs/gpu-kernels.md lists: name, type, trunk, schedule.
LISTED = (
    ("bf16", torch.bfloat16, Trunk(), "persistent"),
    ("bf16", torch.bfloat16, Trunk(), "per_layer"),
    ("bf16, mutual units 1 and 2", torch.bfloat16, Trunk(mutual_layers=(0, 1)), "persistent"),
    ("bf16, mutual units 1 and 2", torch.bfloat16, Trunk(mutual_layers=(0, 1)), "per_layer"),
    ("bf16, foreign int8", torch.bfloat16, Trunk(foreign_dtype=torch.int8), "per_layer"),
    ("bf16, foreign fp8", torch.bfloat16, Trunk(foreign_dtype=FP8), "per_layer"),
    ("bf16, a gate", torch.bfloat16, Trunk(mutual_layers=(), gated=True), "persistent"),
    ("bf16, experts", torch.bfloat16, Trunk(mutual_layers=(), experts=True), "persistent"),
    ("fp32", torch.float32, Trunk(), "persistent"),
    ("fp32, a gate", torch.float32, Trunk(mutual_layers=(), gated=True), "persistent"),
    ("fp32, foreign bf16", torch.float32, Trunk(foreign_dtype=torch.bfloat16), "per_layer"),
)


def has_products(launch: Recorded) -> bool:
    """Whether it multiplies matrices."""
    return launch.name == "weight_gradient_kernel" or bool(launch.kinds & {Layer, InputGradient, QuantizedLayer})


def type_of_factors(launch: Recorded) -> str:
    """The type of what a launch multiplies."""
    pointers = dict(launch.signature)["pointers"]
    body = next(body for body in pointers if hasattr(body, "first") or hasattr(body, "rows"))
    factor = body.first if hasattr(body, "first") else body.rows
    return str(factor[0]) if isinstance(factor, tuple) else "*fp32"


def unavailable(launch: Recorded, chip: Chip) -> bool:
    """Whether the chip has no units for the launch's types, which supports() refuses there."""
    return "*fp8e4nv" in str(launch.signature) and chip.name in ("sm_80", "gfx942")


def title(launch: Recorded) -> str:
    """What sets launches of one trunk apart."""
    if launch.name != "persistent_kernel":
        return launch.name.removesuffix("_kernel")
    if InputGradient in launch.kinds:
        return "chain"
    if not launch.plan.persistent:
        return "foreign product" if QuantizedLayer in launch.kinds else "product of all branches"
    if launch.stages[0] == "V0":
        return "forward"
    if launch.plan.stages == 3 and launch.kinds == {Layer}:
        return "auxiliary network"
    return "forward" if MutualOwnRow in launch.kinds and launch.plan.stages > 6 else "part of the forward"


def _only(launch: Recorded) -> str:
    """The stage of a launch that runs one."""
    return f"{launch.stages[0]} " if len(launch.stages) == 1 else ""


def listing() -> Iterator[tuple[str, dict[str, Recorded]]]:
    """The start of the table's line, and the launch by chip; every launch once."""
    seen: set[tuple[Recorded, ...]] = set()
    for name, dtype, trunk, schedule in LISTED:
        of_chips = [recorded(dtype, trunk, schedule, chip=chip) for chip in CHIPS]
        for each in zip(*of_chips, strict=True):
            if each not in seen:
                seen.add(each)
                title_of = f"| {name} | {schedule} | {title(each[0])} {_only(each[0])}|"
                yield title_of, dict(zip(CHIPS, each, strict=True))


def table() -> str:
    """Registers and shared memory of every listed launch on every chip, in Markdown."""
    lines = [
        "| trunk | schedule | launch | " + " | ".join(CHIPS) + " |",
        "| --- | --- | --- |" + " --- |" * len(CHIPS),
    ]
    for start, launches in listing():
        found = (cell_or_none(launches[name], chip) for name, chip in CHIPS.items())
        lines.append(f"{start} " + " | ".join(found) + " |")
    return "\n".join([f"Compiled by Triton {triton.__version__}.", "", *lines])


def cell_or_none(launch: Recorded, chip: Chip) -> str:
    """What the table says of a launch on a chip."""
    return "–" if unavailable(launch, chip) else cell(launch, chip)


def cell(launch: Recorded, chip: Chip) -> str:
    """Registers, shared memory in KiB, instructions of the main loop, and a mark for matrix instructions."""
    report = compile_for(launch, chip)
    mark = " ●" if report.tensor_core else ""
    spilled = f" **{report.spilled_bytes} spilled**" if report.spilled_bytes else ""
    instructions = main_loop(launch, chip) if report.tensor_core else None
    loop = f" / {instructions}" if instructions else ""
    return f"{report.registers} / {report.shared_memory / 1024:.0f}{loop}{spilled}{mark}"


def documented_triton(page: str) -> str | None:
    """The Triton whose table the page has."""
    found = re.search(r"^Compiled by Triton (\S+)\.$", page, re.MULTILINE)
    return found[1] if found else None


PAGE = Path(__file__).parents[2] / "docs" / "gpu-kernels.md"
BETWEEN = re.compile(r"(?<=<!-- compiled -->\n).*?(?=<!-- end -->)", re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(BETWEEN.sub(lambda _: table() + "\n", PAGE.read_text(encoding="utf-8")), encoding="utf-8")
