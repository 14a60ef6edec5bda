"""The models, each one screen, and their registry."""

from typing import TYPE_CHECKING

from saml_rec.lazy import lazily

if TYPE_CHECKING:
    from saml_rec.models.base import ScenarioModel
    from saml_rec.models.fitted import FittedModel
    from saml_rec.models.hmoe import HMoE
    from saml_rec.models.lightgbm import LightGBM
    from saml_rec.models.logistic_regression import LogisticRegression
    from saml_rec.models.mlp import MLP, PerScenario, ScenarioMLP
    from saml_rec.models.mmoe import MMoE
    from saml_rec.models.pepnet import PEPNet
    from saml_rec.models.ple import PLE
    from saml_rec.models.registry import MODELS
    from saml_rec.models.saml import SAML
    from saml_rec.models.shared_bottom import SharedBottom
    from saml_rec.models.star import STAR

__all__ = [
    "MLP",
    "MODELS",
    "PLE",
    "SAML",
    "STAR",
    "FittedModel",
    "HMoE",
    "LightGBM",
    "LogisticRegression",
    "MMoE",
    "PEPNet",
    "PerScenario",
    "ScenarioMLP",
    "ScenarioModel",
    "SharedBottom",
]

__getattr__ = lazily(
    __name__,
    {
        "FittedModel": "saml_rec.models.fitted",
        "LightGBM": "saml_rec.models.lightgbm",
        "LogisticRegression": "saml_rec.models.logistic_regression",
        "MLP": "saml_rec.models.mlp",
        "PerScenario": "saml_rec.models.mlp",
        "ScenarioMLP": "saml_rec.models.mlp",
        "PEPNet": "saml_rec.models.pepnet",
        "PLE": "saml_rec.models.ple",
        "MODELS": "saml_rec.models.registry",
        "SAML": "saml_rec.models.saml",
        "STAR": "saml_rec.models.star",
        "HMoE": "saml_rec.models.hmoe",
        "MMoE": "saml_rec.models.mmoe",
        "ScenarioModel": "saml_rec.models.base",
        "SharedBottom": "saml_rec.models.shared_bottom",
    },
)
