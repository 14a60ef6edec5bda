"""The trunk's stages, forward and backward, from its shape: docs/computation.md as a list of products and mutual units.

Stages, l counting from 0: A{l} the auxiliary layer; V{l} the branch layer; G{l} a gate; M{l} the mutual unit's own row,
T{l} its whole table; Q{l} rows quantised and F{l} the foreign branches' product of them. Backward: B{l} the mutual
unit, Z{l} its dV_t, X{l} what a branch layer sends down, Y{l} what reaches an auxiliary layer.

Tensors: ``x_local``, ``x_global``; ``branch_weight{l}`` and the like; ``streams{l}`` (B, M, d) of layers that all
branches run; ``own{l}`` V_t, ``mutual{l}`` M_t, ``mixed{l}`` M of all branches, ``gate{l}`` g_t, ``aux{l}`` A;
``own_preact{l}``, ``aux_preact{l}`` what δ was taken of; ``alpha{l}`` own rows of α. Backward: ``dz{l}``, ``dz_aux{l}``
gradients of δ's preactivations, ``d_gate{l}`` of the sigmoid's, ``d_mutual{l}`` of M_t and ``d_own{l}`` of V_t but for
the gate's product, both float32. A grouped MLP that gates: ``gated``, ``sigmoid`` of its last layer, ``d_gated``.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch

from saml_kernels.activations import ACTIVATIONS
from saml_kernels.backends.triton.stages import (
    NO_FACTOR,
    NO_ROWS,
    Buffer,
    Factor,
    InputGradient,
    Layer,
    MutualBackward,
    MutualOwnRow,
    MutualTable,
    Program,
    QuantizedLayer,
    QuantizeRows,
    Rows,
    Stage,
    Weight,
    WeightGradient,
)
from saml_kernels.reference import SCALED_DTYPES

QUANTIZED_PADDING = 16
"""Quantised rows are as long as a multiple of this."""


@dataclass(frozen=True)
class TrunkShape:
    """Everything of a trunk but its tensors and its batch."""

    num_scenarios: int
    local_dim: int
    global_dim: int
    per_branch: bool
    """x_local is (B, M, D_l)."""
    widths: tuple[int, ...]
    """d_1..d_L."""
    aux_widths: tuple[int, ...]
    """a_1..a_L; empty without auxiliary network."""
    gates: tuple[int, ...]
    """Gate width of every layer, 0 without mutual unit."""
    activations: tuple[str, ...]
    score: str
    all_branches: bool = False
    """The last layer of every branch is returned, (B, M, d_L)."""
    quantized: torch.dtype | None = None
    """Type of the foreign branches' factors; None: the inputs'."""
    gate_scale: float | None = None
    """γ where the result is γ sigmoid(z_L) ∘ gated."""
    experts: bool = False
    """Branches are experts: sorted row k B + n is row n of x, as expert k's own. ``all_branches`` is True."""

    @property
    def layers(self) -> int:
        """L."""
        return len(self.widths)

    @property
    def shared_layers(self) -> int:
        """Layers that all branches run for every row."""
        if self.all_branches and not self.experts:
            return self.layers
        return max((layer + 1 for layer, gate in enumerate(self.gates) if gate), default=0)

    @property
    def auxiliary(self) -> bool:
        """Whether there is an auxiliary network."""
        return bool(self.aux_widths)

    def needs_preact(self, layer: int) -> bool:
        """Whether δ' of the layer needs the preactivation."""
        return ACTIVATIONS[self.activations[layer]].needs_preact

    def followed(self, layer: int) -> bool:
        """Whether the layer's mutual unit is needed for all branches, as another one follows."""
        return bool(self.gates[layer]) and layer + 1 < self.shared_layers

    def local(self) -> Rows:
        """x_l."""
        if self.per_branch:
            return Rows.by_branch("x_local", self.num_scenarios, self.local_dim, gathered=True)
        return Rows.shared("x_local", self.local_dim, gathered=True)

    def aux(self, layer: int) -> Rows:
        """A after the layer; the last one is an output, in the caller's order."""
        return Rows.shared(f"aux{layer}", self.aux_widths[layer], gathered=layer == self.layers - 1)

    def aux_input(self, layer: int) -> tuple[Rows, int]:
        """What the auxiliary layer reads, and its width."""
        if layer == 0:
            return Rows.shared("x_global", self.global_dim, gathered=True), self.global_dim
        return self.aux(layer - 1), self.aux_widths[layer - 1]

    def own(self, layer: int) -> Rows:
        """V_t of the layer as δ' reads it; the last layer's is the output where no mutual unit follows it."""
        if layer == self.layers - 1 and self.gate_scale is not None:
            return Rows.shared("sigmoid", self.widths[layer])
        last = layer == self.layers - 1 and not self.gates[layer]
        if last and self.all_branches:
            return Rows.by_branch("own_output", self.num_scenarios, self.widths[layer], gathered=True)
        return Rows.shared("own_output" if last else f"own{layer}", self.widths[layer], gathered=last)

    def own_input(self, layer: int) -> tuple[Rows, int]:
        """What the own branch's layer reads besides the auxiliary stream, as backward finds it, and its width."""
        if layer == 0:
            return self.local(), self.local_dim
        name = "mutual" if self.gates[layer - 1] else "own"
        return Rows.shared(f"{name}{layer - 1}", self.widths[layer - 1]), self.widths[layer - 1]

    def weight(self, layer: int, start: int = 0) -> Weight:
        """W_k of the layer from input row ``start``."""
        k, n = self.own_input(layer)[1] + (self.aux_widths[layer] if self.auxiliary else 0), self.widths[layer]
        return Weight(f"branch_weight{layer}", n, k * n, start * n)

    def aux_weight(self, layer: int) -> Weight:
        """Wa of the layer."""
        return Weight(f"aux_weight{layer}", self.aux_widths[layer], 0, 0)

    def gate_weight(self, layer: int) -> Weight:
        """U_k of the layer."""
        return Weight(f"gate_weight{layer}", self.gates[layer], self.widths[layer] * self.gates[layer], 0)


