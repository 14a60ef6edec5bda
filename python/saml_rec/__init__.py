"""A multi-scenario recommender on saml_kernels: data, models, training, evaluation, comparison."""

from typing import TYPE_CHECKING

from saml_rec.data.schema import FeatureSpec, Schema, load_schema
from saml_rec.errors import InputError
from saml_rec.lazy import lazily

if TYPE_CHECKING:
    from saml_kernels import __version__ as __version__
    from saml_rec.models import MODELS, SAML, SharedBottom

__all__ = ["MODELS", "SAML", "FeatureSpec", "InputError", "Schema", "SharedBottom", "load_schema"]

__getattr__ = lazily(
    __name__, {**dict.fromkeys(("MODELS", "SAML", "SharedBottom"), "saml_rec.models"), "__version__": "saml_kernels"}
)
