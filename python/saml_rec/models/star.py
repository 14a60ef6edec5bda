"""STAR: a shared network times one per scenario, partitioned normalisation, an auxiliary network (arXiv 2101.11427).

z     = PartitionedNorm([global features])
logit = STAR network of the own scenario on z + auxiliary network on (scenario embedding, z)
loss  = BCE(logit, y)
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saml_kernels.checks import check_integer
from saml_kernels.layers import STARMLP, PartitionedNorm
from saml_rec.data.schema import Schema
from saml_rec.models.features import Batch, ScenarioAwareFeatures


class STAROutput(NamedTuple):
    """The sum of the star network's and the auxiliary network's logits, (B,)."""

    logit: Tensor


class STAR(nn.Module):
    """STAR on a schema's features.

    Args:
        schema: the features; scenario_aware is not used.
        num_scenarios: M.
        vocabulary_sizes: per sparse and multi-valued feature the rows of its table.
        hidden_dims: widths of the star network's hidden layers.
        scenario_dim: width of the scenario's embedding.
        aux_dims: widths of the auxiliary network's hidden layers.
        activation, backend: of :class:`saml_kernels.layers.STARMLP`.
        combine: of :class:`saml_kernels.layers.PartitionedNorm`.
        dropout: of the features.
    """

    def __init__(
        self,
        schema: Schema,
        num_scenarios: int,
        *,
        vocabulary_sizes: Mapping[str, int],
        hidden_dims: Sequence[int] = (64, 32),
        scenario_dim: int = 8,
        aux_dims: Sequence[int] = (16,),
        activation: str = "relu",
        combine: str = "product",
        dropout: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_integer("scenario_dim", scenario_dim, 1)
        for width in aux_dims:
            check_integer("every width in aux_dims", width, 1)
        self.features = ScenarioAwareFeatures(schema, num_scenarios, vocabulary_sizes, dropout, local=False)
        width = self.features.global_dim
        self.norm = PartitionedNorm(num_scenarios, width, combine=combine)
        self.network = STARMLP(num_scenarios, width, (*hidden_dims, 1), activation, "identity", backend)
        self.scenario_embedding = nn.Embedding(num_scenarios, scenario_dim)
        layers: list[nn.Module] = []
        before = scenario_dim + width
        for after in aux_dims:
            layers += [nn.Linear(before, after), nn.ReLU()]
            before = after
        self.aux_network = nn.Sequential(*layers, nn.Linear(before, 1))

    def forward(self, batch: Batch) -> STAROutput:
        scenario = batch["scenario"]
        # Dense values are float32 whatever the model's type is.
        z = self.norm(self.features(batch)[0].to(self.norm.weight.dtype), scenario)
        aux_logit = self.aux_network(torch.cat([self.scenario_embedding(scenario), z], dim=1))
        return STAROutput((self.network(z, scenario) + aux_logit).squeeze(1))

    def loss(self, batch: Batch) -> Tensor:
        """Mean binary cross entropy over the batch."""
        return F.binary_cross_entropy_with_logits(self(batch).logit, batch["label"])
