"""SAML: scenario-aware features, auxiliary network, branches that learn from each other (arXiv 2012.08952).

x_g, x_l   = scenario-aware embedding and attention
A^0        = [x_g ; e_t], e_t an embedding of the scenario, which the paper's form is without
A^L, V_t^L = auxiliary network and multi-branch network with mutual units
aux_logit  = A^L w_a + c_a
logit      = [V_t^L ; aux_logit] w_t + c_t
loss       = BCE(logit, y) + λ BCE(aux_logit, y)
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from saml_kernels import TrunkOutput
from saml_kernels.checks import check_choice, check_integer
from saml_kernels.layers import GroupedMLP, MultiBranchMLP
from saml_rec.data.schema import Schema
from saml_rec.errors import InputError
from saml_rec.models.base import ScenarioModel, binary_cross_entropy
from saml_rec.models.features import Batch
from saml_rec.models.hyperparameters import (
    Activation,
    AuxDims,
    AuxLossWeight,
    Backend,
    BranchInit,
    BranchViews,
    Dropout,
    ForeignType,
    Gate,
    HiddenDims,
    IdDropout,
    LocalFeatures,
    MutualLayers,
    ScenarioDim,
    Score,
    StopGradient,
    Temperature,
)

FOREIGN_TYPES = {"full": None, "bfloat16": torch.bfloat16, "int8": torch.int8}


class SAMLOutput(NamedTuple):
    """Logits of the own scenario's head and of the shared auxiliary head, (B,) each."""

    logit: Tensor
    aux_logit: Tensor


# torch.export.save writes it by this name, which must stay.
pytree._register_namedtuple(SAMLOutput, serialized_type_name="saml_rec.SAMLOutput")


class SAML(ScenarioModel):
    """The model of the paper on a schema's features.

    Args:
        schema: the features; those flagged scenario_aware get local tables.
        num_scenarios: M.
        vocabulary_sizes: per sparse and multi-valued feature the rows of its tables.
        hidden_dims, aux_dims, mutual_layers, gate, score, temperature, activation, stop_gradient, backend: of
            :class:`saml_kernels.layers.MultiBranchMLP`.
        foreign_type: ``foreign_dtype`` of that layer; "full" rounds nothing.
        aux_loss_weight: λ.
        scenario_dim: width of e_t; 0 leaves it out, as the paper does.
        branch_views: "own": a row's foreign branches read its own scenario's local tables, as in the paper; "each":
            each branch reads its own scenario's.
        branch_init: "independent": everything of a scenario is drawn on its own, as in the paper; "shared": branches,
            gates, heads and local tables of all scenarios start alike, so that foreign streams are comparable from the
            first step on.
        local_features, dropout, id_dropout: of :class:`saml_rec.models.features.ScenarioAwareFeatures`.
    """

    has_slow_scenarios = True
    scenario_decay = 100.0

    def __init__(
        self,
        schema: Schema,
        num_scenarios: int,
        *,
        vocabulary_sizes: Mapping[str, int],
        hidden_dims: HiddenDims = (64, 32),
        aux_dims: AuxDims | None = None,
        mutual_layers: MutualLayers = (1,),
        gate: Gate = "vector",
        score: Score = "ratio",
        temperature: Temperature = 0.1,
        activation: Activation = "relu",
        stop_gradient: StopGradient = True,
        foreign_type: ForeignType = "full",
        aux_loss_weight: AuxLossWeight = 1.0,
        scenario_dim: ScenarioDim = 8,
        branch_views: BranchViews = "own",
        branch_init: BranchInit = "shared",
        local_features: LocalFeatures = True,
        dropout: Dropout = 0.0,
        id_dropout: IdDropout = 0.0,
        backend: Backend = "auto",
    ) -> None:
        if not 0 <= aux_loss_weight < math.inf:
            raise InputError(f"aux_loss_weight must be finite and at least 0, got {aux_loss_weight}")
        check_choice("foreign_type", foreign_type, FOREIGN_TYPES)
        check_integer("scenario_dim", scenario_dim, 0)
        alike = branch_init == "shared"
        super().__init__(
            schema, num_scenarios, vocabulary_sizes, dropout, id_dropout, local_features, branch_views, alike
        )
        self.scenario_embedding = nn.Embedding(num_scenarios, scenario_dim) if scenario_dim else None
        self.trunk = MultiBranchMLP(
            num_scenarios,
            self.features.local_dim,
            self.features.global_dim + scenario_dim,
            hidden_dims,
            aux_dims,
            mutual_layers,
            gate=gate,
            score=score,
            temperature=temperature,
            activation=activation,
            stop_gradient=stop_gradient,
            foreign_dtype=FOREIGN_TYPES[foreign_type],
            backend=backend,
            branch_init=branch_init,
        )
        self.aux_head = nn.Linear(self.trunk.aux_dims[-1], 1)
        self.head = GroupedMLP(
            num_scenarios,
            self.trunk.hidden_dims[-1] + 1,
            (1,),
            activation="identity",
            backend=backend,
            init=branch_init,
        )
        self.aux_loss_weight = aux_loss_weight

    def forward(self, batch: Batch) -> SAMLOutput:
        own, aux, _ = self._trunk_output(batch)
        aux_logit = self.aux_head(aux)
        logit = self.head(torch.cat([own, aux_logit], dim=1), batch["scenario"])
        return SAMLOutput(logit.squeeze(1), aux_logit.squeeze(1))

    def mutual_weights(self, batch: Batch) -> dict[int, Tensor]:
        """Per mutual layer, counted from 1, every row's own row of α, (B, M), own entry 0."""
        scores = self._trunk_output(batch, return_scores=True).scores
        return {layer: rows for layer, rows in enumerate(scores or (), start=1) if rows is not None}

    def _trunk_output(self, batch: Batch, return_scores: bool = False) -> TrunkOutput:
        x_global, x_local = self.inputs(batch)
        if self.scenario_embedding is not None:
            x_global = torch.cat([x_global, self.scenario_embedding(batch["scenario"])], dim=1)
        output: TrunkOutput = self.trunk(x_local, x_global, batch["scenario"], return_scores=return_scores)
        return output

    def loss(self, batch: Batch) -> Tensor:
        """Mean over the batch of BCE(logit) + λ BCE(aux_logit), weighted where its rows have weights."""
        output = self(batch)
        own_loss = binary_cross_entropy(output.logit, batch)
        return own_loss + self.aux_loss_weight * binary_cross_entropy(output.aux_logit, batch)
