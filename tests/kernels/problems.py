"""Random trunk problems, their evaluation with every gradient, and the comparison of two evaluations."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias

import naive
import plain
import pytest
import torch
from torch import Tensor

import saml_kernels

ACTIVATIONS = tuple(naive.ACTIVATIONS)
FLOAT64_TOLERANCE = 1e-10
FLOAT32_TOLERANCE = 1e-5

Results: TypeAlias = dict[str, Tensor]


class Params(NamedTuple):
    branch_weights: list[Tensor]
    branch_biases: list[Tensor]
    aux_weights: list[Tensor]
    aux_biases: list[Tensor]
    gate_weights: list[Tensor | None]
    gate_biases: list[Tensor | None]


@dataclass(frozen=True)
class Case:
    """One trunk and one batch, everything but the random numbers. mutual_layers counts from 1."""

    M: int = 3
    B: int = 7
    local_dim: int = 4
    global_dim: int = 5
    hidden_dims: tuple[int, ...] = (6, 4)
    aux_dims: tuple[int, ...] = (5, 3)
    mutual_layers: tuple[int, ...] = (1,)
    gate: str = "vector"
    score: str = "ratio"
    activation: str = "relu"
    temperature: float = 0.1
    per_branch: bool = False
    stop_gradient: bool = True
    foreign_dtype: torch.dtype | None = None
    scenario_dtype: torch.dtype = torch.int64
    seed: int = 0

    def __str__(self) -> str:
        parts = [
            f"M{self.M}",
            "x".join(map(str, self.hidden_dims)),
            "mutual" + "".join(map(str, self.mutual_layers)),
            self.gate,
            self.score,
            self.activation,
        ]
        parts += ["views"] if self.per_branch else []
        parts += [] if self.stop_gradient else ["nosg"]
        parts += [str(self.foreign_dtype).removeprefix("torch.")] if self.foreign_dtype else []
        return "-".join(parts)


@dataclass(frozen=True)
class Problem:
    x_local: Tensor
    x_global: Tensor
    scenario: Tensor
    params: Params
    options: dict[str, Any] = field(default_factory=dict)

    def map(self, function: Callable[[Tensor], Tensor]) -> Problem:
        """The same problem with `function` applied to every floating-point tensor."""
        x_local, x_global = function(self.x_local), function(self.x_global)
        lists = [[None if t is None else function(t) for t in tensors] for tensors in self.params]
        return replace(self, x_local=x_local, x_global=x_global, params=Params(*lists))  # type: ignore[arg-type]

    def holding(self, tensors: Iterable[Tensor]) -> Problem:
        """The same problem over other tensors, given in the order of named()."""
        remaining = iter(tensors)
        return self.map(lambda _: next(remaining))

    def to(self, dtype: torch.dtype, device: str = "cpu") -> Problem:
        moved = self.map(lambda t: t.to(device, dtype))
        return replace(moved, scenario=self.scenario.to(device))

    def leaves(self) -> Problem:
        """Fresh leaves that require grad, of the same memory and strides."""
        return self.map(lambda t: t.detach().requires_grad_())

    def named(self) -> Iterator[tuple[str, Tensor]]:
        yield "x_local", self.x_local
        yield "x_global", self.x_global
        for name, tensors in self.params._asdict().items():
            for layer, tensor in enumerate(tensors, start=1):
                if tensor is not None:
                    yield f"{name}[{layer}]", tensor

    @property
    def num_scenarios(self) -> int:
        return self.params.branch_weights[0].shape[0]

    def kernel_params(self) -> saml_kernels.TrunkParams:
        return saml_kernels.TrunkParams(*self.params)

    def run(self, **overrides: Any) -> saml_kernels.TrunkOutput:
        """saml_kernels.multi_branch on this problem."""
        arguments = self.options | overrides
        return saml_kernels.multi_branch(self.x_local, self.x_global, self.scenario, self.kernel_params(), **arguments)


def make(case: Case) -> Problem:
    """float64 tensors of float32-representable values, so that one oracle serves both dtypes.

    Biases have mean 0.5: the streams then point the same way, Σ c_ij stays away from 0 and the ratio well conditioned.
    """
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).double()

    M, B = case.M, case.B
    params = Params([], [], [], [], [], [])
    previous, previous_aux = case.local_dim, case.global_dim
    for layer, (d, a) in enumerate(zip(case.hidden_dims, case.aux_dims, strict=True), start=1):
        params.aux_weights.append(normal(previous_aux, a) / max(previous_aux, 1) ** 0.5)
        params.aux_biases.append(0.5 + 0.3 * normal(a))
        params.branch_weights.append(normal(M, previous + a, d) / (previous + a) ** 0.5)
        params.branch_biases.append(0.5 + 0.3 * normal(M, d))
        width = d if case.gate == "vector" else 1
        mutual = layer in case.mutual_layers
        params.gate_weights.append(normal(M, d, width) / d**0.5 if mutual else None)
        params.gate_biases.append(0.3 * normal(M, width) if mutual else None)
        previous, previous_aux = d, a
    return Problem(
        x_local=normal(B, M, case.local_dim) if case.per_branch else normal(B, case.local_dim),
        x_global=normal(B, case.global_dim),
        scenario=torch.randint(M, (B,), generator=generator).to(case.scenario_dtype),
        params=params,
        options={
            "activation": case.activation,
            "score": case.score,
            "temperature": case.temperature,
            "stop_gradient": case.stop_gradient,
            "foreign_dtype": case.foreign_dtype,
        },
    ).map(lambda t: t.float().double())


def sweep() -> list[Case]:
    """Shapes × score × gate × stop-gradient in full; the other options drawn, the same ones every time."""
    draw = random.Random(0)
    shapes = [
        {"M": 2, "hidden_dims": (5,), "aux_dims": (3,), "mutual_layers": (1,)},
        {"M": 3, "hidden_dims": (6, 4), "aux_dims": (5, 3), "mutual_layers": (1,)},
        {"M": 3, "hidden_dims": (6, 4), "aux_dims": (2, 7), "mutual_layers": (2,)},
        {"M": 4, "hidden_dims": (6, 5, 4), "aux_dims": (4, 4, 4), "mutual_layers": (1, 2)},
        {"M": 3, "hidden_dims": (5, 4, 3), "aux_dims": (3, 2, 1), "mutual_layers": (1, 3)},
        {"M": 3, "hidden_dims": (4, 4, 4), "aux_dims": (4, 4, 4), "mutual_layers": (1, 2, 3)},
        {"M": 6, "hidden_dims": (3, 4), "aux_dims": (2, 2), "mutual_layers": (1,)},
        {"M": 4, "hidden_dims": (4, 3), "aux_dims": (3, 4), "mutual_layers": ()},
        {"M": 1, "hidden_dims": (4, 3), "aux_dims": (3, 4), "mutual_layers": (1,)},
    ]
    cases: list[Case] = []
    for shape in shapes:
        for score in ("ratio", "softmax"):
            for gate in ("vector", "scalar"):
                for stop_gradient in (True, False):
                    cases.append(
                        Case(
                            **shape,  # type: ignore[arg-type]
                            score=score,
                            gate=gate,
                            stop_gradient=stop_gradient,
                            activation=ACTIVATIONS[len(cases) % len(ACTIVATIONS)],
                            per_branch=draw.random() < 0.5,
                            temperature=draw.choice([0.1, 0.5]),
                            scenario_dtype=draw.choice([torch.int32, torch.int64]),
                            seed=len(cases),
                        )
                    )
    return cases


def with_gradients(
    function: Callable[[Problem], Any], problem: Problem, *, seed: int = 99, retain: bool = False
) -> Results:
    """own, aux and scores, and the gradient of Σ cotangent ∘ (own, aux) with respect to every tensor.

    retain=True keeps the graph of the gradients, for a second derivative.
    """
    problem = problem.leaves()
    output = function(problem)
    generator = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(y.shape, generator=generator).to(y.device, y.dtype) for y in (output.own, output.aux)]
    names, inputs = zip(*problem.named(), strict=True)
    gradients = torch.autograd.grad(
        [output.own, output.aux],
        inputs,
        cotangents,
        allow_unused=True,
        materialize_grads=True,
        create_graph=retain,
    )
    results = {"own": output.own, "aux": output.aux}
    for layer, rows in enumerate(output.scores or (), start=1):
        if rows is not None:
            results[f"scores[{layer}]"] = rows
    results |= {f"∂{name}": gradient for name, gradient in zip(names, gradients, strict=True)}
    if retain:
        directions = [torch.randn(g.shape, generator=generator).to(g.device, g.dtype) for g in gradients]
        live = [(g, v) for g, v in zip(gradients, directions, strict=True) if g.requires_grad]
        second = torch.autograd.grad(
            [g for g, _ in live], inputs, [v for _, v in live], allow_unused=True, materialize_grads=True
        )
        results |= {f"∂²{name}": gradient for name, gradient in zip(names, second, strict=True)}
    return {name: tensor.detach() for name, tensor in results.items()}


def oracle(problem: Problem, **keywords: Any) -> Results:
    """The per-sample oracle in float64 on the very values the problem holds."""
    return with_gradients(
        lambda p: naive.multi_branch(p.x_local, p.x_global, p.scenario, p.params, **p.options),
        problem.to(torch.float64),
        **keywords,
    )


def batched_oracle(problem: Problem, dtype: torch.dtype = torch.float64) -> Results:
    """The plain formulation, for problems too large for the per-sample oracle. It rounds no foreign streams."""
    options = {name: value for name, value in problem.options.items() if name != "foreign_dtype"}
    return with_gradients(
        lambda p: plain.multi_branch(p.x_local, p.x_global, p.scenario, p.params, **options), problem.to(dtype)
    )


def kernel(problem: Problem, backend: str, **keywords: Any) -> Results:
    """saml_kernels.multi_branch; skips the test where a backend says it cannot take this input."""
    moved = problem.to(problem.x_global.dtype, device_of(backend))
    with skip_unavailable(backend):
        return with_gradients(lambda p: p.run(backend=backend, return_scores=True), moved, **keywords)


def relative_error(out: Tensor, ref: Tensor) -> float:
    """‖out − ref‖ / ‖ref‖ in float64; ‖out‖ where the reference is zero."""
    assert out.shape == ref.shape, f"{tuple(out.shape)} is not {tuple(ref.shape)}"
    out, ref = out.detach().cpu().double(), ref.detach().cpu().double()
    return float((out - ref).norm() / (ref.norm() or 1.0))


def errors(out: Results, ref: Results) -> dict[str, float]:
    assert out.keys() == ref.keys(), f"{sorted(out.keys() ^ ref.keys())} on one side only"
    return {name: relative_error(out[name], ref[name]) for name in ref}


def assert_close(out: Results, ref: Results, tolerance: float) -> None:
    wrong = {name: error for name, error in errors(out, ref).items() if not error <= tolerance}
    assert not wrong, f"relative errors above {tolerance:g}: {wrong}"


def device_of(backend: str) -> str:
    """Where a backend's tensors live: Triton's on the GPU where there is one, all others' on the CPU."""
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


class skip_unavailable:  # noqa: N801
    """Turns a backend's own "I cannot take this" into a skip. The reference takes everything: there it is an error."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, saml_kernels.BackendUnavailable) and self.backend != "reference":
            pytest.skip(f"{self.backend}: {error}")


def backends(operation: str) -> list[str]:
    """Every backend that runs `operation` here: the parameters of the tests that run on all of them."""
    return [name for name, reason in saml_kernels.available_backends(operation).items() if reason is None]


TRUNK_BACKENDS = backends("multi_branch")
