"""Plain networks: one for all rows, one that also sees the scenario, one for each scenario.

What a model for many scenarios has to beat: `mlp` knows no scenario, `mlp_scenario` reads its embedding as one more
feature, `per_scenario` shares the embedding tables and nothing else.
"""

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from saml_kernels.activations import ACTIVATIONS
from saml_kernels.checks import check_choice, check_integer
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
    ScenarioDim,
)


class SharedNetwork(nn.Module):
    """Linear layers with an activation between them, and one logit.

    Args:
        in_dim: width of the input.
        hidden_dims: widths of the hidden layers; () makes it one linear layer.
        activation: after every hidden layer.

    Raises:
        ValueError: an unknown activation or a width below 1.
    """

    def __init__(self, in_dim: int, hidden_dims: HiddenDims, activation: str) -> None:
        super().__init__()
        check_widths(hidden_dims=hidden_dims)
        check_choice("activation", activation, ACTIVATIONS)
        self.activation = activation
        self.layers = nn.ModuleList(nn.Linear(rows, columns) for rows, columns in pairwise((in_dim, *hidden_dims, 1)))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in_dim) → (B,)."""
        *hidden, last = self.layers
        for layer in hidden:
            x = ACTIVATIONS[self.activation].function(layer(x))
        logit: Tensor = last(x)
        return logit.squeeze(1)


class MLP(ScenarioModel):
    """One network for all rows, which knows no scenario but by local features.

    Args:
        schema: the features.
        num_scenarios: M.
        vocabulary_sizes: per sparse and multi-valued feature the rows of its tables.
        hidden_dims, activation: of :class:`SharedNetwork`.
        local_features, dropout, id_dropout: of :class:`saml_rec.models.features.ScenarioAwareFeatures`.
    """

    has_scenario_parameters = False

    def __init__(
        self,
        schema: Schema,
        num_scenarios: int,
        *,
        vocabulary_sizes: Mapping[str, int],
        hidden_dims: HiddenDims = (64, 32),
        activation: Activation = "relu",
        local_features: LocalFeatures = False,
        dropout: Dropout = 0.0,
        id_dropout: IdDropout = 0.0,
    ) -> None:
        super().__init__(schema, num_scenarios, vocabulary_sizes, dropout, id_dropout, local_features)
        self.network = SharedNetwork(self.input_dim, hidden_dims, activation)

    def forward(self, batch: Batch) -> Logits:
        return Logits(self.network(self.joined_inputs(batch)))


class ScenarioMLP(ScenarioModel):
    """One network for all rows that reads an embedding of the scenario beside the features.

    Args:
        schema, num_scenarios, vocabulary_sizes, hidden_dims, activation, local_features, dropout, id_dropout: of
            :class:`MLP`.
        scenario_dim: width of the scenario's embedding.
    """

    has_scenario_parameters = False

    def __init__(
        self,
        schema: Schema,
        num_scenarios: int,
        *,
        vocabulary_sizes: Mapping[str, int],
        hidden_dims: HiddenDims = (64, 32),
        scenario_dim: ScenarioDim = 8,
        activation: Activation = "relu",
        local_features: LocalFeatures = False,
        dropout: Dropout = 0.0,
        id_dropout: IdDropout = 0.0,
    ) -> None:
        check_integer("scenario_dim", scenario_dim, 1)
        super().__init__(schema, num_scenarios, vocabulary_sizes, dropout, id_dropout, local_features)
        self.scenario_embedding = nn.Embedding(num_scenarios, scenario_dim)
        self.network = SharedNetwork(scenario_dim + self.input_dim, hidden_dims, activation)

    def forward(self, batch: Batch) -> Logits:
        x = self.joined_inputs(batch)
        return Logits(self.network(torch.cat([self.scenario_embedding(batch["scenario"]), x], dim=1)))


class PerScenario(ScenarioModel):
    """A network for each scenario, trained by its rows alone; they share the global embedding tables.

    Args:
        schema, num_scenarios, vocabulary_sizes, local_features, dropout, id_dropout: of :class:`MLP`.
        hidden_dims: widths of each network's hidden layers; () makes it one linear layer.
        activation, backend: of :class:`saml_kernels.layers.GroupedMLP`.
    """

    def __init__(
        self,
        schema: Schema,
        num_scenarios: int,
        *,
        vocabulary_sizes: Mapping[str, int],
        hidden_dims: HiddenDims = (64, 32),
        activation: Activation = "relu",
        local_features: LocalFeatures = False,
        dropout: Dropout = 0.0,
        id_dropout: IdDropout = 0.0,
        backend: Backend = "auto",
    ) -> None:
        check_widths(hidden_dims=hidden_dims)
        super().__init__(schema, num_scenarios, vocabulary_sizes, dropout, id_dropout, local_features)
        self.networks = GroupedMLP(
            num_scenarios, self.input_dim, (*hidden_dims, 1), activation, "identity", backend=backend
        )

    def forward(self, batch: Batch) -> Logits:
        return Logits(self.networks(self.joined_inputs(batch), batch["scenario"]).squeeze(1))
