"""How fast the parameters of single scenarios should learn, by validation log loss.

Every network that has such parameters, with their learning rate a share of the others': 1, and 1/√M for M scenarios.

    python benchmarks/scenario_rate.py              writes results/scenario_rate.json and the table of docs/results.md
    python benchmarks/scenario_rate.py --more       only what the result lacks
    python benchmarks/scenario_rate.py --render     the table from the committed result
"""

from typing import Final

from option_study import Study, command

STUDY: Final = Study(
    "scenario_rate", (1.0, None), ("saml", "star", "hmoe", "mmoe", "ple", "pepnet", "shared_bottom", "per_scenario")
)


def label(rate: float | None) -> str:
    return "1/√M" if rate is None else f"rate {rate:g}"


main: Final = command(STUDY, "scenario rate", label, __doc__)

if __name__ == "__main__":
    main()
