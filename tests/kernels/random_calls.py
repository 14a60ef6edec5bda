"""Random calls of every operation for hypothesis, their results and those of the same formulas in float64.

Shapes, distributions of scenarios, options and layouts in memory are drawn together; a call knows which of its tensors
belong to rows and which to scenarios, so that tests can take both apart.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import naive
import plain
import problems
import torch
from hypothesis import strategies as st
from problems import Case, Params, laid_out, relative_error
from torch import Tensor

import saml_kernels
from saml_kernels.testing.problem import Results

BOUNDS = {torch.float64: 1e-10, torch.float32: problems.FLOAT32_TOLERANCE}
"""‖out − ref‖ / ‖ref‖; in the other types twice the error of the plain formulation in the same type."""
LOW = (torch.bfloat16, torch.float16)
PERTURBATIONS = 4
CONDITION = 16.0
"""Times the distance that rounding the inputs moves the result in float64: what no computation in the type can beat."""
SMOOTH = ("gelu", "silu", "tanh", "identity")

Function = Callable[[Mapping[str, Tensor], Tensor], dict[str, Tensor]]
"""From tensors by name and the scenario of each row to outputs by name, (B, ...) each."""


@dataclass(frozen=True, repr=False)
class Call:
    """A call of one operation."""

    tensors: dict[str, Tensor]
    """All that get gradients."""
    of_rows: tuple[str, ...]
    """Those whose dimension 0 is the batch's."""
    of_scenarios: tuple[str, ...]
    """Those whose dimension 0 is the scenarios' (or experts')."""
    with_columns: tuple[str, ...]
    """Tensors and outputs whose dimension 1 is the scenarios' (or experts')."""
    scenario: Tensor
    M: int
    cotangents: dict[str, Tensor]
    """Of outputs; others have none."""
    function: Callable[..., dict[str, Tensor]]
    """As :data:`Function`, with a keyword ``backend``; None is the oracle."""
    options: dict[str, Any]

    def __repr__(self) -> str:
        shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        return f"Call({shapes}, scenario={self.scenario.tolist()}, M={self.M}, {self.options})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        # Or hypothesis prints all numbers.
        printer.text(repr(self))

    def results(self, backend: str | None, dtype: torch.dtype | None = None) -> Results:
        """Outputs, and the gradient of Σ cotangent ∘ output with respect to every tensor; None is the oracle."""
        if backend is None and len(self.scenario) == 0:
            # The oracle goes sample by sample, and of none it does not know the shapes.
            backend = "reference"
        leaves = {
            name: tensor.detach().to(dtype or tensor.dtype).requires_grad_() for name, tensor in self.tensors.items()
        }
        outputs = self.function(leaves, self.scenario, backend=backend, **self.options)
        given = {name: cotangent.to(outputs[name].dtype) for name, cotangent in self.cotangents.items()}
        gradients = torch.autograd.grad(
            [outputs[name] for name in given],
            list(leaves.values()),
            list(given.values()),
            allow_unused=True,
            materialize_grads=True,
        )
        results = outputs | {f"∂{name}": each for name, each in zip(leaves, gradients, strict=True)}
        return {name: tensor.detach() for name, tensor in results.items()}

    def map(self, change: Callable[[str, Tensor], Tensor]) -> Call:
        return dataclasses.replace(self, tensors={name: change(name, each) for name, each in self.tensors.items()})

    def rows(self, index: Tensor | slice) -> Call:
        """The same for some rows, or in another order."""
        taken = self.map(lambda name, tensor: tensor[index] if name in self.of_rows else tensor)
        cotangents = {name: cotangent[index] for name, cotangent in self.cotangents.items()}
        return dataclasses.replace(taken, scenario=self.scenario[index], cotangents=cotangents)

    def relabelled(self, labels: list[int]) -> Call:
        """Scenario k is labels[k], with all that belongs to it."""
        order = torch.tensor(labels).argsort()

        def moved(name: str, tensor: Tensor) -> Tensor:
            tensor = tensor[order] if name in self.of_scenarios else tensor
            return tensor[:, order] if name in self.with_columns else tensor

        cotangents = {name: moved(name, cotangent) for name, cotangent in self.cotangents.items()}
        scenario = torch.tensor(labels, dtype=self.scenario.dtype)[self.scenario.long()]
        return dataclasses.replace(self.map(moved), scenario=scenario, cotangents=cotangents)


