"""Models by their command-line name, and what they take."""

import inspect
from typing import Any

from saml_rec.errors import InputError, did_you_mean
from saml_rec.models.base import ScenarioModel
from saml_rec.models.hmoe import HMoE
from saml_rec.models.mmoe import MMoE
from saml_rec.models.saml import SAML
from saml_rec.models.shared_bottom import SharedBottom
from saml_rec.models.star import STAR

MODELS: dict[str, type[ScenarioModel]] = {
    "saml": SAML,
    "star": STAR,
    "hmoe": HMoE,
    "mmoe": MMoE,
    "shared_bottom": SharedBottom,
}


def hyperparameters(model: str) -> dict[str, Any]:
    """The options a model takes, with their defaults: the keyword-only parameters of its class.

    Raises:
        InputError: there is no such model.
    """
    if model not in MODELS:
        raise InputError(f"there is no model {model!r} (models: {', '.join(MODELS)}){did_you_mean(model, MODELS)}")
    parameters = inspect.signature(MODELS[model]).parameters.values()
    return {
        parameter.name: parameter.default
        for parameter in parameters
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is not parameter.empty
    }
