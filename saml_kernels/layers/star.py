"""STAR's layers (arXiv 2101.11427): a shared network times one per scenario, and normalisation by scenario."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from saml_kernels import autocast, checks, functional
from saml_kernels.activations import ACTIVATIONS
from saml_kernels.layers.common import (
    Layer,
    check_ids,
    check_options,
    check_widths,
    describe,
    entries,
    init_linear,
    scenario_moments,
)

COMBINATIONS = ("product", "sum")


class STARMLP(Layer):
    """Layers out = δ(in W*_t + b*_t) with W*_t = W_t ∘ W_shared and b*_t = b_t + b_shared: the star topology.

    The shared network starts as nn.Linear does, the scenarios' at W_t = 1 and b_t = 0: all scenarios start alike.

    Args:
        num_scenarios: M.
        in_dim: d_0; 0 is allowed.
        hidden_dims: d_1..d_L.
        activation: after every layer.
        output_activation: after the last layer; None: the same. "identity" gives logits.
        backend: as :func:`saml_kernels.grouped_mlp`.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: options and sizes that cannot be used.
    """

    def __init__(
        self,
        num_scenarios: int,
        in_dim: int,
        hidden_dims: Sequence[int],
        activation: str = "relu",
        output_activation: str | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_scenarios = checks.check_integer("num_scenarios", num_scenarios, 1)
        in_dim = checks.check_integer("in_dim", in_dim, 0)
        hidden_dims = check_widths("hidden_dims", hidden_dims)
        check_options(activation, backend)
        if output_activation is not None:
            checks.check_choice("output_activation", output_activation, ACTIVATIONS)
        self.num_scenarios = num_scenarios
        self.in_dim = in_dim
        self.hidden_dims = hidden_dims
        self.activation = activation
        self.output_activation = output_activation
        self.backend = backend

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        shapes = list(zip((in_dim, *hidden_dims), hidden_dims, strict=False))
        self.shared_weights = nn.ParameterList(empty(rows, columns) for rows, columns in shapes)
        self.shared_biases = nn.ParameterList(empty(d) for d in hidden_dims)
        self.weights = nn.ParameterList(empty(num_scenarios, rows, columns) for rows, columns in shapes)
        self.biases = nn.ParameterList(empty(num_scenarios, d) for d in hidden_dims)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fresh weights, from torch's global generator."""
        for shared_weight, shared_bias in zip(self.shared_weights, self.shared_biases, strict=True):
            init_linear(shared_weight, shared_bias)
        for weight, bias in zip(self.weights, self.biases, strict=True):
            nn.init.ones_(weight)
            nn.init.zeros_(bias)

    def forward(self, x: Tensor, scenario: Tensor) -> Tensor:
        """x (B, d_0), scenario (B,) → (B, d_L)."""
        own_biases = entries(self.biases)
        biases = [own + shared for own, shared in zip(own_biases, entries(self.shared_biases), strict=True)]
        return functional.grouped_mlp(
            x,
            scenario,
            entries(self.weights),
            biases,
            shared_weights=entries(self.shared_weights),
            activation=self.activation,
            output_activation=self.output_activation,
            backend=self.backend,
        )

    if TYPE_CHECKING:
        __call__ = forward

    def extra_repr(self) -> str:
        return describe(self, "num_scenarios in_dim hidden_dims activation output_activation backend")


