"""The Triton engine: shapes to programs, tensors to launches. Nothing waits for the device.

A forward is one launch in the schedule "persistent"; in "per_layer" layers that all branches run have launches of
their own. A backward is two: the chain of input gradients and all weight gradients. Before either the rows are grouped,
once. Streams of all branches that are not kept are computed for SCRATCH_BYTES at a time, launches for each.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from saml_kernels import extension, reference
from saml_kernels.autograd import Lists, Plan
from saml_kernels.backends.triton import configs, program, rounding, weights
from saml_kernels.backends.triton.configs import Choice, Config
from saml_kernels.backends.triton.launching import Grouped
from saml_kernels.backends.triton.program import Program
from saml_kernels.backends.triton.trunk_program import (
    TrunkShape,
    UnitShape,
    backward_program,
    forward_program,
    unit_backward_program,
    unit_forward_program,
    unit_weight_program,
    weight_program,
)

NAMES = ("branch_weight", "branch_bias", "aux_weight", "aux_bias", "gate_weight", "gate_bias")


def trunk_forward(
    x_local: Tensor, x_global: Tensor, scenario: Tensor, lists: Lists, plan: Plan, keep: bool
) -> tuple[Tensor, Tensor, list[Tensor], dict[str, Tensor]]:
    """own, aux, the own rows of α of every mutual layer, all in the caller's order, and what backward needs."""
    shape = trunk_shape(x_local, x_global, lists, plan)
    rows, like = x_local.shape[0], x_local
    choice = _trunk_choice(shape, rows, x_local)
    grouping = grouped(scenario, shape.branches, _num_counters(shape, rows, choice, like.element_size()))
    last = shape.widths[-1]
    outputs = {
        "own_output": like.new_empty((rows, shape.branches, last) if shape.all_branches else (rows, last)),
        f"aux{shape.layers - 1}": like.new_empty(rows, shape.aux_widths[-1] if shape.auxiliary else 0),
    }
    alphas = _alphas(shape, rows, like)
    tensors = named_inputs(x_local, x_global, lists, plan) | outputs | alphas | rounded_weights(shape, lists, plan)
    # Both kinds of products in one kernel spill registers (docs/gpu-kernels.md).
    schedule = "per_layer" if shape.rounded is not None else plan.schedule or choice.schedule
    kept = _run_by_chunks(
        forward_program(shape, keep),
        schedule,
        choice.forward,
        tensors,
        grouping,
        rows,
        plan,
        like,
        keep_streams=keep and not plan.recompute,
    )
    own, aux = outputs.values()
    if not keep:
        return own, aux, list(alphas.values()), {}
    return own, aux, list(alphas.values()), kept | outputs | alphas | grouping._asdict()


