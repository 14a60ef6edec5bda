"""Logistic regression on one-hot features, by scikit-learn: the simplest thing that reads everything a network reads.

logit = b + ⟨w_dense, dense⟩ + w_scenario[t] + Σ_features w_f[id]

The weights of a multi-valued feature or a sequence are averaged over its values, as networks average embeddings: their
sum would let a history outweigh everything else. With local features there is also a weight for every pair of scenario
and value of a feature flagged scenario_aware, w_f,t[id].
"""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor

from saml_rec.data.preparation import Table
from saml_rec.data.schema import Schema
from saml_rec.errors import InputError
from saml_rec.models.base import Logits
from saml_rec.models.features import PADDING_ID, Batch
from saml_rec.models.fitted import ROWS_AT_ONCE, FittedModel, gathered, require_both_labels
from saml_rec.models.hyperparameters import InversePenalties, LocalFeatures

MAX_ITERATIONS = 5000
TOLERANCE = 1e-6
"""Largest gradient of the mean loss where fitting ends; scikit-learn's own, 1e-4, shows in the weights' third digit."""


@dataclass(frozen=True)
class _Block:
    """Columns of one feature.

    Args:
        feature: name of its ids in a batch.
        start: its first column.
        size: values it may have.
        is_crossed: whether every scenario has columns of its own.
    """

    feature: str
    start: int
    size: int
    is_crossed: bool = False

    def columns(self, batch: Batch) -> Tensor:
        """(B, K) int64, K values a row."""
        ids: Tensor = batch["features"][self.feature]
        ids = ids.view(len(ids), -1)
        return self.start + ids + (batch["scenario"].unsqueeze(1) * self.size if self.is_crossed else 0)

    def shares(self, batch: Batch) -> Tensor:
        """(B, K) float64: 1 / values that are no padding, 0 for padding."""
        ids: Tensor = batch["features"][self.feature]
        kept = (ids.view(len(ids), -1) != PADDING_ID).double()
        return kept / kept.sum(dim=1, keepdim=True).clamp(min=1)


class LogisticRegression(FittedModel):
    """Logistic regression on a schema's features.

    Args:
        schema: the features.
        num_scenarios: M.
        vocabulary_sizes: per sparse and multi-valued feature the number of its values.
        inverse_penalties: C of scikit-learn, the inverse strength of the L2 penalty; of several the one with the lowest
            log loss on the validation rows is kept.
        local_features: whether features flagged scenario_aware have weights per scenario too.

    Raises:
        InputError: no inverse penalty, or one that is not positive and finite.
    """

    weight: Tensor

    def __init__(
        self,
        schema: Schema,
        num_scenarios: int,
        *,
        vocabulary_sizes: Mapping[str, int],
        inverse_penalties: InversePenalties = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
        local_features: LocalFeatures = False,
    ) -> None:
        if not inverse_penalties or not all(0 < value < math.inf for value in inverse_penalties):
            raise InputError(f"inverse_penalties must be positive and finite, at least one, got {inverse_penalties}")
        super().__init__(schema, num_scenarios, vocabulary_sizes)
        self.inverse_penalties = tuple(inverse_penalties)
        self._dense = 2 * len(schema.of_kind("dense"))
        self._blocks: list[_Block] = []
        columns = self._dense + num_scenarios
        for feature in (*schema.of_kind("sparse"), *schema.of_kind("multi"), *schema.of_kind("sequence")):
            size = vocabulary_sizes[feature.item or feature.name]
            self._blocks.append(_Block(feature.name, columns, size))
            columns += size
            if local_features and feature.scenario_aware:
                self._blocks.append(_Block(feature.name, columns, size, is_crossed=True))
                columns += num_scenarios * size
        # The last one is b.
        self.register_buffer("weight", torch.zeros(columns + 1, dtype=torch.float64))

    @property
    def num_parameters(self) -> int:
        return len(self.weight)

    def forward(self, batch: Batch) -> Logits:
        self.check(batch)
        of_dense, of_scenario = self.weight[: self._dense], self.weight[self._dense :]
        logit = self.weight[-1] + batch["dense"].double() @ of_dense + of_scenario[batch["scenario"]]
        for block in self._blocks:
            logit = logit + (self.weight[block.columns(batch)] * block.shares(batch)).sum(dim=1)
        return Logits(logit)

    def one_hot(self, batch: Batch) -> sp.csr_matrix:
        """The batch as rows of a matrix whose product with the weights, b apart, is the logit."""
        rows = torch.arange(len(batch["scenario"]))
        scenario = rows, self._dense + batch["scenario"], torch.ones(len(rows), dtype=torch.float64)
        parts = [scenario]
        for block in self._blocks:
            columns, shares = block.columns(batch), block.shares(batch)
            kept = shares > 0
            parts.append((rows.unsqueeze(1).expand_as(columns)[kept], columns[kept], shares[kept]))
        at, places, values = (torch.cat(each).numpy() for each in zip(*parts, strict=True))
        width = len(self.weight) - 1
        dense = sp.csr_matrix(batch["dense"].double().numpy())
        dense.resize(len(rows), width)
        return sp.csr_matrix((values, (at, places)), shape=(len(rows), width)) + dense

    def fit(self, train: Table, valid: Table, seed: int) -> dict[str, Any]:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression as Regression

        if len(self.inverse_penalties) > 1 and len(valid) == 0:
            raise InputError("model logistic_regression chooses on validation rows, and there are none; give it one C")
        x, labels, weights = self._matrix(train)
        require_both_labels(labels, "logistic_regression")
        tried = []
        # From the strongest penalty on, each from where the last one ended.
        regression = Regression(solver="lbfgs", max_iter=MAX_ITERATIONS, tol=TOLERANCE, warm_start=True)
        for c in sorted(self.inverse_penalties):
            regression.C = c
            with warnings.catch_warnings():
                warnings.simplefilter("error", ConvergenceWarning)
                try:
                    regression.fit(x, labels, sample_weight=weights)
                except ConvergenceWarning as warning:
                    raise InputError(f"logistic regression with C = {c} did not converge: {warning}") from warning
            weight = np.append(regression.coef_[0], regression.intercept_)
            tried.append((self._log_loss(weight, valid), c, weight))
        _, c, weight = min(tried, key=lambda trial: trial[0] or 0.0)
        self.weight.copy_(torch.from_numpy(weight))
        ends = (min(self.inverse_penalties), max(self.inverse_penalties))
        return {
            "inverse_penalty": c,
            "is_at_end_of_grid": len(tried) > 1 and c in ends,
            "tried": [{"inverse_penalty": each, "valid_logloss": found} for found, each, _ in tried],
        }

    def _matrix(self, table: Table) -> tuple[sp.csr_matrix, NDArray[Any], NDArray[Any] | None]:
        """One-hot features, labels and weights of all rows."""
        parts, labels, weights = gathered(table, self.one_hot)
        return sp.vstack(parts, format="csr"), labels, weights

    def _log_loss(self, weight: NDArray[np.float64], table: Table) -> float | None:
        losses, total = 0.0, 0.0
        for batch in table.batches(ROWS_AT_ONCE):
            logits = self.one_hot(batch) @ weight[:-1] + weight[-1]
            of_rows = batch["weight"].double().numpy() if "weight" in batch else np.ones(len(logits))
            # −log of the probability of what happened.
            signs = 1 - 2 * batch["label"].double().numpy()
            losses += float(of_rows @ np.logaddexp(0, signs * logits))
            total += float(of_rows.sum())
        return losses / total if total else None
