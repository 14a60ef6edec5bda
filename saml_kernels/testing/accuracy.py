"""Whether a result is right: ‖out − ref‖ / ‖ref‖ against float64 on the same inputs, and the bounds it is held to.

    float32                             1e−5
    float32, foreign streams rounded    against the reference that rounds the same way: 1e−5, or twice the error of
                                        backend "reference" in float32 where that is more
    bfloat16, float16                   twice the error of the plain formulation in the same type
    float32 on a GPU with tf32          2e−3, or twice the error of the plain formulation where that is more

The gradient of relu jumps at 0. A row with an argument of it within rounding distance of 0 would tell two correct
computations apart by whole entries of its gradient: such rows get cotangents 0 (:func:`without_kinks`).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from torch import Tensor

from saml_kernels.activations import ACTIVATIONS
from saml_kernels.functional import grouped_mlp
from saml_kernels.testing.problem import Problem, Results, Trunk, backend
from saml_kernels.types import TrunkParams

FLOAT64_BOUND = 1e-10
FLOAT32_BOUND = 1e-5
TF32_BOUND = 2e-3
LOW_PRECISION_FACTOR = 2.0
KINK_MARGIN = 1e-4
"""No gradient passes through rows that have a relu's argument nearer to 0; over ten times float32's largest error."""
KINKED = {row.name: row.slope_below_kink for row in ACTIVATIONS.values() if row.slope_below_kink is not None}
"""Activations whose derivative jumps at 0, and their slope below it."""
REFERENCE_ROWS = 1024
"""Rows per chunk of the float64 reference, whose streams would not fit in memory for the largest batches."""
REFERENCE = backend("reference")
TINY = 1e-300


def relative_error(out: Tensor, reference: Tensor) -> float:
    """‖out − ref‖ / ‖ref‖ in float64; ‖out‖ where the reference is zero.

    Raises:
        ValueError: tensors of different shapes.
    """
    if out.shape != reference.shape:
        raise ValueError(f"expected the reference's shape {tuple(reference.shape)}, got {tuple(out.shape)}")
    reference = reference.detach().double()
    return float((out.detach().to(reference.device).double() - reference).norm() / (reference.norm() or 1.0))


def relative_errors(results: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, float]:
    """Per tensor of the reference."""
    return {name: relative_error(results[name], tensor) for name, tensor in reference.items()}


def outside(errors: Mapping[str, float], bounds: Mapping[str, float]) -> str | None:
    """None, or one line on the tensor that is furthest outside its bound."""
    # Not ">": an error may be NaN.
    wrong = [name for name, error in errors.items() if not error <= bounds[name]]
    if not wrong:
        return None
    name = max(wrong, key=lambda entry: errors[entry] / (bounds[entry] or TINY))
    return f"wrong: relative error of {name} is {errors[name]:.1e}, bound {bounds[name]:.1e}"


def one_line(error: BaseException) -> str:
    """Kind and first line of an error."""
    lines = [line.strip(" :") for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def reference_results(problem: Problem) -> Results:
    """What backend "reference" computes in float64 on the problem's values, chunk by chunk."""
    wide = problem.to(torch.float64).leaves()
    shared = [f"∂{name}" for name, _ in wide.named() if not name.startswith("x_")]
    chunks = [
        wide.rows(slice(start, start + REFERENCE_ROWS)).leaves()
        for start in range(0, max(len(problem.scenario), 1), REFERENCE_ROWS)
    ]
    whole: Results = {}
    parts: dict[str, list[Tensor]] = {}
    for chunk in chunks:
        for name, tensor in chunk.name(chunk.call("step", REFERENCE)()).items():
            if name in shared:
                whole[name] = whole[name] + tensor if name in whole else tensor
            else:
                parts.setdefault(name, []).append(tensor)
    return {name: torch.cat(tensors) for name, tensors in parts.items()} | whole


@dataclass
class Verdict:
    """What the gate found."""

    errors: dict[str, float] = field(default_factory=dict)
    """Per tensor."""
    bounds: dict[str, float] = field(default_factory=dict)
    """Per tensor."""
    distance: float | None = None
    """Error of own against the reference with foreign streams in full precision; None where nothing is quantised."""
    failure: str | None = None
    """None, or one line: why there is no figure."""


