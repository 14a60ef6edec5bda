"""Training with early stopping and exact resumption."""

from saml_rec.training.history import best_epoch, is_cut_off, stopped_by
from saml_rec.training.loop import RunResult, stream_seed, time_backends, train, train_and_validate
from saml_rec.training.options import TrainOptions
from saml_rec.training.trackers import MLflow, TensorBoard, Tracker

__all__ = [
    "MLflow",
    "RunResult",
    "TensorBoard",
    "Tracker",
    "TrainOptions",
    "best_epoch",
    "is_cut_off",
    "stopped_by",
    "stream_seed",
    "time_backends",
    "train",
    "train_and_validate",
]
