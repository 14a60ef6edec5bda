"""SAML's trunk and the mutual unit alone, as layers."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor, nn

from saml_kernels import checks, functional
from saml_kernels.layers.common import (
    STARTS,
    Layer,
    check_options,
    check_widths,
    describe,
    entries,
    gate_width,
    init_linear,
    start_alike,
)
from saml_kernels.types import TrunkOutput, TrunkParams


class MultiBranchMLP(Layer):
    """Auxiliary network, M branches and mutual units: :func:`saml_kernels.multi_branch` with its parameters.

    Args:
        num_scenarios: M.
        local_dim: D_l, width of x_local; 0 is allowed.
        global_dim: D_g, width of x_global; 0 is allowed.
        hidden_dims: d_1..d_L, widths of the branches.
        aux_dims: a_1..a_L, widths of the auxiliary network; None: as ``hidden_dims``.
        mutual_layers: layers followed by a mutual unit, counted from 1; any subset of 1..L, also none.
        gate: "vector" (U is (d, d)) or "scalar" (U is (d, 1)).
        score, temperature, activation, stop_gradient, foreign_dtype, backend, schedule, form: as
            :func:`saml_kernels.multi_branch`.
        device, dtype: of the parameters.
        branch_init: "independent", every branch and gate drawn on its own, or "shared", all start as branch 0.

    Raises:
        TypeError, ValueError: options and sizes that cannot be used.
    """

    def __init__(
        self,
        num_scenarios: int,
        local_dim: int,
        global_dim: int,
        hidden_dims: Sequence[int] = (512, 256, 128),
        aux_dims: Sequence[int] | None = None,
        mutual_layers: Sequence[int] = (1,),
        gate: str = "vector",
        score: str = "ratio",
        temperature: float = 0.1,
        activation: str = "relu",
        stop_gradient: bool = True,
        foreign_dtype: torch.dtype | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        schedule: str = "auto",
        form: str | None = None,
        branch_init: str = "independent",
    ) -> None:
        super().__init__()
        num_scenarios = checks.check_integer("num_scenarios", num_scenarios, 1)
        local_dim = checks.check_integer("local_dim", local_dim, 0)
        global_dim = checks.check_integer("global_dim", global_dim, 0)
        hidden_dims = check_widths("hidden_dims", hidden_dims)
        aux_dims = hidden_dims if aux_dims is None else check_widths("aux_dims", aux_dims)
        if len(aux_dims) != len(hidden_dims):
            raise ValueError(f"hidden_dims has {len(hidden_dims)} layers but aux_dims has {len(aux_dims)}")
        mutual_layers = [checks.check_integer("mutual_layers", layer, 1) for layer in mutual_layers]
        for layer in mutual_layers:
            if layer > len(hidden_dims):
                raise ValueError(f"mutual_layers must lie in 1..{len(hidden_dims)}, got {layer}")
        check_options(activation, backend, score, temperature, gate)
        schedule = checks.check_schedule(schedule, form)
        functional.check_foreign_dtype(foreign_dtype, stop_gradient)
        checks.check_choice("branch_init", branch_init, STARTS)

        self.num_scenarios = num_scenarios
        self.local_dim = local_dim
        self.global_dim = global_dim
        self.hidden_dims = hidden_dims
        self.aux_dims = aux_dims
        self.mutual_layers = tuple(sorted(set(mutual_layers)))
        self.gate = gate
        self.score = score
        self.temperature = checks.check_positive("temperature", temperature)
        self.activation = activation
        self.stop_gradient = stop_gradient
        self.foreign_dtype = foreign_dtype
        self.backend = backend
        self.schedule = schedule
        self.branch_init = branch_init

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        branch_inputs = [d + a for d, a in zip((local_dim, *hidden_dims), aux_dims, strict=False)]
        self.branch_weights = nn.ParameterList(
            empty(num_scenarios, rows, d) for rows, d in zip(branch_inputs, hidden_dims, strict=True)
        )
        self.branch_biases = nn.ParameterList(empty(num_scenarios, d) for d in hidden_dims)
        self.aux_weights = nn.ParameterList(
            empty(rows, a) for rows, a in zip((global_dim, *aux_dims), aux_dims, strict=False)
        )
        self.aux_biases = nn.ParameterList(empty(a) for a in aux_dims)
        gated = {layer: hidden_dims[layer - 1] for layer in self.mutual_layers}
        self.gate_weights = nn.ParameterDict(
            {str(layer): empty(num_scenarios, d, gate_width(gate, d)) for layer, d in gated.items()}
        )
        self.gate_biases = nn.ParameterDict(
            {str(layer): empty(num_scenarios, gate_width(gate, d)) for layer, d in gated.items()}
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fresh weights, from torch's global generator."""
        params = self.params()
        for weights, biases in (
            (params.branch_weights, params.branch_biases),
            (params.aux_weights, params.aux_biases),
            (params.gate_weights, params.gate_biases),
        ):
            for weight, bias in zip(weights, biases, strict=True):
                if weight is not None and bias is not None:
                    init_linear(weight, bias)
        if self.branch_init == "shared":
            gates = *self.gate_weights.values(), *self.gate_biases.values()
            start_alike(*self.branch_weights, *self.branch_biases, *gates)

    def params(self) -> TrunkParams:
        """The parameters as :func:`saml_kernels.multi_branch` takes them."""
        # Not by what the dictionaries hold: torch.export of torch 2.8 takes them for empty.
        gate_weights: list[Tensor | None] = [None] * len(self.hidden_dims)
        gate_biases = list(gate_weights)
        for layer in self.mutual_layers:
            gate_weights[layer - 1] = self.gate_weights[str(layer)]
            gate_biases[layer - 1] = self.gate_biases[str(layer)]
        return TrunkParams(
            entries(self.branch_weights),
            entries(self.branch_biases),
            entries(self.aux_weights),
            entries(self.aux_biases),
            gate_weights,
            gate_biases,
        )

    def forward(self, x_local: Tensor, x_global: Tensor, scenario: Tensor, return_scores: bool = False) -> TrunkOutput:
        """x_local (B, D_l) or (B, M, D_l), x_global (B, D_g), scenario (B,) → own (B, d_L), aux (B, a_L), scores."""
        return functional.multi_branch(
            x_local,
            x_global,
            scenario,
            self.params(),
            activation=self.activation,
            score=self.score,
            temperature=self.temperature,
            stop_gradient=self.stop_gradient,
            foreign_dtype=self.foreign_dtype,
            backend=self.backend,
            schedule=self.schedule,
            return_scores=return_scores,
        )

    if TYPE_CHECKING:
        __call__ = forward

    def extra_repr(self) -> str:
        return describe(
            self,
            "num_scenarios local_dim global_dim hidden_dims aux_dims mutual_layers gate score temperature activation "
            "stop_gradient foreign_dtype backend branch_init",
        )


