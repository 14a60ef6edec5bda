"""Mixtures: HMoE's in label space (CIKM 2020), and experts under a gate (MMoE, KDD 2018)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saml_kernels import checks, functional
from saml_kernels.layers.common import (
    Layer,
    check_options,
    check_widths,
    describe,
    entries,
    init_linear,
    mix,
    reset_children,
    weigh,
)
from saml_kernels.layers.grouped_mlp import GroupedMLP


class ScoreMixture(Layer):
    """HMoE's label space: H_t(x) = W_tt(x) S_t(x) + Σ_{j≠t} W_tj(x) sg(S_j(x)).

    Every scenario's network predicts every row, S_j(x) = sigmoid(s_j(x)), and the softmax W_t(x) over the scenarios, of
    scenario t's own weight network, weighs the predictions. A row trains the network of its own scenario, and through
    all scores the weight network of its own scenario. What is mixed are probabilities: a mixture of logits is
    unbounded, and under the stop-gradient the networks outbid each other.

    Args:
        num_scenarios: M.
        in_dim: width of x.
        hidden_dims: widths of a scenario network's hidden layers; () makes it one linear layer.
        activation: after every hidden layer.
        foreign_dtype, backend: as :func:`saml_kernels.branch_scores`.
        device, dtype: of the parameters.
        weight_dim: width of what the weight networks, linear ones, read; None: ``in_dim``.

    Raises:
        TypeError, ValueError: options and sizes that cannot be used.
    """

    def __init__(
        self,
        num_scenarios: int,
        in_dim: int,
        hidden_dims: Sequence[int] = (64,),
        activation: str = "relu",
        foreign_dtype: torch.dtype | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        weight_dim: int | None = None,
    ) -> None:
        super().__init__()
        functional.check_foreign_dtype(foreign_dtype, stop_gradient=True)
        if weight_dim is not None:
            weight_dim = checks.check_integer("weight_dim", weight_dim, 1)
        self.networks = GroupedMLP(
            num_scenarios, in_dim, (*hidden_dims, 1), activation, "identity", backend, device, dtype
        )
        num_scenarios, in_dim = self.networks.num_scenarios, self.networks.in_dim
        self.weight_dim = in_dim if weight_dim is None else weight_dim
        self.weight_networks = GroupedMLP(
            num_scenarios, self.weight_dim, (num_scenarios,), "identity", None, backend, device, dtype
        )
        self.foreign_dtype = foreign_dtype
        self.backend = backend

    def reset_parameters(self) -> None:
        """Fresh weights, from torch's global generator."""
        reset_children(self)

    def forward(self, x: Tensor, scenario: Tensor, weight_input: Tensor | None = None) -> Tensor:
        """The logit of H_t(x), log H_t − log(1 − H_t), (B,).

        Args:
            x: (B, in_dim), or (B, M, in_dim), one view per scenario's network.
            scenario: (B,) or (B, 1) of any integer type, in [0, M).
            weight_input: (B, weight_dim), what W_t reads; None: x, which then is (B, in_dim).

        Raises:
            TypeError, ValueError, BackendUnavailable: as :func:`saml_kernels.branch_scores`.
        """
        if weight_input is None:
            if x.dim() == 3:
                raise ValueError("weight_input must say what the weights read where x holds a view per scenario")
            weight_input = x
        checks.check_shape("weight_input", weight_input, (x.shape[0], self.weight_dim))
        gate, logits = self.weight_networks(weight_input, scenario), self.logits(x, scenario)
        precise = torch.promote_types(logits.dtype, torch.float32)
        weights, logits = F.log_softmax(gate.to(precise), dim=1), logits.to(precise)
        # 1 − H_t = Σ W_tj (1 − S_j), as the weights sum to 1.
        liked = torch.logsumexp(weights + F.logsigmoid(logits), dim=1)
        disliked = torch.logsumexp(weights + F.logsigmoid(-logits), dim=1)
        # Near 1/2 the difference cancels; there 2 H_t − 1 = Σ W_tj tanh(s_j / 2) =: T, and the logit is 2 artanh T.
        tilt = (weights.exp() * torch.tanh(logits / 2)).sum(1)
        near = tilt.abs() < 0.5
        logit = torch.where(near, 2 * torch.atanh(torch.where(near, tilt, 0)), liked - disliked)
        return logit.to(x.dtype)

    if TYPE_CHECKING:
        __call__ = forward

    def logits(self, x: Tensor, scenario: Tensor) -> Tensor:
        """s_j(x) of all scenarios, (B, M), for x as in :meth:`forward`; foreign ones are constants."""
        networks = self.networks
        logits = functional.branch_scores(
            x,
            scenario,
            entries(networks.weights),
            entries(networks.biases),
            activation=networks.activation,
            output_activation="identity",
            foreign_dtype=self.foreign_dtype,
            backend=networks.backend,
        )
        return logits.squeeze(2)

    def extra_repr(self) -> str:
        return describe(self, "weight_dim foreign_dtype")


