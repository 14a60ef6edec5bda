"""An encoded table and the batches drawn from it.

Features of varying length are stored ragged, as all values in a row plus offsets: row n owns
``values[offsets[n]:offsets[n + 1]]``. A batch pads them to its own longest row.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor

from saml_rec.data.order import ALL, Share, batch_starts, own_positions

ROWS_PER_BLOCK = 65536


class _Labelled(TypedDict, total=False):
    label: Tensor
    weight: Tensor


class Batch(_Labelled):
    """B rows as tensors, all on the CPU.

    ``scenario`` (B,) int64; ``label`` and ``weight`` (B,) float32, absent when the table has none; ``dense``
    (B, 2·n_dense) float32, per dense feature the normalised value and 1.0 where it was missing, width 0 without dense
    features; ``features`` name -> int64 ids: sparse (B,), multi and sequence (B, K) with K ≥ 1, padded with 0 at the
    end.
    """

    scenario: Tensor
    dense: Tensor
    features: dict[str, Tensor]


@dataclass(frozen=True)
class Ragged:
    """Rows of varying length: ``values`` (total,) int32 and ``offsets`` (N + 1,) int64."""

    values: Tensor
    offsets: Tensor

    def padded(self, indices: Tensor) -> Tensor:
        """Rows ``indices`` (B,) as (B, K) int64, K the longest of them but at least 1, padded with 0 at the end."""
        starts = self.offsets.index_select(0, indices)
        lengths = self.offsets.index_select(0, indices + 1) - starts
        width = max(1, int(lengths.max())) if len(indices) else 1
        position = torch.arange(width)
        valid = position < lengths[:, None]
        if not len(self.values):
            return torch.zeros(valid.shape, dtype=torch.int64)
        # Padding reads value 0 and is zeroed after: more than twice as fast as indexing with a mask.
        source = (starts[:, None] + position).mul_(valid)
        return self.values.index_select(0, source.view(-1)).view_as(source).mul_(valid).long()

    def part(self, start: int, stop: int) -> "Ragged":
        """Rows start .. stop − 1."""
        offsets = self.offsets[start : stop + 1]
        return Ragged(self.values[int(offsets[0]) : int(offsets[-1])], offsets - offsets[0])

    def taken(self, rows: Tensor) -> "Ragged":
        """The rows ``rows`` (n,) int64, in that order."""
        starts = self.offsets[rows]
        lengths = self.offsets[rows + 1] - starts
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        source = torch.repeat_interleave(starts - offsets[:-1], lengths) + torch.arange(int(offsets[-1]))
        return Ragged(self.values[source], offsets)


@dataclass(frozen=True)
class EncodedTable:
    """N rows as tensors, made by :meth:`saml_rec.data.Encoder.encode`.

    Attributes:
        scenario: (N,) int64 in ``range(num_scenarios)``.
        label: (N,) float32 of 0 and 1, or None.
        dense: (N, 2·n_dense) float32, see :class:`Batch`.
        sparse: name -> (N,) int64.
        ragged: name -> multi and sequence features.
        num_scenarios: M.
        weight: (N,) float32 of what the rows count, or None.
        group: (N,) int64, equal in rows of one group, or None.
    """

    scenario: Tensor
    label: Tensor | None
    dense: Tensor
    sparse: dict[str, Tensor]
    ragged: dict[str, Ragged]
    num_scenarios: int
    weight: Tensor | None = None
    group: Tensor | None = None

    def __len__(self) -> int:
        return len(self.scenario)

    def batch(self, indices: Tensor) -> Batch:
        """The rows ``indices`` (B,) int64, in that order."""
        features = {name: ids.index_select(0, indices) for name, ids in self.sparse.items()}
        features |= {name: ragged.padded(indices) for name, ragged in self.ragged.items()}
        result: Batch = {
            "scenario": self.scenario.index_select(0, indices),
            "dense": self.dense.index_select(0, indices),
            "features": features,
        }
        if self.label is not None:
            result["label"] = self.label.index_select(0, indices)
        if self.weight is not None:
            result["weight"] = self.weight.index_select(0, indices)
        return result

    def batches(
        self,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        share: Share = ALL,
        first_batch: int = 0,
    ) -> Iterator[Batch]:
        """Every row once, ``batch_size`` at a time; the last batch may be smaller.

        Args:
            batch_size: rows in a batch, at least 1.
            generator: shuffles the rows; without it they come in the table's order.
            share: of several processes, which this is; it gets its own rows of every batch, which may be none.
            first_batch: the batches before it are left out.

        Raises:
            ValueError: ``batch_size`` is below 1.
        """
        check_batch_size(batch_size)
        rows = len(self)
        order = torch.arange(rows) if generator is None else torch.randperm(rows, generator=generator)
        return (
            self.batch(order[own_positions(start, size, share.processes, share)])
            for start, size in batch_starts(rows, batch_size, first_batch)
        )

    def part(self, start: int, stop: int) -> "EncodedTable":
        """Rows start .. stop − 1; shares memory."""
        return EncodedTable(
            scenario=self.scenario[start:stop],
            label=None if self.label is None else self.label[start:stop],
            dense=self.dense[start:stop],
            sparse={name: ids[start:stop] for name, ids in self.sparse.items()},
            ragged={name: ragged.part(start, stop) for name, ragged in self.ragged.items()},
            num_scenarios=self.num_scenarios,
            weight=None if self.weight is None else self.weight[start:stop],
            group=None if self.group is None else self.group[start:stop],
        )

    def taken(self, rows: Tensor) -> "EncodedTable":
        """The rows ``rows`` (n,) int64, in that order."""
        return EncodedTable(
            scenario=self.scenario[rows],
            label=None if self.label is None else self.label[rows],
            dense=self.dense[rows],
            sparse={name: ids[rows] for name, ids in self.sparse.items()},
            ragged={name: ragged.taken(rows) for name, ragged in self.ragged.items()},
            num_scenarios=self.num_scenarios,
            weight=None if self.weight is None else self.weight[rows],
            group=None if self.group is None else self.group[rows],
        )

    def whole(self) -> "EncodedTable":
        """Itself; another kind of table has to be read for it."""
        return self

    def first(self) -> Batch:
        """The first row."""
        return self.batch(torch.zeros(1, dtype=torch.int64))

    def fingerprint(self) -> str:
        """The table's :class:`Fingerprint`."""
        result = Fingerprint(len(self))
        result.add(self)
        return result.hexdigest()

    def scenario_counts(self) -> Tensor:
        """Rows of each scenario, (M,) int64."""
        return torch.bincount(self.scenario, minlength=self.num_scenarios)