class _List:
    """Stages and buffers of a program while it is made."""

    def __init__(self, num_scenarios: int) -> None:
        self.num_scenarios = num_scenarios
        self.stages: list[Stage] = []
        self.buffers: dict[str, Buffer] = {}

    def add(self, kind: type[Stage], name: str, **fields: Any) -> str:
        """A stage of a kind; its name, for those that wait for it."""
        self.stages.append(kind(name=name, num_scenarios=self.num_scenarios, **fields))
        return name

    def rows(self, name: str, width: int, dtype: torch.dtype | None = None) -> Rows:
        """A new buffer (B, width)."""
        self.buffers[name] = Buffer((width,), dtype)
        return Rows.shared(name, width)

    def of_all_branches(self, name: str, *shape: int, dtype: torch.dtype | None = None, temporary: bool = True) -> None:
        """A new buffer (B, M, width) or as large."""
        self.buffers[name] = Buffer(shape, dtype, of_all_branches=True, temporary=temporary)

    def program(self) -> Program:
        return Program(tuple(self.stages), self.buffers)


def _names(*names: str) -> tuple[str, ...]:
    """The stages among them: an empty name stands for none."""
    return tuple(name for name in names if name)


@functools.cache
def forward_program(shape: TrunkShape, save: bool, again: bool = False) -> Program:
    """The forward. ``save``: with what backward needs. ``again``: only the streams of mutual layers, from saved A."""
    stages = _List(shape.num_scenarios)
    streams = shape.local()
    before, aux_before = "", ""
    for layer in range(shape.shared_layers if again else shape.layers):
        preact = save and shape.needs_preact(layer)
        if shape.auxiliary and not again:
            aux_before = _auxiliary_layer(stages, shape, layer, aux_before, preact)
        # V_k^l = δ([V_k^{l−1} ; A^l] W_k^l + b_k^l)
        d, k = shape.widths[layer], shape.own_input(layer)[1]
        second = NO_FACTOR
        if shape.auxiliary:
            second = Factor(shape.aux(layer), shape.weight(layer, k), shape.aux_widths[layer])
        options: dict[str, Any] = {
            "n": d,
            "second": second,
            "bias": f"branch_bias{layer}",
            "activation": shape.activations[layer],
            "after": _names(before, aux_before),
            "preact": stages.rows(f"own_preact{layer}", d) if preact else NO_ROWS,
        }
        if layer >= shape.shared_layers:
            before = _own_layer(stages, shape, layer, options, save)
            continue
        output = layer == shape.layers - 1 and shape.all_branches
        out = Rows.by_branch("own_output" if output else f"streams{layer}", shape.num_scenarios, d, gathered=output)
        if not output:
            stages.of_all_branches(f"streams{layer}", shape.num_scenarios, d, temporary=not shape.gates[layer])
        if save and not output:
            options["saved"] = shape.own(layer)
            stages.rows(f"own{layer}", d)
        first = Factor(streams, shape.weight(layer), k)
        produced = _all_branches(stages, shape, f"V{layer}", out, first, options)
        streams = out
        if not shape.gates[layer]:
            before = produced[-1]
            continue
        if again and layer == shape.shared_layers - 1:
            break
        before = _mutual_unit(stages, shape, layer, streams, produced, save)
        streams = Rows.by_branch(f"mixed{layer}", shape.num_scenarios, d)
    return stages.program()


