"""The trunk's stages, forward and backward, from its shape: docs/computation.md as a list of products and mutual units.

Names of tensors, l counting from 0: ``x_local``, ``x_global``; ``branch_weight{l}`` and the like; ``streams{l}``
(B, M, d) of layers that all branches run; ``own{l}`` V_t, ``mutual{l}`` M_t, ``mixed{l}`` M of all branches,
``gate{l}``, ``aux{l}`` A; ``own_argument{l}``, ``aux_argument{l}`` what δ was taken of; ``alpha{l}`` own rows of α.
Backward: ``dz{l}``, ``dz_aux{l}`` gradients of δ's arguments, ``d_gate{l}`` of the sigmoid's, ``d_mutual{l}`` of M_t
and ``d_own{l}`` of V_t but for the gate's product, both float32.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch

from saml_kernels.backends.triton.functions import IDENTITY, SIGMOID
from saml_kernels.backends.triton.mutual import ALPHA, D_GATE, D_MUTUAL, D_OWN, GATE, MIXED, MUTUAL, STREAMS
from saml_kernels.backends.triton.program import (
    Buffer,
    Matrix,
    Program,
    Stage,
    Weight,
    foreign_product,
    product,
    rows_stage,
)
from saml_kernels.backends.triton.rounding import FIRST, ROUNDED, SCALE, SECOND, largest, padded_width
from saml_kernels.backends.triton.tables import MUTUAL_BACKWARD, MUTUAL_OWN_ROW, MUTUAL_TABLE, ROUND_ROWS
from saml_kernels.backends.triton.weights import WeightGradient, WeightProgram

Factor = tuple[Matrix, Weight, int]
"""Rows, weight and how many columns of the rows, which are lines of the weight."""
NEEDS_ARGUMENT = frozenset({2, 3})
"""gelu and silu: the derivative needs δ's argument."""


@dataclass(frozen=True)
class TrunkShape:
    """Everything of a trunk but its tensors and its batch."""

    branches: int
    local_dim: int
    global_dim: int
    per_branch: bool
    """x_local is (B, M, D_l)."""
    widths: tuple[int, ...]
    aux_widths: tuple[int, ...]
    """Empty without auxiliary network."""
    gates: tuple[int, ...]
    """Gate width of every layer, 0 without mutual unit."""
    activations: tuple[int, ...]
    score: int
    all_branches: bool = False
    """The last layer of every branch is returned, (B, M, d_L)."""
    rounded: torch.dtype | None = None

    @property
    def layers(self) -> int:
        return len(self.widths)

    @property
    def shared_layers(self) -> int:
        """Layers that all branches run for every row."""
        if self.all_branches:
            return self.layers
        return max((layer + 1 for layer, gate in enumerate(self.gates) if gate), default=0)

    @property
    def auxiliary(self) -> bool:
        return bool(self.aux_widths)

    def needs_argument(self, layer: int) -> bool:
        return self.activations[layer] in NEEDS_ARGUMENT

    def followed(self, layer: int) -> bool:
        """Whether the layer's mutual unit is needed for all branches, as another one follows."""
        return bool(self.gates[layer]) and layer + 1 < self.shared_layers

    def local(self) -> Matrix:
        if self.per_branch:
            return Matrix.by_branch("x_local", self.branches, self.local_dim, gathered=True)
        return Matrix.shared("x_local", self.local_dim, gathered=True)

    def aux(self, layer: int) -> Matrix:
        """A^(layer + 1); the last one is an output, in the caller's order."""
        return Matrix.shared(f"aux{layer}", self.aux_widths[layer], gathered=layer == self.layers - 1)

    def aux_input(self, layer: int) -> tuple[Matrix, int]:
        if layer == 0:
            return Matrix.shared("x_global", self.global_dim, gathered=True), self.global_dim
        return self.aux(layer - 1), self.aux_widths[layer - 1]

    def own(self, layer: int) -> Matrix:
        """V_t of the layer as δ' reads it; the last layer's is the output where no mutual unit follows it."""
        last = layer == self.layers - 1 and not self.gates[layer]
        if last and self.all_branches:
            return Matrix.by_branch("own_output", self.branches, self.widths[layer], gathered=True)
        return Matrix.shared("own_output" if last else f"own{layer}", self.widths[layer], gathered=last)

    def own_input(self, layer: int) -> tuple[Matrix, int]:
        """What the own branch's layer reads besides the auxiliary stream, as backward finds it."""
        if layer == 0:
            return self.local(), self.local_dim
        name = "mutual" if self.gates[layer - 1] else "own"
        return Matrix.shared(f"{name}{layer - 1}", self.widths[layer - 1]), self.widths[layer - 1]

    def weight(self, layer: int, start: int = 0) -> Weight:
        """W_k of the layer from input row ``start``."""
        k, n = self.own_input(layer)[1] + (self.aux_widths[layer] if self.auxiliary else 0), self.widths[layer]
        return Weight(f"branch_weight{layer}", n, k * n, start * n)

    def gate_weight(self, layer: int) -> Weight:
        return Weight(f"gate_weight{layer}", self.gates[layer], self.widths[layer] * self.gates[layer])


