"""The Triton engine: shapes to programs, tensors to launches. Nothing waits for the device.

A forward is one launch in the schedule "persistent"; in "per_layer" layers that all branches run have launches of
their own. A backward is two: the chain of input gradients and all weight gradients. Before either the rows are grouped,
once. Streams of all branches that are not saved are computed for SCRATCH_BYTES at a time, launches for each.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from saml_kernels import extension, reference
from saml_kernels.autograd import ParameterLists, Plan
from saml_kernels.backends.triton import configs, launch
from saml_kernels.backends.triton import schedule as scheduling
from saml_kernels.backends.triton.configs import Choice, Config
from saml_kernels.backends.triton.launch import Grouped
from saml_kernels.backends.triton.stages import Program
from saml_kernels.backends.triton.trunk import (
    QUANTIZED_PADDING,
    TrunkShape,
    UnitShape,
    backward_program,
    forward_program,
    unit_backward_program,
    unit_forward_program,
    unit_weight_program,
    weight_program,
)
from saml_kernels.reference import SCALED_DTYPES

PARAMETERS = "branch_weight", "branch_bias", "aux_weight", "aux_bias", "gate_weight", "gate_bias", "shared_weight"
"""A parameter of one layer, by the lists of ParameterLists; no kernel here reads a shared weight."""


def trunk_forward(
    x_local: Tensor,
    x_global: Tensor,
    gated: Tensor | None,
    scenario: Tensor,
    lists: ParameterLists,
    plan: Plan,
    save: bool,
) -> tuple[Tensor, Tensor, list[Tensor], dict[str, Tensor]]:
    """own, aux, the own rows of α of every mutual layer if the plan returns them, all in the caller's order, and what
    backward needs."""
    shape = trunk_shape(x_local, x_global, lists, plan)
    rows, like = x_local.shape[0], x_local
    choice = _trunk_choice(shape, rows, x_local)
    grouping = grouped(scenario, shape.num_scenarios, _num_counters(shape, rows, choice, like.dtype))
    last = shape.widths[-1]
    outputs = {
        "own_output": like.new_empty((rows, shape.num_scenarios, last) if shape.all_branches else (rows, last)),
        f"aux{shape.layers - 1}": like.new_empty(rows, shape.aux_widths[-1] if shape.auxiliary else 0),
    }
    alphas = _alphas(shape, rows, like)
    tensors = named_inputs(x_local, x_global, lists, plan) | outputs | alphas | quantized_weights(shape, lists, plan)
    tensors |= {} if gated is None else {"gated": gated}
    # Both kinds of products in one kernel spill registers (docs/gpu-kernels.md).
    schedule = "per_layer" if shape.quantized is not None else plan.schedule or choice.schedule
    saved = _run_by_chunks(
        forward_program(shape, save),
        schedule,
        choice,
        tensors,
        grouping,
        rows,
        shape.num_scenarios,
        plan,
        like,
        save_streams=save and not plan.recompute,
    )
    own, aux = outputs.values()
    scores = list(alphas.values()) if plan.return_scores else []
    return own, aux, scores, saved | outputs | alphas | grouping._asdict() if save else {}


def trunk_backward(
    grad_own: Tensor,
    grad_aux: Tensor,
    x_local: Tensor,
    x_global: Tensor,
    gated: Tensor | None,
    scenario: Tensor,
    lists: ParameterLists,
    saved: Mapping[str, Tensor],
    plan: Plan,
    need_local: bool,
    need_global: bool,
) -> tuple[Tensor, Tensor, Tensor, *tuple[list[Tensor], ...]]:
    """Gradients of x_local, x_global, gated (empty where not needed or absent) and of the parameter lists."""
    shape = trunk_shape(x_local, x_global, lists, plan)
    rows, like = x_local.shape[0], x_local
    choice = _trunk_choice(shape, rows, x_local)
    grouping = _saved_grouping(saved, _num_counters(shape, rows, choice, like.dtype))
    # Foreign views of a per-branch x_local have zero gradient.
    d_local = _gradient_of(x_local, need_local, zero=shape.per_branch)
    d_global = _gradient_of(x_global, need_global, zero=not shape.auxiliary)
    d_gated = x_local.new_empty(0) if gated is None else torch.empty_like(gated)
    gradients = {"d_local": d_local, "d_global": d_global, "grad_own": grad_own, "grad_aux": grad_aux}
    tensors = named_inputs(x_local, x_global, lists, plan) | dict(saved) | gradients
    tensors |= {} if gated is None else {"gated": gated, "d_gated": d_gated}
    chain = backward_program(shape, need_local, need_global)
    run = functools.partial(launch.run, temperature=plan.temperature, num_scenarios=shape.num_scenarios, like=like)
    if plan.recompute and any(shape.gates):
        again = forward_program(shape, False, True)
        scratch_alphas = _alphas(shape, rows, like)
        tensors |= quantized_weights(shape, lists, plan)
        written = allocate(chain, like, rows)
        every = tensors | written
        by_row = set(written) | {name for name in forward_program(shape, True).buffers if name in saved}
        for row0, count in _chunks(again, rows, like, choice.forward):
            part = {name: tensor[row0 : row0 + count] if name in by_row else tensor for name, tensor in every.items()}
            streams = allocate(again, like, count)
            again_schedule = "persistent" if shape.quantized is None else "per_layer"
            part |= streams
            streamed = part | scratch_alphas
            run(again, again_schedule, choice.forward, streamed, grouping, count, row0=row0, layer=choice.layer)
            run(chain, "persistent", choice.backward, part, grouping, count, row0=row0)
    else:
        written = allocate(chain, like, rows)
        run(chain, "persistent", choice.backward, tensors | written, grouping, rows)
    d_parameters = [[torch.empty_like(parameter) for parameter in parameters] for parameters in lists]
    tensors |= written | {
        f"d_{name}{layer}": gradient
        for name, layers, found in zip(PARAMETERS, _layers_of(plan, lists), d_parameters, strict=True)
        for layer, gradient in zip(layers, found, strict=True)
    }
    launch.run_weight_gradients(
        weight_program(shape), choice.weights, tensors, grouping, rows, num_scenarios=shape.num_scenarios, like=like
    )
    return d_local, d_global, d_gated, *d_parameters


def mutual_forward(
    v: Tensor, scenario: Tensor, gate_weight: Tensor, gate_bias: Tensor, score: str, temperature: float
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """M_t (B, d), α (B, M) and what backward needs."""
    rows, m, d = v.shape
    shape = UnitShape(m, d, gate_weight.shape[2], score)
    choice = configs.choice(rows, m, d, v.dtype, v.device)
    grouping = grouped(scenario, m, _unit_counters(shape, rows, choice, v.dtype))
    unit = unit_forward_program(shape)
    alpha, own = torch.empty(rows, m, dtype=torch.float32, device=v.device), v.new_empty(rows, d)
    tensors = {"streams": v, "gate_weight": gate_weight, "gate_bias": gate_bias, "alpha": alpha, "own_output": own}
    buffers = allocate(unit, v, rows)
    run = functools.partial(launch.run, temperature=temperature, num_scenarios=m, like=v)
    run(unit, "persistent", choice.forward, tensors | buffers, grouping, rows)
    return own, alpha, buffers | {"alpha": alpha} | grouping._asdict()


def mutual_backward(
    gradient: Tensor,
    v: Tensor,
    scenario: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    saved: Mapping[str, Tensor],
    score: str,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of v, the gate's weight and its bias."""
    rows, m, d = v.shape
    shape = UnitShape(m, d, gate_weight.shape[2], score)
    choice = configs.choice(rows, m, d, v.dtype, v.device)
    grouping = _saved_grouping(saved, _unit_counters(shape, rows, choice, v.dtype))
    unit = unit_backward_program(shape)
    d_streams, d_weight, d_bias = torch.zeros_like(v), torch.empty_like(gate_weight), torch.empty_like(gate_bias)
    tensors = dict(saved) | allocate(unit, v, rows)
    tensors |= {"streams": v, "gate_weight": gate_weight, "grad_own": gradient, "d_streams": d_streams}
    run = functools.partial(launch.run, temperature=temperature, num_scenarios=m, like=v)
    run(unit, "persistent", choice.backward, tensors, grouping, rows)
    tensors |= {"d_gate_weight": d_weight, "d_gate_bias": d_bias}
    gradients = unit_weight_program(shape)
    launch.run_weight_gradients(gradients, choice.weights, tensors, grouping, rows, num_scenarios=m, like=v)
    return d_streams, d_weight, d_bias