class PartitionedNorm(Layer):
    """Batch normalisation with every scenario's own statistics, on mixed-scenario batches.

    Training: (γ·γ_t) (z − μ_t)/√(σ_t² + ε) + (β + β_t), μ_t and σ_t² over the batch's rows of scenario t; evaluation:
    that scenario's moving statistics, so that a row never depends on its neighbours. A scenario with fewer than two
    rows in a batch has no variance there: its rows are normalised by its moving statistics, which stay as they are.

    The moving statistics are the mean over the first 1/momentum batches that have two rows of the scenario, and from
    then on move by the momentum: none of what they start from, mean 0 and variance 1, is left after the first batch.

    Args:
        num_scenarios: M.
        dim: width of z.
        eps: ε.
        momentum: share of a batch's statistics in the moving ones, at least; as nn.BatchNorm1d, with the unbiased
            variance.
        combine: "product" (the paper's γ·γ_t) or "sum" (γ + γ_t, γ_t starting at 0).
        device, dtype: of parameters and moving statistics.

    Raises:
        TypeError, ValueError: options and sizes that cannot be used.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_scenarios: int,
        dim: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        combine: str = "product",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_scenarios = checks.check_integer("num_scenarios", num_scenarios, 1)
        dim = checks.check_integer("dim", dim, 1)
        eps = checks.check_positive("eps", eps)
        momentum = checks.check_positive("momentum", momentum)
        if momentum > 1:
            raise ValueError(f"momentum must be at most 1, got {momentum}")
        checks.check_choice("combine", combine, COMBINATIONS)
        self.num_scenarios = num_scenarios
        self.dim = dim
        self.eps = eps
        self.momentum = momentum
        self.combine = combine

        def full(value: float, *shape: int) -> Tensor:
            return torch.full(shape, value, device=device, dtype=dtype)

        self.shared_weight = nn.Parameter(full(1.0, dim))
        self.shared_bias = nn.Parameter(full(0.0, dim))
        self.weight = nn.Parameter(full(1.0 if combine == "product" else 0.0, num_scenarios, dim))
        self.bias = nn.Parameter(full(0.0, num_scenarios, dim))
        self.register_buffer("running_mean", full(0.0, num_scenarios, dim))
        self.register_buffer("running_var", full(1.0, num_scenarios, dim))
        self.register_buffer("num_batches_tracked", torch.zeros(num_scenarios, device=device, dtype=torch.int64))

    def reset_parameters(self) -> None:
        """Scales, shifts and moving statistics as of a new layer."""
        nn.init.ones_(self.shared_weight)
        nn.init.constant_(self.weight, 1.0 if self.combine == "product" else 0.0)
        for zeros in (self.shared_bias, self.bias, self.running_mean, self.num_batches_tracked):
            nn.init.zeros_(zeros)
        nn.init.ones_(self.running_var)

    def forward(self, z: Tensor, scenario: Tensor) -> Tensor:
        """z (B, dim), scenario (B,) → (B, dim). TypeError, ValueError for anything else and ids out of range."""
        scenario = checks.scenario_ids(scenario)
        if autocast.is_on(autocast.device_type(z)):
            # What a product before this layer gave is in the autocast type then.
            z = z.to(self.weight.dtype)
        checks.check_same_kind({"z": z, "weight": self.weight}, scenario)
        checks.check_shape("z", z, ("B", self.dim))
        checks.check_shape("scenario", scenario, (z.shape[0],), " as z has B = {} rows", z.shape[0])
        t = check_ids(scenario, self.num_scenarios).long()
        # As nn.BatchNorm1d: in bfloat16 a count stops at 256.
        wide = z.to(torch.promote_types(z.dtype, torch.float32))
        mean, variance = self.running_mean.to(wide.dtype), self.running_var.to(wide.dtype)
        if self.training:
            mean, variance = self._batch_statistics(wide, t, mean, variance)
        normalised = (wide - mean[t]) * torch.rsqrt(variance[t] + self.eps)
        scale = self.weight * self.shared_weight if self.combine == "product" else self.weight + self.shared_weight
        return (normalised * scale[t] + (self.bias + self.shared_bias)[t]).to(z.dtype)

    if TYPE_CHECKING:
        __call__ = forward

    def _batch_statistics(
        self, z: Tensor, t: Tensor, moving_mean: Tensor, moving_variance: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(M, dim) each, the moving ones where a scenario has fewer than two rows; updates the moving ones."""
        count, mean, variance = scenario_moments(z, t, self.num_scenarios)
        known = count >= 2
        with torch.no_grad():
            unbiased = variance * count / (count - 1).clamp(min=1)
            self.num_batches_tracked.add_(known.squeeze(1))
            share = (1 / self.num_batches_tracked.clamp(min=1).to(z.dtype)).clamp(min=self.momentum).unsqueeze(1)
            for kept, moving, value in (
                (self.running_mean, moving_mean, mean),
                (self.running_var, moving_variance, unbiased),
            ):
                kept.copy_(torch.where(known, torch.lerp(moving, value, share), moving))
        return torch.where(known, mean, moving_mean), torch.where(known, variance, moving_variance)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        key = f"{prefix}num_batches_tracked"
        if key not in state_dict:
            # Saved before batches were counted: its statistics have moved by the momentum, and go on so.
            state_dict[key] = torch.full_like(self.num_batches_tracked, math.ceil(1 / self.momentum))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        return describe(self, "num_scenarios dim eps momentum combine")
