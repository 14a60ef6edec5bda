"""HMoE: experts under a gate for each scenario, and a mixture of all scenarios' scores in label space (CIKM 2020).

h_j(x)  = Σ_e softmax(G_j x)_e E_e(x)        experts on the global features x
H_t(x)  = W_tt(x) S_t(x) + Σ_{j≠t} W_tj(x) sg(S_j(x)),   S_j = sigmoid of scenario j's network on h_j(x)
loss    = BCE(H_t, y)
"""

from collections.abc import Mapping

from saml_kernels.layers import MixtureOfExperts, ScoreMixture
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


class HMoE(ScenarioModel):
    """HMoE on a schema's features.

    Args:
        schema: the features.
        num_scenarios: M.
        vocabulary_sizes: per sparse and multi-valued feature the rows of its tables.
        num_experts, hidden_dims: experts, of :class:`saml_kernels.layers.MixtureOfExperts`.
        tower_dims: widths of a scenario network's hidden layers.
        activation, backend: of both.
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
        width = self.input_dim
        self.bottom = MixtureOfExperts(num_experts, width, hidden_dims, num_scenarios, activation, backend)
        self.mixture = ScoreMixture(
            num_scenarios, hidden_dims[-1], tower_dims, activation, backend=backend, weight_dim=width
        )

    def forward(self, batch: Batch) -> Logits:
        x, scenario = self.joined_inputs(batch), batch["scenario"]
        return Logits(self.mixture(self.bottom.views(x, scenario), scenario, weight_input=x))
