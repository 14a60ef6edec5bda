"""No figure without a green gate: every contender against the float64 reference on the same inputs first.

The error of a tensor is ‖out − ref‖ / ‖ref‖, for own, aux (in inference and in training) and every gradient. Its bound:

    float32                             1e−5
    float32, foreign streams rounded    against the reference that rounds the same way: 1e−5, or twice the error of
                                        backend "reference" in float32 where that is more
    bfloat16                            twice the error of the plain formulation (peer all_towers) in bfloat16
    float32 on a GPU with tf32          2e−3, or twice the error of the plain formulation where that is more
"""

from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

import workload
from contenders import Contender, forward_call, step_call
from peers import Trunk
from workload import Problem

FLOAT32_BOUND = 1e-5
TF32_BOUND = 2e-3
LOW_PRECISION_FACTOR = 2.0


@dataclass
class Verdict:
    """What the gate found."""

    errors: dict[str, float] = field(default_factory=dict)
    """Per tensor."""
    bounds: dict[str, float] = field(default_factory=dict)
    """Per tensor."""
    distance: float | None = None
    """Error of own against the reference without rounding of foreign streams; None where nothing is rounded."""
    failure: str | None = None
    """None, or one line: why there is no figure."""


class Gate:
    """The gate of one batch. References and yardsticks are computed when first needed, then kept."""

    def __init__(self, problem: Problem) -> None:
        self.problems = cache(problem.to)
        self.reference = cache(self._reference)
        self.bounds = cache(self._bounds)

    def judge(self, contender: Contender, function: Trunk) -> Verdict:
        """Runs ``function`` for the first time, so that it is also compiled afterwards. Never raises for its errors."""
        try:
            results = evaluate(function, self.problems(contender.dtype))
        except Exception as error:
            lines = [line.strip(" :") for line in str(error).splitlines() if line.strip()] or ["no message"]
            return Verdict(failure=f"{type(error).__name__}: {lines[0]}")
        return self.compare(contender, results)

    def compare(self, contender: Contender, results: dict[str, Tensor]) -> Verdict:
        """On results that are there already, as :func:`evaluate` names them."""
        bounds = self.bounds(contender.dtype, contender.foreign_dtype)
        errors = relative_errors(results, self.reference(contender.dtype, contender.foreign_dtype))
        wrong = {name: error for name, error in errors.items() if not error <= bounds[name]}
        verdict = Verdict(errors, bounds)
        if contender.foreign_dtype is not None:
            verdict.distance = relative_error(results["own"], self.reference(contender.dtype, None)["own"])
        if wrong:
            name = max(wrong, key=lambda tensor: wrong[tensor] / bounds[tensor])
            verdict.failure = f"wrong: relative error of {name} is {wrong[name]:.1e}, bound {bounds[name]:.1e}"
        return verdict

    def _reference(self, dtype: torch.dtype, foreign_dtype: torch.dtype | None) -> dict[str, Tensor]:
        results = workload.reference(self.problems(dtype), foreign_dtype)
        return results | {f"{name} (inference)": results[name] for name in ("own", "aux")}

    def _bounds(self, dtype: torch.dtype, foreign_dtype: torch.dtype | None) -> dict[str, float]:
        reference = self.reference(dtype, foreign_dtype)
        tf32 = self.problems(dtype).x_local.is_cuda and torch.backends.cuda.matmul.allow_tf32
        if dtype == torch.float32 and foreign_dtype is None and not tf32:
            return dict.fromkeys(reference, FLOAT32_BOUND)
        yardstick = Contender("reference" if foreign_dtype else "all_towers", dtype=dtype, foreign_dtype=foreign_dtype)
        errors = relative_errors(evaluate(yardstick.function(), self.problems(dtype)), reference)
        floor = 0.0 if dtype != torch.float32 else TF32_BOUND if tf32 else FLOAT32_BOUND
        return {name: max(floor, LOW_PRECISION_FACTOR * error) for name, error in errors.items()}


def evaluate(function: Trunk, problem: Problem) -> dict[str, Tensor]:
    """own and aux in inference and in training, and every gradient "∂name"."""
    inference = forward_call(function, problem)()
    training = step_call(function, problem)()
    results = {
        **dict(zip(("own (inference)", "aux (inference)"), inference, strict=True)),  # type: ignore[call-overload]
        **dict(zip(("own", "aux"), training, strict=True)),  # type: ignore[call-overload]
    }
    for name, tensor in problem.named():
        results[f"∂{name}"] = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
    return {name: tensor.detach() for name, tensor in results.items()}


def relative_errors(results: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, float]:
    """Per tensor of the reference."""
    return {name: relative_error(results[name], tensor) for name, tensor in reference.items()}


def relative_error(out: Tensor, ref: Tensor) -> float:
    """‖out − ref‖ / ‖ref‖ in float64; ‖out‖ where the reference is zero."""
    return float((out.double() - ref).norm() / (ref.norm() or 1.0))
