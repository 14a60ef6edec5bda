"""Models beside each other on one split, seed by seed: a table, verdicts, compare.json, report.html."""

from saml_rec.comparison.compare import (
    ALL_MODELS,
    check_directory,
    check_models,
    compare,
    comparison_table,
    options_of,
    summarize,
)
from saml_rec.comparison.significance import judge, row_errors
from saml_rec.comparison.verdicts import all_sentences

__all__ = [
    "ALL_MODELS",
    "all_sentences",
    "check_directory",
    "check_models",
    "compare",
    "comparison_table",
    "judge",
    "options_of",
    "row_errors",
    "summarize",
]
