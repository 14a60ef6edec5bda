"""The page report.html of a comparison: one file, no network, for phone and desktop, light and dark."""

from saml_rec.comparison.report_page.page import render_page, write_page

__all__ = ["render_page", "write_page"]
