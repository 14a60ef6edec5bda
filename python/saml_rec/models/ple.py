"""PLE: experts of each scenario and shared ones, level by level, under gates by scenario (RecSys 2020).

x     = level by level: own experts (own scenario's rows) and shared experts (all rows), mixed by the scenario's gate
logit = tower of the own scenario on x
loss  = BCE(logit, y)
"""

from collections.abc import Mapping

from saml_kernels.layers import GroupedMLP, ProgressiveExperts
from saml_rec.data.schema import Schema
from saml_rec.errors import InputError
from saml_rec.models.base import Logits, ScenarioModel, check_widths
from saml_rec.models.features import Batch
from saml_rec.models.hyperparameters import (
    Activation,
    Backend,
    Dropout,
    HiddenDims,
    IdDropout,
    LocalFeatures,
    OwnExperts,
    SharedExperts,
    TowerDims,
)


class PLE(ScenarioModel):
    """PLE on a schema's features.

    Args:
        schema: the features.
        num_scenarios: M.
        vocabulary_sizes: per sparse and multi-valued feature the rows of its tables.
        hidden_dims: width of the experts of each level, which have one layer.
        own_experts, shared_experts: of :class:`saml_kernels.layers.ProgressiveExperts`.
        tower_dims: widths of a tower's hidden layers.
        activation, backend: of :class:`saml_kernels.layers.GroupedMLP`.
        local_features, dropout, id_dropout: of :class:`saml_rec.models.features.ScenarioAwareFeatures`.
    """

    def __init__(
        self,
        schema: Schema,
        num_scenarios: int,
        *,
        vocabulary_sizes: Mapping[str, int],
        hidden_dims: HiddenDims = (64,),
        own_experts: OwnExperts = 1,
        shared_experts: SharedExperts = 1,
        tower_dims: TowerDims = (32,),
        activation: Activation = "relu",
        local_features: LocalFeatures = False,
        dropout: Dropout = 0.0,
        id_dropout: IdDropout = 0.0,
        backend: Backend = "auto",
    ) -> None:
        check_widths(hidden_dims=hidden_dims, tower_dims=tower_dims)
        if not hidden_dims:
            raise InputError("hidden_dims must name at least one level of experts, got none")
        super().__init__(schema, num_scenarios, vocabulary_sizes, dropout, id_dropout, local_features)
        self.experts = ProgressiveExperts(
            num_scenarios,
            self.input_dim,
            [(width,) for width in hidden_dims],
            own_experts,
            shared_experts,
            activation=activation,
            backend=backend,
        )
        self.towers = GroupedMLP(
            num_scenarios, hidden_dims[-1], (*tower_dims, 1), activation, "identity", backend=backend
        )

    def forward(self, batch: Batch) -> Logits:
        scenario = batch["scenario"]
        x = self.experts(self.joined_inputs(batch), scenario)
        return Logits(self.towers(x, scenario).squeeze(1))
