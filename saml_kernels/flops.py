"""Operations of the extension's operators for torch.utils.flop_counter: a multiplication and an addition count two.

Counted is what the kernels multiply, as FlopCounterMode counts products of matrices: the products with weights, and of
the mutual unit the inner products ⟨V_i, V_j⟩ and the sums Σ_j α_ij V_j. Its module imports Triton where there is one,
which takes longer than importing saml_kernels, so that the formulas are handed over when somebody imports it.
"""

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from saml_kernels.operators import arguments_of

COUNTER = "torch.utils.flop_counter"


def _trunk_forward(call: Any) -> int:
    return 2 * (_auxiliary(call) + _branches(call) + _own_units(call, gates=1, sums=2) + _tables(call))


def _trunk_backward(call: Any) -> int:
    rows = call.x_local.shape[0]
    # The first layer's inputs may need no gradient.
    own = _own_branch(call)
    if not call.need_local:
        local_width, (_, width) = call.x_local.shape[-1], _own_shapes(call)[0]
        own -= rows * local_width * width
    auxiliary = _auxiliary(call)
    if call.aux_weights and not call.need_global:
        auxiliary -= rows * call.aux_weights[0].numel()
    again = _branches(call, shared_only=True) + _tables(call) if call.recompute else 0
    # Of a unit the gate's input; c_j and p_j, Σ α_j V_j and Σ dc_j V_j.
    return 2 * (own + auxiliary + _own_units(call, gates=1, sums=4) + again)


def _trunk_weight_gradients(call: Any) -> int:
    return 2 * (_own_branch(call) + _auxiliary(call) + _own_units(call, gates=1, sums=0))


def _mutual_forward(call: Any) -> int:
    return 2 * _own_unit(call.streams.shape[0], call.gate_weight, gates=1, sums=2)


def _mutual_backward(call: Any) -> int:
    return 2 * _own_unit(call.streams.shape[0], call.gate_weight, gates=2, sums=4)


def _experts_forward(call: Any) -> int:
    return 2 * call.x.shape[0] * sum(weight.numel() for weight in call.weights)


def _experts_backward(call: Any) -> int:
    without = 0 if call.need_input else call.x.shape[0] * call.weights[0].numel()
    return 2 * (2 * call.x.shape[0] * sum(weight.numel() for weight in call.weights) - without)


def _own_shapes(call: Any) -> list[Sequence[int]]:
    return [weight.shape[1:] for weight in call.branch_weights]


def _auxiliary(call: Any) -> int:
    return call.x_local.shape[0] * sum(weight.numel() for weight in call.aux_weights)


def _branches(call: Any, shared_only: bool = False) -> int:
    """Layers up to the last mutual unit run for all branches, the others for a row's own."""
    rows, networks = call.x_local.shape[0], call.branch_weights[0].shape[0]
    all_branches = getattr(call, "all_branches", False)
    shared = len(call.branch_weights) if all_branches else _last_unit(call) + 1
    found = 0
    for layer, (inputs, width) in enumerate(_own_shapes(call)):
        if layer < shared or not shared_only:
            found += rows * inputs * width * (networks if layer < shared else 1)
    return found


def _last_unit(call: Any) -> int:
    return max(call.mutual_layers, default=-1)


def _own_branch(call: Any) -> int:
    return sum(call.x_local.shape[0] * inputs * width for inputs, width in _own_shapes(call))


def _own_units(call: Any, gates: int, sums: int) -> int:
    return sum(_own_unit(call.x_local.shape[0], gate, gates, sums) for gate in call.gate_weights)


def _own_unit(rows: int, gate: Tensor, gates: int, sums: int) -> int:
    """Row t of the table: products with the gate's matrix, and sums over the foreign streams."""
    networks, width, gate_width = gate.shape
    return rows * width * (gates * gate_width + sums * (networks - 1))


def _tables(call: Any) -> int:
    """All rows of the table but the own one, where another unit follows: gates, c_ij of every pair, mixtures."""
    rows, networks = call.x_local.shape[0], call.branch_weights[0].shape[0]
    found = 0
    for layer, gate in zip(call.mutual_layers, call.gate_weights, strict=True):
        if layer < _last_unit(call):
            _, width, gate_width = gate.shape
            pairs = networks * (networks - 1) // 2
            found += rows * width * (networks * gate_width + pairs + (networks - 1) ** 2)
    return found


FORMULAS: dict[str, Callable[[Any], int]] = {
    "trunk_forward": _trunk_forward,
    "trunk_backward": _trunk_backward,
    "trunk_weight_gradients": _trunk_weight_gradients,
    "mutual_forward": _mutual_forward,
    "mutual_backward": _mutual_backward,
    "experts_forward": _experts_forward,
    "experts_backward": _experts_backward,
}
"""By operator; of its arguments under the names of its schema."""


def register(counter: ModuleType) -> None:
    """Hands the formulas to torch.utils.flop_counter."""

    def registered(name: str, formula: Callable[[Any], int]) -> Callable[..., int]:
        named = arguments_of(name)
        return lambda *values, out_val, **keywords: formula(named(*values, **keywords))

    for name, formula in FORMULAS.items():
        add = counter.register_flop_formula(getattr(torch.ops.saml_kernels, name), get_raw=True)
        add(registered(name, formula))


class WhenImported(MetaPathFinder):
    """Registers the formulas as soon as the module has been imported, once."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """The module's own spec, followed by the registration; None for every other module."""
        if fullname != COUNTER:
            return None
        with contextlib.suppress(ValueError):
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            register(module)

        # The loader is this import's own.
        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if COUNTER in sys.modules:
    register(sys.modules[COUNTER])
else:
    sys.meta_path.insert(0, WhenImported())
