"""One trunk and one batch: from shapes to inputs, parameters and cotangents, and to outputs and gradients.

Symbols as in docs/computation.md: B rows, M scenarios, D_l and D_g the widths of x_local and x_global, d_1..d_L and
a_1..a_L those of the layers of the branches and of the auxiliary network.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from saml_kernels.functional import multi_branch
from saml_kernels.types import TrunkOutput, TrunkParams

DISTRIBUTIONS = ("uniform", "zipf")
PASSES = ("forward", "step")
"""Inference, and a training step without the optimizer's part: forward and backward."""
COTANGENT_SEED = 99

Results: TypeAlias = dict[str, Tensor]
"""By name: "own", "aux", and "∂name" for the gradient of a tensor of :meth:`Problem.named`."""
Call: TypeAlias = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """One trunk and one batch, everything but the random numbers.

    Raises:
        ValueError: shapes that no trunk has, or an unknown distribution.
    """

    B: int
    M: int
    local_dim: int
    """D_l."""
    global_dim: int
    """D_g."""
    hidden_dims: tuple[int, ...]
    """d_1..d_L."""
    aux_dims: tuple[int, ...] | None = None
    """a_1..a_L; None: as ``hidden_dims``."""
    mutual_layers: tuple[int, ...] = (1,)
    """Layers with a mutual unit behind them, counted from 1."""
    gate: str = "vector"
    per_branch: bool = False
    """x_local is (B, M, D_l), one view per branch, rather than (B, D_l)."""
    distribution: str = "uniform"
    """Of the scenarios: "uniform", or "zipf" (scenario k has probability ∝ 1 / (k + 1))."""
    scenario_dtype: torch.dtype = torch.int64
    activation: str = "relu"
    score: str = "ratio"
    temperature: float = 0.1
    stop_gradient: bool = True
    foreign_dtype: torch.dtype | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        layers = len(self.hidden_dims)
        if self.distribution not in DISTRIBUTIONS:
            raise ValueError(f"distribution must be one of {', '.join(DISTRIBUTIONS)}, got {self.distribution!r}")
        if self.B < 0 or self.M < 1 or not layers:
            raise ValueError(f"expected B ≥ 0 rows, M ≥ 1 scenarios and a layer, got {self.B}, {self.M} and {layers}")
        if self.aux_dims is not None and len(self.aux_dims) != layers:
            raise ValueError(f"expected a width in aux_dims for each of {layers} layers, got {len(self.aux_dims)}")
        if not set(self.mutual_layers) <= set(range(1, layers + 1)):
            raise ValueError(f"mutual_layers must lie in 1..{layers}, got {self.mutual_layers}")


@dataclass(frozen=True)
class Problem:
    """A batch, parameters, cotangents, and the options of :func:`saml_kernels.multi_branch`."""

    x_local: Tensor
    """(B, D_l) or (B, M, D_l)."""
    x_global: Tensor
    """(B, D_g)."""
    scenario: Tensor
    """(B,) int32 or int64."""
    params: TrunkParams
    cotangents: tuple[Tensor, Tensor]
    """∂loss/∂own (B, d_L) and ∂loss/∂aux (B, a_L)."""
    options: dict[str, Any] = field(default_factory=dict)

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor that receives a gradient, with its name; layers count from 1."""
        yield "x_local", self.x_local
        yield "x_global", self.x_global
        for name, tensors in self.params._asdict().items():
            for layer, tensor in enumerate(tensors, start=1):
                if tensor is not None:
                    yield f"{name}[{layer}]", tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> "Problem":
        """The same problem with ``function`` applied to every tensor of :meth:`named`."""
        x_local, x_global = function(self.x_local), function(self.x_global)
        params = TrunkParams._make([None if t is None else function(t) for t in tensors] for tensors in self.params)
        return replace(self, x_local=x_local, x_global=x_global, params=params)

    def holding(self, tensors: Iterable[Tensor]) -> "Problem":
        """The same problem over other tensors, given in the order of :meth:`named`."""
        remaining = iter(tensors)
        return self.map(lambda _: next(remaining))

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> "Problem":
        """The same values in another type or place, where it is given; on the graph of these tensors, as Tensor.to."""
        own, aux = (cotangent.to(device, dtype) for cotangent in self.cotangents)
        moved = self.map(lambda tensor: tensor.to(device, dtype))
        return replace(moved, scenario=self.scenario.to(device), cotangents=(own, aux))

    def leaves(self) -> "Problem":
        """Fresh leaves that require a gradient, of the same memory and strides."""
        return self.map(lambda tensor: tensor.detach().requires_grad_())

    def copy(self) -> "Problem":
        """The same values elsewhere in memory, as leaves that require a gradient."""
        own, aux = (cotangent.clone() for cotangent in self.cotangents)
        copied = self.map(lambda tensor: tensor.detach().clone()).leaves()
        return replace(copied, scenario=self.scenario.clone(), cotangents=(own, aux))

    def rows(self, index: Tensor | slice) -> "Problem":
        """The batch's rows ``index``, over the same parameters."""
        own, aux = (cotangent[index] for cotangent in self.cotangents)
        return replace(
            self,
            x_local=self.x_local[index],
            x_global=self.x_global[index],
            scenario=self.scenario[index],
            cotangents=(own, aux),
        )

    def run(self, **overrides: Any) -> TrunkOutput:
        """saml_kernels.multi_branch on this problem; ``overrides`` come before its options."""
        return multi_branch(self.x_local, self.x_global, self.scenario, self.params, **self.options | overrides)

    def call(self, kind: str, function: "Trunk") -> Call:
        """One pass of PASSES as a call: (own, aux) under inference mode; or own, aux and every gradient of a step.

        Gradients come in the order of :meth:`named`, zero where the function does not read a tensor. The problem's
        tensors must be :meth:`leaves` for a step.
        """
        if kind == "forward":
            return partial(_forward, function, self)
        return partial(_step, function, self, [tensor for _, tensor in self.named()])

    def results(self, function: "Trunk") -> Results:
        """Everything that a function computes; of inference "own (inference)" and "aux (inference)"."""
        own, aux = self.call("forward", function)()
        return {"own (inference)": own, "aux (inference)": aux} | self.name(self.call("step", function)())

    def name(self, step: Sequence[Tensor]) -> Results:
        """What a step's call returned, by name."""
        names = ("own", "aux", *(f"∂{name}" for name, _ in self.named()))
        return {name: tensor.detach() for name, tensor in zip(names, step, strict=True)}


