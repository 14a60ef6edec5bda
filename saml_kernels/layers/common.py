"""What the layers share: the start of weights, checks of options, their description."""

import math
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor, nn

from saml_kernels import checks, tracing
from saml_kernels.activations import ACTIVATIONS
from saml_kernels.backends import BACKEND_CHOICES, BackendUnavailable

STARTS = ("independent", "shared")
"""How the scenarios' parameters start: each drawn on its own, or all as scenario 0's."""


class Layer(nn.Module):
    """A layer of this package."""

    def __prepare_scriptable__(self) -> NoReturn:
        """What torch.jit.script calls first: BackendUnavailable."""
        raise BackendUnavailable(f"{type(self).__name__} cannot be scripted: {tracing.SCRIPT_REASON}")


def gate_width(gate: str, dim: int) -> int:
    """Columns of U: d for a vector gate, 1 for a scalar gate."""
    return dim if gate == "vector" else 1


def init_linear(weight: Tensor, bias: Tensor) -> None:
    """nn.Linear's start for weight (..., inputs, outputs) and bias: uniform in ±1/√inputs; zeros without inputs."""
    inputs = weight.shape[-2]
    bound = 1 / math.sqrt(inputs) if inputs > 0 else 0.0
    nn.init.uniform_(weight, -bound, bound)
    nn.init.uniform_(bias, -bound, bound)


def entries(parameters: nn.ParameterList) -> list[Tensor]:
    """A list's parameters; torch.compile of torch 2.8 follows neither list(parameters) nor [*parameters]."""
    if not torch.compiler.is_compiling():
        # What iterating does for every entry takes as long as all checks of a call.
        registered = parameters._parameters
        try:
            return [registered[str(index)] for index in range(len(parameters))]  # type: ignore[misc]  # never None
        except KeyError:
            # Under a parametrization or pruned, and in replicas of nn.DataParallel, an entry is no parameter.
            pass
    return [parameter for parameter in parameters]  # noqa: C416


def start_alike(*parameters: Tensor) -> None:
    """Entry 0 of every parameter (M, …) copied into all M."""
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(parameter[:1].clone())


def reset_children(module: nn.Module) -> None:
    """``reset_parameters`` of the modules inside, in the order in which they were made."""
    for child in module.children():
        if callable(reset := getattr(child, "reset_parameters", None)):
            reset()
        else:
            reset_children(child)


def check_widths(name: str, widths: Sequence[int]) -> tuple[int, ...]:
    """The widths as ints; ValueError or TypeError unless they are positive integers, at least one."""
    if len(widths) == 0:
        raise ValueError(f"{name} must name at least one layer, got ()")
    return tuple(checks.check_integer(f"every width in {name}", width, 1) for width in widths)


def check_ids(scenario: Tensor, num_scenarios: int) -> Tensor:
    """Ids as :func:`checks.scenario_ids` gives them, where one would index by them before a kernel checks their range.

    ValueError for an id out of range; not read from a GPU.
    """
    scenario = checks.scenario_ids(scenario)
    # Compiled code checks an index itself, and a branch on data would break its graph.
    checked = scenario.device.type == "cpu" and not torch.compiler.is_compiling() and tracing.holds_numbers(scenario)
    if checked and bool(((scenario < 0) | (scenario >= num_scenarios)).any()):
        raise ValueError(f"scenario ids must lie in [0, {num_scenarios}), got {scenario.tolist()}")
    return scenario


def check_options(
    activation: str, backend: str, score: str = "ratio", temperature: float = 0.1, gate: str = "vector"
) -> None:
    """Raises ValueError or TypeError for an option that no layer takes."""
    checks.check_choice("activation", activation, ACTIVATIONS)
    checks.check_choice("score", score, checks.SCORES)
    checks.check_positive("temperature", temperature)
    checks.check_choice("gate", gate, checks.GATES)
    checks.check_choice("backend", backend, BACKEND_CHOICES)


def mix(logits: Tensor, *experts: Tensor) -> Tensor:
    """Σ_e softmax(logits)_e E_e: logits (B, K), experts (B, K_i, d), K in all, which are not copied → (B, d)."""
    shares = torch.softmax(logits, dim=1).split([each.shape[1] for each in experts], dim=1)
    first, *others = (weigh(share.unsqueeze(1), each) for share, each in zip(shares, experts, strict=True))
    return sum(others, first).squeeze(1)


def weigh(shares: Tensor, experts: Tensor) -> Tensor:
    """Σ_e shares_re E_e: shares (B, R, K), experts (B, K, d) → (B, R, d), in the experts' dtype."""
    shares = shares.to(experts.dtype)
    # Batched products of inner width 1 take a multiple of the time.
    return shares * experts if experts.shape[1] == 1 else torch.bmm(shares, experts)


def scenario_moments(x: Tensor, scenario: Tensor, num_scenarios: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, mean and biased variance of x (B, d) by scenario, (M, 1), (M, d), (M, d); zeros where there is no row."""
    count = torch.zeros(num_scenarios, device=x.device, dtype=x.dtype)
    count = count.index_add(0, scenario, torch.ones_like(scenario, dtype=x.dtype)).unsqueeze(1)
    rows = count.clamp(min=1)
    nothing = x.new_zeros(num_scenarios, x.shape[1])
    mean = nothing.index_add(0, scenario, x) / rows
    # Around the mean, as E x² − μ² cancels.
    variance = nothing.index_add(0, scenario, (x - mean.index_select(0, scenario)).square()) / rows
    return count, mean, variance


def describe(module: nn.Module, names: str) -> str:
    """For extra_repr: the attributes named in ``names``."""
    return ", ".join(f"{name}={getattr(module, name)!r}" for name in names.split())
