"""Whether it pays that ids become unknown in training, by validation log loss.

python benchmarks/id_dropout.py              writes results/id_dropout.json and the table of docs/results.md
python benchmarks/id_dropout.py --more       only what the result lacks
python benchmarks/id_dropout.py --render     the table from the committed result
"""

from typing import Final

from option_study import Study, command

STUDY: Final = Study("id_dropout", (0.0, 0.1), ("saml", "shared_bottom", "mlp"))


def label(probability: float) -> str:
    return f"{probability:g}"


main: Final = command(STUDY, "id dropout", label, __doc__)

if __name__ == "__main__":
    main()
