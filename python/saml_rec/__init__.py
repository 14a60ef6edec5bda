"""A multi-scenario recommender on saml_kernels: features, models, data and training."""

import importlib
from typing import TYPE_CHECKING, Any

from saml_rec.errors import InputError
from saml_rec.schema import FeatureSpec, Schema, load_schema

if TYPE_CHECKING:
    from saml_rec.models import MODELS, SAML, SharedBottom

__all__ = ["MODELS", "SAML", "FeatureSpec", "InputError", "Schema", "SharedBottom", "load_schema"]


def __getattr__(name: str) -> Any:
    # Models need torch, which takes seconds to load: too long for `saml-rec --help`.
    if name in ("MODELS", "SAML", "SharedBottom"):
        return getattr(importlib.import_module("saml_rec.models"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