def _auxiliary_layer(stages: _List, shape: TrunkShape, layer: int, before: str, preact: bool) -> str:
    """A^l = δ(A^{l−1} Wa^l + ba^l)."""
    rows, k = shape.aux_input(layer)
    a, out = shape.aux_widths[layer], shape.aux(layer)
    if not out.gathered:
        stages.rows(f"aux{layer}", a)
    return stages.add(
        Layer,
        f"A{layer}",
        own=False,
        after=_names(before),
        first=Factor(rows, shape.aux_weight(layer), k),
        n=a,
        bias=f"aux_bias{layer}",
        activation=shape.activations[layer],
        out=out,
        preact=stages.rows(f"aux_preact{layer}", a) if preact else NO_ROWS,
        every_row_is_own=True,
    )


def _own_layer(stages: _List, shape: TrunkShape, layer: int, options: dict[str, Any], save: bool) -> str:
    """A layer behind the last mutual unit: only the own branch goes on."""
    rows, k = shape.own_input(layer)
    if 0 < layer <= shape.shared_layers and not shape.gates[layer - 1]:
        # The layer below ran for all branches; this one reads the own entry of its streams.
        rows = Rows.by_branch(f"streams{layer - 1}", shape.num_scenarios, k)
    if layer < shape.layers - 1:
        stages.rows(f"own{layer}", shape.widths[layer])
    first, out = Factor(rows, shape.weight(layer), k), shape.own(layer)
    if layer == shape.layers - 1 and shape.gate_scale is not None:
        d = shape.widths[layer]
        saved = stages.rows("sigmoid", d) if save else NO_ROWS
        options |= {"activation": "sigmoid", "saved": saved, "every_row_is_own": True, "gate_scale": shape.gate_scale}
        options["gated"] = Rows.shared("gated", d, gathered=True)
        out = Rows.shared("own_output", d, gathered=True)
    return stages.add(Layer, f"V{layer}", own=True, first=first, out=out, **options)


