"""What a run keeps of its epochs: an entry for each, and where it is within the one that was begun."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saml_rec.errors import InputError
from saml_rec.models.registry import is_fitted
from saml_rec.training.options import TrainOptions


@dataclass
class Begun:
    """An epoch that was begun: losses of its steps and what each of them counts, seconds, random numbers."""

    losses: list[Tensor]
    weights: list[float]
    seconds: float
    random: Mapping[str, Tensor]

    @property
    def steps(self) -> int:
        return len(self.losses)

    def to_dict(self) -> dict[str, Any]:
        return {
            "losses": stacked(self.losses),
            "weights": self.weights,
            "seconds": self.seconds,
            "random": dict(self.random),
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> "Begun":
        """What ``to_dict`` gave.

        Raises:
            InputError: it did not give this.
            RuntimeError: the state of random numbers is none.
            TypeError, KeyError: parts are missing, or of other types.
        """
        losses, weights, seconds, random = (saved[name] for name in ("losses", "weights", "seconds", "random"))
        if not (isinstance(losses, Tensor) and losses.is_floating_point() and losses.dim() == 1):
            raise InputError("the losses of the epoch that was begun are no vector")
        if not (isinstance(weights, list) and all(is_number(each) and each >= 0 for each in weights)):
            raise InputError("the weights of the epoch that was begun must be finite numbers of at least 0")
        if len(losses) != len(weights):
            raise InputError(f"the epoch that was begun has {len(losses)} losses of {len(weights)} steps")
        if not is_number(seconds) or seconds < 0:
            raise InputError("the seconds of the epoch that was begun must be a finite number of at least 0")
        torch.Generator().set_state(random["cpu"])
        return cls(list(losses), weights, seconds, random)


def check_history(history: Sequence[Any]) -> None:
    """Looks at what is read of a history.

    Raises:
        InputError: an entry is not as training wrote it.
    """
    for number, entry in enumerate(history, 1):
        valid = entry.get("valid") if isinstance(entry, Mapping) else None
        if not (
            isinstance(valid, Mapping)
            and entry.get("epoch") == number
            and all(is_number(entry.get(name)) for name in ("train_loss", "seconds", "rows_per_second"))
            and all(name in valid and (valid[name] is None or is_number(valid[name])) for name in ("logloss", "auc"))
        ):
            raise InputError(f"entry {number} of the history is not as training writes it")


def is_number(value: object) -> bool:
    """Whether it is a finite number, booleans left out."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def best_epoch(history: Sequence[Mapping[str, Any]]) -> int:
    """The first epoch with the lowest validation log loss, from 1; the last one if there are no validation rows."""
    losses = [entry["valid"]["logloss"] for entry in history]
    return len(losses) if not losses or None in losses else losses.index(min(losses)) + 1


def stopped_by(history: Sequence[Mapping[str, Any]], options: TrainOptions) -> str | None:
    """What ends training.

    Returns:
        "patience": as many epochs without a better one; "epochs": all are done; "fit": a fitted model is done; or None.
    """
    if is_fitted(options.model):
        return "fit" if history else None
    if 0 < options.patience <= len(history) - best_epoch(history):
        return "patience"
    return "epochs" if len(history) >= options.epochs else None


def is_cut_off(history: Sequence[Mapping[str, Any]], options: TrainOptions) -> bool:
    """Training ended at the last epoch while that was still the best, by validation rows."""
    return (
        stopped_by(history, options) == "epochs"
        and best_epoch(history) == len(history)
        and history[-1]["valid"]["logloss"] is not None
    )


def stacked(losses: Sequence[Tensor]) -> Tensor:
    """(n,) on the CPU: losses of as many steps."""
    return torch.stack([loss.cpu() for loss in losses]) if losses else torch.empty(0)