class MixtureOfExperts(Layer):
    """Experts under a softmax gate, Σ_k G_k(x) E_k(x): one gate for all rows, or one for each scenario (MMoE, HMoE).

    The experts are :func:`saml_kernels.expert_outputs`: every row runs through all of them and trains them all.

    Args:
        num_experts: K.
        in_dim: width of x.
        hidden_dims: widths of an expert's layers, each followed by the activation.
        num_scenarios: None: one gate; M: a gate per scenario, and forward takes the scenario.
        activation: of the experts.
        backend: of the experts and of the gates per scenario.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: options and sizes that cannot be used.
    """

    def __init__(
        self,
        num_experts: int,
        in_dim: int,
        hidden_dims: Sequence[int] = (64,),
        num_scenarios: int | None = None,
        activation: str = "relu",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_experts = checks.check_integer("num_experts", num_experts, 1)
        in_dim = checks.check_integer("in_dim", in_dim, 1)
        hidden_dims = check_widths("hidden_dims", hidden_dims)
        if num_scenarios is not None:
            num_scenarios = checks.check_integer("num_scenarios", num_scenarios, 1)
        check_options(activation, backend)
        self.num_experts = num_experts
        self.in_dim = in_dim
        self.hidden_dims = hidden_dims
        self.num_scenarios = num_scenarios
        self.activation = activation
        self.backend = backend

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        shapes = list(zip((in_dim, *hidden_dims), hidden_dims, strict=False))
        self.weights = nn.ParameterList(empty(num_experts, rows, columns) for rows, columns in shapes)
        self.biases = nn.ParameterList(empty(num_experts, 1, d) for d in hidden_dims)
        self.gate: nn.Module
        if num_scenarios is None:
            self.gate = nn.Linear(in_dim, num_experts, device=device, dtype=dtype)
        else:
            self.gate = GroupedMLP(
                num_scenarios, in_dim, (num_experts,), "identity", backend=backend, device=device, dtype=dtype
            )
        self._reset_experts()

    def reset_parameters(self) -> None:
        """Fresh gates and experts, from torch's global generator."""
        gate: Any = self.gate
        gate.reset_parameters()
        self._reset_experts()

    def _reset_experts(self) -> None:
        for weight, bias in zip(self.weights, self.biases, strict=True):
            init_linear(weight, bias)

    def forward(self, x: Tensor, scenario: Tensor | None = None) -> Tensor:
        """x (B, in_dim), scenario (B,) if the gates are the scenarios' → (B, d_L)."""
        checks.check_shape("x", x, ("B", self.in_dim))
        if (scenario is None) != (self.num_scenarios is None):
            wanted = "no scenario: there is one gate" if self.num_scenarios is None else "the scenario of every row"
            raise ValueError(f"forward takes {wanted}")
        logits = self.gate(x) if scenario is None else self.gate(x, scenario)
        return mix(logits, self._outputs(x))

    if TYPE_CHECKING:
        __call__ = forward

    def views(self, x: Tensor, scenario: Tensor) -> Tensor:
        """The mixtures of all scenarios' gates, h_j(x) = Σ_k softmax(G_j x)_k E_k(x), (B, M, d_L).

        A row trains the experts and its own scenario's gate through h_t; h_j, j ≠ t, are constants.

        Args:
            x: (B, in_dim).
            scenario: (B,) or (B, 1) of any integer type, in [0, M).

        Raises:
            ValueError: there is one gate for all rows.
            TypeError, ValueError, BackendUnavailable: as :func:`saml_kernels.grouped_mlp`.
        """
        checks.check_shape("x", x, ("B", self.in_dim))
        gate = self.gate
        if not isinstance(gate, GroupedMLP):
            raise ValueError("views need a gate per scenario, but num_scenarios is None: there is one gate")
        scenario = checks.scenario_ids(scenario)
        own_logits, outputs = gate(x, scenario), self._outputs(x)
        own = mix(own_logits, outputs)
        with torch.no_grad():
            logits = functional.expert_outputs(
                x, entries(gate.weights), entries(gate.biases), activation="identity", backend=self.backend
            )
            views = weigh(torch.softmax(logits, dim=2), outputs)
        # In place: the foreign views are constants of no graph, so no copy of all M is needed.
        return views.index_put_((torch.arange(x.shape[0], device=x.device), scenario.long()), own)

    def _outputs(self, x: Tensor) -> Tensor:
        """(B, K, d_L)."""
        return functional.expert_outputs(
            x,
            entries(self.weights),
            [bias.squeeze(1) for bias in self.biases],
            activation=self.activation,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return describe(self, "num_experts in_dim hidden_dims num_scenarios activation backend")
