"""Argument checks: everything wrong with a call is said before any work is done."""

import difflib
import numbers
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from saml_kernels.types import TrunkParams

FLOATING_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SCENARIO_DTYPES = (torch.int32, torch.int64)
"""Of ids as kernels read them; of other integer types they are converted."""
OTHER_ID_DTYPES = (torch.int8, torch.int16, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
FOREIGN_DTYPES = (torch.bfloat16, torch.int8, torch.float8_e4m3fn)
MOST_SHOWN = 80
"""Characters of a name that is none of the choices, in a message."""
SCORES = ("ratio", "softmax")
GATES = ("vector", "scalar")
SCHEDULES = ("auto", "persistent", "per_layer")
OLD_SCHEDULES = {"auto": "auto", "single": "persistent", "staged": "per_layer"}
"""What the option ``form`` called them."""


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """ValueError that names the nearest right one unless ``value`` is one of ``choices``."""
    # Some choices are a dictionary's keys, where what cannot be hashed cannot be looked up.
    if isinstance(value, str) and value in choices:
        return
    choices = list(choices)
    nearest = difflib.get_close_matches(str(value), choices, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    given = repr(value)
    given = given if len(given) <= MOST_SHOWN else f"{given[: MOST_SHOWN - 3]}..."
    raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {given}{hint}")


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


Name = str | tuple[str, int]
"""What messages call a tensor: its name, or a list's with the entry."""


def check_shape(name: Name, tensor: Tensor, expected: Sequence[int | str], why: str = "", *sizes: int) -> None:
    """ValueError unless ``tensor`` has the expected shape; a string in ``expected`` stands for any size.

    ``why`` is filled in with ``sizes`` only where it is raised: formatting costs as much as the check, and makes
    torch.compile compile again for every batch size that is printed.
    """
    shape = tensor.shape
    fits = len(shape) == len(expected)
    if fits:
        for have, want in zip(shape, expected, strict=True):
            if not isinstance(want, str) and have != want:
                fits = False
    if not fits:
        wanted = ", ".join(map(str, expected)) + ("," if len(expected) == 1 else "")
        raise ValueError(f"{_spelled(name)} must have shape ({wanted}){why.format(*sizes)}, got {tuple(shape)}")


def _spelled(name: Name) -> str:
    return name if isinstance(name, str) else f"{name[0]}[{name[1]}]"


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


def check_same_kind(tensors: Mapping[Name, Tensor | None], scenario: Tensor | None = None) -> None:
    """All floating tensors share one supported dtype, and everything one device."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{_spelled(name)} must be a tensor, got {type(tensor).__name__}")
    first_name, first = next(iter(tensors.items()))
    assert first is not None
    dtype, device = first.dtype, first.device
    if dtype not in FLOATING_DTYPES:
        supported = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATING_DTYPES)
        raise TypeError(f"{_spelled(first_name)} must be one of {supported}, got {dtype}")
    for name, tensor in tensors.items():
        assert tensor is not None
        if tensor.dtype != dtype:
            raise TypeError(
                f"{_spelled(first_name)} is {dtype} but {_spelled(name)} is {tensor.dtype}: one dtype is needed"
            )
    for name, tensor in (*tensors.items(), ("scenario", scenario)):
        if tensor is not None and tensor.device != device:
            given = f"{_spelled(first_name)} is on {device} but {_spelled(name)} is on {tensor.device}"
            raise ValueError(f"{given}: one device is needed")


def check_trunk(x_local: Tensor, x_global: Tensor, scenario: Tensor, params: TrunkParams) -> None:
    """Types, dtypes, devices and shapes of everything :func:`saml_kernels.multi_branch` reads."""
    if not torch.compiler.is_compiling() and _trunk_fits(x_local, x_global, scenario, params):
        return
    if not isinstance(params, TrunkParams):
        raise TypeError(f"params must be a TrunkParams, got {type(params).__name__}")
    num_layers = len(params.branch_weights)
    if num_layers == 0:
        raise ValueError("params must hold at least one layer, got none")
    for field, named in _TRUNK_FIELDS:
        if (length := len(getattr(params, field))) != num_layers:
            raise ValueError(f"params.branch_weights has {num_layers} layers but {named} has {length}")
    tensors: dict[Name, Tensor | None] = {"x_local": x_local, "x_global": x_global}
    for field, named in _TRUNK_FIELDS:
        for layer, tensor in enumerate(getattr(params, field)):
            if tensor is not None or field not in ("gate_weights", "gate_biases"):
                tensors[named, layer] = tensor
    check_same_kind(tensors, scenario)

    check_shape("params.branch_weights[0]", params.branch_weights[0], ("M", "D_l + a_1", "d_1"))
    num_scenarios = params.branch_weights[0].shape[0]
    if num_scenarios == 0:
        raise ValueError("params.branch_weights[0] must hold at least one scenario, got 0")
    if x_local.dim() == 3:
        check_shape("x_local", x_local, ("B", num_scenarios, "D_l"), " with M = {} branches", num_scenarios)
    else:
        check_shape("x_local", x_local, ("B", "D_l"), " or (B, M, D_l)")
    batch = x_local.shape[0]
    check_shape("x_global", x_global, (batch, "D_g"), _AS_X_LOCAL, batch)
    check_shape("scenario", scenario, (batch,), _AS_X_LOCAL, batch)

    branch_width, aux_width = x_local.shape[-1], x_global.shape[1]
    for layer in range(num_layers):
        aux_weight, branch_weight = params.aux_weights[layer], params.branch_weights[layer]
        why = " as x_global has {} columns" if layer == 0 else " as params.aux_weights[{1}] has {0} columns"
        check_shape(("params.aux_weights", layer), aux_weight, (aux_width, "a_l"), why, aux_width, layer - 1)
        aux_width = aux_weight.shape[1]
        check_shape(("params.aux_biases", layer), params.aux_biases[layer], (aux_width,))
        why = " for a branch stream of width {} and an auxiliary stream of width {}"
        expected = num_scenarios, branch_width + aux_width, "d_l"
        check_shape(("params.branch_weights", layer), branch_weight, expected, why, branch_width, aux_width)
        branch_width = branch_weight.shape[2]
        check_shape(("params.branch_biases", layer), params.branch_biases[layer], (num_scenarios, branch_width))
        gate_weight, gate_bias = params.gate_weights[layer], params.gate_biases[layer]
        if (gate_weight is None) != (gate_bias is None):
            raise ValueError(f"params.gate_weights[{layer}] and params.gate_biases[{layer}] must both be None or not")
        if gate_weight is not None and gate_bias is not None:
            names = ("params.gate_weights", layer), ("params.gate_biases", layer)
            check_gate(names, gate_weight, gate_bias, num_scenarios, branch_width)


def _trunk_fits(x_local: Tensor, x_global: Tensor, scenario: Tensor, params: TrunkParams) -> bool:
    """True only where :func:`check_trunk` has nothing to say: the same in one pass, without the names of messages.

    Every call pays for its checks, and with one row they are a good part of it. Nothing is remembered from call to
    call: whatever a parameter is now is what is looked at.
    """
    if not isinstance(params, TrunkParams) or not isinstance(x_local, Tensor) or not isinstance(x_global, Tensor):
        return False
    for entries in params:
        if len(entries) != len(params.branch_weights):
            return False
    if len(params.branch_weights) == 0 or x_local.dim() not in (2, 3) or x_global.dim() != 2:
        return False
    expected: list[Expected] = []
    num_scenarios = -1
    width, aux_width = x_local.shape[-1], x_global.shape[1]
    for weight, bias, aux_weight, aux_bias, gate_weight, gate_bias in zip(*params, strict=True):
        if not isinstance(weight, Tensor) or weight.dim() != 3:
            return False
        if not isinstance(aux_weight, Tensor) or aux_weight.dim() != 2:
            return False
        aux_inputs, aux_width = aux_width, aux_weight.shape[1]
        inputs = width + aux_width
        num_scenarios, width = (weight.shape[0] if num_scenarios < 0 else num_scenarios), weight.shape[2]
        expected += (
            (weight, (num_scenarios, inputs, width)),
            (bias, (num_scenarios, width)),
            (aux_weight, (aux_inputs, aux_width)),
            (aux_bias, (aux_width,)),
        )
        if gate_weight is not None:
            scalar = isinstance(gate_weight, Tensor) and gate_weight.dim() == 3 and gate_weight.shape[2] == 1
            gate_width = 1 if scalar else width
            expected += (
                (gate_weight, (num_scenarios, width, gate_width)),
                (gate_bias, (num_scenarios, gate_width)),
            )
        elif gate_bias is not None:
            return False
    if num_scenarios == 0 or (x_local.dim() == 3 and x_local.shape[1] != num_scenarios):
        return False
    batch = x_local.shape[0]
    expected.append((x_global, (batch, x_global.shape[1])))
    fits = scenario.shape == (batch,) and scenario.device == x_local.device
    return fits and _are_like(x_local, expected)


Expected = tuple[Tensor | None, tuple[int, ...]]
"""A tensor, and the shape that it is to have."""


def _are_like(first: Tensor, expected: Iterable[Expected]) -> bool:
    """Whether all are tensors of their shapes, of the first one's dtype, a supported one, and on its device."""
    dtype, device = first.dtype, first.device
    for tensor, shape in expected:
        if not isinstance(tensor, Tensor) or tensor.shape != shape or tensor.dtype != dtype or tensor.device != device:
            return False
    return dtype in FLOATING_DTYPES


_TRUNK_FIELDS = tuple((field, f"params.{field}") for field in TrunkParams._fields)
_AS_X_LOCAL = " as x_local has B = {} rows"


def check_gate(names: tuple[Name, Name], weight: Tensor, bias: Tensor, num_scenarios: int, width: int) -> None:
    """A vector gate (M, d, d), (M, d) or a scalar gate (M, d, 1), (M, 1)."""
    gate_width = weight.shape[2] if weight.dim() == 3 and weight.shape[2] == 1 else width
    check_shape(names[0], weight, (num_scenarios, width, gate_width), " or ({}, {}, 1)", num_scenarios, width)
    why = " as the gate's weight has {} columns"
    check_shape(names[1], bias, (num_scenarios, gate_width), why, gate_width)


def check_towers(
    x: Tensor,
    scenario: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    per_branch: bool = False,
    gated: Tensor | None = None,
    shared_weights: Sequence[Tensor] = (),
) -> None:
    """Types, dtypes, devices and shapes of everything :func:`saml_kernels.grouped_mlp` reads.

    ``per_branch``: x may also be (B, M, d_0), as :func:`saml_kernels.branch_scores` takes it.
    """
    if not torch.compiler.is_compiling() and _towers_fit(
        x, scenario, weights, biases, per_branch, gated, shared_weights
    ):
        return
    tensors = _layer_tensors(x, weights, biases)
    tensors |= {("shared_weights", layer): shared for layer, shared in enumerate(shared_weights)}
    if gated is not None:
        tensors["gated"] = gated
    check_same_kind(tensors, scenario)
    num_scenarios = _check_first_layer(weights[0], "M", "scenario")
    if per_branch and x.dim() == 3:
        check_shape("x", x, ("B", num_scenarios, "d_0"), " with M = {} towers", num_scenarios)
    else:
        check_shape("x", x, ("B", "d_0"), " or (B, M, d_0)" if per_branch else "")
    check_shape("scenario", scenario, (x.shape[0],), " as x has B = {} rows", x.shape[0])
    width = _check_layers(x.shape[-1], weights, biases)
    if len(shared_weights) not in (0, len(weights)):
        raise ValueError(
            f"shared_weights must be none or as many as weights: {len(weights)}, got {len(shared_weights)}"
        )
    for layer, (shared, weight) in enumerate(zip(shared_weights, weights, strict=False)):
        check_shape(("shared_weights", layer), shared, tuple(weight.shape[1:]), " as a scenario's weight")
    if gated is not None:
        check_shape("gated", gated, (x.shape[0], width), " as the result of the last layer")


def check_experts(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> None:
    """Types, dtypes, devices and shapes of everything :func:`saml_kernels.expert_outputs` reads."""
    if not torch.compiler.is_compiling() and _fitting_width(x, weights, biases, False) is not None:
        return
    check_same_kind(_layer_tensors(x, weights, biases))
    _check_first_layer(weights[0], "K", "expert")
    check_shape("x", x, ("B", "d_0"))
    _check_layers(x.shape[1], weights, biases)


def _towers_fit(
    x: Tensor,
    scenario: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    per_branch: bool,
    gated: Tensor | None,
    shared_weights: Sequence[Tensor],
) -> bool:
    """As :func:`_trunk_fits`, for :func:`check_towers`."""
    width = _fitting_width(x, weights, biases, per_branch)
    if width is None or scenario.shape != (x.shape[0],) or scenario.device != x.device:
        return False
    expected: list[Expected] = [] if gated is None else [(gated, (x.shape[0], width))]
    if shared_weights:
        if len(shared_weights) != len(weights):
            return False
        expected += [(shared, tuple(weight.shape[1:])) for shared, weight in zip(shared_weights, weights, strict=True)]
    return _are_like(x, expected)


def _fitting_width(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], per_network: bool) -> int | None:
    """As :func:`_trunk_fits`, of stacked networks: None wherever something may be wrong, else the last layer's width.

    ``per_network``: x may also be (B, networks, d_0).
    """
    if not isinstance(x, Tensor) or x.dim() not in ((2, 3) if per_network else (2,)) or len(weights) != len(biases):
        return None
    expected: list[Expected] = []
    networks, width = -1, x.shape[-1]
    for weight, bias in zip(weights, biases, strict=True):
        if not isinstance(weight, Tensor) or weight.dim() != 3:
            return None
        networks = weight.shape[0] if networks < 0 else networks
        expected.append((weight, (networks, width, weight.shape[2])))
        width = weight.shape[2]
        expected.append((bias, (networks, width)))
    # -1: there are no layers.
    fits = networks > 0 and (x.dim() == 2 or x.shape[1] == networks)
    return width if fits and _are_like(x, expected) else None


def _layer_tensors(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> dict[Name, Tensor | None]:
    """x and the layers' parameters by their names in messages; ValueError unless they are as many."""
    if len(weights) == 0 or len(weights) != len(biases):
        raise ValueError(
            f"weights and biases must hold the same number of layers, at least 1, got {len(weights)} and {len(biases)}"
        )
    tensors: dict[Name, Tensor | None] = {"x": x}
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        tensors["weights", layer] = weight
        tensors["biases", layer] = bias
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
        check_shape(("weights", layer), weight, (networks, width, "d_l"), " for an input of width {}", width)
        width = weight.shape[2]
        check_shape(("biases", layer), bias, (networks, width))
    return width