def trunk_backward(
    grad_own: Tensor,
    grad_aux: Tensor,
    x_local: Tensor,
    x_global: Tensor,
    scenario: Tensor,
    lists: Lists,
    kept: Mapping[str, Tensor],
    plan: Plan,
    need_local: bool,
    need_global: bool,
) -> tuple[Tensor, Tensor, *tuple[list[Tensor], ...]]:
    """Gradients of x_local, x_global (empty where not needed) and of the six parameter lists."""
    shape = trunk_shape(x_local, x_global, lists, plan)
    rows, like = x_local.shape[0], x_local
    choice = _trunk_choice(shape, rows, x_local)
    grouping = _kept_grouping(kept, _num_counters(shape, rows, choice, like.element_size()))
    # Foreign views of a per-branch x_local have zero gradient.
    d_local = _gradient_of(x_local, need_local, zero=shape.per_branch)
    d_global = _gradient_of(x_global, need_global, zero=not shape.auxiliary)
    gradients = {"d_local": d_local, "d_global": d_global, "grad_own": grad_own, "grad_aux": grad_aux}
    tensors = named_inputs(x_local, x_global, lists, plan) | dict(kept) | gradients
    chain = backward_program(shape, need_local, need_global)
    if plan.recompute and any(shape.gates):
        again = forward_program(shape, False, True)
        scratch_alphas = _alphas(shape, rows, like)
        tensors |= rounded_weights(shape, lists, plan)
        written = chain.allocate(like, rows)
        every = tensors | written
        by_row = set(written) | {name for name in forward_program(shape, True).buffers if name in kept}
        for row0, count in _chunks(again, rows, like, choice.forward):
            part = {name: tensor[row0 : row0 + count] if name in by_row else tensor for name, tensor in every.items()}
            streams = again.allocate(like, count)
            again_schedule = "persistent" if shape.rounded is None else "per_layer"
            _run(
                again,
                again_schedule,
                choice.forward,
                part | streams | scratch_alphas,
                grouping,
                count,
                row0,
                plan,
                like,
            )
            _run(chain, "persistent", choice.backward, part | streams, grouping, count, row0, plan, like)
    else:
        written = chain.allocate(like, rows)
        _run(chain, "persistent", choice.backward, tensors | written, grouping, rows, 0, plan, like)
    d_parameters = [[torch.empty_like(parameter) for parameter in parameters] for parameters in lists]
    tensors |= written | {
        f"d_{name}{layer}": gradient
        for name, layers, found in zip(NAMES, _layers_of(plan, lists), d_parameters, strict=True)
        for layer, gradient in zip(layers, found, strict=True)
    }
    weights.run(weight_program(shape), choice.weights, tensors, grouping, rows, like)
    return d_local, d_global, *d_parameters


