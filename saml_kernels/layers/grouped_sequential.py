"""Towers per scenario with batch norms, dropout and activations that the kernels lack between their products."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saml_kernels import activations, checks, functional, tracing
from saml_kernels.layers.common import Layer, check_ids, describe, entries, reset_children, scenario_moments
from saml_kernels.layers.convert import (
    Entry,
    Tower,
    as_new,
    freeze_as,
    is_activation,
    linear_entries,
    read_towers,
    state_of,
)
from saml_kernels.layers.grouped_mlp import GroupedMLP


class GroupedBatchNorm(Layer):
    """M nn.BatchNorm1d, each row through that of its scenario.

    Training: (x − μ_t)/√(σ_t² + ε) γ_t + β_t, μ_t and σ_t² over the batch's rows of scenario t, whose moving statistics
    move by the momentum; those of a scenario without a row stay as they are. Evaluation: by the moving statistics.
    :class:`PartitionedNorm` is STAR's, with shared factors, and takes scenarios with one row.

    Args:
        num_scenarios: M.
        dim: width of x.
        eps: ε.
        momentum: as of nn.BatchNorm1d; None: moving statistics are the mean over all batches.
        affine: whether there are γ and β.
        track_running_stats: whether there are moving statistics; False: evaluation normalises by the batch too.
        bias: whether there is β with ``affine``.
        device, dtype: of parameters and moving statistics.

    Raises:
        TypeError, ValueError: options and sizes that cannot be used.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        num_scenarios: int,
        dim: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_scenarios = checks.check_integer("num_scenarios", num_scenarios, 1)
        self.dim = checks.check_integer("dim", dim, 1)
        self.eps = checks.check_positive("eps", eps)
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track_running_stats

        def full(value: float, wanted: bool) -> Tensor | None:
            shape = self.num_scenarios, self.dim
            return torch.full(shape, value, device=device, dtype=dtype) if wanted else None

        for name, value, wanted in (("weight", 1.0, affine), ("bias", 0.0, affine and bias)):
            start = full(value, wanted)
            self.register_parameter(name, None if start is None else nn.Parameter(start))
        self.register_buffer("running_mean", full(0.0, track_running_stats))
        self.register_buffer("running_var", full(1.0, track_running_stats))
        counts = torch.zeros(self.num_scenarios, device=device, dtype=torch.int64) if track_running_stats else None
        self.register_buffer("num_batches_tracked", counts)

    def reset_parameters(self) -> None:
        """Scales, shifts and moving statistics as of a new layer."""
        for ones in (self.weight, self.running_var):
            if ones is not None:
                nn.init.ones_(ones)
        for zeros in (self.bias, self.running_mean, self.num_batches_tracked):
            if zeros is not None:
                nn.init.zeros_(zeros)

    @property
    def reads_moving_statistics(self) -> bool:
        """Whether a row's output is its own affine function: in evaluation, with moving statistics."""
        return not self.training and self.running_mean is not None

    def forward(self, x: Tensor, scenario: Tensor) -> Tensor:
        """x (B, dim), scenario (B,) → (B, dim).

        Raises:
            TypeError, ValueError: shapes and types that do not fit; a scenario that has one row where statistics are
                the batch's, as nn.BatchNorm1d (on a GPU a device assertion, so that the call need not wait for it).
        """
        t = check_ids(scenario, self.num_scenarios)
        checks.check_shape("x", x, ("B", self.dim))
        checks.check_shape("scenario", t, (x.shape[0],), " as x has B = {} rows", x.shape[0])
        # As nn.BatchNorm1d: in bfloat16 a count stops at 256.
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.reads_moving_statistics:
            return self.affine_map().of(x, t)
        count, mean, variance = scenario_moments(wide, t, self.num_scenarios)
        self._require_rows(count)
        if self.training and self.track_running_stats:
            self._move(count, mean, variance)
        normalised = (wide - mean.index_select(0, t)) * torch.rsqrt(variance + self.eps).index_select(0, t)
        return _scaled(normalised, self.weight, self.bias, t).to(x.dtype)

    if TYPE_CHECKING:
        __call__ = forward

    def affine_map(self) -> "Affine":
        """Evaluation by moving statistics, as x ∘ scale_t + shift_t."""
        assert self.running_mean is not None
        assert self.running_var is not None
        wide = torch.promote_types(self.running_var.dtype, torch.float32)
        scale = torch.rsqrt(self.running_var.to(wide) + self.eps)
        if self.weight is not None:
            scale = scale * self.weight
        shift = -self.running_mean * scale
        return Affine(scale, shift if self.bias is None else shift + self.bias)

    def tower(self, index: int, x: Tensor) -> Tensor:
        """The batch norm of scenario ``index`` on all rows: x (N, dim) or (N, dim, L), as nn.BatchNorm1d."""
        if x.dim() not in (2, 3):
            raise ValueError(f"x must have shape (N, {self.dim}) or (N, {self.dim}, L), got {tuple(x.shape)}")
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked[index] += 1
            if self.momentum is None:
                momentum = 1 / float(self.num_batches_tracked[index])
        mean, variance, weight, bias = (
            None if each is None else each[index]
            for each in (self.running_mean, self.running_var, self.weight, self.bias)
        )
        return F.batch_norm(x, mean, variance, weight, bias, not self.reads_moving_statistics, momentum, self.eps)

    def _require_rows(self, count: Tensor) -> None:
        enough = count != 1
        if count.device.type != "cpu" or torch.compiler.is_compiling():
            torch._assert_async(enough.all(), "a scenario has one row in the batch, batch norm in training needs two")
        elif tracing.holds_numbers(count) and not bool(enough.all()):
            raise ValueError(
                f"scenario {int(enough.logical_not().nonzero()[0, 0])} has one row in the batch: batch norm in "
                "training needs at least two of a scenario, or none"
            )

    @torch.no_grad()
    def _move(self, count: Tensor, mean: Tensor, variance: Tensor) -> None:
        """Moving statistics of the scenarios in the batch; of the variance the unbiased one, as nn.BatchNorm1d."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        is_here = count > 0
        self.num_batches_tracked.add_(is_here.squeeze(1))
        share: Tensor | float
        if self.momentum is None:
            share = 1 / self.num_batches_tracked.clamp(min=1).to(count.dtype).unsqueeze(1)
        else:
            share = self.momentum
        unbiased = variance * count / (count - 1).clamp(min=1)
        for kept, value in ((self.running_mean, mean), (self.running_var, unbiased)):
            moved = kept.to(value.dtype) * (1 - share) + value * share
            kept.copy_(torch.where(is_here, moved, kept.to(value.dtype)))

    def extra_repr(self) -> str:
        return describe(self, "num_scenarios dim eps momentum affine track_running_stats")


def _scaled(x: Tensor, scale: Tensor | None, shift: Tensor | None, t: Tensor) -> Tensor:
    if scale is not None:
        x = x * scale.index_select(0, t)
    return x if shift is None else x + shift.index_select(0, t)


@dataclass(frozen=True)
class Affine:
    """x ∘ scale_t + shift_t; both (M, d)."""

    scale: Tensor
    shift: Tensor

    def of(self, x: Tensor, t: Tensor) -> Tensor:
        """x (B, d), t (B,) → (B, d)."""
        return _scaled(x, self.scale, self.shift, t).to(x.dtype)


@dataclass(frozen=True)
class _Product:
    """δ(x W_t + b_t): W (M, inputs, outputs), b (M, outputs)."""

    weight: Tensor
    bias: Tensor
    activation: str
    backend: str

    def before(self, affine: Affine) -> "_Product":
        """The product, and then the affine map."""
        weight = self.weight * affine.scale.unsqueeze(1)
        return self._like(weight, self.bias * affine.scale + affine.shift)

    def after(self, affine: Affine) -> "_Product":
        """The affine map, and then the product."""
        shift = torch.bmm(affine.shift.to(self.weight.dtype).unsqueeze(1), self.weight).squeeze(1)
        return self._like(self.weight * affine.scale.unsqueeze(2), self.bias + shift)

    def _like(self, weight: Tensor, bias: Tensor) -> "_Product":
        return replace(self, weight=weight.to(self.weight.dtype), bias=bias.to(self.bias.dtype))


_Piece = Affine | _Product | nn.Module


class GroupedSequential(Layer):
    """Steps one after the other, those of scenario t for a row of scenario t; few launches of the kernels.

    Products in a row that have one activation between them are one call of :func:`saml_kernels.grouped_mlp`. A batch
    norm in evaluation is folded into the product before or after it, and dropout in evaluation is left out, so that
    towers of nn.Linear, batch norm, an activation of the kernels and dropout are one call there.

    Args:
        steps: :class:`GroupedMLP`, :class:`GroupedBatchNorm`, nn.Dropout and activations that work number by number.

    Raises:
        TypeError: another module.
        ValueError: no :class:`GroupedMLP`; steps for different numbers of scenarios.
    """

    def __init__(self, *steps: nn.Module) -> None:
        super().__init__()
        by_scenario = [step for step in steps if isinstance(step, GroupedMLP | GroupedBatchNorm)]
        for place, step in enumerate(steps):
            if step not in by_scenario and type(step) is not nn.Dropout and not is_activation(step):
                raise TypeError(
                    f"step {place} must be a GroupedMLP, GroupedBatchNorm, nn.Dropout or a known activation, got {step}"
                )
        if not any(isinstance(step, GroupedMLP) for step in steps):
            raise ValueError("steps must hold at least one GroupedMLP")
        counts = {step.num_scenarios for step in by_scenario}
        if len(counts) > 1:
            raise ValueError(f"steps must be for one number of scenarios, got {', '.join(map(str, sorted(counts)))}")
        self.num_scenarios = counts.pop()
        self.steps = nn.ModuleList(steps)

    def reset_parameters(self) -> None:
        """Fresh parameters and moving statistics of every step, from torch's global generator."""
        reset_children(self)

    def forward(self, x: Tensor, scenario: Tensor) -> Tensor:
        """x (B, d_0), scenario (B,) → (B, d_L). TypeError, ValueError, BackendUnavailable: as its steps."""
        t = check_ids(scenario, self.num_scenarios)
        for run in _runs(self._pieces()):
            first = run[0]
            if isinstance(first, _Product):
                x = functional.grouped_mlp(
                    x,
                    t,
                    [product.weight for product in run],
                    [product.bias for product in run],
                    activation=first.activation,
                    output_activation=run[-1].activation,
                    backend=first.backend,
                )
            elif isinstance(first, Affine):
                x = first.of(x, t)
            elif isinstance(first, GroupedBatchNorm):
                x = first(x, t)
            else:
                x = first(x)
        return x

    if TYPE_CHECKING:
        __call__ = forward

    def _pieces(self) -> list[_Piece]:
        """The steps that do something in the present mode, batch norms folded where they can be."""
        pieces: list[_Piece] = []
        for step in self.steps:
            last = pieces[-1] if pieces else None
            linear = last if isinstance(last, _Product) and last.activation == "identity" else None
            if isinstance(step, GroupedMLP):
                layers = zip(entries(step.weights), step.all_biases(), step.layer_activations, strict=True)
                products = [_Product(*layer, step.backend) for layer in layers]
                if isinstance(last, Affine):
                    pieces.pop()
                    products[0] = products[0].after(last)
                pieces += products
            elif isinstance(step, GroupedBatchNorm) and step.reads_moving_statistics:
                affine = step.affine_map()
                if linear is None:
                    pieces.append(affine)
                else:
                    pieces[-1] = linear.before(affine)
            elif isinstance(step, nn.Dropout) and (not step.training or step.p == 0):
                continue
            elif linear is not None and (name := activations.name_of(step)) is not None:
                pieces[-1] = replace(linear, activation=name)
            else:
                pieces.append(step)
        return pieces

    def tower(self, index: int, x: Tensor) -> Tensor:
        """Tower ``index`` on all rows, as nn.Linear, nn.BatchNorm1d and so on compute it: x (..., d_0) → (..., d_L)."""
        for step in self.steps:
            x = step.tower(index, x) if isinstance(step, GroupedMLP | GroupedBatchNorm) else step(x)
        return x

    @classmethod
    def from_towers(cls, towers: Iterable[nn.Module], backend: str = "auto") -> "GroupedSequential":
        """The same function as a list of towers, tower k serving scenario k; parameters and statistics are copied.

        Args:
            towers: nn.Sequential, or modules whose forward runs others one after the other, all alike, of nn.Linear
                with bias or without, nn.BatchNorm1d, nn.Dropout and activations: those of the kernels, and any of
                nn.GELU, nn.Sigmoid, nn.LeakyReLU, nn.ELU, nn.SELU, nn.Softplus, nn.Mish, nn.Hardswish, nn.LogSigmoid
                and nn.ReLU6. What is frozen, or in evaluation mode, in all stays so.
            backend: as of :class:`GroupedMLP`.

        Raises:
            TypeError, ValueError: towers that are not of this kind, with what stands in the way.
        """
        modules = list(towers)
        first = read_towers(modules)[0]
        layer = cls(*(_step_like(step.module, len(modules), backend) for step in first.steps))
        entries = sequential_entries(first)
        layer.load_state_dict(state_of(entries, [tower.state_dict() for tower in modules]))
        freeze_as(layer, entries, modules[0])
        layer.train(modules[0].training)
        for step, like in zip(layer.steps, first.steps, strict=True):
            step.train(like.module.training)
        return layer

    def to_towers(self) -> nn.ModuleList:
        """The same function as M nn.Sequential of torch's modules; parameters and statistics are copied."""
        parts = [_towers_of(step, self.num_scenarios) for step in self.steps]
        towers = nn.ModuleList(
            nn.Sequential(*(module for part in each for module in part)) for each in zip(*parts, strict=True)
        )
        return towers.train(self.training)


