"""Shared bottom: one network for all scenarios and a small tower for each; the plain multi-scenario baseline."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from saml_kernels.activations import ACTIVATIONS
from saml_kernels.checks import check_integer
from saml_kernels.layers import GroupedMLP
from saml_rec.data.schema import Schema
from saml_rec.models.features import Batch, ScenarioAwareFeatures


class SharedBottomOutput(NamedTuple):
    """Logit of the own scenario's tower, (B,)."""

    logit: Tensor


class SharedBottom(nn.Module):
    """Global features only, a shared MLP, and a tower per scenario.

    Args:
        schema: the features; scenario_aware is not used.
        num_scenarios: M.
        vocabulary_sizes: per sparse and multi-valued feature the rows of its table.
        hidden_dims: widths of the shared network.
        tower_dims: widths of a tower's hidden layers; () makes it one linear layer.
        activation: after every hidden layer.
        dropout: of the features.
        backend: of :class:`saml_kernels.layers.GroupedMLP`.
    """

    def __init__(
        self,
        schema: Schema,
        num_scenarios: int,
        *,
        vocabulary_sizes: Mapping[str, int],
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
        self.features = ScenarioAwareFeatures(schema, num_scenarios, vocabulary_sizes, dropout, local=False)
        widths = (self.features.global_dim, *hidden_dims)
        self.bottom = nn.ModuleList(nn.Linear(inputs, outputs) for inputs, outputs in pairwise(widths))
        self.towers = GroupedMLP(
            num_scenarios,
            widths[-1],
            (*tower_dims, 1),
            activation=activation,
            output_activation="identity",
            backend=backend,
        )

    def forward(self, batch: Batch) -> SharedBottomOutput:
        # Dense values are float32 whatever the model's type is.
        shared = self.features(batch)[0].to(self.towers.weights[0].dtype)
        for layer in self.bottom:
            shared = ACTIVATIONS[self.towers.activation].function(layer(shared))
        return SharedBottomOutput(self.towers(shared, batch["scenario"]).squeeze(1))

    def loss(self, batch: Batch) -> Tensor:
        """Mean binary cross entropy over the batch."""
        return F.binary_cross_entropy_with_logits(self(batch).logit, batch["label"])
