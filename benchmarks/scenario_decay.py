"""How fast the parameters of single scenarios should decay to their mean over scenarios, by validation log loss.

Every network that has such parameters, without and with a decay of 100: a tenth of what sets them apart in a step.

    python benchmarks/scenario_decay.py             writes results/scenario_decay.json and the table of docs/results.md
    python benchmarks/scenario_decay.py --more      only what the result lacks
    python benchmarks/scenario_decay.py --render    the table from the committed result
"""

from typing import Final

from option_study import Study, command


def label(value: float) -> str:
    return f"decay {value:g}"


STUDY: Final = Study(
    "scenario_decay",
    (0.0, 100.0),
    ("saml", "star", "hmoe", "mmoe", "ple", "pepnet", "shared_bottom", "per_scenario"),
)
main: Final = command(STUDY, "scenario decay", label, __doc__)

if __name__ == "__main__":
    main()
