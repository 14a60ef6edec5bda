"""MMoE: shared experts, a gate and a tower for each scenario (KDD 2018); the usual multi-task baseline."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from saml_kernels.checks import check_integer
from saml_kernels.layers import GroupedMLP, MixtureOfExperts
from saml_rec.data.schema import Schema
from saml_rec.errors import InputError
from saml_rec.models.features import Batch, ScenarioAwareFeatures


class MMoEOutput(NamedTuple):
    """Logit of the own scenario's tower, (B,)."""

    logit: Tensor


class MMoE(nn.Module):
    """MMoE on a schema's features.

    Args:
        schema: the features; scenario_aware is not used.
        num_scenarios: M.
        vocabulary_sizes: per sparse and multi-valued feature the rows of its table.
        num_experts, hidden_dims: experts, of :class:`saml_kernels.layers.MixtureOfExperts`.
        tower_dims: widths of a tower's hidden layers.
        activation, backend: of :class:`saml_kernels.layers.GroupedMLP`.
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
        self.bottom = MixtureOfExperts(
            num_experts, self.features.global_dim, hidden_dims, num_scenarios, activation, backend
        )
        self.towers = GroupedMLP(num_scenarios, hidden_dims[-1], (*tower_dims, 1), activation, "identity", backend)

    def forward(self, batch: Batch) -> MMoEOutput:
        scenario = batch["scenario"]
        # Dense values are float32 whatever the model's type is.
        x = self.bottom(self.features(batch)[0].to(self.bottom.weights[0].dtype), scenario)
        return MMoEOutput(self.towers(x, scenario).squeeze(1))

    def loss(self, batch: Batch) -> Tensor:
        """Mean binary cross entropy over the batch."""
        return F.binary_cross_entropy_with_logits(self(batch).logit, batch["label"])
