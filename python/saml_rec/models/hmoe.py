"""HMoE: experts under a gate, and a mixture of all scenarios' scores in label space (CIKM 2020).

x       = Σ_k G_k E_k        experts on the global features
H_t(x)  = W_t(x) S_t(x) + Σ_{j≠t} W_j(x) sg(S_j(x)),   S_j = sigmoid of scenario j's network
loss    = BCE(H_t, y)
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from saml_kernels.checks import check_integer
from saml_kernels.layers import MixtureOfExperts, ScoreMixture
from saml_rec.data.schema import Schema
from saml_rec.errors import InputError
from saml_rec.models.features import Batch, ScenarioAwareFeatures


class HMoEOutput(NamedTuple):
    """Logit of H_t, (B,)."""

    logit: Tensor


class HMoE(nn.Module):
    """HMoE on a schema's features.

    Args:
        schema: the features; scenario_aware is not used.
        num_scenarios: M.
        vocabulary_sizes: per sparse and multi-valued feature the rows of its table.
        num_experts, hidden_dims: experts, of :class:`saml_kernels.layers.MixtureOfExperts`.
        tower_dims: widths of a scenario network's hidden layers.
        activation, backend: of :class:`saml_kernels.layers.ScoreMixture`.
        dropout: of the features.
    """

    def __init__(
        self,
        schema: Schema,
        num_scenarios: int,
        *,
        vocabulary_sizes: Mapping[str, int],
        num_experts: int = 4,
        hidden_dims: Sequence[int] = (64,),
        tower_dims: Sequence[int] = (32,),
        activation: str = "relu",
        dropout: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        for option, widths in (("hidden_dims", hidden_dims), ("tower_dims", tower_dims)):
            for width in widths:
                check_integer(f"every width in {option}", width, 1)
        if not hidden_dims:
            raise InputError("hidden_dims must name at least one layer of the experts, got none")
        self.features = ScenarioAwareFeatures(schema, num_scenarios, vocabulary_sizes, dropout, local=False)
        self.bottom = MixtureOfExperts(num_experts, self.features.global_dim, hidden_dims, activation=activation)
        self.mixture = ScoreMixture(num_scenarios, hidden_dims[-1], tower_dims, activation, backend=backend)

    def forward(self, batch: Batch) -> HMoEOutput:
        # Dense values are float32 whatever the model's type is.
        x = self.bottom(self.features(batch)[0].to(self.bottom.weights[0].dtype))
        return HMoEOutput(self.mixture(x, batch["scenario"]))

    def loss(self, batch: Batch) -> Tensor:
        """Mean binary cross entropy over the batch."""
        return F.binary_cross_entropy_with_logits(self(batch).logit, batch["label"])
