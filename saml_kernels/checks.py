"""Argument checks: everything wrong with a call is said before any work is done."""

import difflib
import numbers
import warnings
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from saml_kernels.types import TrunkParams

FLOATING_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SCENARIO_DTYPES = (torch.int32, torch.int64)
"""Of ids as kernels read them; of other integer types they are converted."""
OTHER_ID_DTYPES = (torch.int8, torch.int16, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
FOREIGN_DTYPES = (torch.bfloat16, torch.int8, torch.float8_e4m3fn)
SCORES = ("ratio", "softmax")
GATES = ("vector", "scalar")
SCHEDULES = ("auto", "persistent", "per_layer")
OLD_SCHEDULES = {"auto": "auto", "single": "persistent", "staged": "per_layer"}
"""What the option ``form`` called them."""


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """ValueError that names the nearest right one unless ``value`` is one of ``choices``."""
    choices = list(choices)
    if value in choices:
        return
    nearest = difflib.get_close_matches(str(value), choices, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}{hint}")


def check_schedule(schedule: str, form: str | None) -> str:
    """``schedule``, or what the deprecated option ``form`` says; ValueError unless it is one of SCHEDULES."""
    if form is not None:
        check_choice("form", form, OLD_SCHEDULES)
        if schedule != "auto":
            raise ValueError(f"form is the old name of schedule: give one of them, got {form!r} and {schedule!r}")
        schedule = OLD_SCHEDULES[form]
        warnings.warn(f'form={form!r} is deprecated: write schedule="{schedule}"', DeprecationWarning, stacklevel=3)
    check_choice("schedule", schedule, SCHEDULES)
    return schedule


def check_positive(name: str, value: float) -> float:
    """A number, numpy's included, as Python's; ValueError unless it is finite and above 0, TypeError if it is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be finite and above 0, got {value}")
    return value if isinstance(value, (int, float)) else float(value)


def check_integer(name: str, value: object, minimum: int) -> int:
    """An integer, numpy's included, as an int; TypeError if it is none, ValueError if it is below ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, (int, numbers.Integral)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return value if isinstance(value, int) else int(value)


def check_shape(name: str, tensor: Tensor, expected: Sequence[int | str], why: str = "") -> None:
    """ValueError unless ``tensor`` has the expected shape; a string in ``expected`` stands for any size."""
    fits = tensor.dim() == len(expected) and all(
        isinstance(want, str) or have == want for have, want in zip(tensor.shape, expected, strict=True)
    )
    if not fits:
        shape = ", ".join(map(str, expected)) + ("," if len(expected) == 1 else "")
        raise ValueError(f"{name} must have shape ({shape}){why}, got {tuple(tensor.shape)}")


def scenario_ids(scenario: Tensor) -> Tensor:
    """Ids as kernels read them, (B,) int32 or int64, from (B,) or (B, 1) of any integer type.

    Their range is checked where they are grouped.
    """
    if not isinstance(scenario, Tensor):
        raise TypeError(f"scenario must be a tensor, got {type(scenario).__name__}")
    if scenario.dtype in OTHER_ID_DTYPES:
        scenario = scenario.to(torch.int64)
    if scenario.dtype not in SCENARIO_DTYPES:
        raise TypeError(f"scenario must be int32 or int64 or another integer type, got {scenario.dtype}")
    if scenario.dim() == 2 and scenario.shape[1] == 1:
        scenario = scenario.squeeze(1)
    check_shape("scenario", scenario, ("B",), " or (B, 1)")
    return scenario


def check_same_kind(tensors: Mapping[str, Tensor | None], scenario: Tensor | None = None) -> None:
    """All floating tensors share one supported dtype, and everything one device."""
    checked: list[tuple[str, Tensor]] = []
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        checked.append((name, tensor))
    (first_name, first), *others = checked
    if first.dtype not in FLOATING_DTYPES:
        supported = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATING_DTYPES)
        raise TypeError(f"{first_name} must be one of {supported}, got {first.dtype}")
    for name, tensor in others:
        if tensor.dtype != first.dtype:
            raise TypeError(f"{first_name} is {first.dtype} but {name} is {tensor.dtype}: one dtype is needed")
    placed = others if scenario is None else [*others, ("scenario", scenario)]
    for name, tensor in placed:
        if tensor.device != first.device:
            raise ValueError(
                f"{first_name} is on {first.device} but {name} is on {tensor.device}: one device is needed"
            )