class MutualUnit(Layer):
    """The mutual unit on given streams: :func:`saml_kernels.mutual_unit` with its gate.

    Args:
        num_scenarios: M.
        dim: d, width of the streams.
        gate, score, temperature, stop_gradient, backend, device, dtype: as :class:`MultiBranchMLP`.

    Raises:
        TypeError, ValueError: options and sizes that cannot be used.
    """

    def __init__(
        self,
        num_scenarios: int,
        dim: int,
        gate: str = "vector",
        score: str = "ratio",
        temperature: float = 0.1,
        stop_gradient: bool = True,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_scenarios = checks.check_integer("num_scenarios", num_scenarios, 1)
        dim = checks.check_integer("dim", dim, 1)
        check_options("identity", backend, score, temperature, gate)
        self.num_scenarios = num_scenarios
        self.dim = dim
        self.gate = gate
        self.score = score
        self.temperature = checks.check_positive("temperature", temperature)
        self.stop_gradient = stop_gradient
        self.backend = backend
        width = gate_width(gate, dim)
        self.gate_weight = nn.Parameter(torch.empty(num_scenarios, dim, width, device=device, dtype=dtype))
        self.gate_bias = nn.Parameter(torch.empty(num_scenarios, width, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A fresh gate, from torch's global generator."""
        init_linear(self.gate_weight, self.gate_bias)

    @overload
    def forward(self, v: Tensor, scenario: Tensor, return_scores: Literal[False] = False) -> Tensor: ...
    @overload
    def forward(self, v: Tensor, scenario: Tensor, return_scores: bool) -> Tensor | tuple[Tensor, Tensor]: ...
    def forward(self, v: Tensor, scenario: Tensor, return_scores: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """v (B, M, d), scenario (B,) → M_t (B, d); with ``return_scores`` also row t of α (B, M)."""
        return functional.mutual_unit(
            v,
            scenario,
            self.gate_weight,
            self.gate_bias,
            score=self.score,
            temperature=self.temperature,
            stop_gradient=self.stop_gradient,
            backend=self.backend,
            return_scores=return_scores,
        )

    if TYPE_CHECKING:
        __call__ = forward

    def extra_repr(self) -> str:
        return describe(self, "num_scenarios dim gate score temperature stop_gradient backend")