class _Builder:
    def __init__(self) -> None:
        self.stages: list[Stage] = []
        self.buffers: dict[str, Buffer] = {}

    def add(self, stage: Stage) -> str:
        self.stages.append(stage)
        return stage.name

    def buffer(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> None:
        self.buffers[name] = Buffer(shape, dtype)

    def scratch(self, name: str, *shape: int, dtype: torch.dtype | None = None, temporary: bool = True) -> None:
        """A buffer for all branches; ``temporary``: backward does not read it."""
        self.buffers[name] = Buffer(shape, dtype, of_all_branches=True, temporary=temporary)


class _TrunkBuilder(_Builder):
    def __init__(self, shape: TrunkShape) -> None:
        super().__init__()
        self.shape = shape


@functools.cache
def forward_program(shape: TrunkShape, keep: bool, again: bool = False) -> Program:
    """The forward. ``keep``: with what backward needs. ``again``: only the streams of mutual layers, from kept A."""
    build = _TrunkBuilder(shape)
    m = shape.branches
    streams: Matrix = shape.local()
    before, aux_before = "", ""
    """Stages that wrote the branches' and the auxiliary network's input."""
    for layer in range(shape.shared_layers if again else shape.layers):
        d, activation, last = shape.widths[layer], shape.activations[layer], layer == shape.layers - 1
        argument = keep and shape.needs_argument(layer)
        if shape.auxiliary and not again:
            aux_before = _auxiliary_layer(build, layer, aux_before, argument)
        second, k = None, shape.own_input(layer)[1]
        if shape.auxiliary:
            a = shape.aux_widths[layer]
            second = (shape.aux(layer), shape.weight(layer, k), a)
        after = [name for name in (before, aux_before) if name]
        if argument:
            build.buffer(f"own_argument{layer}", d)
        options: dict[str, Any] = {
            "second": second,
            "bias": f"branch_bias{layer}",
            "activation": activation,
            "argument": f"own_argument{layer}" if argument else None,
        }
        if layer >= shape.shared_layers:
            rows = shape.local() if layer == 0 else _own_stream(shape, layer)
            out = shape.own(layer)
            if not last:
                build.buffer(out.name, d)
            first = (rows, shape.weight(layer), k)
            before = build.add(product(f"V{layer}", d, out, own=True, after=after, first=first, **options))
            continue

        output = last and shape.all_branches
        out = Matrix.by_branch("own_output" if output else f"streams{layer}", m, d, gathered=output)
        if not output:
            build.scratch(out.name, m, d, temporary=not shape.gates[layer])
        value = None
        if keep and not output:
            value = shape.own(layer)
            build.buffer(value.name, d)
        options["value"] = value
        first = (streams, shape.weight(layer), k)
        produced = _all_branches(build, f"V{layer}", d, out, (first, second), after, options)
        streams = out
        if not shape.gates[layer]:
            before = produced[-1]
            continue
        if again and layer == shape.shared_layers - 1:
            break
        before = _mutual_layer(build, layer, streams, produced, keep)
        streams = Matrix.by_branch(f"mixed{layer}", m, d)
    return Program(
        m,
        tuple(build.stages),
        build.buffers,
        score=shape.score,
        keep=keep,
        largest=0.0 if shape.rounded is None else largest(shape.rounded),
    )


def _own_stream(shape: TrunkShape, layer: int) -> Matrix:
    """The own branch's input in a forward without all branches: M_t or V_t, or its entry of all streams."""
    rows, width = shape.own_input(layer)
    if rows.name.startswith("own") and layer - 1 < shape.shared_layers:
        return Matrix.by_branch(f"streams{layer - 1}", shape.branches, width)
    return rows


def _auxiliary_layer(build: _TrunkBuilder, layer: int, before: str, argument: bool) -> str:
    shape = build.shape
    rows, k = shape.aux_input(layer)
    a, out = shape.aux_widths[layer], shape.aux(layer)
    if not out.gathered:
        build.buffer(out.name, a)
    if argument:
        build.buffer(f"aux_argument{layer}", a)
    return build.add(
        product(
            f"A{layer}",
            a,
            out,
            own=False,
            after=[before] if before else [],
            first=(rows, Weight(f"aux_weight{layer}", a), k),
            bias=f"aux_bias{layer}",
            activation=shape.activations[layer],
            argument=f"aux_argument{layer}" if argument else None,
            shared=True,
        )
    )


def _all_branches(
    build: _TrunkBuilder,
    name: str,
    n: int,
    out: Matrix,
    factors: tuple[Factor, Factor | None],
    after: list[str],
    options: dict[str, Any],
) -> list[str]:
    """A product of all branches on any rows, foreign ones rounded on request; the stages that complete it."""
    shape, (first, second) = build.shape, factors
    m = shape.branches
    if shape.rounded is None or m == 1:
        return [
            build.add(product(name, n, out, own=False, after=after, first=first, parts=m, own_launch=True, **options))
        ]
    rows, weight, k1 = first
    width = padded_width(k1 + (second[2] if second else 0))
    branches = m if rows.branch else 1
    target = f"rounded_{name}"
    build.scratch(target, branches, width, dtype=shape.rounded)
    build.scratch(f"{target}_scale", branches, dtype=torch.float32)
    places = {FIRST.value: rows.name, ROUNDED.value: target, SCALE.value: f"{target}_scale"}
    entries = {"k1": k1, "n": width, "a1_row": rows.row, "a1_branch": rows.branch, "a1_gathered": rows.gathered}
    if second is not None:
        places[SECOND.value] = second[0].name
        entries |= {"k2": second[2], "a2_row": second[0].row, "a2_gathered": second[0].gathered}
    rounding = build.add(
        rows_stage(f"R{name}", ROUND_ROWS.value, places, entries, own=False, after=after, parts=branches)
    )
    foreign = build.add(
        foreign_product(
            f"F{name}",
            n,
            width,
            Matrix(target, branches * width, width if rows.branch else 0),
            f"rounded_{weight.name}",
            options["bias"],
            out,
            after=[rounding],
            activation=options["activation"],
            parts=m,
        )
    )
    # The own branch in full precision, into its entry.
    own = build.add(product(name, n, out, own=True, after=after, first=first, **options))
    return [foreign, own]


def _mutual_layer(build: _TrunkBuilder, layer: int, streams: Matrix, after: list[str], keep: bool) -> str:
    """The mutual unit after a layer: own row, or the table where another unit follows."""
    shape = build.shape
    m, d, width = shape.branches, shape.widths[layer], shape.gates[layer]
    last = layer == shape.layers - 1
    first = (streams, shape.gate_weight(layer), d)
    gate = Matrix.shared(f"gate{layer}", width)
    if keep or not shape.followed(layer):
        build.buffer(gate.name, width)
    target = "own_output" if last else f"mutual{layer}"
    if not last and (keep or not shape.followed(layer)):
        build.buffer(target, d)
    options: dict[str, Any] = {"bias": f"gate_bias{layer}", "activation": SIGMOID.value, "second": None}
    if not shape.followed(layer):
        # The gate waits for all branches of its rows, so the mix need not.
        gated = build.add(product(f"G{layer}", width, gate, own=True, after=after, first=first, **options))
        own_places = {
            STREAMS.value: streams.name,
            GATE.value: gate.name,
            ALPHA.value: f"alpha{layer}",
            MUTUAL.value: target,
        }
        return build.add(
            rows_stage(
                f"M{layer}",
                MUTUAL_OWN_ROW.value,
                own_places,
                {"n": d, "gate": width, "out_gathered": int(last)},
                own=True,
                after=[gated],
            )
        )
    build.scratch(f"gates{layer}", m, width)
    build.scratch(f"mixed{layer}", m, d)
    options["value"] = gate if keep else None
    gates = Matrix.by_branch(f"gates{layer}", m, width)
    produced = _all_branches(build, f"G{layer}", width, gates, (first, None), after, options)
    places = {
        STREAMS.value: streams.name,
        GATE.value: gates.name,
        ALPHA.value: f"alpha{layer}",
        MUTUAL.value: target if keep else f"mixed{layer}",
        MIXED.value: f"mixed{layer}",
    }
    return build.add(
        rows_stage(f"T{layer}", MUTUAL_TABLE.value, places, {"n": d, "gate": width}, own=False, after=produced)
    )


@functools.cache
def backward_program(shape: TrunkShape, need_local: bool, need_global: bool) -> Program:
    """Gradients of δ's arguments and of the inputs, through the own branch: every stage on tiles of one scenario."""
    build = _TrunkBuilder(shape)
    m, top = shape.branches, shape.layers - 1
    float32 = torch.float32

    def through_activation(layer: int) -> dict[str, Any]:
        """δ' of an own branch's layer."""
        return {
            "activation": shape.activations[layer],
            "value": shape.own(layer),
            "argument": f"own_argument{layer}" if shape.needs_argument(layer) else None,
        }

    def into_own(layer: int, name: str, after: list[str], **factors: Any) -> str:
        """A product whose result is the gradient of what a layer of the own branch gives: dz, or dM before its unit."""
        d = shape.widths[layer]
        if not shape.gates[layer]:
            build.buffer(f"dz{layer}", d)
            out = Matrix.shared(f"dz{layer}", d)
            return build.add(product(name, d, out, own=True, after=after, **factors, **through_activation(layer)))
        build.buffer(f"d_mutual{layer}", d, dtype=float32)
        out = Matrix.shared(f"d_mutual{layer}", d)
        return build.add(product(name, d, out, own=True, after=after, out_float32=True, **factors))

    if shape.all_branches:
        upstream = Matrix.by_branch("grad_own", m, shape.widths[top], gathered=True)
    else:
        upstream = Matrix.shared("grad_own", shape.widths[top], gathered=True)
    before = into_own(top, "D", [], addend=upstream)
    aux_before = ""
    for layer in reversed(range(shape.layers)):
        d, width = shape.widths[layer], shape.gates[layer]
        if width:
            build.buffer(f"d_own{layer}", d, dtype=float32)
            build.buffer(f"d_gate{layer}", width)
            build.buffer(f"dz{layer}", d)
            places = {
                STREAMS.value: f"streams{layer}",
                GATE.value: f"gate{layer}",
                ALPHA.value: f"alpha{layer}",
                D_MUTUAL.value: f"d_mutual{layer}",
                D_OWN.value: f"d_own{layer}",
                D_GATE.value: f"d_gate{layer}",
            }
            unit = build.add(
                rows_stage(
                    f"B{layer}", MUTUAL_BACKWARD.value, places, {"n": d, "gate": width}, own=True, after=[before]
                )
            )
            before = build.add(
                product(
                    f"Z{layer}",
                    d,
                    Matrix.shared(f"dz{layer}", d),
                    own=True,
                    after=[unit],
                    first=(Matrix.shared(f"d_gate{layer}", width), shape.gate_weight(layer), width),
                    addend=Matrix.shared(f"d_own{layer}", d),
                    addend_float32=True,
                    **through_activation(layer),
                )
            )
        of_layer, k = before, shape.own_input(layer)[1]
        dz = Matrix.shared(f"dz{layer}", d)
        if shape.auxiliary:
            aux_before = _auxiliary_backward(build, layer, [name for name in (of_layer, aux_before) if name], dz)
        first = (dz, shape.weight(layer), d)
        if layer > 0:
            before = into_own(layer - 1, f"X{layer}", [of_layer], first=first)
        elif need_local and k > 0:
            out = Matrix.shared("d_local", k, gathered=True)
            if shape.per_branch:
                out = Matrix.by_branch("d_local", m, k, gathered=True)
            build.add(product("X0", k, out, own=True, after=[of_layer], first=first))
    if shape.auxiliary and need_global and shape.global_dim > 0:
        a = shape.aux_widths[0]
        first = (Matrix.shared("dz_aux0", a), Weight("aux_weight0", a), a)
        out = Matrix.shared("d_global", shape.global_dim, gathered=True)
        build.add(product("Y", shape.global_dim, out, own=True, after=[aux_before], first=first))
    return Program(m, tuple(build.stages), build.buffers, backward=True, score=shape.score)


def _auxiliary_backward(build: _TrunkBuilder, layer: int, after: list[str], dz: Matrix) -> str:
    """dz of the auxiliary layer: what its branch layer and the auxiliary layer above send down, through δ'."""
    shape = build.shape
    a, last = shape.aux_widths[layer], layer == shape.layers - 1
    build.buffer(f"dz_aux{layer}", a)
    above = None
    if not last:
        wide = shape.aux_widths[layer + 1]
        above = (Matrix.shared(f"dz_aux{layer + 1}", wide), Weight(f"aux_weight{layer + 1}", wide), wide)
    return build.add(
        product(
            f"Y{layer}",
            a,
            Matrix.shared(f"dz_aux{layer}", a),
            own=True,
            after=after,
            first=(dz, shape.weight(layer, shape.own_input(layer)[1]), shape.widths[layer]),
            second=above,
            addend=Matrix.shared("grad_aux", a, gathered=True) if last else None,
            activation=shape.activations[layer],
            value=shape.aux(layer),
            argument=f"aux_argument{layer}" if shape.needs_argument(layer) else None,
        )
    )


@functools.cache
def weight_program(shape: TrunkShape) -> WeightProgram:
    """Gradients of all parameters."""
    gradients: list[WeightGradient] = []
    for layer, d in enumerate(shape.widths):
        second = (shape.aux(layer), shape.aux_widths[layer]) if shape.auxiliary else None
        names = f"branch_weight{layer}", f"branch_bias{layer}"
        gradients.append(WeightGradient(shape.own_input(layer), second, f"dz{layer}", d, *names))
        if shape.gates[layer]:
            own = shape.own(layer), d
            names = f"gate_weight{layer}", f"gate_bias{layer}"
            gradients.append(WeightGradient(own, None, f"d_gate{layer}", shape.gates[layer], *names))
        if shape.auxiliary:
            names = f"aux_weight{layer}", f"aux_bias{layer}"
            a = shape.aux_widths[layer]
            gradients.append(WeightGradient(shape.aux_input(layer), None, f"dz_aux{layer}", a, *names, False))
    return WeightProgram(shape.branches, tuple(gradients))


@dataclass(frozen=True)
class UnitShape:
    """A mutual unit on streams (B, M, d) in the caller's order."""

    branches: int
    dim: int
    gate: int
    score: int

    def streams(self) -> Matrix:
        return Matrix.by_branch("streams", self.branches, self.dim, gathered=True)

    def gate_weight(self) -> Weight:
        return Weight("gate_weight", self.gate, self.dim * self.gate)


@functools.cache
def unit_forward_program(shape: UnitShape) -> Program:
    """The gate and the own row: ``streams`` → ``gate``, ``alpha``, ``own_output``."""
    build = _Builder()
    build.buffer("gate", shape.gate)
    gated = build.add(
        product(
            "G",
            shape.gate,
            Matrix.shared("gate", shape.gate),
            own=True,
            first=(shape.streams(), shape.gate_weight(), shape.dim),
            bias="gate_bias",
            activation=SIGMOID.value,
        )
    )
    places = {STREAMS.value: "streams", GATE.value: "gate", ALPHA.value: "alpha", MUTUAL.value: "own_output"}
    build.add(
        rows_stage(
            "M",
            MUTUAL_OWN_ROW.value,
            places,
            {"n": shape.dim, "gate": shape.gate, "a1_gathered": 1, "out_gathered": 1},
            own=True,
            after=[gated],
        )
    )
    return Program(shape.branches, tuple(build.stages), build.buffers, score=shape.score)


@functools.cache
def unit_backward_program(shape: UnitShape) -> Program:
    """``grad_own`` → the own entry of ``d_streams``, and ``d_gate``."""
    build = _Builder()
    d = shape.dim
    build.buffer("d_mutual", d, dtype=torch.float32)
    build.buffer("d_own", d, dtype=torch.float32)
    build.buffer("d_gate", shape.gate)
    before = build.add(
        product(
            "D",
            d,
            Matrix.shared("d_mutual", d),
            own=True,
            addend=Matrix.shared("grad_own", d, gathered=True),
            out_float32=True,
        )
    )
    places = {
        STREAMS.value: "streams",
        GATE.value: "gate",
        ALPHA.value: "alpha",
        D_MUTUAL.value: "d_mutual",
        D_OWN.value: "d_own",
        D_GATE.value: "d_gate",
    }
    unit = build.add(
        rows_stage(
            "B",
            MUTUAL_BACKWARD.value,
            places,
            {"n": d, "gate": shape.gate, "a1_gathered": 1},
            own=True,
            after=[before],
        )
    )
    build.add(
        product(
            "Z",
            d,
            Matrix.by_branch("d_streams", shape.branches, d, gathered=True),
            own=True,
            after=[unit],
            first=(Matrix.shared("d_gate", shape.gate), shape.gate_weight(), shape.gate),
            addend=Matrix.shared("d_own", d),
            addend_float32=True,
            activation=IDENTITY.value,
        )
    )
    return Program(shape.branches, tuple(build.stages), build.buffers, backward=True, score=shape.score)


@functools.cache
def unit_weight_program(shape: UnitShape) -> WeightProgram:
    """Gradients of the gate."""
    gradient = WeightGradient((shape.streams(), shape.dim), None, "d_gate", shape.gate, "gate_weight", "gate_bias")
    return WeightProgram(shape.branches, (gradient,))
