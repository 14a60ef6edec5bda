"""What the layers share: the start of weights, checks of options, their description."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from saml_kernels import checks
from saml_kernels.activations import ACTIVATIONS
from saml_kernels.backends import BACKENDS

STARTS = ("independent", "shared")


def gate_width(gate: str, dim: int) -> int:
    """Columns of U: d for a vector gate, 1 for a scalar gate."""
    return dim if gate == "vector" else 1


def init_linear(weight: Tensor, bias: Tensor) -> None:
    """nn.Linear's start for weight (..., inputs, outputs) and bias: uniform in ±1/√inputs; zeros without inputs."""
    inputs = weight.shape[-2]
    bound = 1 / math.sqrt(inputs) if inputs > 0 else 0.0
    nn.init.uniform_(weight, -bound, bound)
    nn.init.uniform_(bias, -bound, bound)


@torch.no_grad()
def start_alike(of_scenarios: Iterable[Tensor]) -> None:
    """Every scenario's part of tensors (M, ...) becomes that of scenario 0."""
    for tensor in of_scenarios:
        tensor.copy_(tensor[:1].expand_as(tensor).clone())


def check_widths(name: str, widths: tuple[int, ...]) -> None:
    """Raises ValueError or TypeError unless ``widths`` are positive ints, at least one."""
    if not widths:
        raise ValueError(f"{name} must name at least one layer, got ()")
    for width in widths:
        checks.check_integer(f"every width in {name}", width, 1)


def check_options(
    activation: str, backend: str, score: str = "ratio", temperature: float = 0.1, gate: str = "vector"
) -> None:
    """Raises ValueError or TypeError for an option that no layer takes."""
    checks.check_choice("activation", activation, ACTIVATIONS)
    checks.check_choice("score", score, checks.SCORES)
    checks.check_positive("temperature", temperature)
    checks.check_choice("gate", gate, checks.GATES)
    checks.check_choice("backend", backend, ("auto", *BACKENDS))


def describe(module: nn.Module, names: str) -> str:
    """For extra_repr: the attributes named in ``names``."""
    return ", ".join(f"{name}={getattr(module, name)!r}" for name in names.split())
