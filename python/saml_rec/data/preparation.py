"""Files and their schema become encoded tables: split, learn from the training rows, encode; all of it as a stream.

Up to MEMORY_ROWS rows, all splits together, the tables are held in memory. More are encoded once into a cache on disk
and read from there.
"""

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from rich.console import Console

from saml_rec.console import say
from saml_rec.data.cache import Cache, cache_directory, key_of
from saml_rec.data.cells import Checks
from saml_rec.data.coverage import Coverage, check_coverage, prepared_lines
from saml_rec.data.csv_format import CsvOptions
from saml_rec.data.encoding import OTHER, Encoder
from saml_rec.data.learning import Learner
from saml_rec.data.order import WINDOW_ROWS
from saml_rec.data.readers import TableFiles
from saml_rec.data.schema import Schema
from saml_rec.data.sources import Paths
from saml_rec.data.splits import SPLITS, Split, check_split, check_weights, needs_a_pass, split_of, weighted_labels
from saml_rec.data.stored import StoredTable, TableWriter, fingerprint_of
from saml_rec.data.table import EncodedTable, joined
from saml_rec.errors import InputError, listed

MEMORY_ROWS = WINDOW_ROWS
Table = EncodedTable | StoredTable


@dataclass(frozen=True)
class PreparedData:
    """What training needs.

    Attributes:
        encoder: learnt from the training rows.
        tables: ``train``, ``valid`` and ``test``; a split that was not asked for is an empty table.
        unseen: rows of every scenario without a training row, by name.
        coverage: by split how much of each feature is empty or unknown.
        csv: what was said of CSV files.
    """

    encoder: Encoder
    tables: Mapping[str, Table]
    unseen: Mapping[str, int] = field(default_factory=dict)
    coverage: Mapping[str, Coverage] = field(default_factory=dict)
    csv: CsvOptions = field(default_factory=CsvOptions)

    def shares(self) -> dict[str, dict[str, dict[str, float | None]]]:
        """By split the shares of :class:`saml_rec.data.coverage.Coverage`."""
        return {name: coverage.shares() for name, coverage in self.coverage.items()}


def prepare(
    paths: Paths,
    schema: Schema,
    *,
    seed: int,
    cache: str | Path | None = None,
    console: Console | None = None,
    csv: CsvOptions | None = None,
) -> PreparedData:
    """Read, split and encode a table.

    Args:
        paths: CSV or Parquet, as :func:`saml_rec.data.sources.table_files` takes them.
        schema: of the table.
        seed: of the random split; of no effect with a time or split column.
        cache: where encoded tables that do not go into memory are kept, see
            :func:`saml_rec.data.cache.cache_directory`.
        console: where to say how files are written, what became of rare scenarios, of unknown values and of the
            cache; None prints nothing.
        csv: how CSV files are written; found in each of them unless given.

    Raises:
        InputError: see :func:`saml_rec.data.read_table`, :func:`saml_rec.data.split_rows`,
            :meth:`saml_rec.data.learning.Learner.encoder` and :func:`saml_rec.data.coverage.check_coverage`; or a
            validation or test row has a scenario that no training row has, where those are refused; or a file changed
            while it was read.
        OSError: the cache cannot be written.
    """
    csv = csv or CsvOptions()
    files = TableFiles(paths, schema, csv)
    checks = Checks()
    files.require(checks)
    for line in files.format_lines():
        say(console, line)
    states = _states(files)
    kept = Cache(cache_directory(cache), key_of(files.files, schema, seed, csv))
    if (meta := kept.meta()) is not None:
        say(console, f"{files.name}: {meta['rows']:,} rows from the cache {kept.path}")
        data = _stored(kept.path, meta)
    else:
        data = _Preparation(files, checks, seed, states).run(kept, console)
    for line in (*scenario_lines(data), *prepared_lines(data.encoder, data.coverage)):
        say(console, line)
    return replace(data, csv=csv)


def _states(files: TableFiles) -> list[tuple[int, int]]:
    return [(state.st_size, state.st_mtime_ns) for state in (file.stat() for file in files.files)]


