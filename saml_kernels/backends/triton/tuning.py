"""Finds the fastest choice for a bucket by trying candidates, one of its three configurations at a time.

Trying them together would multiply their number. Every candidate is compared with the float64 reference before it is
timed. The clock is the caller's. Imports no Triton until a candidate runs.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from saml_kernels.backends.triton import availability, configs
from saml_kernels.backends.triton.configs import Bucket, Choice, Config
from saml_kernels.functional import multi_branch
from saml_kernels.types import TrunkOutput, TrunkParams

Call = Callable[[], object]
Timer = Callable[[Mapping[Choice, Call]], Mapping[Choice, float]]
"""Seconds of a call, for every contender. All have run before, and may be timed in turns."""
Report = Callable[[str], None]

FLOAT32_BOUND = 1e-5
TF32_BOUND = 2e-3
LOW_PRECISION_FACTOR = 2.0
KINK_MARGIN = 1e-4
"""No gradient passes through rows that have a relu's argument nearer to 0 than this."""
GATE_ROWS = 16384
"""So many rows at most are compared with the reference, whose float64 streams take twice as much memory and more."""


class TuningFailed(RuntimeError):
    """Not one candidate runs and is right; the message says why the last one does not."""


@dataclass(frozen=True)
class Shape:
    """What is timed: a trunk with a mutual unit after layer 1, relu, score "ratio", a vector gate, and one batch."""

    rows: int
    scenarios: int
    local_dim: int
    global_dim: int
    hidden_dims: tuple[int, ...]
    """d_1..d_L, and the auxiliary widths a_1..a_L as well."""
    dtype: torch.dtype
    device: torch.device

    @property
    def bucket(self) -> Bucket:
        """That the engine files its choice under."""
        return Bucket.of(self.rows, self.scenarios, max(self.hidden_dims))


@dataclass(frozen=True)
class Problem:
    """A batch, parameters, and cotangents ∂loss/∂own (B, d_L) and ∂loss/∂aux (B, a_L)."""

    x_local: Tensor
    x_global: Tensor
    scenario: Tensor
    params: TrunkParams
    cotangents: tuple[Tensor, Tensor]

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor that receives a gradient, with its name."""
        yield "x_local", self.x_local
        yield "x_global", self.x_global
        for name, tensors in self.params._asdict().items():
            for layer, tensor in enumerate(tensors, start=1):
                if tensor is not None:
                    yield f"{name}[{layer}]", tensor

    def to(self, dtype: torch.dtype, rows: int | None = None) -> "Problem":
        """The same values, of the first ``rows`` rows or all, as leaves of that type."""

        def leaf(tensor: Tensor) -> Tensor:
            return tensor.detach().to(dtype).requires_grad_()

        own, aux = (cotangent[:rows].to(dtype) for cotangent in self.cotangents)
        params = [[None if t is None else leaf(t) for t in tensors] for tensors in self.params]
        return Problem(
            leaf(self.x_local[:rows]),
            leaf(self.x_global[:rows]),
            self.scenario[:rows],
            TrunkParams(*params),  # type: ignore[arg-type]
            (own, aux),
        )

    def forward(self, backend: str) -> TrunkOutput:
        """In inference mode."""
        with torch.inference_mode():
            return self._output(backend)

    def step(self, backend: str) -> tuple[Tensor, ...]:
        """own, aux and the gradient of every tensor of :meth:`named`: a training step without an optimizer's part."""
        output = self._output(backend)
        leaves = [tensor for _, tensor in self.named()]
        return output.own, output.aux, *torch.autograd.grad([output.own, output.aux], leaves, self.cotangents)

    def results(self, backend: str) -> dict[str, Tensor]:
        """Everything that a backend computes, by name; gradients are "∂name"."""
        inference = self.forward(backend)
        names = ["own", "aux", *(f"∂{name}" for name, _ in self.named())]
        training = dict(zip(names, (tensor.detach() for tensor in self.step(backend)), strict=True))
        return {"own (inference)": inference.own, "aux (inference)": inference.aux} | training

    def _output(self, backend: str) -> TrunkOutput:
        return multi_branch(self.x_local, self.x_global, self.scenario, self.params, backend=backend)


