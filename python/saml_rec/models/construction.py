"""Models built from their names and options, on a device, by a backend."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from saml_kernels.backends import BackendUnavailable, choose_backend
from saml_kernels.backends.base import Operation
from saml_kernels.layers import (
    STARMLP,
    GateUnit,
    GroupedMLP,
    MixtureOfExperts,
    MultiBranchMLP,
    MutualUnit,
    ProgressiveExperts,
    ScoreMixture,
)
from saml_rec.data.encoding import Encoder
from saml_rec.data.schema import Schema
from saml_rec.errors import InputError, shortened, shown
from saml_rec.models.base import ScenarioModel
from saml_rec.models.fitted import FittedModel
from saml_rec.models.registry import MODELS, hyperparameters
from saml_rec.models.tables import FusedTable
from saml_rec.processes import ALONE, Processes

OPERATION_OF_LAYER: dict[type[nn.Module], Operation] = {
    MultiBranchMLP: "multi_branch",
    GroupedMLP: "grouped_mlp",
    MutualUnit: "mutual_unit",
    STARMLP: "grouped_mlp",
    ScoreMixture: "branch_scores",
    GateUnit: "grouped_mlp",
    MixtureOfExperts: "expert_outputs",
    ProgressiveExperts: "expert_outputs",
}

BUILT_BEFORE: dict[str, Mapping[str, Any]] = {"saml": {"scenario_dim": 0}}
"""Per model what a saved one was built with that is older than a hyperparameter, and so says nothing of it."""


def resolve_model_options(model: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The model's defaults, overridden by ``given``.

    Raises:
        InputError: there is no such model, or it does not take one of the options.
    """
    defaults = hyperparameters(model)
    for name in given:
        if name not in defaults:
            raise InputError(f"model {model} does not take {shortened(name)}; it takes {', '.join(defaults)}")
    return {**defaults, **given}


def resolve_device(name: str, processes: Processes = ALONE) -> torch.device:
    """The named device after a test allocation; "auto" is a GPU if torch sees one, else the CPU.

    In several processes "auto" and "cuda" are the GPU with the number of the process on its machine.

    Raises:
        InputError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and processes.are_several:
        name = f"cuda:{processes.local_rank}"
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device {shown(name)} cannot be used here: {shortened(reason)}") from error
    return device


def build_model(name: str, options: Mapping[str, Any], schema: Schema, encoder: Encoder) -> ScenarioModel | FittedModel:
    """A freshly initialised model on the CPU, from torch's global generator.

    Raises:
        InputError: a hyperparameter that the model refuses.
    """
    return _construct(name, options, schema, encoder.num_scenarios, encoder.vocabulary_sizes)


def check_model(name: str, options: Mapping[str, Any], schema: Schema, device: torch.device) -> None:
    """Tries hyperparameters and backend on a model of the smallest size, before any data are read.

    Args:
        name, options: as :func:`build_model`.
        schema: its features.
        device: where the model is to run.

    Raises:
        InputError: a hyperparameter that the model refuses, or a backend that cannot run here.
    """
    sizes = {feature.name: 2 for kind in ("sparse", "multi") for feature in schema.of_kind(kind)}
    backends_used(_construct(name, options, schema, 2, sizes), device)


def _construct(
    name: str, options: Mapping[str, Any], schema: Schema, num_scenarios: int, vocabulary_sizes: Mapping[str, int]
) -> ScenarioModel | FittedModel:
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    try:
        return MODELS[name](schema, num_scenarios, vocabulary_sizes=vocabulary_sizes, **options)
    # The last ones: widths that memory cannot hold.
    except (ValueError, TypeError, RuntimeError, MemoryError, OverflowError) as error:
        raise InputError(f"model {name}: {(str(error) or 'not enough memory').splitlines()[0]}") from error


def backends_used(model: nn.Module, device: torch.device) -> dict[str, str]:
    """The backend that runs each kernel operation of the model.

    Raises:
        InputError: a backend that was asked for by name cannot run here.
    """
    like = torch.empty(0, device=device)
    used: dict[str, str] = {}
    for module in model.modules():
        if (operation := OPERATION_OF_LAYER.get(type(module))) is not None:
            stop_gradient = getattr(module, "stop_gradient", True)
            try:
                chosen = choose_backend(str(module.backend), operation, like, stop_gradient=stop_gradient)
            except BackendUnavailable as error:
                raise InputError(str(error)) from error
            used[operation] = chosen.name
    return used


def parameter_count(model: nn.Module) -> int:
    """Numbers in all parameters and tables, or those that were fitted."""
    if isinstance(model, FittedModel):
        return model.num_parameters
    fused = [table.num_rows * table.dim for table in model.modules() if isinstance(table, FusedTable)]
    return sum(fused) + sum(parameter.numel() for parameter in model.parameters())


@contextmanager
def own_random_numbers(device: torch.device) -> Iterator[None]:
    """Leaves the caller's global generators as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