def _stored(path: Path, meta: Mapping[str, Any]) -> PreparedData:
    encoder = Encoder.from_dict(meta["encoder"])
    return PreparedData(
        encoder,
        {name: _open(path, name, encoder, meta["tables"][name]) for name in SPLITS},
        meta["unseen"],
        {name: Coverage.from_dict(encoder, meta["coverage"][name]) for name in SPLITS},
    )


def _open(path: Path, name: str, encoder: Encoder, content: Mapping[str, Any]) -> StoredTable:
    ragged = tuple(f.name for f in (*encoder.schema.of_kind("multi"), *encoder.schema.of_kind("sequence")))
    return StoredTable(
        path, name, content, encoder.num_scenarios, encoder.dense_width, ragged, content.get("fingerprint", "")
    )


class _Preparation:
    """The passes over the rows: one to split them where that needs one, one to learn, one to encode."""

    def __init__(self, files: TableFiles, checks: Checks, seed: int, states: list[tuple[int, int]]) -> None:
        self.files, self.schema, self._states = files, files.schema, states
        self._rows = _SeveralTimes(lambda: files.checked(checks))
        self.split = split_of(self.schema, self._for_split(), seed)

    def _for_split(self) -> Iterator[pl.DataFrame]:
        if not needs_a_pass(self.schema):
            return iter(())
        # Every cell is checked in the next pass.
        return self.files.checked(for_split(self.schema)) if self._rows.is_long else self._rows()

    def run(self, cache: Cache, console: Console | None) -> PreparedData:
        start = time.perf_counter()
        encoder, rows = self._learn()
        if rows <= MEMORY_ROWS:
            return self._in_memory(encoder)

        def write(directory: Path) -> dict[str, Any]:
            return self._encode_into(directory, encoder) | {"rows": rows}

        meta = cache.make(write)
        seconds = time.perf_counter() - start
        say(console, f"{self.files.name}: {rows:,} rows encoded into the cache {cache.path} in {seconds:.0f} s")
        return _stored(cache.path, meta)

    def _learn(self) -> tuple[Encoder, int]:
        """What the training rows teach, and how many rows there are in all."""
        learner = Learner(self.schema)
        sizes = np.zeros(len(SPLITS), np.int64)
        weights = np.zeros(len(SPLITS))
        labels: set[int] = set()
        for frame, codes in with_codes(self.split, self._rows()):
            sizes += np.bincount(codes, minlength=len(SPLITS))
            training = frame.filter(codes == SPLITS.index("train"))
            labels.update(weighted_labels(self.schema, training))
            learner.add(training)
            if self.schema.weight is not None:
                counted = frame[self.schema.weight].cast(pl.Float32).to_numpy()
                weights += np.bincount(codes, weights=counted, minlength=len(SPLITS))
        check_split(self.schema, dict(zip(SPLITS, sizes.tolist(), strict=True)), labels)
        check_weights(self.schema, dict(zip(SPLITS, zip(sizes.tolist(), weights.tolist(), strict=True), strict=True)))
        return learner.encoder(), int(sizes.sum())

    def _encoded(
        self, encoder: Encoder, unseen: Counter[str], coverage: Mapping[str | None, Coverage]
    ) -> Iterator[tuple[str | None, EncodedTable]]:
        """The rows of every chunk by their split; counts those of scenarios without a training row, and values."""
        known = pl.Series([*encoder.scenario_names, *encoder.rare], dtype=pl.String).implode()

        def counted() -> Iterator[pl.DataFrame]:
            for frame in self._rows():
                scenarios = frame[self.schema.scenario]
                unseen.update(dict(scenarios.filter(~scenarios.is_in(known)).value_counts().iter_rows()))
                yield frame

        return encoded_rows(encoder, counted(), self.split, coverage)

    def _require_unchanged(self) -> None:
        """Before anything is kept under the name of what the files were."""
        if _states(self.files) != self._states:
            raise InputError(f"{self.files.name} changed while it was read")

    def _nothing(self, encoder: Encoder) -> EncodedTable:
        return encoder.encode(next(self._rows()).clear())

    def _in_memory(self, encoder: Encoder) -> PreparedData:
        unseen: Counter[str] = Counter()
        coverage = {name: Coverage(encoder) for name in SPLITS}
        parts: dict[str, list[EncodedTable]] = {name: [] for name in SPLITS}
        for name, rows in self._encoded(encoder, unseen, dict(coverage.items())):
            assert name is not None
            parts[name].append(rows)
        self._require_unchanged()
        check_coverage(encoder, coverage)
        tables = {name: joined(each or [self._nothing(encoder)]) for name, each in parts.items()}
        return PreparedData(encoder, tables, dict(unseen), coverage)

    def _encode_into(self, directory: Path, encoder: Encoder) -> dict[str, Any]:
        unseen: Counter[str] = Counter()
        coverage = {name: Coverage(encoder) for name in SPLITS}
        writers = {name: TableWriter(directory, name, self._nothing(encoder)) for name in SPLITS}
        for name, rows in self._encoded(encoder, unseen, dict(coverage.items())):
            assert name is not None
            writers[name].add(rows)
        self._require_unchanged()
        check_coverage(encoder, coverage)
        tables = {name: writer.finish() for name, writer in writers.items()}
        for name, content in tables.items():
            content["fingerprint"] = fingerprint_of(_open(directory, name, encoder, content))
        return {
            "encoder": encoder.to_dict(),
            "unseen": dict(unseen),
            "tables": tables,
            "coverage": {name: counts.to_dict() for name, counts in coverage.items()},
        }


