"""Shared bottom: one network for all scenarios and a small tower for each; the plain multi-scenario baseline."""

from collections.abc import Mapping
from itertools import pairwise

from torch import nn

from saml_kernels.activations import ACTIVATIONS
from saml_kernels.layers import GroupedMLP
from saml_rec.data.schema import Schema
from saml_rec.models.base import Logits, ScenarioModel, check_widths
from saml_rec.models.features import Batch
from saml_rec.models.hyperparameters import (
    Activation,
    Backend,
    Dropout,
    HiddenDims,
    IdDropout,
    LocalFeatures,
    TowerDims,
)


class SharedBottom(ScenarioModel):
    """A shared MLP, and a tower per scenario.

    Args:
        schema: the features.
        num_scenarios: M.
        vocabulary_sizes: per sparse and multi-valued feature the rows of its tables.
        hidden_dims: widths of the shared network.
        tower_dims: widths of a tower's hidden layers; () makes it one linear layer.
        activation: after every hidden layer.
        local_features, dropout, id_dropout: of :class:`saml_rec.models.features.ScenarioAwareFeatures`.
        backend: of :class:`saml_kernels.layers.GroupedMLP`.
    """

    def __init__(
        self,
        schema: Schema,
        num_scenarios: int,
        *,
        vocabulary_sizes: Mapping[str, int],
        hidden_dims: HiddenDims = (64,),
        tower_dims: TowerDims = (32,),
        activation: Activation = "relu",
        local_features: LocalFeatures = False,
        dropout: Dropout = 0.0,
        id_dropout: IdDropout = 0.0,
        backend: Backend = "auto",
    ) -> None:
        check_widths(hidden_dims=hidden_dims, tower_dims=tower_dims)
        super().__init__(schema, num_scenarios, vocabulary_sizes, dropout, id_dropout, local_features)
        widths = (self.input_dim, *hidden_dims)
        self.bottom = nn.ModuleList(nn.Linear(inputs, outputs) for inputs, outputs in pairwise(widths))
        self.towers = GroupedMLP(
            num_scenarios,
            widths[-1],
            (*tower_dims, 1),
            activation=activation,
            output_activation="identity",
            backend=backend,
        )

    def forward(self, batch: Batch) -> Logits:
        shared = self.joined_inputs(batch)
        for layer in self.bottom:
            shared = ACTIVATIONS[self.towers.activation].function(layer(shared))
        return Logits(self.towers(shared, batch["scenario"]).squeeze(1))
