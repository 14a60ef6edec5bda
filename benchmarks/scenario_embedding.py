"""Whether SAML's auxiliary network should be told the scenario, by validation log loss.

Without the embedding, the paper's form, and with one of the width that other models have.

    python benchmarks/scenario_embedding.py            writes results/scenario_dim.json and the table of docs/results.md
    python benchmarks/scenario_embedding.py --more     only what the result lacks
    python benchmarks/scenario_embedding.py --render   the table from the committed result
"""

from typing import Final

from option_study import DATA, Study, command


def label(value: int) -> str:
    return f"width {value}" if value else "none"


STUDY: Final = Study("scenario_dim", (0, 8), ("saml",), data=tuple(DATA))
main: Final = command(STUDY, "scenario embedding", label, __doc__)

if __name__ == "__main__":
    main()
