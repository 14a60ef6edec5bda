"""SAML's forms on data without a planted relation: what foreign branches read, how scenarios start, how they weigh.

By validation log loss.

python benchmarks/saml_forms.py              writes results/saml_forms.json and the table of docs/results.md
python benchmarks/saml_forms.py --more       only what the result lacks
python benchmarks/saml_forms.py --render     the table from the committed result
"""

from collections.abc import Mapping
from typing import Any, Final

from option_study import Study, command

FORMS: Final[Mapping[str, Mapping[str, Any]]] = {
    "the paper's form": {"branch_views": "own", "branch_init": "independent", "score": "ratio"},
    "shared start": {"branch_views": "own", "branch_init": "shared", "score": "ratio"},
    "views each": {"branch_views": "each", "branch_init": "independent", "score": "ratio"},
    "views each, shared start, softmax": {"branch_views": "each", "branch_init": "shared", "score": "softmax"},
    "no mutual unit, shared start": {"branch_init": "shared", "mutual_layers": ()},
}


def form(value: str, scenarios: int) -> dict[str, Any]:
    """The hyperparameters of a form; of all of them the auxiliary network is not told the scenario, as in the paper."""
    return {"scenario_dim": 0, **FORMS[value]}


STUDY: Final = Study("model_options", tuple(FORMS), ("saml",), form, "saml_forms")
label: Final = str
main: Final = command(STUDY, "saml forms", label, __doc__)

if __name__ == "__main__":
    main()