def check_trunk(x_local: Tensor, x_global: Tensor, scenario: Tensor, params: TrunkParams) -> None:
    """Types, dtypes, devices and shapes of everything :func:`saml_kernels.multi_branch` reads."""
    if not isinstance(params, TrunkParams):
        raise TypeError(f"params must be a TrunkParams, got {type(params).__name__}")
    num_layers = len(params.branch_weights)
    if num_layers == 0:
        raise ValueError("params must hold at least one layer, got none")
    for field, entries in zip(params._fields, params, strict=True):
        if len(entries) != num_layers:
            raise ValueError(f"params.branch_weights has {num_layers} layers but params.{field} has {len(entries)}")
    tensors = {"x_local": x_local, "x_global": x_global} | {
        f"params.{field}[{layer}]": tensor
        for field, entries in zip(params._fields, params, strict=True)
        for layer, tensor in enumerate(entries)
        if tensor is not None or not field.startswith("gate_")
    }
    check_same_kind(tensors, scenario)

    check_shape("params.branch_weights[0]", params.branch_weights[0], ("M", "D_l + a_1", "d_1"))
    num_scenarios = params.branch_weights[0].shape[0]
    if num_scenarios == 0:
        raise ValueError("params.branch_weights[0] must hold at least one scenario, got 0")
    if x_local.dim() == 3:
        check_shape("x_local", x_local, ("B", num_scenarios, "D_l"), f" with M = {num_scenarios} branches")
    else:
        check_shape("x_local", x_local, ("B", "D_l"), " or (B, M, D_l)")
    batch = x_local.shape[0]
    check_shape("x_global", x_global, (batch, "D_g"), f" as x_local has B = {batch} rows")
    check_shape("scenario", scenario, (batch,), f" as x_local has B = {batch} rows")

    branch_width, aux_width = x_local.shape[-1], x_global.shape[1]
    for layer in range(num_layers):
        aux_weight, branch_weight = params.aux_weights[layer], params.branch_weights[layer]
        source = "x_global" if layer == 0 else f"params.aux_weights[{layer - 1}]"
        check_shape(
            f"params.aux_weights[{layer}]",
            aux_weight,
            (aux_width, f"a_{layer + 1}"),
            f" as {source} has {aux_width} columns",
        )
        aux_width = aux_weight.shape[1]
        check_shape(f"params.aux_biases[{layer}]", params.aux_biases[layer], (aux_width,))
        check_shape(
            f"params.branch_weights[{layer}]",
            branch_weight,
            (num_scenarios, branch_width + aux_width, f"d_{layer + 1}"),
            f" for a branch stream of width {branch_width} and an auxiliary stream of width {aux_width}",
        )
        branch_width = branch_weight.shape[2]
        check_shape(f"params.branch_biases[{layer}]", params.branch_biases[layer], (num_scenarios, branch_width))
        gate_weight, gate_bias = params.gate_weights[layer], params.gate_biases[layer]
        if (gate_weight is None) != (gate_bias is None):
            raise ValueError(f"params.gate_weights[{layer}] and params.gate_biases[{layer}] must both be None or not")
        if gate_weight is not None and gate_bias is not None:
            names = (f"params.gate_weights[{layer}]", f"params.gate_biases[{layer}]")
            check_gate(names, gate_weight, gate_bias, num_scenarios, branch_width)


def check_gate(names: tuple[str, str], weight: Tensor, bias: Tensor, num_scenarios: int, width: int) -> None:
    """A vector gate (M, d, d), (M, d) or a scalar gate (M, d, 1), (M, 1)."""
    gate_width = weight.shape[2] if weight.dim() == 3 and weight.shape[2] == 1 else width
    check_shape(names[0], weight, (num_scenarios, width, gate_width), f" or ({num_scenarios}, {width}, 1)")
    check_shape(names[1], bias, (num_scenarios, gate_width), f" as {names[0]} has {gate_width} columns")


def check_towers(
    x: Tensor,
    scenario: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    per_branch: bool = False,
    gated: Tensor | None = None,
) -> None:
    """Types, dtypes, devices and shapes of everything :func:`saml_kernels.grouped_mlp` reads.

    ``per_branch``: x may also be (B, M, d_0), as :func:`saml_kernels.branch_scores` takes it.
    """
    tensors = _layer_tensors(x, weights, biases) | ({} if gated is None else {"gated": gated})
    check_same_kind(tensors, scenario)
    num_scenarios = _check_first_layer(weights[0], "M", "scenario")
    if per_branch and x.dim() == 3:
        check_shape("x", x, ("B", num_scenarios, "d_0"), f" with M = {num_scenarios} towers")
    else:
        check_shape("x", x, ("B", "d_0"), " or (B, M, d_0)" if per_branch else "")
    check_shape("scenario", scenario, (x.shape[0],), f" as x has B = {x.shape[0]} rows")
    width = _check_layers(x.shape[-1], weights, biases)
    if gated is not None:
        check_shape("gated", gated, (x.shape[0], width), " as the result of the last layer")


def check_experts(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> None:
    """Types, dtypes, devices and shapes of everything :func:`saml_kernels.expert_outputs` reads."""
    check_same_kind(_layer_tensors(x, weights, biases))
    _check_first_layer(weights[0], "K", "expert")
    check_shape("x", x, ("B", "d_0"))
    _check_layers(x.shape[1], weights, biases)


def _layer_tensors(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> dict[str, Tensor]:
    """x and the layers' parameters by their names in messages; ValueError unless they are as many."""
    if len(weights) == 0 or len(weights) != len(biases):
        raise ValueError(
            f"weights and biases must hold the same number of layers, at least 1, got {len(weights)} and {len(biases)}"
        )
    tensors = {"x": x}
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        tensors |= {f"weights[{layer}]": weight, f"biases[{layer}]": bias}
    return tensors


def _check_first_layer(weight: Tensor, letter: str, noun: str) -> int:
    """How many networks there are."""
    check_shape("weights[0]", weight, (letter, "d_0", "d_1"))
    if weight.shape[0] == 0:
        raise ValueError(f"weights[0] must hold at least one {noun}, got 0")
    return weight.shape[0]


def _check_layers(width: int, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> int:
    """Layers of stacked networks that read ``width`` columns; the width of the last one."""
    networks = weights[0].shape[0]
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        why = f" for an input of width {width}"
        check_shape(f"weights[{layer}]", weight, (networks, width, f"d_{layer + 1}"), why)
        width = weight.shape[2]
        check_shape(f"biases[{layer}]", bias, (networks, width))
    return width
