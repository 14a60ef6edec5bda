"""Models that are fitted as a whole and not by steps: what a network for many scenarios has to beat.

Their state is in buffers, so that runs keep and load it as they do a network's weights.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from saml_rec.data.preparation import Table
from saml_rec.data.schema import Schema
from saml_rec.errors import InputError
from saml_rec.models.base import Logits, binary_cross_entropy
from saml_rec.models.features import Batch, check_scenario_ids

ROWS_AT_ONCE = 2**14


class FittedModel(nn.Module, ABC):
    """A model with :meth:`fit` in place of steps of gradients.

    Args:
        schema: the features.
        num_scenarios: M.
        vocabulary_sizes: per sparse and multi-valued feature the number of its values.
    """

    def __init__(self, schema: Schema, num_scenarios: int, vocabulary_sizes: Mapping[str, int]) -> None:
        super().__init__()
        self.schema = schema
        self.num_scenarios = num_scenarios
        self.vocabulary_sizes = dict(vocabulary_sizes)

    @property
    @abstractmethod
    def num_parameters(self) -> int:
        """Numbers that were fitted."""

    @abstractmethod
    def fit(self, train: Table, valid: Table, seed: int) -> dict[str, Any]:
        """Fits the rows of ``train``; what has to be chosen is chosen on those of ``valid``, by log loss.

        Returns:
            What was tried and chosen, as values that JSON can hold.

        Raises:
            InputError: rows that cannot be fitted, or none to choose by.
        """

    @abstractmethod
    def forward(self, batch: Batch) -> Logits:
        """A batch as EncodedTable makes it → logits (B,) float64."""

    def loss(self, batch: Batch) -> Tensor:
        """Mean binary cross entropy over the batch, weighted where its rows have weights."""
        return binary_cross_entropy(self(batch).logit, {**batch, "label": batch["label"].double()})

    def check(self, batch: Batch) -> None:
        """InputError for scenario ids that do not fit."""
        check_scenario_ids(batch["scenario"], self.num_scenarios)


def gathered(
    table: Table, columns: Callable[[Batch], Any]
) -> tuple[list[Any], NDArray[np.float32], NDArray[np.float32] | None]:
    """What ``columns`` makes of the table's batches, in order, with labels (N,) and, where rows have some, weights."""
    parts, labels, weights = [], [], []
    for batch in table.batches(ROWS_AT_ONCE):
        parts.append(columns(batch))
        labels.append(batch["label"].numpy())
        if "weight" in batch:
            weights.append(batch["weight"].numpy())
    return parts, np.concatenate(labels), np.concatenate(weights) if weights else None


def require_both_labels(labels: Any, name: str) -> None:
    """InputError unless some of the labels are 0 and some 1."""
    if len(labels) == 0 or labels.min() == labels.max():
        raise InputError(f"model {name} needs training rows of both labels, got {len(labels)} rows of one")
