"""What a trained model's mutual units weigh: own rows of α, averaged over the rows of each scenario."""

from typing import Protocol, cast, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from saml_rec.data.preparation import Table
from saml_rec.evaluation.scoring import SCORING_BATCH_SIZE, to_device
from saml_rec.models.features import Batch


@runtime_checkable
class HasMutualUnit(Protocol):
    """A model whose scenarios weigh each other's streams."""

    def mutual_weights(self, batch: Batch) -> dict[int, Tensor]:
        """Per mutual layer, counted from 1, every row's own row of α, (B, M), own entry 0."""


def mean_mutual_weights(model: nn.Module, table: Table, device: torch.device) -> dict[int, NDArray[np.float64]] | None:
    """The learned M×M weights of every mutual layer.

    Args:
        model: in evaluation mode, on ``device``.
        table: the rows to average over.
        device: of the model.

    Returns:
        Per mutual layer (M, M) float64: row t is the mean of α_t over the rows of scenario t, so it sums to 1 and its
        own entry is 0; NaN for a scenario without a row. None for a model without a mutual unit.
    """
    if not isinstance(model, HasMutualUnit):
        return None
    sums: dict[int, Tensor] = {}
    with torch.no_grad():
        for batch in table.batches(SCORING_BATCH_SIZE):
            scenario = batch["scenario"]
            for layer, rows in cast(HasMutualUnit, model).mutual_weights(to_device(batch, device)).items():
                total = sums.setdefault(layer, torch.zeros(table.num_scenarios, table.num_scenarios).double())
                total.index_add_(0, scenario, rows.double().cpu())
    counts = table.scenario_counts().double().unsqueeze(1)
    return {layer: (total / counts).numpy() for layer, total in sums.items()} or None
