"""Hyperparameters of several models, searched for with the same effort for each; Optuna is the extra ``tune``."""

from saml_rec.tuning.outcome import Tuned, load_tuned, tried_table, tuning_table
from saml_rec.tuning.search import FILE, check_tuning_directory, require_optuna, tune
from saml_rec.tuning.space import space_of

__all__ = [
    "FILE",
    "Tuned",
    "check_tuning_directory",
    "load_tuned",
    "require_optuna",
    "space_of",
    "tried_table",
    "tune",
    "tuning_table",
]
