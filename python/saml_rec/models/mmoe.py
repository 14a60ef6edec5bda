"""MMoE: shared experts, a gate and a tower for each scenario (KDD 2018); the usual multi-task baseline."""

from collections.abc import Mapping

from saml_kernels.layers import GroupedMLP, MixtureOfExperts
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
    NumExperts,
    TowerDims,
)


class MMoE(ScenarioModel):
    """MMoE on a schema's features.

    Args:
        schema: the features.
        num_scenarios: M.
        vocabulary_sizes: per sparse and multi-valued feature the rows of its tables.
        num_experts, hidden_dims: experts, of :class:`saml_kernels.layers.MixtureOfExperts`.
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
        num_experts: NumExperts = 4,
        hidden_dims: HiddenDims = (64,),
        tower_dims: TowerDims = (32,),
        activation: Activation = "relu",
        local_features: LocalFeatures = False,
        dropout: Dropout = 0.0,
        id_dropout: IdDropout = 0.0,
        backend: Backend = "auto",
    ) -> None:
        check_widths(hidden_dims=hidden_dims, tower_dims=tower_dims)
        if not hidden_dims:
            raise InputError("hidden_dims must name at least one layer of the experts, got none")
        super().__init__(schema, num_scenarios, vocabulary_sizes, dropout, id_dropout, local_features)
        self.bottom = MixtureOfExperts(num_experts, self.input_dim, hidden_dims, num_scenarios, activation, backend)
        self.towers = GroupedMLP(num_scenarios, hidden_dims[-1], (*tower_dims, 1), activation, "identity", backend)

    def forward(self, batch: Batch) -> Logits:
        scenario = batch["scenario"]
        x = self.bottom(self.joined_inputs(batch), scenario)
        return Logits(self.towers(x, scenario).squeeze(1))