class AccuracyGate:
    """The gate of one batch. References and yardsticks are computed when first needed, then kept.

    Args:
        problem: the batch, in any type; ``options["foreign_dtype"]`` is overridden by what is judged.
        plain: the plain formulation, whose error in a low precision is the yardstick there.
    """

    def __init__(self, problem: Problem, plain: Trunk = REFERENCE) -> None:
        self.problem = problem
        self.plain = plain
        self.problems = cache(lambda dtype: problem.to(dtype).leaves())
        self.reference = cache(self._reference)
        self.bounds = cache(self._bounds)

    def judge(self, function: Trunk, dtype: torch.dtype, foreign_dtype: torch.dtype | None = None) -> Verdict:
        """Runs ``function`` for the first time, so that it is also compiled afterwards. Never raises for its errors."""
        try:
            results = self.problems(dtype).results(function)
        except Exception as error:  # A compiler raises many kinds, and so does a launch.
            return Verdict(failure=one_line(error))
        return self.compare(results, dtype, foreign_dtype)

    def compare(self, results: Results, dtype: torch.dtype, foreign_dtype: torch.dtype | None = None) -> Verdict:
        """On results that are there already, as :meth:`Problem.results` names them."""
        reference, bounds = self.reference(dtype, foreign_dtype), self.bounds(dtype, foreign_dtype)
        errors = relative_errors(results, reference)
        distance = None
        if foreign_dtype is not None:
            distance = relative_error(results["own"], self.reference(dtype, None)["own"])
        return Verdict(errors, bounds, distance, outside(errors, bounds))

    def _rounding(self, dtype: torch.dtype, foreign_dtype: torch.dtype | None) -> Problem:
        problem: Problem = self.problems(dtype)
        return replace(problem, options=problem.options | {"foreign_dtype": foreign_dtype})

    def _reference(self, dtype: torch.dtype, foreign_dtype: torch.dtype | None) -> Results:
        results = reference_results(self._rounding(dtype, foreign_dtype))
        return results | {f"{name} (inference)": results[name] for name in ("own", "aux")}

    def _bounds(self, dtype: torch.dtype, foreign_dtype: torch.dtype | None) -> dict[str, float]:
        reference = self.reference(dtype, foreign_dtype)
        tf32 = self.problem.x_local.is_cuda and torch.backends.cuda.matmul.allow_tf32
        if dtype == torch.float32 and foreign_dtype is None and not tf32:
            return dict.fromkeys(reference, FLOAT32_BOUND)
        yardstick = self.plain if foreign_dtype is None else REFERENCE
        errors = relative_errors(self._rounding(dtype, foreign_dtype).results(yardstick), reference)
        floor = 0.0 if dtype != torch.float32 else TF32_BOUND if tf32 else FLOAT32_BOUND
        return {name: max(floor, LOW_PRECISION_FACTOR * error) for name, error in errors.items()}


def without_kinks(problem: Problem, foreign_dtypes: Iterable[torch.dtype | None] = (None,)) -> Problem:
    """The problem with cotangents 0 in rows where rounding decides which side of a kink an argument is on.

    ``foreign_dtypes`` are the precisions of foreign streams it is going to be judged in: through the mutual unit they
    move the arguments of later layers.
    """
    margins = [
        kink_margin(replace(problem, options=problem.options | {"foreign_dtype": foreign_dtype}))
        for foreign_dtype in foreign_dtypes
    ]
    near = torch.stack(margins).amin(0) < KINK_MARGIN
    own, aux = (cotangent.masked_fill(near[:, None], 0.0) for cotangent in problem.cotangents)
    return replace(problem, cotangents=(own, aux))


def kink_margin(problem: Problem) -> Tensor:
    """(B,) the smallest |z| at a kink of δ that a row's gradient passes, float64: auxiliary network and own branch.

    ∞ where δ has no kink. The foreign streams' arguments do not count: under stop-gradient no gradient passes them.
    """
    activation = problem.options.get("activation", "relu")
    margin = torch.full(problem.scenario.shape, torch.inf, dtype=torch.float64, device=problem.scenario.device)
    if activation not in KINKED:
        return margin
    exact = problem.to(torch.float64).map(Tensor.detach)
    for start in range(0, len(margin), REFERENCE_ROWS):
        chunk = exact.rows(slice(start, start + REFERENCE_ROWS))
        for layer in range(len(exact.params.branch_weights)):
            ending = replace(chunk, params=_doubled(exact.params, layer))
            for output in ending.call("forward", REFERENCE)():
                there = margin[start : start + REFERENCE_ROWS]
                torch.minimum(there, _smallest(output, KINKED[activation]), out=there)
    return margin


def tower_kink_margin(
    x: Tensor, scenario: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], activation: str = "relu"
) -> Tensor:
    """:func:`kink_margin` of towers as saml_kernels.grouped_mlp takes them, for every layer that is given."""
    margin = torch.full(scenario.shape, torch.inf, dtype=torch.float64, device=x.device)
    exact = [[tensor.detach().double() for tensor in tensors] for tensors in (weights, biases)]
    for layer in range(len(weights) if activation in KINKED else 0):
        ending = [[*tensors[:layer], torch.cat([tensors[layer], -tensors[layer]], -1)] for tensors in exact]
        output = grouped_mlp(x.detach().double(), scenario, *ending, activation=activation, backend="reference")
        margin = margin.minimum(_smallest(output, KINKED[activation]))
    return margin


def _doubled(params: TrunkParams, layer: int) -> TrunkParams:
    """The trunk that ends with a layer, without mutual unit there, and has that layer's opposite beside it.

    It returns [δ(z) ; δ(−z)], whose sum is |z| times one less the slope below 0.
    """

    def end(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [*tensors[:layer], torch.cat([tensors[layer], -tensors[layer]], -1)]

    branch, branch_biases, aux, aux_biases = (end(tensors) for tensors in params[:4])
    # The branch reads the auxiliary layer of its level, now twice as wide: nothing of the opposite.
    opposite = branch[-1].new_zeros(len(branch[-1]), params.aux_weights[layer].shape[1], branch[-1].shape[2])
    branch[-1] = torch.cat([branch[-1], opposite], 1)
    gates, gate_biases = ([*tensors[:layer], None] for tensors in params[4:])
    return TrunkParams(branch, branch_biases, aux, aux_biases, gates, gate_biases)


def _smallest(doubled: Tensor, slope: float) -> Tensor:
    """(B,) the smallest |z| of a row, from [δ(z) ; δ(−z)] (B, 2 d)."""
    positive, negative = doubled.chunk(2, dim=1)
    return (positive + negative).amin(1) / (1 - slope)
