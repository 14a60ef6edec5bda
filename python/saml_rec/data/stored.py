"""Encoded tables on disk, as Arrow IPC shards: written a chunk at a time, read in blocks, never whole.

    NAME-00000.arrow             SHARD_ROWS rows: scenario, label, weight, group, dense, ids, lengths of ragged features
    NAME-00000.FEATURE.arrow     the values of one ragged feature, those of all rows one after the other

The files hold the narrowest types; :class:`StoredTable` gives back what :class:`saml_rec.data.table.EncodedTable` has.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from saml_rec.data.order import ALL, BLOCK_ROWS, LANES, WINDOW_ROWS, Lane, Share, batch_starts, own_positions, windows
from saml_rec.data.table import (
    ROWS_PER_BLOCK,
    Batch,
    EncodedTable,
    Fingerprint,
    Ragged,
    check_batch_size,
    joined,
)

SHARD_ROWS = 2**18
SCENARIO, LABEL, WEIGHT, GROUP, DENSE = "scenario", "label", "weight", "group", "dense"
IDS, LENGTH = "id:", "length:"  # before a feature's name


class TableWriter:
    """Writes the rows of a table as they come.

    Args:
        directory: of the files; exists.
        name: of the table.
        nothing: a table without rows, of the same encoder.
    """

    def __init__(self, directory: Path, name: str, nothing: EncodedTable) -> None:
        self._directory, self._name, self._nothing = directory, name, nothing
        self._waiting: list[EncodedTable] = []
        self._rows = 0
        self._shards: list[dict[str, Any]] = []

    def add(self, rows: EncodedTable) -> None:
        """More rows.

        Raises:
            OSError: the disk refuses them.
        """
        if not len(rows):
            return
        self._waiting.append(rows)
        self._rows += len(rows)
        while self._rows >= SHARD_ROWS:
            whole = joined(self._waiting)
            self._write(whole.part(0, SHARD_ROWS))
            self._waiting = [whole.part(SHARD_ROWS, len(whole))]
            self._rows -= SHARD_ROWS

    def finish(self) -> dict[str, Any]:
        """What :class:`StoredTable` has to know of the files."""
        if self._rows or not self._shards:
            self._write(joined(self._waiting or [self._nothing]))
            self._waiting, self._rows = [], 0
        return {"shards": self._shards, "rows": sum(shard["rows"] for shard in self._shards)}

    def _write(self, rows: EncodedTable) -> None:
        stem = f"{self._name}-{len(self._shards):05d}"
        columns: dict[str, Any] = {SCENARIO: rows.scenario.int().numpy()}
        if rows.label is not None:
            columns[LABEL] = rows.label.to(torch.uint8).numpy()
        if rows.weight is not None:
            columns[WEIGHT] = rows.weight.numpy()
        if rows.group is not None:
            columns[GROUP] = rows.group.numpy()
        if rows.dense.shape[1]:
            columns[DENSE] = pl.Series(rows.dense.numpy(), dtype=pl.Array(pl.Float32, rows.dense.shape[1]))
        columns |= {IDS + name: ids.int().numpy() for name, ids in rows.sparse.items()}
        columns |= {LENGTH + name: ragged.offsets.diff().int().numpy() for name, ragged in rows.ragged.items()}
        files = {f"{stem}.arrow": pl.DataFrame(columns)}
        # Feature names may hold what a file name may not.
        for number, ragged in enumerate(rows.ragged.values()):
            files[f"{stem}.{number}.arrow"] = pl.DataFrame({"value": ragged.values.numpy()})
        for name, frame in files.items():
            with (self._directory / name).open("wb") as file:
                frame.write_ipc(file, compression="uncompressed", record_batch_size=BLOCK_ROWS)
                file.flush()
                os.fsync(file.fileno())
        self._shards.append(
            {
                "rows": len(rows),
                "files": {name: (self._directory / name).stat().st_size for name in files},
                # Per ragged feature, where the values of each block begin.
                "starts": {name: ragged.offsets[::BLOCK_ROWS].tolist() for name, ragged in rows.ragged.items()},
            }
        )


@dataclass(frozen=True)
class StoredTable:
    """N rows on disk, with the interface that training and scoring use of an EncodedTable.

    Args:
        directory: of its files.
        name: of the table.
        content: what :meth:`TableWriter.finish` gave.
        num_scenarios: M.
        dense_width: 2·n_dense.
        ragged: names of the multi and sequence features, in order.
        digest: the fingerprint of its rows.
    """

    directory: Path
    name: str
    content: Mapping[str, Any]
    num_scenarios: int
    dense_width: int
    ragged: tuple[str, ...]
    digest: str = ""

    def __len__(self) -> int:
        return int(self.content["rows"])

    def block(self, number: int) -> EncodedTable:
        """Rows number · BLOCK_ROWS and following, BLOCK_ROWS of them or those that are left."""
        shard, within = divmod(number, SHARD_ROWS // BLOCK_ROWS)
        described = self.content["shards"][shard]
        stem = self.directory / f"{self.name}-{shard:05d}"
        frame = _rows_of(stem.with_name(f"{stem.name}.arrow"), within * BLOCK_ROWS, BLOCK_ROWS)
        ragged = {}
        for position, name in enumerate(self.ragged):
            offsets = np.zeros(frame.height + 1, dtype=np.int64)
            np.cumsum(frame[LENGTH + name].to_numpy(), out=offsets[1:])
            start = described["starts"][name][within]
            values = _rows_of(stem.with_name(f"{stem.name}.{position}.arrow"), start, int(offsets[-1]))["value"]
            ragged[name] = Ragged(_tensor(values), torch.from_numpy(offsets))
        sparse = [column for column in frame.columns if column.startswith(IDS)]
        return EncodedTable(
            scenario=_tensor(frame[SCENARIO]).long(),
            label=_tensor(frame[LABEL]).float() if LABEL in frame.columns else None,
            dense=_tensor(frame[DENSE]) if self.dense_width else torch.zeros(frame.height, 0),
            sparse={column.removeprefix(IDS): _tensor(frame[column]).long() for column in sparse},
            ragged=ragged,
            num_scenarios=self.num_scenarios,
            weight=_tensor(frame[WEIGHT]) if WEIGHT in frame.columns else None,
            group=_tensor(frame[GROUP]) if GROUP in frame.columns else None,
        )

    def first(self) -> Batch:
        """The first row."""
        return self.block(0).first()

    def fingerprint(self) -> str:
        """As that of an EncodedTable with the same rows, known since they were written."""
        return self.digest

    def whole(self) -> EncodedTable:
        """All rows, in memory."""
        return joined(list(self.blocks()) or [self.block(0)])

    def blocks(self) -> Iterator[EncodedTable]:
        """All rows in order."""
        for number in range(-(-len(self) // BLOCK_ROWS)):
            yield self.block(number)

    @cached_property
    def scenario(self) -> Tensor:
        """(N,) int64."""
        return self._required(SCENARIO).long()

    @cached_property
    def label(self) -> Tensor:
        """(N,) float32."""
        return self._required(LABEL).float()

    @cached_property
    def weight(self) -> Tensor | None:
        """(N,) float32, or None."""
        return self._column(WEIGHT)

    @cached_property
    def group(self) -> Tensor | None:
        """(N,) int64, or None."""
        return self._column(GROUP)

    def _required(self, column: str) -> Tensor:
        found = self._column(column)
        assert found is not None
        return found

    def _column(self, column: str) -> Tensor | None:
        stems = [self.directory / f"{self.name}-{shard:05d}.arrow" for shard in range(len(self.content["shards"]))]
        if column not in pl.scan_ipc(stems[0]).collect_schema():
            return None
        return _tensor(pl.concat([pl.scan_ipc(stem).select(column) for stem in stems]).collect().to_series())

    def scenario_counts(self) -> Tensor:
        """Rows of each scenario, (M,) int64."""
        return torch.bincount(self.scenario, minlength=self.num_scenarios)

    def batches(
        self,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        share: Share = ALL,
        first_batch: int = 0,
    ) -> Iterator[Batch]:
        """Every row once, as :meth:`EncodedTable.batches`, shuffled as :mod:`saml_rec.data.order` says."""
        check_batch_size(batch_size)
        if len(self) <= WINDOW_ROWS:
            return self.whole().batches(batch_size, generator=generator, share=share, first_batch=first_batch)
        if generator is None:
            return self._in_order(batch_size, share, first_batch)
        return self._shuffled(batch_size, generator, share, first_batch)

    def _in_order(self, batch_size: int, share: Share, first_batch: int) -> Iterator[Batch]:
        known: dict[int, EncodedTable] = {}
        for start, size in batch_starts(len(self), batch_size, first_batch):
            first, last = start // BLOCK_ROWS, (start + size - 1) // BLOCK_ROWS
            known = {number: known.get(number) or self.block(number) for number in range(first, last + 1)}
            near = joined(list(known.values()))
            yield near.batch(own_positions(start, size, share.processes, share) - first * BLOCK_ROWS)

    def _shuffled(self, batch_size: int, generator: torch.Generator, share: Share, first_batch: int) -> Iterator[Batch]:
        lanes_of = list(windows(len(self), generator))
        opened: dict[int, _Window] = {}
        for start, size in batch_starts(len(self), batch_size, first_batch):
            positions = own_positions(start, size, LANES, share)
            first, last = start // WINDOW_ROWS, (start + size - 1) // WINDOW_ROWS
            opened = {
                number: opened[number] if number in opened else _Window(self, lanes_of[number], share)
                for number in range(first, last + 1)
            }
            if first == last:
                yield opened[first].rows.batch(opened[first].places(positions - first * WINDOW_ROWS))
                continue
            parts = []
            for number, window in opened.items():
                inside = positions[positions // WINDOW_ROWS == number] - number * WINDOW_ROWS
                parts.append(window.rows.taken(window.places(inside)))
            near = joined(parts)
            yield near.batch(torch.arange(len(near)))

    def read(self, segments: Sequence[Any]) -> EncodedTable:
        """The rows of segments that lie within one block each, in order."""
        parts = []
        for segment in segments:
            number = segment.start // BLOCK_ROWS
            before = number * BLOCK_ROWS
            parts.append(self.block(number).part(segment.start - before, segment.stop - before))
        return joined(parts or [self.block(0).part(0, 0)])


class _Window:
    """The rows of a window that a process needs, in memory."""

    def __init__(self, table: StoredTable, lanes: Sequence[Lane], share: Share) -> None:
        own = range(share.rank, LANES, share.processes)
        self.rows = table.read([segment for lane in own for segment in lanes[lane].segments])
        orders = {lane: lanes[lane].order() for lane in own}
        # Row r of lane l is the row at order[start of l + r].
        self._start = torch.zeros(LANES, dtype=torch.int64)
        before = 0
        for lane, order in orders.items():
            self._start[lane] = before
            orders[lane] = order + before
            before += len(order)
        self._order = torch.cat(list(orders.values()))

    def places(self, positions: Tensor) -> Tensor:
        """Positions of the window, in own lanes → indices into ``rows``."""
        return self._order[self._start[positions % LANES] + positions // LANES]


def fingerprint_of(table: StoredTable) -> str:
    """The fingerprint of the rows as they lie on disk."""
    result = Fingerprint(len(table))
    blocks_a_round = ROWS_PER_BLOCK // BLOCK_ROWS
    for first in range(0, -(-len(table) // BLOCK_ROWS), blocks_a_round):
        last = min(first + blocks_a_round, -(-len(table) // BLOCK_ROWS))
        result.add(joined([table.block(number) for number in range(first, last)]))
    return result.hexdigest()


def _rows_of(path: Path, start: int, rows: int) -> pl.DataFrame:
    return pl.scan_ipc(path).slice(start, rows).collect()


def _tensor(column: pl.Series) -> Tensor:
    return torch.from_numpy(column.to_numpy(writable=True))
