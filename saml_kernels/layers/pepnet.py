"""PEPNet's layers (KDD 2023, arXiv 2302.01115): a gate by prior knowledge, and towers gated before every layer."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from saml_kernels import checks, functional
from saml_kernels.layers.common import Layer, describe, entries, reset_children
from saml_kernels.layers.grouped_mlp import GroupedMLP


class GateUnit(Layer):
    """Gate Neural Unit: γ sigmoid(U' relu(U prior + u) + u') ∘ gated; one for all rows, or one for each scenario.

    :func:`saml_kernels.grouped_mlp` with ``gated``. EPNet is this unit with a shared embedding E as ``gated`` and
    [domain prior ; sg(E)] as ``prior``: what of a prior is under stop-gradient, the caller detaches.

    Args:
        num_scenarios: None: one gate; M: a gate per scenario, and forward takes the scenario.
        in_dim: width of the prior.
        hidden_dim: width between U and U'.
        out_dim: width of what is gated.
        scale: γ, the largest value of the gate.
        backend: as :func:`saml_kernels.grouped_mlp`.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: options and sizes that cannot be used.
    """

    def __init__(
        self,
        in_dim: int,
        hidden_dim: int,
        out_dim: int,
        num_scenarios: int | None = None,
        scale: float = 2.0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        in_dim = checks.check_integer("in_dim", in_dim, 1)
        hidden_dim = checks.check_integer("hidden_dim", hidden_dim, 1)
        out_dim = checks.check_integer("out_dim", out_dim, 1)
        scale = checks.check_positive("scale", scale)
        if num_scenarios is not None:
            num_scenarios = checks.check_integer("num_scenarios", num_scenarios, 1)
        self.in_dim = in_dim
        self.hidden_dim = hidden_dim
        self.out_dim = out_dim
        self.num_scenarios = num_scenarios
        self.scale = scale
        self.backend = backend
        gates = 1 if num_scenarios is None else num_scenarios
        self.network = GroupedMLP(gates, in_dim, (hidden_dim, out_dim), "relu", "identity", backend, device, dtype)

    def reset_parameters(self) -> None:
        """Fresh weights, from torch's global generator."""
        reset_children(self)

    def forward(self, prior: Tensor, gated: Tensor, scenario: Tensor | None = None) -> Tensor:
        """prior (B, in_dim), gated (B, out_dim), scenario (B,) if the gates are the scenarios' → (B, out_dim)."""
        checks.check_shape("prior", prior, ("B", self.in_dim))
        checks.check_shape("gated", gated, (prior.shape[0], self.out_dim))
        if (scenario is None) != (self.num_scenarios is None):
            wanted = "no scenario: there is one gate" if self.num_scenarios is None else "the scenario of every row"
            raise ValueError(f"forward takes {wanted}")
        if scenario is None:
            scenario = torch.zeros(prior.shape[0], dtype=torch.int64, device=prior.device)
        return functional.grouped_mlp(
            prior,
            scenario,
            entries(self.network.weights),
            entries(self.network.biases),
            activation="relu",
            gated=gated,
            gate_scale=self.scale,
            backend=self.backend,
        )

    if TYPE_CHECKING:
        __call__ = forward

    def extra_repr(self) -> str:
        return describe(self, "in_dim hidden_dim out_dim num_scenarios scale backend")


class GatedTowers(Layer):
    """PPNet: a tower per scenario, every layer's input gated by priors.

    With H^0 = x, before every layer l: H^l ← gate^l([prior ; sg(x)]) ∘ H^l, then H^{l+1} = δ(H^l W_t^l + b_t^l).
    Gates and towers are those of the row's scenario t; x gets no gradient through the gates.

    Args:
        num_scenarios: M.
        in_dim: width of x.
        prior_dim: width of the priors, of the user, the item and the author in the paper.
        hidden_dims: d_1..d_L.
        gate_dim: hidden width of every gate.
        activation: δ after every layer.
        output_activation: δ after the last layer; None: the same. "identity" gives logits.
        scale: γ of :class:`GateUnit`.
        backend: as :func:`saml_kernels.grouped_mlp`.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: options and sizes that cannot be used.
    """

    def __init__(
        self,
        num_scenarios: int,
        in_dim: int,
        prior_dim: int,
        hidden_dims: Sequence[int],
        gate_dim: int,
        activation: str = "relu",
        output_activation: str | None = None,
        scale: float = 2.0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        in_dim = checks.check_integer("in_dim", in_dim, 1)
        prior_dim = checks.check_integer("prior_dim", prior_dim, 0)
        gate_dim = checks.check_integer("gate_dim", gate_dim, 1)
        scale = checks.check_positive("scale", scale)
        self.in_dim = in_dim
        self.prior_dim = prior_dim
        self.gate_dim = gate_dim
        self.scale = scale
        self.backend = backend
        self.towers = GroupedMLP(
            num_scenarios, in_dim, hidden_dims, activation, output_activation, backend, device, dtype
        )
        gated = (in_dim, *self.towers.hidden_dims[:-1])
        options = backend, device, dtype
        # All gates read the same: their first layers lie side by side, gate l's from column l gate_dim on.
        self.gate_inputs = GroupedMLP(
            num_scenarios, prior_dim + in_dim, (len(gated) * gate_dim,), "relu", None, *options
        )
        self.gate_outputs = nn.ModuleList(
            GroupedMLP(num_scenarios, gate_dim, (width,), "identity", None, *options) for width in gated
        )

    def reset_parameters(self) -> None:
        """Fresh weights, from torch's global generator."""
        reset_children(self)

    def forward(self, x: Tensor, prior: Tensor, scenario: Tensor) -> Tensor:
        """x (B, in_dim), prior (B, prior_dim), scenario (B,) → (B, d_L)."""
        checks.check_shape("x", x, ("B", self.in_dim))
        checks.check_shape("prior", prior, (x.shape[0], self.prior_dim))
        towers = self.towers
        activations = towers.layer_activations
        hidden = self.gate_inputs(torch.cat([prior, x.detach()], dim=1), scenario).chunk(len(activations), dim=1)
        gates: list[Any] = list(self.gate_outputs)
        layers = zip(hidden, gates, entries(towers.weights), entries(towers.biases), activations, strict=True)
        for read, gate, weight, bias, activation in layers:
            x = functional.grouped_mlp(
                read,
                scenario,
                entries(gate.weights),
                entries(gate.biases),
                gated=x,
                gate_scale=self.scale,
                backend=self.backend,
            )
            x = functional.grouped_mlp(x, scenario, [weight], [bias], activation=activation, backend=self.backend)
        return x

    if TYPE_CHECKING:
        __call__ = forward

    def extra_repr(self) -> str:
        return describe(self, "in_dim prior_dim gate_dim scale backend")