def _runs(pieces: Iterable[_Piece]) -> Iterator[list[Any]]:
    """Pieces one by one, products that are one call together: the same activation after all but the last."""
    run: list[Any] = []
    for piece in pieces:
        joins = (
            run
            and isinstance(piece, _Product)
            and isinstance(run[-1], _Product)
            and run[-1].backend == piece.backend
            and run[-1].activation == run[0].activation
        )
        if run and not joins:
            yield run
            run = []
        run.append(piece)
    if run:
        yield run


def _step_like(module: nn.Module, num_scenarios: int, backend: str) -> nn.Module:
    """The step that is M modules like this one."""
    if isinstance(module, nn.Linear):
        weight = module.weight
        return GroupedMLP(
            num_scenarios,
            module.in_features,
            (module.out_features,),
            "identity",
            backend=backend,
            device=weight.device,
            dtype=weight.dtype,
            bias=module.bias is not None,
        )
    if isinstance(module, nn.BatchNorm1d):
        like = module.weight if module.running_mean is None else module.running_mean
        return GroupedBatchNorm(
            num_scenarios,
            module.num_features,
            module.eps,
            module.momentum,
            module.affine,
            module.track_running_stats,
            bias=module.bias is not None,
            device=None if like is None else like.device,
            dtype=None if like is None else like.dtype,
        )
    return nn.Dropout(module.p) if isinstance(module, nn.Dropout) else as_new(module)


