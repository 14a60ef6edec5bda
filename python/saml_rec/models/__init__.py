"""Models by their command-line name."""

from torch import nn

from saml_rec.models.saml import SAML
from saml_rec.models.shared_bottom import SharedBottom

MODELS: dict[str, type[nn.Module]] = {"saml": SAML, "shared_bottom": SharedBottom}

__all__ = ["MODELS", "SAML", "SharedBottom"]
