"""How fast the parameters of single scenarios should learn, by validation log loss.

Every network that has such parameters, with their learning rate a share of the others': 1, and 1/√M for M scenarios.

    python benchmarks/scenario_rate.py              writes results/scenario_rate.json and the table of docs/results.md
    python benchmarks/scenario_rate.py --more       only what the result lacks
    python benchmarks/scenario_rate.py --render     the table from the committed result
"""

import math
from typing import Final

from option_study import Study, command

ROOT: Final = "1/√M"


def rate(value: float | str, scenarios: int) -> float:
    """As training takes it."""
    return 1 / math.sqrt(scenarios) if isinstance(value, str) else value


def label(value: float | str) -> str:
    return value if isinstance(value, str) else f"rate {value:g}"


STUDY: Final = Study(
    "scenario_rate",
    (1.0, ROOT),
    ("saml", "star", "hmoe", "mmoe", "ple", "pepnet", "shared_bottom", "per_scenario"),
    rate,
)
main: Final = command(STUDY, "scenario rate", label, __doc__)

if __name__ == "__main__":
    main()
