"""Models by their command-line name, and what they take."""

import inspect
from typing import Any

from saml_rec.errors import InputError, did_you_mean, shown
from saml_rec.models.base import ScenarioModel
from saml_rec.models.fitted import FittedModel
from saml_rec.models.hmoe import HMoE
from saml_rec.models.lightgbm import LightGBM, is_installed
from saml_rec.models.logistic_regression import LogisticRegression
from saml_rec.models.mlp import MLP, PerScenario, ScenarioMLP
from saml_rec.models.mmoe import MMoE
from saml_rec.models.pepnet import PEPNet
from saml_rec.models.ple import PLE
from saml_rec.models.saml import SAML
from saml_rec.models.shared_bottom import SharedBottom
from saml_rec.models.star import STAR

MODELS: dict[str, type[ScenarioModel] | type[FittedModel]] = {
    "saml": SAML,
    "star": STAR,
    "hmoe": HMoE,
    "mmoe": MMoE,
    "ple": PLE,
    "pepnet": PEPNet,
    "shared_bottom": SharedBottom,
    "mlp": MLP,
    "mlp_scenario": ScenarioMLP,
    "per_scenario": PerScenario,
    "logistic_regression": LogisticRegression,
    "lightgbm": LightGBM,
}


def is_fitted(model: str) -> bool:
    """Whether a model is fitted as a whole and not by steps, which need learning rate, batches and epochs."""
    return issubclass(MODELS[model], FittedModel)


def installed_models() -> list[str]:
    """All models, without those whose extra is not installed."""
    return [name for name in MODELS if name != "lightgbm" or is_installed()]


def hyperparameters(model: str) -> dict[str, Any]:
    """The options a model takes, with their defaults: the keyword-only parameters of its class.

    Raises:
        InputError: there is no such model.
    """
    if model not in MODELS:
        raise InputError(f"there is no model {shown(model)} (models: {', '.join(MODELS)}){did_you_mean(model, MODELS)}")
    parameters = inspect.signature(MODELS[model]).parameters.values()
    return {
        parameter.name: parameter.default
        for parameter in parameters
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is not parameter.empty
    }