def _all_branches(
    stages: _List, shape: TrunkShape, name: str, out: Rows, first: Factor, options: dict[str, Any]
) -> tuple[str, ...]:
    """A layer of all branches on any rows, foreign ones quantised on request; the stages that complete it."""
    m = shape.num_scenarios
    if shape.quantized is None or m == 1:
        return (stages.add(Layer, name, own=False, first=first, out=out, branches=m, own_launch=True, **options),)
    second: Factor = options["second"]
    width = -(-(first.k + second.k) // QUANTIZED_PADDING) * QUANTIZED_PADDING
    largest = SCALED_DTYPES.get(shape.quantized, 0.0)
    views = m if first.rows.branch_stride else 1
    target = f"quantized_{name}"
    stages.of_all_branches(target, views, width, dtype=shape.quantized)
    stages.of_all_branches(f"{target}_scale", views, dtype=torch.float32)
    rounded = stages.add(
        QuantizeRows,
        f"Q{name}",
        own=False,
        after=options["after"],
        first=first.rows,
        k1=first.k,
        second=second.rows,
        k2=second.k,
        width=width,
        views=views,
        quantized=target,
        scale=f"{target}_scale",
        largest=largest,
    )
    foreign = stages.add(
        QuantizedLayer,
        f"F{name}",
        own=False,
        after=(rounded,),
        rows=Rows(target, views * width, width if views > 1 else 0, False),
        k=width,
        n=options["n"],
        weight=f"quantized_{first.weight.tensor}",
        bias=options["bias"],
        activation=options["activation"],
        out=out,
        scaled=largest > 0,
        itemsize=shape.quantized.itemsize,
        branches=m,
        own_launch=True,
    )
    # The own branch in full precision, into its entry.
    return foreign, stages.add(Layer, name, own=True, first=first, out=out, **options)


def _mutual_unit(
    stages: _List, shape: TrunkShape, layer: int, streams: Rows, after: tuple[str, ...], save: bool
) -> str:
    """g = sigmoid(V U + u), then M_t = V_t + g_t ∘ Σ α_tj V_j, or M of all branches where another unit follows."""
    m, d, width = shape.num_scenarios, shape.widths[layer], shape.gates[layer]
    last, followed = layer == shape.layers - 1, shape.followed(layer)
    first = Factor(streams, shape.gate_weight(layer), d)
    gate = stages.rows(f"gate{layer}", width) if save or not followed else NO_ROWS
    mutual = Rows.shared("own_output" if last else f"mutual{layer}", d, gathered=last)
    if not last and (save or not followed):
        stages.rows(f"mutual{layer}", d)
    options: dict[str, Any] = {
        "n": width,
        "second": NO_FACTOR,
        "bias": f"gate_bias{layer}",
        "activation": "sigmoid",
        "after": after,
    }
    unit = {"d": d, "gate_width": width, "alpha": f"alpha{layer}", "score": shape.score, "streams": streams}
    if not followed:
        # The gate waits for all branches of its rows, so the mix need not.
        gated = stages.add(Layer, f"G{layer}", own=True, first=first, out=gate, **options)
        return stages.add(MutualOwnRow, f"M{layer}", own=True, after=(gated,), gate=gate.tensor, mutual=mutual, **unit)
    stages.of_all_branches(f"gates{layer}", m, width)
    stages.of_all_branches(f"mixed{layer}", m, d)
    gates = Rows.by_branch(f"gates{layer}", m, width)
    gated_all = _all_branches(stages, shape, f"G{layer}", gates, first, options | {"saved": gate})
    return stages.add(
        MutualTable,
        f"T{layer}",
        own=False,
        after=gated_all,
        gates=gates.tensor,
        mutual=mutual.tensor if save else None,
        mixed=f"mixed{layer}",
        save=save,
        **unit,
    )


@functools.cache
def backward_program(shape: TrunkShape, need_local: bool, need_global: bool) -> Program:
    """Gradients of δ's preactivations and of the inputs, through the own branch: all on tiles of one scenario."""
    stages = _List(shape.num_scenarios)
    top = shape.layers - 1
    upstream = Rows.shared("grad_own", shape.widths[top], gathered=True)
    if shape.all_branches:
        upstream = Rows.by_branch("grad_own", shape.num_scenarios, shape.widths[top], gathered=True)
    before, aux_before = _into_own(stages, shape, top, "D", addend=upstream, addend_float32=False), ""
    for layer in reversed(range(shape.layers)):
        if shape.gates[layer]:
            before = _mutual_unit_backward(stages, shape, layer, before)
        dz = Rows.shared(f"dz{layer}", shape.widths[layer])
        if shape.auxiliary:
            aux_before = _auxiliary_backward(stages, shape, layer, _names(before, aux_before), dz)
        down = Factor(dz, shape.weight(layer), shape.widths[layer])
        if layer > 0:
            before = _into_own(stages, shape, layer - 1, f"X{layer}", after=(before,), first=down)
        elif need_local and shape.local_dim > 0:
            out = Rows.shared("d_local", shape.local_dim, gathered=True)
            if shape.per_branch or shape.experts:
                out = Rows.by_branch("d_local", shape.num_scenarios, shape.local_dim, gathered=True)
            stages.add(InputGradient, "X0", own=True, after=(before,), first=down, n=shape.local_dim, out=out)
    if shape.auxiliary and need_global and shape.global_dim > 0:
        a = shape.aux_widths[0]
        down = Factor(Rows.shared("dz_aux0", a), shape.aux_weight(0), a)
        out = Rows.shared("d_global", shape.global_dim, gathered=True)
        stages.add(InputGradient, "Y", own=True, after=(aux_before,), first=down, n=shape.global_dim, out=out)
    return stages.program()


def _through_activation(shape: TrunkShape, layer: int) -> dict[str, Any]:
    """δ' of an own branch's layer."""
    d = shape.widths[layer]
    if layer == shape.layers - 1 and shape.gate_scale is not None:
        gated, d_gated = (Rows.shared(name, d, gathered=True) for name in ("gated", "d_gated"))
        through = {"activation": "sigmoid", "saved": shape.own(layer)}
        return through | {"gated": gated, "d_gated": d_gated, "gate_scale": shape.gate_scale}
    preact = Rows.shared(f"own_preact{layer}", d) if shape.needs_preact(layer) else NO_ROWS
    return {"activation": shape.activations[layer], "saved": shape.own(layer), "preact": preact}


def _into_own(stages: _List, shape: TrunkShape, layer: int, name: str, **factors: Any) -> str:
    """The gradient of what a layer of the own branch gives: through δ, dz; before its mutual unit, dM."""
    d = shape.widths[layer]
    if shape.gates[layer]:
        out = stages.rows(f"d_mutual{layer}", d, dtype=torch.float32)
        return stages.add(InputGradient, name, own=True, n=d, out=out, out_float32=True, **factors)
    out = stages.rows(f"dz{layer}", d)
    through = _through_activation(shape, layer)
    return stages.add(InputGradient, name, own=True, n=d, out=out, **through, **factors)


def _mutual_unit_backward(stages: _List, shape: TrunkShape, layer: int, before: str) -> str:
    """dz_g and dV_t without the gate's product, then dz = (dV_t + dz_g Uᵀ) ∘ δ'."""
    d, width = shape.widths[layer], shape.gates[layer]
    d_own = stages.rows(f"d_own{layer}", d, dtype=torch.float32)
    d_gate = stages.rows(f"d_gate{layer}", width)
    unit = stages.add(
        MutualBackward,
        f"B{layer}",
        own=True,
        after=(before,),
        streams=Rows.by_branch(f"streams{layer}", shape.num_scenarios, d),
        d=d,
        gate=f"gate{layer}",
        gate_width=width,
        alpha=f"alpha{layer}",
        d_mutual=f"d_mutual{layer}",
        d_own=d_own.tensor,
        d_gate=d_gate.tensor,
        score=shape.score,
    )
    return stages.add(
        InputGradient,
        f"Z{layer}",
        own=True,
        after=(unit,),
        first=Factor(d_gate, shape.gate_weight(layer), width),
        n=d,
        addend=d_own,
        addend_float32=True,
        out=stages.rows(f"dz{layer}", d),
        **_through_activation(shape, layer),
    )


def _auxiliary_backward(stages: _List, shape: TrunkShape, layer: int, after: tuple[str, ...], dz: Rows) -> str:
    """dz of the auxiliary layer: what its branch layer and the auxiliary layer above send down, through δ'."""
    a, last = shape.aux_widths[layer], layer == shape.layers - 1
    above = NO_FACTOR
    if not last:
        wide = shape.aux_widths[layer + 1]
        above = Factor(Rows.shared(f"dz_aux{layer + 1}", wide), shape.aux_weight(layer + 1), wide)
    return stages.add(
        InputGradient,
        f"Y{layer}",
        own=True,
        after=after,
        first=Factor(dz, shape.weight(layer, shape.own_input(layer)[1]), shape.widths[layer]),
        second=above,
        n=a,
        addend=Rows.shared("grad_aux", a, gathered=True) if last else NO_ROWS,
        addend_float32=False if last else None,
        activation=shape.activations[layer],
        saved=shape.aux(layer),
        preact=Rows.shared(f"aux_preact{layer}", a) if shape.needs_preact(layer) else NO_ROWS,
        out=stages.rows(f"dz_aux{layer}", a),
    )


@functools.cache
def weight_program(shape: TrunkShape) -> Program:
    """Gradients of all parameters: dW = Σ [A1 ; A2]ᵀ dz, db = Σ dz."""
    stages = _List(shape.num_scenarios)

    def add(parameter: str, layer: int, first: tuple[Rows, int], dz: str, n: int, **options: Any) -> None:
        d_weight, d_bias = f"d_{parameter}_weight{layer}", f"d_{parameter}_bias{layer}"
        rows, k1 = first
        fields = {"first": rows, "k1": k1, "dz": dz, "n": n, "d_weight": d_weight, "d_bias": d_bias}
        stages.add(WeightGradient, d_weight, own=True, **fields, **options)

    for layer, d in enumerate(shape.widths):
        second = {"second": shape.aux(layer), "k2": shape.aux_widths[layer]} if shape.auxiliary else {}
        add("branch", layer, shape.own_input(layer), f"dz{layer}", d, **second)
        if shape.gates[layer]:
            add("gate", layer, (shape.own(layer), d), f"d_gate{layer}", shape.gates[layer])
        if shape.auxiliary:
            a = shape.aux_widths[layer]
            add("aux", layer, shape.aux_input(layer), f"dz_aux{layer}", a, by_scenario=False)
    return stages.program()


@dataclass(frozen=True)
class UnitShape:
    """A mutual unit on streams (B, M, d) in the caller's order."""

    num_scenarios: int
    dim: int
    gate: int
    """Width of the gate, d or 1."""
    score: str

    def streams(self) -> Rows:
        """V of all branches."""
        return Rows.by_branch("streams", self.num_scenarios, self.dim, gathered=True)

    def gate_weight(self) -> Weight:
        """U_k."""
        return Weight("gate_weight", self.gate, self.dim * self.gate, 0)


@functools.cache
def unit_forward_program(shape: UnitShape) -> Program:
    """The gate and the own row: ``streams`` → ``gate``, ``alpha``, ``own_output``."""
    stages = _List(shape.num_scenarios)
    gate = stages.rows("gate", shape.gate)
    gated = stages.add(
        Layer,
        "G",
        own=True,
        first=Factor(shape.streams(), shape.gate_weight(), shape.dim),
        n=shape.gate,
        bias="gate_bias",
        activation="sigmoid",
        out=gate,
    )
    stages.add(
        MutualOwnRow,
        "M",
        own=True,
        after=(gated,),
        streams=shape.streams(),
        d=shape.dim,
        gate="gate",
        gate_width=shape.gate,
        alpha="alpha",
        mutual=Rows.shared("own_output", shape.dim, gathered=True),
        score=shape.score,
    )
    return stages.program()


@functools.cache
def unit_backward_program(shape: UnitShape) -> Program:
    """``grad_own`` → the own entry of ``d_streams``, and ``d_gate``."""
    stages = _List(shape.num_scenarios)
    d = shape.dim
    before = stages.add(
        InputGradient,
        "D",
        own=True,
        n=d,
        addend=Rows.shared("grad_own", d, gathered=True),
        addend_float32=False,
        out=stages.rows("d_mutual", d, dtype=torch.float32),
        out_float32=True,
    )
    d_own = stages.rows("d_own", d, dtype=torch.float32)
    d_gate = stages.rows("d_gate", shape.gate)
    unit = stages.add(
        MutualBackward,
        "B",
        own=True,
        after=(before,),
        streams=shape.streams(),
        d=d,
        gate="gate",
        gate_width=shape.gate,
        alpha="alpha",
        d_mutual="d_mutual",
        d_own="d_own",
        d_gate="d_gate",
        score=shape.score,
    )
    stages.add(
        InputGradient,
        "Z",
        own=True,
        after=(unit,),
        first=Factor(d_gate, shape.gate_weight(), shape.gate),
        n=d,
        addend=d_own,
        addend_float32=True,
        out=Rows.by_branch("d_streams", shape.num_scenarios, d, gathered=True),
    )
    return stages.program()


@functools.cache
def unit_weight_program(shape: UnitShape) -> Program:
    """Gradients of the gate: dU = Σ V_tᵀ dz_g, du = Σ dz_g."""
    stages = _List(shape.num_scenarios)
    stages.add(
        WeightGradient,
        "d_gate_weight",
        own=True,
        first=shape.streams(),
        k1=shape.dim,
        dz="d_gate",
        n=shape.gate,
        d_weight="d_gate_weight",
        d_bias="d_gate_bias",
    )
    return stages.program()
