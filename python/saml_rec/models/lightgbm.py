"""Boosted trees by LightGBM, the extra saml-kernels[lightgbm].

A tree reads numbers and categories. The scenario, every sparse feature and the last item of every sequence are
categories; of a multi-valued feature there is a column for each of its values, 1 where a row has it, or, where it may
have more than MOST_VALUES, how many values the row has and the last one as a category; of a sequence also its length
and how often the target item occurs in it.
"""

import math
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saml_rec.data.preparation import Table
from saml_rec.data.schema import Schema
from saml_rec.errors import InputError
from saml_rec.models.base import Logits
from saml_rec.models.features import PADDING_ID, Batch
from saml_rec.models.fitted import FittedModel, gathered, require_both_labels
from saml_rec.models.hyperparameters import NumLeaves, NumTrees, TreeRate

MOST_VALUES = 256
PATIENCE = 50
"""Trees without a lower log loss on the validation rows, after which boosting stops."""


class LightGBM(FittedModel):
    """Boosted trees on a schema's features.

    Args:
        schema: the features.
        num_scenarios: M.
        vocabulary_sizes: per sparse and multi-valued feature the number of its values.
        num_trees: at most; fewer where the validation rows say so.
        num_leaves: of a tree at most.
        tree_rate: shrinkage of each tree.

    Raises:
        InputError: LightGBM is not installed, or an option out of range.
    """

    booster: Tensor

    def __init__(
        self,
        schema: Schema,
        num_scenarios: int,
        *,
        vocabulary_sizes: Mapping[str, int],
        num_trees: NumTrees = 1000,
        num_leaves: NumLeaves = 31,
        tree_rate: TreeRate = 0.05,
    ) -> None:
        if not is_installed():
            raise InputError("LightGBM is not installed; pip install 'saml-kernels[lightgbm]'")
        for name, value, smallest in (("num_trees", num_trees, 1), ("num_leaves", num_leaves, 2)):
            if value < smallest:
                raise InputError(f"{name} must be at least {smallest}, got {value}")
        if not 0 < tree_rate < math.inf:
            raise InputError(f"tree_rate must be above 0 and finite, got {tree_rate}")
        super().__init__(schema, num_scenarios, vocabulary_sizes)
        self.num_trees, self.num_leaves, self.tree_rate = num_trees, num_leaves, tree_rate
        self._loaded: Any = None
        # LightGBM's own text of the trees.
        self.register_buffer("booster", torch.empty(0, dtype=torch.uint8))

    @property
    def num_parameters(self) -> int:
        return sum(tree["num_leaves"] for tree in self._trees().dump_model()["tree_info"])

    def forward(self, batch: Batch) -> Logits:
        self.check(batch)
        found = self._trees().predict(self.columns(batch), raw_score=True, num_threads=torch.get_num_threads())
        return Logits(torch.from_numpy(np.asarray(found, dtype=np.float64)).to(batch["scenario"].device))

    def columns(self, batch: Batch) -> NDArray[np.float32]:
        """(B, columns): categories first."""
        ids = {name: each.cpu() for name, each in batch["features"].items()}
        rows = len(batch["scenario"])
        categories = [batch["scenario"].cpu(), *(ids[feature.name] for feature in self.schema.of_kind("sparse"))]
        numbers = [batch["dense"].cpu().float()]
        for feature in self.schema.of_kind("multi"):
            if self.vocabulary_sizes[feature.name] > MOST_VALUES:
                length, last = _length_and_last(ids[feature.name])
                categories.append(last)
                numbers.append(length.unsqueeze(1).float())
            else:
                present = torch.zeros(rows, self.vocabulary_sizes[feature.name]).scatter_(1, ids[feature.name], 1.0)
                numbers.append(present[:, PADDING_ID + 1 :])
        for feature in self.schema.of_kind("sequence"):
            assert feature.item is not None
            length, last = _length_and_last(ids[feature.name])
            categories.append(last)
            repeats = ((ids[feature.name] == ids[feature.item].unsqueeze(1)) & (ids[feature.name] != PADDING_ID)).sum(1)
            numbers.append(torch.stack([length, repeats], dim=1).float())
        return torch.cat([torch.stack(categories, dim=1).float(), *numbers], dim=1).numpy()

    def fit(self, train: Table, valid: Table, seed: int) -> dict[str, Any]:
        import lightgbm

        x, labels, weights = self._matrix(train)
        require_both_labels(labels, "lightgbm")
        wide = [f for f in self.schema.of_kind("multi") if self.vocabulary_sizes[f.name] > MOST_VALUES]
        listed = [*self.schema.of_kind("sparse"), *wide, *self.schema.of_kind("sequence")]
        categorical = list(range(1 + len(listed)))
        rows = lightgbm.Dataset(x, labels, weight=weights, categorical_feature=categorical)
        stopping: dict[str, Any] = {}
        if len(valid):
            to_stop_by = self._matrix(valid)
            stopping["valid_sets"] = [rows.create_valid(to_stop_by[0], to_stop_by[1], weight=to_stop_by[2])]
            stopping["callbacks"] = [lightgbm.early_stopping(PATIENCE, verbose=False)]
        options = {
            "objective": "binary",
            "learning_rate": self.tree_rate,
            "num_leaves": self.num_leaves,
            "seed": seed,
            "deterministic": True,
            "force_row_wise": True,
            "num_threads": torch.get_num_threads(),
            "verbosity": -1,
        }
        trees = lightgbm.train(options, rows, self.num_trees, **stopping)
        kept = trees.best_iteration if len(valid) else trees.num_trees()
        text = trees.model_to_string(num_iteration=kept)
        self._set(torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8))
        return {"trees": kept, "is_at_most_trees": kept == self.num_trees}

    def _matrix(self, table: Table) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any] | None]:
        """Columns, labels and weights of all rows."""
        parts, labels, weights = gathered(table, self.columns)
        return np.concatenate(parts), labels, weights

    def _trees(self) -> Any:
        import lightgbm

        if not len(self.booster):
            raise InputError("model lightgbm has not been fitted")
        if self._loaded is None:
            text = self.booster.cpu().numpy().tobytes().decode()
            self._loaded = lightgbm.Booster(model_str=text)
        return self._loaded

    def _set(self, booster: Tensor) -> None:
        self.booster = booster.clone()
        self._loaded = None

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        # Its size is known from the file alone.
        if (found := state_dict.get(f"{prefix}booster")) is not None:
            self._set(found)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loaded": None}


def _length_and_last(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Of ids (B, K), padded at the end: how many there are in a row, and the last one; (B,) each."""
    length = (ids != PADDING_ID).sum(dim=1)
    return length, ids.gather(1, (length - 1).clamp(min=0).unsqueeze(1)).squeeze(1)


def is_installed() -> bool:
    """Whether LightGBM is."""
    return find_spec("lightgbm") is not None
