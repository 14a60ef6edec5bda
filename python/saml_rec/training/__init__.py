"""Training with early stopping and exact resumption."""

from saml_rec.training.loop import (
    RunResult,
    best_epoch,
    is_cut_off,
    stopped_by,
    stream_seed,
    time_backends,
    train,
    train_and_validate,
)
from saml_rec.training.options import TrainOptions

__all__ = [
    "RunResult",
    "TrainOptions",
    "best_epoch",
    "is_cut_off",
    "stopped_by",
    "stream_seed",
    "time_backends",
    "train",
    "train_and_validate",
]
