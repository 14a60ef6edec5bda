"""STAR: a shared network times one per scenario, partitioned normalisation, an auxiliary network (arXiv 2101.11427).

z     = PartitionedNorm([global features])
logit = STAR network of the own scenario on z + auxiliary network on (scenario embedding, z)
loss  = BCE(logit, y)
"""

from collections.abc import Mapping

import torch
from torch import nn

from saml_kernels.checks import check_integer
from saml_kernels.layers import STARMLP, PartitionedNorm
from saml_rec.data.schema import Schema
from saml_rec.models.base import Logits, ScenarioModel, check_widths
from saml_rec.models.features import Batch
from saml_rec.models.hyperparameters import (
    Activation,
    AuxDims,
    Backend,
    Combine,
    Dropout,
    HiddenDims,
    IdDropout,
    LocalFeatures,
    ScenarioDim,
)


class STAR(ScenarioModel):
    """STAR on a schema's features.

    Args:
        schema: the features.
        num_scenarios: M.
        vocabulary_sizes: per sparse and multi-valued feature the rows of its tables.
        hidden_dims: widths of the star network's hidden layers.
        scenario_dim: width of the scenario's embedding.
        aux_dims: widths of the auxiliary network's hidden layers.
        activation, backend: of :class:`saml_kernels.layers.STARMLP`.
        combine: of :class:`saml_kernels.layers.PartitionedNorm`.
        local_features, dropout, id_dropout: of :class:`saml_rec.models.features.ScenarioAwareFeatures`.
    """

    def __init__(
        self,
        schema: Schema,
        num_scenarios: int,
        *,
        vocabulary_sizes: Mapping[str, int],
        hidden_dims: HiddenDims = (64, 32),
        scenario_dim: ScenarioDim = 8,
        aux_dims: AuxDims = (16,),
        activation: Activation = "relu",
        combine: Combine = "product",
        local_features: LocalFeatures = False,
        dropout: Dropout = 0.0,
        id_dropout: IdDropout = 0.0,
        backend: Backend = "auto",
    ) -> None:
        check_integer("scenario_dim", scenario_dim, 1)
        check_widths(aux_dims=aux_dims)
        super().__init__(schema, num_scenarios, vocabulary_sizes, dropout, id_dropout, local_features)
        width = self.input_dim
        self.norm = PartitionedNorm(num_scenarios, width, combine=combine)
        self.network = STARMLP(num_scenarios, width, (*hidden_dims, 1), activation, "identity", backend)
        self.scenario_embedding = nn.Embedding(num_scenarios, scenario_dim)
        layers: list[nn.Module] = []
        before = scenario_dim + width
        for after in aux_dims:
            layers += [nn.Linear(before, after), nn.ReLU()]
            before = after
        self.aux_network = nn.Sequential(*layers, nn.Linear(before, 1))

    def forward(self, batch: Batch) -> Logits:
        scenario = batch["scenario"]
        z = self.norm(self.joined_inputs(batch), scenario)
        aux_logit = self.aux_network(torch.cat([self.scenario_embedding(scenario), z], dim=1))
        return Logits((self.network(z, scenario) + aux_logit).squeeze(1))
