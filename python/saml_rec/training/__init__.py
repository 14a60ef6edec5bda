"""Training with early stopping and exact resumption."""

from saml_rec.training.loop import RunResult, best_epoch, stream_seed, time_backends, train
from saml_rec.training.options import TrainOptions

__all__ = ["RunResult", "TrainOptions", "best_epoch", "stream_seed", "time_backends", "train"]
