"""Trunk problems for the tests: small cases, the oracles' results, and the comparison of two evaluations.

The problem itself and ‖out − ref‖ / ‖ref‖ are saml_kernels.testing's; the oracles are the tests' own.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import naive
import plain
import pytest
import torch
from torch import Tensor

import saml_kernels
from saml_kernels.testing import problem as testing
from saml_kernels.testing.accuracy import FLOAT32_BOUND, FLOAT64_BOUND, relative_error, relative_errors
from saml_kernels.testing.problem import Problem, Results, make
from saml_kernels.types import TrunkParams as Params

__all__ = ["Params", "Problem", "make", "relative_error"]

ACTIVATIONS = tuple(naive.ACTIVATIONS)
LAYOUTS = ("contiguous", "transposed", "sliced", "offset", "expanded")
"""In memory, as :func:`laid_out` makes them."""
FLOAT64_TOLERANCE = FLOAT64_BOUND
FLOAT32_TOLERANCE = FLOAT32_BOUND


@dataclass(frozen=True)
class Case(testing.Case):
    """A case of few rows and narrow layers unless it says otherwise."""

    B: int = 7
    M: int = 3
    local_dim: int = 4
    global_dim: int = 5
    hidden_dims: tuple[int, ...] = (6, 4)
    aux_dims: tuple[int, ...] | None = (5, 3)

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


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values (for "expanded": the first row's) in memory laid out otherwise, NaN in between."""
    if layout == "transposed" and tensor.ndim >= 2:
        return tensor.mT.contiguous().mT
    if layout == "sliced":
        gaps = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), float("nan"), dtype=tensor.dtype)
        gaps[..., ::2] = tensor
        return gaps[..., ::2]
    if layout == "offset":
        frame = torch.full((tensor.shape[0] + 2, *tensor.shape[1:]), float("nan"), dtype=tensor.dtype)
        frame[1:-1] = tensor
        return frame[1:-1]
    if layout == "expanded" and tensor.shape[0] > 0:
        return tensor[:1].expand_as(tensor)
    return tensor


def with_gradients(function: Callable[[Problem], Any], problem: Problem, *, retain: bool = False) -> Results:
    """own, aux and scores, and the gradient of Σ cotangent ∘ (own, aux) with respect to every tensor.

    retain=True keeps the graph of the gradients, for a second derivative.
    """
    problem = problem.leaves()
    output = function(problem)
    names, inputs = zip(*problem.named(), strict=True)
    gradients = torch.autograd.grad(
        [output.own, output.aux],
        inputs,
        problem.cotangents,
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
        generator = torch.Generator().manual_seed(testing.COTANGENT_SEED + 1)
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


def errors(out: Results, ref: Results) -> dict[str, float]:
    assert out.keys() == ref.keys(), f"{sorted(out.keys() ^ ref.keys())} on one side only"
    return relative_errors(out, ref)


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