def experts_forward(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], activations: tuple[str, ...], save: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """E_k(x) (B, K, d_L), and what backward needs."""
    shape = experts_shape(x, weights, activations)
    rows, choice = shape.num_scenarios * x.shape[0], _experts_choice(shape, x)
    grouping = _experts_rows(shape, x, choice)
    out = x.new_empty(x.shape[0], shape.num_scenarios, shape.widths[-1])
    program = forward_program(shape, save)
    written = allocate(program, x, rows)
    tensors = _experts_inputs(x, weights, biases) | {"own_output": out} | written
    launch.run(
        program, choice.schedule, choice.forward, tensors, grouping, rows, num_scenarios=shape.num_scenarios, like=x
    )
    return out, written | grouping._asdict() if save else {}


def experts_backward(
    gradient: Tensor,
    out: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    saved: Mapping[str, Tensor],
    activations: tuple[str, ...],
    need_input: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Gradients of x (empty where not needed), the weights and the biases; one of x for every expert is added up."""
    shape = experts_shape(x, weights, activations)
    k, rows, choice = shape.num_scenarios, shape.num_scenarios * x.shape[0], _experts_choice(shape, x)
    grouping = _saved_grouping(saved, _num_counters(shape, rows, choice, x.dtype))
    chain = backward_program(shape, need_input, False)
    d_x = x.new_empty(x.shape[0], k, x.shape[1] if need_input else 0)
    tensors = _experts_inputs(x, weights, biases) | dict(saved) | allocate(chain, x, rows)
    tensors |= {"own_output": out, "grad_own": gradient, "d_local": d_x}
    launch.run(chain, "persistent", choice.backward, tensors, grouping, rows, num_scenarios=k, like=x)
    d_weights, d_biases = ([torch.empty_like(parameter) for parameter in layers] for layers in (weights, biases))
    for name, found in (("weight", d_weights), ("bias", d_biases)):
        tensors |= {f"d_branch_{name}{layer}": each for layer, each in enumerate(found)}
    launch.run_weight_gradients(weight_program(shape), choice.weights, tensors, grouping, rows, num_scenarios=k, like=x)
    return d_x.sum(1), d_weights, d_biases


def experts_shape(x: Tensor, weights: Sequence[Tensor], activations: tuple[str, ...]) -> TrunkShape:
    """Experts as own branches of K times as many rows."""
    return TrunkShape(
        num_scenarios=weights[0].shape[0],
        local_dim=x.shape[1],
        global_dim=0,
        per_branch=False,
        widths=tuple(weight.shape[2] for weight in weights),
        aux_widths=(),
        gates=(0,) * len(weights),
        activations=activations,
        score="ratio",
        all_branches=True,
        experts=True,
    )


def _experts_choice(shape: TrunkShape, x: Tensor) -> Choice:
    return _trunk_choice(shape, shape.num_scenarios * x.shape[0], x)


def _experts_rows(shape: TrunkShape, x: Tensor, choice: Choice) -> Grouped:
    """Sorted row k B + n is the caller's row n, expert k's own."""
    rows, k = x.shape[0], shape.num_scenarios
    counters = _num_counters(shape, k * rows, choice, x.dtype)
    return Grouped(
        torch.arange(rows, device=x.device).repeat(k),
        torch.arange(k + 1, device=x.device) * rows,
        torch.zeros(counters, dtype=torch.int32, device=x.device),
    )


def _experts_inputs(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> dict[str, Tensor]:
    tensors = {"x_local": x}
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        tensors |= {f"branch_weight{layer}": weight, f"branch_bias{layer}": bias}
    return tensors


def trunk_shape(x_local: Tensor, x_global: Tensor, lists: ParameterLists, plan: Plan) -> TrunkShape:
    """The shape of a call."""
    branch_weights, aux_weights, gate_weights = lists.branch_weights, lists.aux_weights, lists.gate_weights
    gates = [0] * len(branch_weights)
    for layer, weight in zip(plan.mutual_layers, gate_weights, strict=True):
        gates[layer] = weight.shape[2]
    return TrunkShape(
        num_scenarios=branch_weights[0].shape[0],
        local_dim=x_local.shape[-1],
        global_dim=x_global.shape[1],
        per_branch=x_local.dim() == 3,
        widths=tuple(weight.shape[2] for weight in branch_weights),
        aux_widths=tuple(weight.shape[1] for weight in aux_weights),
        gates=tuple(gates),
        activations=plan.activations,
        score=plan.score,
        all_branches=plan.all_branches,
        quantized=None if plan.foreign_dtype == x_local.dtype else plan.foreign_dtype,
        gate_scale=plan.gate_scale,
    )


def named_inputs(x_local: Tensor, x_global: Tensor, lists: ParameterLists, plan: Plan) -> dict[str, Tensor]:
    """Inputs and parameters by the names of trunk.py."""
    tensors = {"x_local": x_local, "x_global": x_global}
    for name, layers, parameters in zip(PARAMETERS, _layers_of(plan, lists), lists, strict=True):
        tensors |= {f"{name}{layer}": parameter for layer, parameter in zip(layers, parameters, strict=True)}
    return tensors


def _layers_of(plan: Plan, lists: ParameterLists) -> Iterator[Sequence[int]]:
    """The layers whose parameters each list holds."""
    for name, parameters in zip(PARAMETERS, lists, strict=True):
        yield plan.mutual_layers if name.startswith("gate") else range(len(parameters))


def quantized_weights(shape: TrunkShape, lists: ParameterLists, plan: Plan) -> dict[str, Tensor]:
    """Weights that foreign products read, quantised, with their scales: a launch each.

    They are quantised in every call that uses them: what changes a weight without leaving a trace on the host (a
    replayed CUDA graph, an edit through ``.data``) can then not leave a stale copy behind.
    """
    if shape.quantized is None or shape.num_scenarios == 1:
        return {}
    wanted = {f"branch_weight{layer}": lists[0][layer] for layer in range(shape.shared_layers)}
    gates = zip(plan.mutual_layers, lists[4], strict=True)
    wanted |= {f"gate_weight{layer}": weight for layer, weight in gates if shape.followed(layer)}
    tensors: dict[str, Tensor] = {}
    for name, weight in wanted.items():
        tensors[f"quantized_{name}"], tensors[f"quantized_{name}_scale"] = quantize_weight(weight, shape.quantized)
    return tensors


def quantize_weight(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """W (M, K, N) → Ŵ (M, N, K padded) of ``dtype``, scales (M, N) float32 (not written for an unscaled type)."""
    branches, k, n = weight.shape
    padded = -(-k // QUANTIZED_PADDING) * QUANTIZED_PADDING
    quantized = weight.new_empty(branches, n, padded, dtype=dtype)
    scale = weight.new_empty(branches, n, dtype=torch.float32)
    launch.quantize_weight(weight, quantized, scale, SCALED_DTYPES.get(dtype, 0.0))
    return quantized, scale


def grouped(scenario: Tensor, branches: int, counters: int) -> Grouped:
    """permutation, offsets and cleared counters; one launch where the extension has the kernel."""
    if _extension_groups(scenario):
        permutation, offsets, cleared = torch.ops.saml_kernels.group_by_scenario_and_clear(scenario, branches, counters)
    else:
        permutation, _, offsets = reference.group_by_scenario(scenario, branches)
        cleared = torch.zeros(counters, dtype=torch.int32, device=scenario.device)
    return Grouped(permutation, offsets, cleared)


def _gradient_of(x: Tensor, needed: bool, *, zero: bool) -> Tensor:
    """Memory of x's gradient, zeros where no stage writes all of it; empty where nobody wants it."""
    if not needed:
        return x.new_empty(0)
    return torch.zeros_like(x) if zero else torch.empty_like(x)


def _saved_grouping(saved: Mapping[str, Tensor], counters: int) -> Grouped:
    """The forward's grouping; with more counters where another choice was tuned since."""
    grouping = Grouped(*(saved[name] for name in Grouped._fields))
    if grouping.counters.numel() >= counters:
        return grouping
    return grouping._replace(counters=grouping.counters.new_zeros(counters))


def _extension_groups(scenario: Tensor) -> bool:
    info = extension.build_info()
    return info is not None and (scenario.device.type == "cpu" or info["cuda"] is not None)


def _trunk_choice(shape: TrunkShape, rows: int, like: Tensor) -> Choice:
    return configs.choice(rows, shape.num_scenarios, max(shape.widths), like.dtype, like.device)


def _alphas(shape: TrunkShape, rows: int, like: Tensor) -> dict[str, Tensor]:
    return {
        f"alpha{layer}": torch.empty(rows, shape.num_scenarios, dtype=torch.float32, device=like.device)
        for layer, gate in enumerate(shape.gates)
        if gate
    }


def _num_counters(shape: TrunkShape, rows: int, choice: Choice, dtype: torch.dtype) -> int:
    """Enough for every launch of forward and backward; each leaves them zero."""
    programs = (forward_program(shape, True), choice.forward), (backward_program(shape, True, True), choice.backward)
    return _most_counters(programs, weight_program(shape), rows, shape.num_scenarios, choice, dtype)


def _unit_counters(shape: UnitShape, rows: int, choice: Choice, dtype: torch.dtype) -> int:
    programs = (unit_forward_program(shape), choice.forward), (unit_backward_program(shape), choice.backward)
    return _most_counters(programs, unit_weight_program(shape), rows, shape.num_scenarios, choice, dtype)


def _most_counters(
    programs: Iterable[tuple[Program, Config]],
    gradients: Program,
    rows: int,
    num_scenarios: int,
    choice: Choice,
    dtype: torch.dtype,
) -> int:
    return max(
        *(
            scheduling.num_counters(len(program.stages), rows, num_scenarios, config.block_m)
            for program, config in programs
        ),
        launch.num_weight_counters(gradients, choice.weights, dtype, num_scenarios),
    )


def allocate(program: Program, like: Tensor, rows: int, given: Iterable[str] = ()) -> dict[str, Tensor]:
    """Fresh tensors for all buffers of a program but those given."""
    given = set(given)
    return {
        name: like.new_empty((rows, *buffer.shape), dtype=buffer.dtype or like.dtype)
        for name, buffer in program.buffers.items()
        if name not in given
    }


def _run_by_chunks(
    program: Program,
    schedule: str,
    choice: Choice,
    tensors: Mapping[str, Tensor],
    grouping: Grouped,
    rows: int,
    num_scenarios: int,
    plan: Plan,
    like: Tensor,
    *,
    save_streams: bool,
) -> dict[str, Tensor]:
    """Runs a forward, in chunks of rows unless the streams of all branches are saved; what it wrote, sorted."""
    run = functools.partial(
        launch.run, layer=choice.layer, temperature=plan.temperature, num_scenarios=num_scenarios, like=like
    )
    if save_streams:
        written = allocate(program, like, rows)
        run(program, schedule, choice.forward, {**tensors, **written}, grouping, rows)
        return {name: tensor for name, tensor in written.items() if not program.buffers[name].temporary}
    scratch = {name for name, buffer in program.buffers.items() if buffer.of_all_branches}
    written = allocate(program, like, rows, scratch)
    reused: dict[str, Tensor] = {}
    for row0, count in _chunks(program, rows, like, choice.forward):
        if not reused:
            reused = allocate(program, like, count, set(program.buffers) - scratch)
        part = {name: tensor[row0 : row0 + count] for name, tensor in written.items()}
        run(program, schedule, choice.forward, {**tensors, **part, **reused}, grouping, count, row0=row0)
    return written


def _chunks(program: Program, rows: int, like: Tensor, config: Config) -> Iterator[tuple[int, int]]:
    """(first row, rows) of parts whose streams of all branches stay within SCRATCH_BYTES."""
    bytes_each = sum(
        buffer.elements * (buffer.dtype or like.dtype).itemsize
        for buffer in program.buffers.values()
        if buffer.of_all_branches
    )
    most = (
        max(configs.SCRATCH_BYTES // bytes_each // config.block_m * config.block_m, config.block_m)
        if bytes_each
        else rows
    )
    for row0 in range(0, rows, most or 1):
        yield row0, min(most, rows - row0)