# --- judging ----------------------------------------------------------------------------------------------------------


def errors(out: Results, ref: Results) -> dict[str, float]:
    assert out.keys() == ref.keys()
    return {name: relative_error(out[name], ref[name]) for name in ref}


def check_against_oracle(call: Call, backend: str) -> None:
    """The kernels' outputs and gradients are within the bounds of their type.

    Where one is not, the bound is also what the rounding of inputs to the type makes of the exact result: a gradient of
    few numbers may cancel, an argument of relu lie at 0, a sum of cosines be nearly 0. And twice what the oracle itself
    errs by in the type: a sigmoid that is 1 there has no derivative, however its argument is rounded.
    """
    (dtype,) = {tensor.dtype for tensor in call.tensors.values()}
    ref = call.results(None, torch.float64)
    found = errors(call.results(backend), ref)
    bounds = dict.fromkeys(ref, BOUNDS.get(dtype, 0.0))
    if dtype in LOW:
        # NaN where plain PyTorch has no result itself: it is no measure then.
        plainly = errors(call.results(None), ref)
        bounds = {name: 0.0 if math.isnan(error) else 2 * error for name, error in plainly.items()}
    if all(found[name] <= bounds[name] for name in found):
        return
    for name, distance in _moved(call, ref, torch.finfo(dtype).eps / 2).items():
        bounds[name] = max(bounds[name], CONDITION * distance)
    for name, error in errors(call.results(None), ref).items():
        bounds[name] = max(bounds[name], 0.0 if math.isnan(error) else 2 * error)
    wrong = {name: (error, bounds[name]) for name, error in found.items() if not error <= bounds[name]}
    assert not wrong, f"relative errors and their bounds: {wrong}"


def _moved(call: Call, ref: Results, unit: float) -> dict[str, float]:
    """How far results move at most when inputs and cotangents change by their rounding."""
    generator = torch.Generator().manual_seed(0)

    def perturbed(_: str, tensor: Tensor) -> Tensor:
        sign = torch.randint(2, tensor.shape, generator=generator) * 2.0 - 1
        return tensor.double() * (1 + unit * sign)

    def again() -> Call:
        # Kernels round what comes from a cotangent row by row, and rows may cancel.
        cotangents = {name: perturbed(name, cotangent) for name, cotangent in call.cotangents.items()}
        return dataclasses.replace(call.map(perturbed), cotangents=cotangents)

    moved = [errors(again().results(None), ref) for _ in range(PERTURBATIONS)]
    # NaN: next to these inputs the score's quotient has no value, and nothing bounds what rounding does.
    return {name: max(math.inf if math.isnan(each[name]) else each[name] for each in moved) for name in ref}


def check_same(call: Call, out: Results, other: Results) -> None:
    """Two ways to the same results in float64, whose sums may have another order."""
    found = errors(out, other)
    wrong = {name: error for name, error in found.items() if not error <= BOUNDS[torch.float64]}
    if not wrong:
        return
    exact = call.results(None, torch.float64)
    moved = _moved(call, exact, torch.finfo(torch.float64).eps)
    wrong = {name: error for name, error in wrong.items() if not error <= CONDITION * max(moved.values())}
    assert not wrong, f"relative differences: {wrong}"


# --- drawing ----------------------------------------------------------------------------------------------------------

seeds = st.integers(0, 2**32 - 1)
row_counts = st.sampled_from([0, 1, 1, 2, 5, 9, 17, 40])
widths = st.integers(1, 9) | st.sampled_from([15, 16, 17, 33])