def _towers_of(step: nn.Module, num_scenarios: int) -> list[list[nn.Module]]:
    """For every scenario the modules that are a step."""
    if isinstance(step, GroupedMLP):
        return [list(tower.children()) for tower in step.to_towers()]
    if not isinstance(step, GroupedBatchNorm):
        return [[nn.Dropout(step.p) if isinstance(step, nn.Dropout) else as_new(step)] for _ in range(num_scenarios)]
    norms: list[list[nn.Module]] = []
    for k in range(num_scenarios):
        norm = nn.BatchNorm1d(step.dim, step.eps, step.momentum, step.affine, step.track_running_stats)
        state = step.state_dict()
        if step.affine and step.bias is None:
            norm.register_parameter("bias", None)
        if state:
            norm.to(next(iter(state.values())))
        norm.load_state_dict({name: tensor[k] for name, tensor in state.items()})
        norms.append([norm])
    return norms


NORM_STATE = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def sequential_entries(tower: Tower) -> list[Entry]:
    """Of a :class:`GroupedSequential` whose steps are the tower's."""
    entries = []
    for place, step in enumerate(tower.steps):
        if isinstance(step.module, nn.Linear):
            own = linear_entries(Tower(tower.name, (step,)))
            entries += [replace(entry, name=f"steps.{place}.{entry.name}") for entry in own]
        elif isinstance(step.module, nn.BatchNorm1d):
            names = [name for name in NORM_STATE if getattr(step.module, name) is not None]
            entries += [Entry(f"steps.{place}.{name}", f"{step.path}{name}") for name in names]
    return entries
