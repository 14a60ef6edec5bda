"""docs/api.md is what its script makes of the docstrings."""

import importlib.util
from pathlib import Path

import saml_kernels
import saml_kernels.layers
import saml_rec
import saml_rec.models

DOCS = Path(__file__).parent.parent / "docs"


def generated() -> str:
    spec = importlib.util.spec_from_file_location("make_api", DOCS / "make_api.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.page()


def test_the_page_is_up_to_date():
    assert (DOCS / "api.md").read_text(encoding="utf-8") == generated(), "run python docs/make_api.py"


def test_nothing_public_is_missing():
    page = generated()
    for package in (saml_kernels, saml_kernels.layers, saml_rec, saml_rec.models):
        for name in package.__all__:
            assert name == "layers" or f"\n### `{name}`\n" in page, name