def mutual_forward(
    v: Tensor, scenario: Tensor, gate_weight: Tensor, gate_bias: Tensor, score: int, temperature: float
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """M_t (B, d), α (B, M) and what backward needs."""
    rows, m, d = v.shape
    shape = UnitShape(m, d, gate_weight.shape[2], score)
    has_ragged_widths = configs.ragged((d, gate_weight.shape[2]), v.element_size())
    choice = configs.choice(rows, m, d, v.dtype, v.device, has_ragged_widths=has_ragged_widths)
    grouping = grouped(scenario, m, _unit_counters(shape, rows, choice, v.element_size()))
    unit = unit_forward_program(shape)
    alpha, own = torch.empty(rows, m, dtype=torch.float32, device=v.device), v.new_empty(rows, d)
    tensors = {"streams": v, "gate_weight": gate_weight, "gate_bias": gate_bias, "alpha": alpha, "own_output": own}
    buffers = unit.allocate(v, rows)
    program.run(unit, "persistent", choice.forward, tensors | buffers, grouping, rows, temperature=temperature, base=v)
    return own, alpha, buffers | {"alpha": alpha} | grouping._asdict()


def mutual_backward(
    gradient: Tensor,
    v: Tensor,
    scenario: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    kept: Mapping[str, Tensor],
    score: int,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of v, the gate's weight and its bias."""
    rows, m, d = v.shape
    shape = UnitShape(m, d, gate_weight.shape[2], score)
    has_ragged_widths = configs.ragged((d, gate_weight.shape[2]), v.element_size())
    choice = configs.choice(rows, m, d, v.dtype, v.device, has_ragged_widths=has_ragged_widths)
    grouping = _kept_grouping(kept, _unit_counters(shape, rows, choice, v.element_size()))
    unit = unit_backward_program(shape)
    d_streams, d_weight, d_bias = torch.zeros_like(v), torch.empty_like(gate_weight), torch.empty_like(gate_bias)
    tensors = dict(kept) | unit.allocate(v, rows)
    tensors |= {"streams": v, "gate_weight": gate_weight, "grad_own": gradient, "d_streams": d_streams}
    program.run(unit, "persistent", choice.backward, tensors, grouping, rows, temperature=temperature, base=v)
    tensors |= {"d_gate_weight": d_weight, "d_gate_bias": d_bias}
    weights.run(unit_weight_program(shape), choice.weights, tensors, grouping, rows, v)
    return d_streams, d_weight, d_bias


def trunk_shape(x_local: Tensor, x_global: Tensor, lists: Lists, plan: Plan) -> TrunkShape:
    """The shape of a call."""
    branch_weights, _, aux_weights, _, gate_weights, _ = lists
    gates = [0] * len(branch_weights)
    for layer, weight in zip(plan.mutual_layers, gate_weights, strict=True):
        gates[layer] = weight.shape[2]
    return TrunkShape(
        branches=branch_weights[0].shape[0],
        local_dim=x_local.shape[-1],
        global_dim=x_global.shape[1],
        per_branch=x_local.dim() == 3,
        widths=tuple(weight.shape[2] for weight in branch_weights),
        aux_widths=tuple(weight.shape[1] for weight in aux_weights),
        gates=tuple(gates),
        activations=plan.activations,
        score=plan.score,
        all_branches=plan.all_branches,
        rounded=None if plan.foreign_dtype == x_local.dtype else plan.foreign_dtype,
    )


def named_inputs(x_local: Tensor, x_global: Tensor, lists: Lists, plan: Plan) -> dict[str, Tensor]:
    """Inputs and parameters by the names of trunk_program."""
    tensors = {"x_local": x_local, "x_global": x_global}
    for name, layers, parameters in zip(NAMES, _layers_of(plan, lists), lists, strict=True):
        tensors |= {f"{name}{layer}": parameter for layer, parameter in zip(layers, parameters, strict=True)}
    return tensors


def _layers_of(plan: Plan, lists: Lists) -> Iterator[Sequence[int]]:
    """The layers whose parameters each list holds."""
    for name, parameters in zip(NAMES, lists, strict=True):
        yield plan.mutual_layers if name.startswith("gate") else range(len(parameters))


def rounded_weights(shape: TrunkShape, lists: Lists, plan: Plan) -> dict[str, Tensor]:
    """Weights that foreign products read, rounded, with their scales: a launch each."""
    if shape.rounded is None or shape.branches == 1:
        return {}
    wanted = {f"branch_weight{layer}": lists[0][layer] for layer in range(shape.shared_layers)}
    gates = zip(plan.mutual_layers, lists[4], strict=True)
    wanted |= {f"gate_weight{layer}": weight for layer, weight in gates if shape.followed(layer)}
    tensors: dict[str, Tensor] = {}
    for name, weight in wanted.items():
        tensors[f"rounded_{name}"], tensors[f"rounded_{name}_scale"] = rounding.round_weight(weight, shape.rounded)
    return tensors


def grouped(scenario: Tensor, branches: int, counters: int) -> Grouped:
    """permutation, offsets and cleared counters; one launch where the extension has the kernel."""
    if _extension_groups(scenario):
        permutation, _, offsets, cleared = torch.ops.saml_kernels.group_by_scenario_and_clear(
            scenario, branches, counters
        )
    else:
        permutation, _, offsets = reference.group_by_scenario(scenario, branches)
        cleared = torch.zeros(counters, dtype=torch.int32, device=scenario.device)
    return Grouped(permutation, offsets, cleared)


def _gradient_of(x: Tensor, needed: bool, *, zero: bool) -> Tensor:
    """Memory of x's gradient, zeros where no stage writes all of it; empty where nobody wants it."""
    if not needed:
        return x.new_empty(0)
    return torch.zeros_like(x) if zero else torch.empty_like(x)


def _kept_grouping(kept: Mapping[str, Tensor], counters: int) -> Grouped:
    """The forward's grouping; with more counters where another choice was tuned since."""
    grouping = Grouped(*(kept[name] for name in Grouped._fields))
    if grouping.counters.numel() >= counters:
        return grouping
    return grouping._replace(counters=grouping.counters.new_zeros(counters))


def _extension_groups(scenario: Tensor) -> bool:
    info = extension.build_info()
    return info is not None and (scenario.device.type == "cpu" or info["cuda"] is not None)


def _trunk_choice(shape: TrunkShape, rows: int, like: Tensor) -> Choice:
    widths = (shape.local_dim, shape.global_dim, *shape.widths, *shape.aux_widths, *shape.gates)
    return configs.choice(
        rows,
        shape.branches,
        max(shape.widths),
        like.dtype,
        like.device,
        has_ragged_widths=configs.ragged(widths, like.element_size()),
    )


def _alphas(shape: TrunkShape, rows: int, like: Tensor) -> dict[str, Tensor]:
    return {
        f"alpha{layer}": torch.empty(rows, shape.branches, dtype=torch.float32, device=like.device)
        for layer, gate in enumerate(shape.gates)
        if gate
    }


def _num_counters(shape: TrunkShape, rows: int, choice: Choice, itemsize: int) -> int:
    """Enough for every launch of forward and backward; each leaves them zero."""
    forward, chain = forward_program(shape, True), backward_program(shape, True, True)
    return max(
        program.num_counters(len(forward.stages), rows, shape.branches, choice.forward),
        program.num_counters(len(chain.stages), rows, shape.branches, choice.backward),
        weights.num_counters(weight_program(shape), choice.weights, 16 // itemsize),
    )


def _unit_counters(shape: UnitShape, rows: int, choice: Choice, itemsize: int) -> int:
    return max(
        program.num_counters(2, rows, shape.branches, choice.forward),
        program.num_counters(3, rows, shape.branches, choice.backward),
        weights.num_counters(unit_weight_program(shape), choice.weights, 16 // itemsize),
    )


def _run(
    stages: Program,
    schedule: str,
    config: Config,
    tensors: Mapping[str, Tensor],
    grouping: Grouped,
    rows: int,
    row0: int,
    plan: Plan,
    like: Tensor,
) -> None:
    program.run(stages, schedule, config, tensors, grouping, rows, row0=row0, temperature=plan.temperature, base=like)


def _run_by_chunks(
    stages: Program,
    schedule: str,
    config: Config,
    tensors: Mapping[str, Tensor],
    grouping: Grouped,
    rows: int,
    plan: Plan,
    like: Tensor,
    *,
    keep_streams: bool,
) -> dict[str, Tensor]:
    """Runs a forward, in chunks of rows unless the streams of all branches are kept; what it wrote, sorted."""
    if keep_streams:
        written = stages.allocate(like, rows)
        _run(stages, schedule, config, {**tensors, **written}, grouping, rows, 0, plan, like)
        return {name: tensor for name, tensor in written.items() if not stages.buffers[name].temporary}
    scratch = {name for name, buffer in stages.buffers.items() if buffer.of_all_branches}
    written = stages.allocate(like, rows, scratch)
    reused: dict[str, Tensor] = {}
    for row0, count in _chunks(stages, rows, like, config):
        if not reused:
            reused = stages.allocate(like, count, set(stages.buffers) - scratch)
        part = {name: tensor[row0 : row0 + count] for name, tensor in written.items()}
        _run(stages, schedule, config, {**tensors, **part, **reused}, grouping, count, row0, plan, like)
    return written


def _chunks(stages: Program, rows: int, like: Tensor, config: Config) -> Iterator[tuple[int, int]]:
    """(first row, rows) of parts whose streams of all branches stay within SCRATCH_BYTES."""
    bytes_each = sum(
        buffer.elements * (buffer.dtype or like.dtype).itemsize
        for buffer in stages.buffers.values()
        if buffer.of_all_branches
    )
    most = max(configs.SCRATCH_BYTES // bytes_each // config.rows * config.rows, config.rows) if bytes_each else rows
    for row0 in range(0, rows, most or 1):
        yield row0, min(most, rows - row0)
