"""What the training rows teach an encoder, learnt from a stream of them: scenarios, vocabularies, moments.

Everything comes from the training rows alone, so that nothing of the validation and test rows reaches the model.
"""

import math
from collections import Counter
from dataclasses import dataclass

import polars as pl

from saml_rec.data.encoding import OTHER, Encoder, categorical, flat, natural_order
from saml_rec.data.schema import FeatureSpec, Schema
from saml_rec.errors import InputError, listed, named

MOST_PENDING = 2**20
"""Values with their counts, of a chunk each, that wait to be added up."""


class Learner:
    """Adds up what chunks of training rows say, and makes an encoder of it.

    Args:
        schema: of the rows.
    """

    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        self.scenarios: Counter[str] = Counter()
        self._counts = {f.name: _Counts(f) for f in categorical(schema) if not f.buckets}
        self._moments = {f.name: _Moments() for f in schema.of_kind("dense")}

    def add(self, rows: pl.DataFrame) -> "Learner":
        """Learn from more training rows, from :func:`saml_rec.data.read_table`."""
        if rows.height:
            self.scenarios.update(dict(rows[self.schema.scenario].value_counts().iter_rows()))
            for name, counts in self._counts.items():
                counts.add(rows[name])
            for name, moments in self._moments.items():
                moments.add(rows[name])
        return self

    def encoder(self) -> Encoder:
        """What was learnt.

        Raises:
            InputError: rare scenarios where those are refused, no scenario that is not rare, none that is rare where
                rows of unseen ones are to share their branch, or a scenario by the name of that branch.
        """
        rule = self.schema.scenarios
        rare = {name: rows for name, rows in self.scenarios.items() if rows < rule.min_rows}
        names = natural_order([name for name in self.scenarios if name not in rare])
        self._check_scenarios(rare, names)
        if rare and rule.rare == "other":
            names = (*names, OTHER)
        return Encoder(
            schema=self.schema,
            scenario_names=names,
            vocabularies={name: counts.vocabulary() for name, counts in self._counts.items()},
            moments={name: moments.mean_and_deviation() for name, moments in self._moments.items()},
            rare={name: rare[name] for name in natural_order(list(rare))},
        )

    def _check_scenarios(self, rare: dict[str, int], names: tuple[str, ...]) -> None:
        rule, column = self.schema.scenarios, self.schema.scenario
        if rare and rule.rare == "refuse":
            raise InputError(
                f"scenario column {named(column)}: {listed(natural_order(list(rare)), 5)} have fewer than "
                f"{rule.min_rows} "
                'training rows; [scenarios] rare = "other" or "drop" in the schema lets them pass'
            )
        if not names:
            most = max(self.scenarios.values(), default=0)
            raise InputError(
                f"scenario column {named(column)}: no scenario has scenarios.min_rows = {rule.min_rows} training rows; "
                f"the largest has {most}"
            )
        if not rare and rule.unseen == "other":
            raise InputError(
                f'scenarios.unseen = "other": every scenario has {rule.min_rows} training rows, so that the branch of '
                "other scenarios would have none to learn from; raise min_rows or say drop or refuse"
            )
        if OTHER in self.scenarios and rare:
            raise InputError(
                f"scenario column {named(column)} has {OTHER!r}, the name of the branch that rare ones share"
            )


class _Counts:
    """How often each value of a sparse or multi column occurs."""

    def __init__(self, feature: FeatureSpec) -> None:
        self._feature = feature
        self._parts: list[pl.DataFrame] = []
        self._pending = 0

    def add(self, column: pl.Series) -> None:
        part = flat(column, self._feature).to_frame("value").group_by("value").len("rows")
        self._parts.append(part.cast({"rows": pl.UInt64}))
        self._pending += part.height
        if self._pending > max(MOST_PENDING, 2 * self._parts[0].height):
            self._parts, self._pending = [self._total()], 0

    def _total(self) -> pl.DataFrame:
        return pl.concat(self._parts).group_by("value").agg(pl.col("rows").sum())

    def vocabulary(self) -> tuple[str, ...]:
        if not self._parts:
            return ()
        kept = self._total().filter(pl.col("rows") >= self._feature.min_count)
        return tuple(kept.sort(["rows", "value"], descending=[True, False])["value"].to_list())


@dataclass
class _Moments:
    """Mean and standard deviation (n), by the parallel update of Chan, Golub and LeVeque (1979)."""

    count: int = 0
    mean: float = 0.0
    deviation: float = 0.0
    least: float = math.inf
    largest: float = -math.inf

    def add(self, column: pl.Series) -> None:
        values = column.drop_nulls().to_numpy()
        if not len(values):
            return
        self.least, self.largest = min(self.least, values.min()), max(self.largest, values.max())
        count, mean, deviation = len(values), float(values.mean()), float(values.std())
        if self.count:
            total, apart = self.count + count, mean - self.mean
            squares = self.count * self.deviation**2 + count * deviation**2 + apart**2 * self.count * count / total
            mean, deviation, count = self.mean + apart * count / total, math.sqrt(squares / total), total
        self.count, self.mean, self.deviation = count, mean, deviation

    def mean_and_deviation(self) -> tuple[float, float]:
        if not self.count:
            return 0.0, 1.0
        # The deviation of equal values is not always exactly 0 in floating point, and that of others may underflow.
        if self.least == self.largest:
            return float(self.least), 1.0
        return self.mean, self.deviation or 1.0