def make(shape: Shape, seed: int = 0) -> Problem:
    """Random inputs of unit variance, weights that keep it, scenarios drawn uniformly; the same on every device.

    Biases have mean 0.5: the streams then point the same way, and the ratio of cosines is well conditioned.
    """
    generator = torch.Generator().manual_seed(seed)
    M, B, hidden = shape.scenarios, shape.rows, shape.hidden_dims

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator)

    def placed(tensor: Tensor) -> Tensor:
        return tensor.to(shape.device, shape.dtype).requires_grad_()

    def weight(*sizes: int) -> Tensor:
        return placed(normal(*sizes) / math.sqrt(max(sizes[-2], 1)))

    branch_inputs = [before + d for before, d in zip((shape.local_dim, *hidden), hidden, strict=False)]
    aux_inputs = (shape.global_dim, *hidden[:-1])
    first, *others = hidden
    params = TrunkParams(
        [weight(M, k, d) for k, d in zip(branch_inputs, hidden, strict=True)],
        [placed(0.5 + 0.3 * normal(M, d)) for d in hidden],
        [weight(k, d) for k, d in zip(aux_inputs, hidden, strict=True)],
        [placed(0.5 + 0.3 * normal(d)) for d in hidden],
        [weight(M, first, first), *(None for _ in others)],
        [placed(0.3 * normal(M, first)), *(None for _ in others)],
    )
    own, aux = (normal(B, hidden[-1]).to(shape.device, shape.dtype) for _ in range(2))
    return Problem(
        placed(normal(B, shape.local_dim)),
        placed(normal(B, shape.global_dim)),
        torch.randint(M, (B,), generator=generator).to(shape.device),
        params,
        (own, aux),
    )


def without_kinks(problem: Problem) -> Problem:
    """The problem with cotangents 0 in rows where rounding decides which side of 0 a relu's argument is on.

    There two correct computations differ by whole entries of a gradient.
    """
    exact = problem.to(torch.float64)
    near = torch.zeros_like(exact.scenario, dtype=torch.bool)
    for layer in range(len(exact.params.branch_weights)):
        # |z| = relu(z) + relu(-z): of the trunk that ends with the layer, and of one that has its opposite there.
        plain, branch, auxiliary = (
            replace(exact, params=_ending(exact.params, layer, *signs)).forward("reference")
            for signs in ((1.0, 1.0), (-1.0, 1.0), (1.0, -1.0))
        )
        for size in (plain.own + branch.own, plain.aux + auxiliary.aux):
            near |= (size < KINK_MARGIN).any(1)
    own, aux = (cotangent.masked_fill(near[:, None], 0.0) for cotangent in problem.cotangents)
    return replace(problem, cotangents=(own, aux))


def _ending(params: TrunkParams, layer: int, branch_sign: float, aux_sign: float) -> TrunkParams:
    """The trunk that ends with a layer, without mutual unit there, its weights and biases times the signs."""
    branch, branch_biases, aux, aux_biases = (
        [*tensors[:layer], sign * tensors[layer]]
        for tensors, sign in zip(params[:4], (branch_sign, branch_sign, aux_sign, aux_sign), strict=True)
    )
    gates, gate_biases = ([*tensors[:layer], None] for tensors in params[4:])
    return TrunkParams(branch, branch_biases, aux, aux_biases, gates, gate_biases)


class Gate:
    """Whether a choice's numbers are right: ‖out − ref‖ / ‖ref‖ of outputs and gradients against float64.

    The bound is 1e-5 in float32. With tf32 it is 2e-3, or twice the error of the reference backend in float32 where
    that is more; in bfloat16 and float16 twice the error of the reference backend in that type.
    """

    def __init__(self, problem: Problem) -> None:
        dtype = problem.x_local.dtype
        self._problem = without_kinks(problem.to(dtype, GATE_ROWS))
        self._exact = self._problem.to(torch.float64).results("reference")
        tf32 = problem.x_local.is_cuda and torch.backends.cuda.matmul.allow_tf32
        if dtype == torch.float32 and not tf32:
            self._bounds = dict.fromkeys(self._exact, FLOAT32_BOUND)
        else:
            floor = TF32_BOUND if dtype == torch.float32 else 0.0
            plain = self._errors(self._problem.results("reference"))
            self._bounds = {name: max(floor, LOW_PRECISION_FACTOR * error) for name, error in plain.items()}
        self._failures: dict[Choice, str | None] = {}

    def failure(self, choice: Choice) -> str | None:
        """None if the choice runs and is right, else one line. Never raises for its errors."""
        if choice not in self._failures:
            try:
                with configs.forced(choice):
                    errors = self._errors(self._problem.results("triton"))
            except Exception as error:  # Triton's compiler raises many kinds, and so does a launch.
                self._failures[choice] = one_line(error)
            else:
                # Not ">": an error may be NaN.
                wrong = [name for name, error in errors.items() if not error <= self._bounds[name]]
                lines = (f"relative error of {n} is {errors[n]:.1e}, bound {self._bounds[n]:.1e}" for n in wrong)
                self._failures[choice] = f"wrong: {next(lines)}" if wrong else None
        return self._failures[choice]

    def _errors(self, results: Mapping[str, Tensor]) -> dict[str, float]:
        return {name: _relative_error(results[name], reference) for name, reference in self._exact.items()}


def _relative_error(out: Tensor, reference: Tensor) -> float:
    return float((out.double() - reference).norm() / (reference.norm() or 1.0))


