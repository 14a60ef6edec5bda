"""Models beside each other on one split, seed by seed: a table, compare.json, report.html."""

from saml_rec.comparison.compare import (
    calibration,
    check_directory,
    check_models,
    compare,
    comparison_table,
    judge,
    options_of,
    summarize,
)

__all__ = [
    "calibration",
    "check_directory",
    "check_models",
    "compare",
    "comparison_table",
    "judge",
    "options_of",
    "summarize",
]
