"""PEPNet: gates that personalise the embeddings and every layer of the scenarios' towers (KDD 2023, arXiv 2302.01115).

E'    = gate([scenario embedding ; sg(E)]) ∘ E                                  EPNet, E all features
H^l   ← gate^l([priors ; sg(E')]) ∘ H^l,   H^{l+1} = δ(H^l W^l + b^l)            PPNet, towers by scenario
logit = [H^L] w + c                                                             head of the own scenario
loss  = BCE(logit, y)

gate(p) = γ sigmoid(U' relu(U p + u) + u'), γ = 2. The priors are the embeddings of single features, such as user and
item.
"""

from collections.abc import Mapping

import torch
from torch import nn

from saml_kernels.checks import check_integer
from saml_kernels.layers import GatedTowers, GateUnit, GroupedMLP
from saml_rec.data.schema import Schema
from saml_rec.errors import InputError, did_you_mean
from saml_rec.models.base import Logits, ScenarioModel, check_widths
from saml_rec.models.features import Batch
from saml_rec.models.hyperparameters import (
    Activation,
    Backend,
    Dropout,
    GateDim,
    HiddenDims,
    IdDropout,
    LocalFeatures,
    PriorFeatures,
    ScenarioDim,
)


class PEPNet(ScenarioModel):
    """PEPNet on a schema's features.

    Args:
        schema: the features.
        num_scenarios: M.
        vocabulary_sizes: per sparse and multi-valued feature the rows of its tables.
        hidden_dims: widths of a tower's hidden layers.
        gate_dim: width of the gates' hidden layer.
        scenario_dim: width of the scenario's embedding, EPNet's prior.
        prior_features: names of sparse features, PPNet's priors; () takes all of them.
        activation, backend: of :class:`saml_kernels.layers.GatedTowers`.
        local_features, dropout, id_dropout: of :class:`saml_rec.models.features.ScenarioAwareFeatures`.

    Raises:
        InputError: a prior that is no sparse feature, or a schema without one.
    """

    scenario_decay = 100.0

    def __init__(
        self,
        schema: Schema,
        num_scenarios: int,
        *,
        vocabulary_sizes: Mapping[str, int],
        hidden_dims: HiddenDims = (64, 32),
        gate_dim: GateDim = 32,
        scenario_dim: ScenarioDim = 8,
        prior_features: PriorFeatures = (),
        activation: Activation = "relu",
        local_features: LocalFeatures = False,
        dropout: Dropout = 0.0,
        id_dropout: IdDropout = 0.0,
        backend: Backend = "auto",
    ) -> None:
        check_integer("gate_dim", gate_dim, 1)
        check_integer("scenario_dim", scenario_dim, 1)
        check_widths(hidden_dims=hidden_dims)
        if not hidden_dims:
            raise InputError("hidden_dims must name at least one layer of the towers, got none")
        sparse = [feature.name for feature in schema.of_kind("sparse")]
        priors = tuple(prior_features) or tuple(sparse)
        for name in priors:
            if name not in sparse:
                raise InputError(
                    f"prior_features: {name!r} is no sparse feature{did_you_mean(name, sparse)}; "
                    f"these are {', '.join(sparse) or 'none'}"
                )
        if not priors:
            raise InputError("PEPNet's gates read sparse features, and the schema has none")
        super().__init__(schema, num_scenarios, vocabulary_sizes, dropout, id_dropout, local_features)
        self.prior_features = priors
        width = self.input_dim
        prior_dim = sum(self.features.global_widths[name] for name in priors)
        self.embedding_gate = GateUnit(scenario_dim + width, gate_dim, width, backend=backend)
        self.scenario_embedding = nn.Embedding(num_scenarios, scenario_dim)
        self.towers = GatedTowers(
            num_scenarios, width, prior_dim, hidden_dims, gate_dim, activation=activation, backend=backend
        )
        self.head = GroupedMLP(num_scenarios, hidden_dims[-1], (1,), "identity", backend=backend)

    def forward(self, batch: Batch) -> Logits:
        scenario = batch["scenario"]
        x_global, x_local = self.inputs(batch)
        embedded = torch.cat([x_global, x_local], dim=1)
        domain = torch.cat([self.scenario_embedding(scenario), embedded.detach()], dim=1)
        prior = self.features.global_part(x_global, self.prior_features)
        own = self.towers(self.embedding_gate(domain, embedded), prior, scenario)
        return Logits(self.head(own, scenario).squeeze(1))
