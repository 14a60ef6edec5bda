"""Models by their command-line name."""

from torch import nn

from saml_rec.models.hmoe import HMoE
from saml_rec.models.mmoe import MMoE
from saml_rec.models.saml import SAML
from saml_rec.models.shared_bottom import SharedBottom
from saml_rec.models.star import STAR

MODELS: dict[str, type[nn.Module]] = {
    "saml": SAML,
    "star": STAR,
    "hmoe": HMoE,
    "mmoe": MMoE,
    "shared_bottom": SharedBottom,
}

__all__ = ["MODELS", "SAML", "STAR", "HMoE", "MMoE", "SharedBottom"]