class _SeveralTimes:
    """A stream that can be started again; one of a single frame is read once."""

    def __init__(self, start: Callable[[], Iterator[pl.DataFrame]]) -> None:
        self._start = start
        first = list(itertools.islice(start(), 2))
        self.is_long = len(first) > 1
        self._whole = [] if self.is_long else first

    def __call__(self) -> Iterator[pl.DataFrame]:
        return self._start() if self.is_long else iter(self._whole)


def for_split(schema: Schema) -> Checks:
    """Nothing but what decides the split; of a random one any column, for the number of rows."""
    return Checks(only=(schema.split_column or schema.time or schema.scenario,))


def encoded_rows(
    encoder: Encoder,
    frames: Iterator[pl.DataFrame],
    split: Split | None,
    coverage: Mapping[str | None, Coverage],
) -> Iterator[tuple[str | None, EncodedTable]]:
    """The rows of every frame with the name of their split, split by split; those of no split without one.

    Args:
        encoder: of the rows.
        frames: the rows.
        split: how they are divided, if they are.
        coverage: by the name of the split what counts its rows; rows of others are not counted.

    Raises:
        InputError: as :meth:`saml_rec.data.encoding.Encoder.encode`.
    """

    def encoded(name: str | None, rows: pl.DataFrame, ids: NDArray[np.int64]) -> tuple[str | None, EncodedTable]:
        table = encoder.encode_kept(rows, ids)
        if name in coverage:
            coverage[name].add(rows, table)
        return name, table

    divided = ((frame, None) for frame in frames) if split is None else with_codes(split, frames)
    for frame, codes in divided:
        ids = encoder.scenario_ids(frame[encoder.schema.scenario])
        if codes is None:
            yield encoded(None, frame, ids)
            continue
        for code, name in enumerate(SPLITS):
            if (own := codes == code).any():
                yield encoded(name, frame.filter(own), ids[own])


def with_codes(split: Split, parts: Iterator[pl.DataFrame]) -> Iterator[tuple[pl.DataFrame, NDArray[np.uint8]]]:
    """Every frame with the splits of its rows."""
    first = 0
    for frame in parts:
        yield frame, split.codes(frame, first)
        first += frame.height


def scenario_lines(data: PreparedData) -> list[str]:
    """What became of rare and of unseen scenarios, a line each where there are any."""
    rule = data.encoder.schema.scenarios
    went = {"other": f"share the branch {OTHER}", "drop": "are left out"}
    lines = []
    for what, rows, fate in (
        (f"with fewer than {rule.min_rows} training rows", data.encoder.rare, rule.rare),
        ("without a training row", data.unseen, rule.unseen),
    ):
        if rows:
            names = listed(tuple(rows), 10)
            lines.append(f"scenarios {what} ({len(rows):,}, {sum(rows.values()):,} rows) {went[fate]}: {names}")
    return lines