@st.composite
def scenarios(draw: st.DrawFn, M: int, B: int) -> Tensor:
    """Ids of B rows: any, those of few scenarios, of one alone, or of one but for a row; both types, also strided."""
    # Drawn from a seed: hypothesis takes a millisecond for a few rows.
    generator = torch.Generator().manual_seed(draw(seeds))
    kind = draw(st.sampled_from(["any", "any", "few", "one", "all but one"]))
    present = {"any": M, "few": max(1, M // 2)}.get(kind, 1)
    some = torch.randperm(M, generator=generator)[:present]
    ids = some[torch.randint(present, (B,), generator=generator)]
    if B and kind == "all but one":
        ids[torch.randint(B, (1,), generator=generator)] = torch.randint(M, (1,), generator=generator)
    ids = ids.to(draw(st.sampled_from([torch.int32, torch.int64])))
    return torch.stack([ids, torch.full_like(ids, -1)], 1)[:, 0] if draw(st.booleans()) else ids


def _finished(draw: st.DrawFn, call: Call, dtype: torch.dtype, layouts: bool) -> Call:
    """In a type, its tensors laid out in memory in drawn ways."""
    chosen = itertools.cycle(draw(st.lists(st.sampled_from(problems.LAYOUTS), min_size=1, max_size=5)))
    narrow = call.map(lambda _, tensor: tensor.to(dtype))
    return narrow.map(lambda _, tensor: laid_out(tensor, next(chosen))) if layouts else narrow


dtypes = st.sampled_from([torch.float64, torch.float64, torch.float32, torch.float32, *LOW])


def _activation(draw: st.DrawFn, dtype: torch.dtype) -> str:
    return draw(st.sampled_from(SMOOTH if dtype in LOW else problems.ACTIVATIONS))


def _trunk(tensors: Mapping[str, Tensor], scenario: Tensor, *, backend: str | None, layers: int, **options: Any) -> Any:
    parameters = {kind: [tensors.get(f"{kind}[{layer}]") for layer in range(1, layers + 1)] for kind in Params._fields}
    inputs = tensors["x_local"], tensors["x_global"], scenario, Params(**parameters)  # type: ignore[arg-type]
    if backend is not None:
        out = saml_kernels.multi_branch(*inputs, return_scores=True, backend=backend, **options)
    elif options["foreign_dtype"] is not None:
        out = naive.multi_branch(*inputs, **options)
    else:
        out = plain.multi_branch(*inputs, **{key: value for key, value in options.items() if key != "foreign_dtype"})
    scores = {f"scores[{layer}]": rows for layer, rows in enumerate(out.scores or (), 1) if rows is not None}
    return {"own": out.own, "aux": out.aux, **scores}


@st.composite
def trunks(draw: st.DrawFn, types: Any = dtypes, layouts: bool = True, smallest: int = 0, **fixed: Any) -> Call:
    """multi_branch."""
    dtype = draw(types)
    L = draw(st.integers(1, 3))
    dims = st.lists(widths, min_size=L, max_size=L).map(tuple)
    stop_gradient = draw(st.booleans())
    roundings = [None, None, None, torch.int8, torch.bfloat16] if stop_gradient and dtype == torch.float64 else [None]
    case = Case(
        M=draw(st.integers(1, 6)),
        B=max(smallest, draw(row_counts)),
        local_dim=draw(st.sampled_from([0, 1, 3, 16])),
        global_dim=draw(st.sampled_from([0, 1, 4])),
        hidden_dims=draw(dims),
        aux_dims=draw(dims),
        mutual_layers=tuple(sorted(draw(st.sets(st.integers(1, L))))),
        gate=draw(st.sampled_from(["vector", "scalar"])),
        score=draw(st.sampled_from(["ratio", "softmax"])),
        activation=_activation(draw, dtype),
        temperature=draw(st.sampled_from([0.1, 1.0])),
        per_branch=draw(st.booleans()),
        stop_gradient=stop_gradient,
        foreign_dtype=draw(st.sampled_from(roundings)),
        seed=draw(seeds),
    )
    case = dataclasses.replace(case, **fixed)
    if case.foreign_dtype is not None:
        # Whose oracle goes sample by sample.
        case = dataclasses.replace(case, B=min(case.B, 9))
    problem = problems.make(case)
    tensors = dict(problem.named())
    call = Call(
        tensors,
        of_rows=("x_local", "x_global"),
        of_scenarios=tuple(name for name in tensors if name.startswith(("branch", "gate"))),
        with_columns=(*(["x_local"] if case.per_branch else []), *(f"scores[{layer}]" for layer in case.mutual_layers)),
        scenario=draw(scenarios(case.M, case.B)),
        M=case.M,
        cotangents=dict(zip(("own", "aux"), problem.cotangents, strict=True)),
        function=_trunk,
        options={"layers": L, **problem.options},
    )
    return _finished(draw, call, dtype, layouts)


def _normal(draw: st.DrawFn) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(draw(seeds))
    # Values that float32 holds, so that all types start from the same.
    return lambda *shape: torch.randn(shape, generator=generator).double()


def _towers(draw: st.DrawFn, normal: Callable[..., Tensor], M: int, dims: list[int]) -> dict[str, Tensor]:
    pairs = list(enumerate(itertools.pairwise(dims)))
    weights = {f"weights[{layer}]": normal(M, i, o) / max(i, 1) ** 0.5 for layer, (i, o) in pairs}
    return weights | {f"biases[{layer}]": 0.5 + 0.3 * normal(M, o) for layer, (_, o) in pairs}


def _layers(tensors: Mapping[str, Tensor], kind: str) -> list[Tensor]:
    return [tensor for name, tensor in tensors.items() if name.startswith(kind)]


def _grouped(tensors: Mapping[str, Tensor], scenario: Tensor, *, backend: str | None, **options: Any) -> Any:
    inputs = tensors["x"], scenario, _layers(tensors, "weights"), _layers(tensors, "biases")
    options |= {"gated": tensors.get("gated"), "shared_weights": _layers(tensors, "shared")}
    if backend is not None:
        return {"out": saml_kernels.grouped_mlp(*inputs, backend=backend, **options)}
    if len(scenario) == 0:
        return {"out": saml_kernels.grouped_mlp(*inputs, backend="reference", **options)}
    return {"out": naive.grouped_mlp(*inputs, **options)}


@st.composite
def grouped_mlps(draw: st.DrawFn, types: Any = dtypes, layouts: bool = True, smallest: int = 0) -> Call:
    """grouped_mlp, with a gate or without, of weights or of products."""
    dtype, normal = draw(types), _normal(draw)
    M, B = draw(st.integers(1, 6)), max(smallest, draw(row_counts))
    dims = [draw(st.sampled_from([0, 1, 3, 16])), *draw(st.lists(widths, min_size=1, max_size=3))]
    tensors = {"x": normal(B, dims[0]), **_towers(draw, normal, M, dims)}
    options: dict[str, Any] = {"activation": _activation(draw, dtype)}
    # In 16 bits the product is rounded, of which the oracle knows nothing.
    if dtype not in LOW and draw(st.booleans()):
        tensors |= {f"shared[{layer}]": 1 + normal(i, o) for layer, (i, o) in enumerate(itertools.pairwise(dims))}
    if draw(st.booleans()):
        tensors["gated"] = normal(B, dims[-1])
        options["gate_scale"] = draw(st.sampled_from([2.0, 1.7]))
    else:
        options["output_activation"] = draw(st.sampled_from([None, "identity", "tanh"]))
    call = Call(
        tensors,
        of_rows=("x", "gated"),
        of_scenarios=tuple(name for name in tensors if name.startswith(("weights", "biases"))),
        with_columns=(),
        scenario=draw(scenarios(M, B)),
        M=M,
        cotangents={"out": normal(B, dims[-1])},
        function=_grouped,
        options=options,
    )
    return _finished(draw, call, dtype, layouts)


def _experts(tensors: Mapping[str, Tensor], scenario: Tensor, *, backend: str | None, **options: Any) -> Any:
    inputs = tensors["x"], _layers(tensors, "weights"), _layers(tensors, "biases")
    if backend is not None:
        return {"out": saml_kernels.expert_outputs(*inputs, backend=backend, **options)}
    if len(scenario) == 0:
        return {"out": saml_kernels.expert_outputs(*inputs, backend="reference", **options)}
    return {"out": naive.expert_outputs(*inputs, **options)}


@st.composite
def expert_outputs(draw: st.DrawFn, types: Any = dtypes, layouts: bool = True, smallest: int = 0) -> Call:
    """expert_outputs; its scenarios are the experts, and no row has one of its own."""
    dtype, normal = draw(types), _normal(draw)
    K, B = draw(st.integers(1, 5)), max(smallest, draw(st.sampled_from([0, 1, 2, 5, 9, 17])))
    dims = [draw(st.sampled_from([0, 1, 3, 16])), *draw(st.lists(widths, min_size=1, max_size=3))]
    tensors = {"x": normal(B, dims[0]), **_towers(draw, normal, K, dims)}
    call = Call(
        tensors,
        of_rows=("x",),
        of_scenarios=tuple(name for name in tensors if name != "x"),
        with_columns=("out",),
        scenario=torch.zeros(B, dtype=torch.int64),
        M=K,
        cotangents={"out": normal(B, K, dims[-1])},
        function=_experts,
        options={
            "activation": _activation(draw, dtype),
            "output_activation": draw(st.sampled_from([None, "identity", "silu"])),
        },
    )
    return _finished(draw, call, dtype, layouts)


def _mutual(tensors: Mapping[str, Tensor], scenario: Tensor, *, backend: str | None, **options: Any) -> Any:
    inputs = tensors["v"], scenario, tensors["gate_weight"], tensors["gate_bias"]
    if backend is not None:
        out, scores = saml_kernels.mutual_unit(*inputs, backend=backend, return_scores=True, **options)
    elif len(scenario) == 0:
        out, scores = saml_kernels.mutual_unit(*inputs, backend="reference", return_scores=True, **options)
    else:
        out, scores = naive.mutual_unit(*inputs, **options)
    return {"out": out, "scores": scores}


@st.composite
def mutual_units(draw: st.DrawFn, types: Any = dtypes, layouts: bool = True, smallest: int = 0) -> Call:
    """mutual_unit."""
    dtype, normal = draw(types), _normal(draw)
    M, B, d = draw(st.integers(1, 6)), max(smallest, draw(row_counts)), draw(widths)
    width = draw(st.sampled_from([d, 1]))
    call = Call(
        # With a direction in common, so that Σ c_ij stays away from 0.
        {
            "v": 0.7 + normal(B, M, d),
            "gate_weight": normal(M, d, width) / d**0.5,
            "gate_bias": normal(M, width),
        },
        of_rows=("v",),
        of_scenarios=("gate_weight", "gate_bias"),
        with_columns=("v", "scores"),
        scenario=draw(scenarios(M, B)),
        M=M,
        cotangents={"out": normal(B, d)},
        function=_mutual,
        options={
            "score": draw(st.sampled_from(["ratio", "softmax"])),
            "temperature": draw(st.sampled_from([0.1, 1.0])),
            "stop_gradient": draw(st.booleans()),
        },
    )
    return _finished(draw, call, dtype, layouts)


CALLS: dict[str, Callable[..., st.SearchStrategy[Call]]] = {
    "multi_branch": trunks,
    "grouped_mlp": grouped_mlps,
    "expert_outputs": expert_outputs,
    "mutual_unit": mutual_units,
}