def one_line(error: BaseException) -> str:
    """Kind and first line of an error."""
    lines = [line.strip(" :") for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@dataclass(frozen=True)
class Seconds:
    """Of a call, with the built-in choice and with the one that tuning made, timed together."""

    built_in: float
    tuned: float

    @property
    def ratio(self) -> float:
        """How many times as fast the tuned one is."""
        return self.built_in / self.tuned


@dataclass(frozen=True)
class Tuned:
    """What tuning found and where it was written."""

    key: str
    path: Path
    choice: Choice
    built_in: Choice
    forward: Seconds | None
    """Inference. None where the built-in choice is kept, or does not run."""
    step: Seconds | None
    """Forward and backward."""


def tune(shape: Shape, timer: Timer, report: Report = lambda line: None, path: Path | None = None) -> Tuned:
    """Times candidates for the shape's bucket, and writes the fastest choice.

    Forward configurations, in both schedules, are timed in inference, those of backward and weight gradients in a
    training step, each with the others as built in. What was chosen is then timed against the built-in choice, and is
    kept only if forward and step together take less time: three winners need not win together.

    Args:
        shape: float32, bfloat16 or float16, on a device that the Triton backend supports.
        timer: seconds of every contender.
        report: receives a line for every stage and for every candidate that is skipped.
        path: the file to add the choice to; None: :func:`configs.cache_path`.

    Raises:
        TuningFailed: no candidate runs and is right.
        ValueError: the file is there and does not hold choices; nothing was timed.
        OSError: the file cannot be read or written.
    """
    path = configs.cache_path() if path is None else path
    configs.forget()
    configs.tuned(path)
    problem = make(shape)
    gate = Gate(problem)
    built_in = _built_in(shape)
    others = configs.candidates(shape.dtype.itemsize)

    def forward() -> object:
        return problem.forward("triton")

    def step() -> object:
        return problem.step("triton")

    trials = [
        replace(built_in, schedule=schedule, forward=config) for config in others for schedule in configs.SCHEDULES
    ]
    best = _fastest("forward", trials, built_in, forward, gate, timer, report)
    # Where the built-in forward does not run here, nothing could be timed with it.
    base = built_in if gate.failure(built_in) is None else best
    backward = _fastest("backward", [replace(base, backward=c) for c in others], base, step, gate, timer, report)
    weights = _fastest("weights", [replace(base, weights=c) for c in others], base, step, gate, timer, report)
    choice = Choice(best.schedule, best.forward, backward.backward, weights.weights)
    forward_seconds = step_seconds = None
    if choice != base and (failure := gate.failure(choice)) is not None:
        report(f"the three together: {failure}")
        choice = base
    if choice != built_in and gate.failure(built_in) is None:
        forward_seconds, step_seconds = (
            Seconds(seconds[built_in], seconds[choice])
            for seconds in (_time([built_in, choice], call, timer) for call in (forward, step))
        )
        if forward_seconds.tuned + step_seconds.tuned >= forward_seconds.built_in + step_seconds.built_in:
            report("the three together are not faster than the built-in choice")
            choice, forward_seconds, step_seconds = built_in, None, None
    key = configs.key(configs.device_name(shape.device), shape.dtype, shape.bucket)
    # Another process may have added to the file meanwhile.
    configs.forget()
    configs.save(path, {key: choice})
    return Tuned(key, path, choice, built_in, forward_seconds, step_seconds)


def _built_in(shape: Shape) -> Choice:
    if availability.INTERPRETED:
        return configs.choice(shape.rows, shape.scenarios, max(shape.hidden_dims), shape.dtype, shape.device)
    return configs.built_in(shape.bucket, shape.dtype.itemsize, torch.version.hip is not None)


def _fastest(
    stage: str, trials: Sequence[Choice], base: Choice, call: Call, gate: Gate, timer: Timer, report: Report
) -> Choice:
    contenders: list[Choice] = []
    failure = None
    for trial in dict.fromkeys((base, *trials)):
        failure = gate.failure(trial)
        if failure is None:
            contenders.append(trial)
        else:
            report(f"{stage}: skipped {describe(trial, stage)}: {failure}")
    if not contenders:
        raise TuningFailed(f"no candidate for {stage} can be used; the last one: {failure}")
    seconds = _time(contenders, call, timer)
    fastest = min(contenders, key=lambda choice: seconds[choice])
    found = f"fastest {describe(fastest, stage)} with {1e3 * seconds[fastest]:.3f} ms"
    report(f"{stage}: {len(contenders)} candidates, {found}")
    return fastest


def _time(contenders: Sequence[Choice], call: Call, timer: Timer) -> Mapping[Choice, float]:
    def forced(choice: Choice) -> Call:
        def run() -> object:
            with configs.forced(choice):
                return call()

        return run

    return timer({choice: forced(choice) for choice in contenders})


def describe(choice: Choice, stage: str) -> str:
    """A configuration of a choice, and of a forward the schedule too, for a person."""
    config: Config = getattr(choice, stage)
    schedule = f"{choice.schedule} " if stage == "forward" else ""
    tiles = f"{config.block_m}x{config.block_n}x{config.block_k}"
    return f"{schedule}{tiles}, {config.num_warps} warps, {config.num_stages} stages, {config.programs} programs"
