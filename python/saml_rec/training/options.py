"""How to train."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from saml_rec.data.schema import Schema
from saml_rec.errors import InputError, did_you_mean, shortened, shown
from saml_rec.models.construction import resolve_device, resolve_model_options
from saml_rec.models.registry import is_fitted
from saml_rec.models.tables import TableOptions, resolve_engine
from saml_rec.processes import ALONE, Processes

STATISTICS_OF_A_BATCH = ("star",)
"""Models whose output for a row depends on the other rows of its batch."""


@dataclass(frozen=True)
class TrainOptions:
    """How to train.

    Args:
        model: a name in :data:`saml_rec.models.MODELS`.
        epochs: at most this many passes over the training rows.
        batch_size: rows a step.
        learning_rate, weight_decay: of AdamW.
        scenario_rate: learning rate of the parameters of single scenarios, as a share of ``learning_rate``; None: 1/√M
            for SAML, 1 for other models (:mod:`saml_rec.training.scenario_parameters`).
        scenario_decay: decay of what sets the parameters of single scenarios, but for biases, apart from their mean
            over scenarios, of which a step takes ``learning_rate * scenario_decay``; None: the model's own, 100 for
            SAML and PEPNet but at most ``0.1 / learning_rate``, 0 for others.
        patience: epochs without a better validation log loss after which training stops; 0 never stops early.
        seed: of the initial weights, shuffling and dropout; also of the split, if the data were prepared with it.
        device: "auto" (a GPU if torch sees one), or what :class:`torch.device` takes.
        tables: where embedding tables are kept, "auto", "dense", "sparse" or "fbgemm" (:mod:`saml_rec.models.tables`).
        table_optimizer, table_learning_rate: of tables that are not dense; None for the optimizer's own default.
        table_learning_rates: of single features' tables, by the feature's name.
        model_options: hyperparameters of the model by keyword; the model's defaults for the others.

    Raises:
        InputError: a value out of range.
    """

    model: str = "saml"
    epochs: int = 30
    batch_size: int = 1024
    learning_rate: float = 1e-3
    weight_decay: float = 1.0
    scenario_rate: float | None = None
    scenario_decay: float | None = None
    patience: int = 3
    seed: int = 0
    device: str = "auto"
    tables: str = "auto"
    table_optimizer: str = "rowwise_adagrad"
    table_learning_rate: float | None = None
    table_learning_rates: Mapping[str, float] = field(default_factory=dict)
    model_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, smallest in (("epochs", 1), ("batch_size", 1), ("patience", 0), ("seed", 0)):
            if getattr(self, name) < smallest:
                raise InputError(f"{name} must be at least {smallest}, got {getattr(self, name)}")
        if not 0 < self.learning_rate < math.inf:
            raise InputError(f"learning_rate must be above 0 and finite, got {self.learning_rate}")
        if self.scenario_rate is not None and not 0 <= self.scenario_rate < math.inf:
            raise InputError(f"scenario_rate must be at least 0 and finite, got {self.scenario_rate}")
        if self.scenario_decay is not None and not 0 <= self.learning_rate * self.scenario_decay <= 1:
            raise InputError(
                f"scenario_decay must be from 0 to 1 / learning_rate, here {1 / self.learning_rate:g}, of which a step "
                f"takes all that sets scenarios apart, got {self.scenario_decay}"
            )
        if not 0 <= self.weight_decay < math.inf:
            raise InputError(f"weight_decay must be at least 0 and finite, got {self.weight_decay}")
        # What "auto" may stand for is known with the vocabularies; the rest is refused now.
        self.table_options("sparse" if self.tables == "auto" else self.tables)

    def table_options(self, engine: str) -> TableOptions:
        """How tables are kept by an engine.

        Raises:
            InputError: as :class:`saml_rec.models.tables.TableOptions`.
        """
        return TableOptions(engine, self.table_optimizer, self.table_learning_rate, self.table_learning_rates)

    def check_features(self, schema: Schema) -> None:
        """Refuses learning rates of tables that the schema's features do not have.

        Raises:
            InputError: with the name, and those that have one.
        """
        known = [feature.name for kind in ("sparse", "multi") for feature in schema.of_kind(kind)]
        for name in self.table_learning_rates:
            if name not in known:
                raise InputError(
                    f"table learning rate of {shown(name)}{did_you_mean(name, known)}: features with a table are "
                    f"{shortened(', '.join(known)) or 'none'}"
                )

    def resolved(self, processes: Processes = ALONE) -> "TrainOptions":
        """With the device chosen and every hyperparameter of the model filled in.

        Raises:
            InputError: no such model or device, an option that the model does not take, or tables that cannot be on
                the device.
        """
        device = resolve_device(self.device, processes)
        # Refuses an engine that does not run there; what "auto" stands for is known with the vocabularies.
        resolve_engine(self.tables, self.table_optimizer, 0, device, processes)
        if processes.are_several and self.model in STATISTICS_OF_A_BATCH:
            raise InputError(
                f"model {self.model} normalises by the statistics of a batch, of which each of {processes.count} "
                "processes has a part only; train it in one"
            )
        if processes.are_several and is_fitted(self.model):
            raise InputError(f"model {self.model} is fitted in one process, not in {processes.count}")
        if processes.count > self.batch_size:
            raise InputError(f"batch_size {self.batch_size} is too small for {processes.count} processes")
        return dataclasses.replace(
            self,
            device=str(device),
            model_options=resolve_model_options(self.model, self.model_options),
        )

    def to_dict(self) -> dict[str, Any]:
        """As values that JSON can hold."""
        options = {name: _plain(value) for name, value in self.model_options.items()}
        return {**dataclasses.asdict(self), "model_options": options}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
