"""What the models have in common: features of a schema, a logit of every sample's own scenario, a loss."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import chain, islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, nn

from saml_kernels.checks import check_integer
from saml_rec.data.schema import Schema
from saml_rec.models.features import Batch, ScenarioAwareFeatures


class Logits(NamedTuple):
    """Logit of every sample's own scenario, (B,)."""

    logit: Tensor


# torch.export.save writes it by this name, which must stay.
pytree._register_namedtuple(Logits, serialized_type_name="saml_rec.Logits")


def binary_cross_entropy(logit: Tensor, batch: Batch) -> Tensor:
    """Mean over the rows of a batch, weighted where they have weights; 0 where all weights are 0.

    Args:
        logit: (B,).
        batch: with ``label`` (B,) and, where rows have weights, ``weight`` (B,).
    """
    if "weight" not in batch:
        return F.binary_cross_entropy_with_logits(logit, batch["label"])
    weight = batch["weight"]
    total = weight.sum()
    losses = F.binary_cross_entropy_with_logits(logit, batch["label"], weight=weight, reduction="sum")
    return losses / total.where(total > 0, 1)


class ScenarioModel(nn.Module, ABC):
    """A recommender for several scenarios. A subclass builds its network after this and gives :meth:`forward`.

    Its own parameters beyond these are keyword-only and annotated as in :mod:`saml_rec.models.hyperparameters`: they
    are the model's hyperparameters.

    Args:
        schema: the features.
        num_scenarios: M.
        vocabulary_sizes: per sparse and multi-valued feature the rows of its tables.
        dropout, id_dropout: of :class:`saml_rec.models.features.ScenarioAwareFeatures`.
        local_features: whether features flagged scenario_aware get local tables.
        branch_views, alike: of :class:`saml_rec.models.features.ScenarioAwareFeatures`.

    Raises:
        InputError: dropout or id_dropout outside [0, 1).
    """

    has_scenario_parameters = True
    """Whether it has parameters of single scenarios other than embeddings."""
    has_slow_scenarios = False
    """Whether parameters of single scenarios learn 1/√M as fast as the others, unless a rate is given."""
    scenario_decay = 0.0
    """Decay of what sets parameters of single scenarios apart from their mean, unless one is given."""

    def __init__(
        self,
        schema: Schema,
        num_scenarios: int,
        vocabulary_sizes: Mapping[str, int],
        dropout: float,
        id_dropout: float,
        local_features: bool,
        branch_views: str = "own",
        alike: bool = False,
    ) -> None:
        super().__init__()
        self.features = ScenarioAwareFeatures(
            schema, num_scenarios, vocabulary_sizes, dropout, local_features, id_dropout, branch_views, alike
        )

    @property
    def input_dim(self) -> int:
        """Width of :meth:`joined_inputs`."""
        return self.features.global_dim + self.features.local_dim

    def inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """x_g (B, global_dim) and x_l (B, local_dim), in the network's type: dense values are float32 always."""
        network = chain.from_iterable(child.parameters() for child in islice(self.children(), 1, None))
        dtype = next(network).dtype
        x_global, x_local = self.features(batch)
        return x_global.to(dtype), x_local.to(dtype)

    def joined_inputs(self, batch: Batch) -> Tensor:
        """x = [x_g ; x_l], (B, input_dim)."""
        return torch.cat(self.inputs(batch), dim=1)

    @abstractmethod
    def forward(self, batch: Batch) -> Any:
        """A batch as EncodedTable makes it → a NamedTuple whose ``logit`` is (B,)."""

    def loss(self, batch: Batch) -> Tensor:
        """Mean binary cross entropy over the batch, weighted where its rows have weights."""
        return binary_cross_entropy(self(batch).logit, batch)


def check_widths(**widths: Sequence[int]) -> None:
    """ValueError unless all are positive integers; by the option's name."""
    for option, each in widths.items():
        for width in each:
            check_integer(f"every width in {option}", width, 1)