def check_batch_size(batch_size: int) -> None:
    """ValueError unless it is at least 1."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")


class Fingerprint:
    """SHA-256 of what a model and its metrics see of a table, in order of rows: all that it holds, encoded.

    Files with the same rows have the same fingerprint, whether they are CSV or Parquet, one or several.

    Args:
        rows: of the table.
    """

    def __init__(self, rows: int) -> None:
        self._digest = hashlib.sha256(str(rows).encode())

    def add(self, rows: "EncodedTable") -> None:
        """More rows of the table; ROWS_PER_BLOCK or a multiple of them, but for the last."""
        for start in range(0, len(rows), ROWS_PER_BLOCK):
            stop = min(start + ROWS_PER_BLOCK, len(rows))
            seen: dict[str, Any] = {**rows.batch(torch.arange(start, stop))}
            if rows.group is not None:
                seen["group"] = rows.group[start:stop]
            for name, tensor in _tensors(seen):
                self._digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                self._digest.update(tensor.contiguous().numpy().data)

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def joined(tables: Sequence[EncodedTable]) -> EncodedTable:
    """The rows of all tables, of one encoder's; at least one."""
    first = tables[0]
    if len(tables) == 1:
        return first
    return EncodedTable(
        scenario=torch.cat([table.scenario for table in tables]),
        label=_joined_if_any([table.label for table in tables]),
        dense=torch.cat([table.dense for table in tables]),
        sparse={name: torch.cat([table.sparse[name] for table in tables]) for name in first.sparse},
        ragged={name: _joined_ragged([table.ragged[name] for table in tables]) for name in first.ragged},
        num_scenarios=first.num_scenarios,
        weight=_joined_if_any([table.weight for table in tables]),
        group=_joined_if_any([table.group for table in tables]),
    )


def _joined_if_any(parts: Sequence[Tensor | None]) -> Tensor | None:
    there = [part for part in parts if part is not None]
    return torch.cat(there) if there else None


def reblocked(tables: Iterable[EncodedTable], rows: int) -> Iterator[EncodedTable]:
    """The same rows, so many in every table but the last."""
    waiting: list[EncodedTable] = []
    height = 0
    for table in tables:
        waiting.append(table)
        height += len(table)
        if height >= rows:
            whole = joined(waiting)
            cut = height - height % rows
            yield from (whole.part(start, start + rows) for start in range(0, cut, rows))
            waiting, height = [whole.part(cut, height)], height - cut
    if height:
        yield joined(waiting)


def _joined_ragged(parts: Sequence[Ragged]) -> Ragged:
    ends = torch.tensor([0, *(len(part.values) for part in parts)]).cumsum(0)
    offsets = [part.offsets[1:] + end for part, end in zip(parts, ends[:-1], strict=True)]
    return Ragged(torch.cat([part.values for part in parts]), torch.cat([torch.zeros(1, dtype=torch.int64), *offsets]))


def _tensors(batch: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name in sorted(batch):
        if isinstance(batch[name], Mapping):
            yield from _tensors(batch[name], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", batch[name]