Trunk: TypeAlias = Callable[[Problem], Sequence[Any]]
"""A trunk under test: own (B, d_L) and aux (B, a_L) first, as TrunkOutput or a tuple."""


def backend(name: str, **options: Any) -> Trunk:
    """The trunk as a backend of saml_kernels computes it."""
    return lambda problem: problem.run(backend=name, **options)


def make(case: Case) -> Problem:
    """Random inputs of unit variance and weights that keep it: float64 on the CPU, of values that float32 holds.

    So one float64 reference serves both types, and the numbers are the same on every device. Biases have mean 0.5: the
    streams then point the same way, Σ c_ij stays away from 0 and the ratio of cosines is well conditioned.
    """
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).double()

    B, M = case.B, case.M
    params = TrunkParams([], [], [], [], [], [])
    previous, previous_aux = case.local_dim, case.global_dim
    aux_dims = case.hidden_dims if case.aux_dims is None else case.aux_dims
    for layer, (d, a) in enumerate(zip(case.hidden_dims, aux_dims, strict=True), start=1):
        width = d if case.gate == "vector" else 1
        mutual = layer in case.mutual_layers
        drawn = {
            "aux_weights": normal(previous_aux, a) / max(previous_aux, 1) ** 0.5,
            "aux_biases": 0.5 + 0.3 * normal(a),
            "branch_weights": normal(M, previous + a, d) / max(previous + a, 1) ** 0.5,
            "branch_biases": 0.5 + 0.3 * normal(M, d),
            "gate_weights": normal(M, d, width) / max(d, 1) ** 0.5 if mutual else None,
            "gate_biases": 0.3 * normal(M, width) if mutual else None,
        }
        for name, tensor in drawn.items():
            getattr(params, name).append(tensor)
        previous, previous_aux = d, a
    x_local = normal(B, M, case.local_dim) if case.per_branch else normal(B, case.local_dim)
    x_global = normal(B, case.global_dim)
    if case.distribution == "uniform":
        scenario = torch.randint(M, (B,), generator=generator)
    else:
        scenario = torch.multinomial(1 / torch.arange(1, M + 1), B, replacement=True, generator=generator)
    generator.manual_seed(COTANGENT_SEED)
    options = ("activation", "score", "temperature", "stop_gradient", "foreign_dtype")
    return Problem(
        x_local,
        x_global,
        scenario.to(case.scenario_dtype),
        params,
        (normal(B, previous), normal(B, previous_aux)),
        {name: getattr(case, name) for name in options},
    ).map(lambda tensor: tensor.float().double())


def _forward(function: Trunk, problem: Problem) -> tuple[Tensor, ...]:
    with torch.inference_mode():
        return tuple(function(problem)[:2])


def _step(function: Trunk, problem: Problem, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    outputs = tuple(function(problem)[:2])
    gradients = torch.autograd.grad(outputs, leaves, problem.cotangents, allow_unused=True, materialize_grads=True)
    return (*outputs, *gradients)
