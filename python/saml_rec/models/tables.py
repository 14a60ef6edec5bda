"""Where the rows of an embedding table are kept and how they are trained: the engines behind ``--tables``.

dense    the gradient is as large as the table, and the model's own optimizer trains all of it
sparse   the gradient has the rows of the batch, and a lazy optimizer trains those
fbgemm   table-batched embeddings of fbgemm-gpu-cpu; the optimizer is part of backward

A batch costs the last two what it reads, however many rows there are, and rows that it does not read stay as they are:
no weight decay. Weights are the same tensor by the same name in all three, so that any engine loads them.
"""

import importlib.util
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saml_kernels import group_by_scenario
from saml_rec.errors import InputError

PADDING_ROW = 0
ENGINES = ("dense", "sparse", "fbgemm")
TABLE_OPTIMIZERS = {"rowwise_adagrad": 0.02, "adam": 0.001}
"""With the learning rate that each has unless another is given."""
FUSED_OPTIMIZER = "rowwise_adagrad"
"""The one that fbgemm has on the CPU."""
DENSE_ROWS = 100_000
"""Rows of all tables together up to which "auto" keeps them dense."""
ROWS_PER_VALUE = 8
"""A table with more rows than so many times the values added to it is not worth counting through."""
EPSILON = 1e-8


@dataclass(frozen=True)
class TableOptions:
    """How tables are kept and trained.

    Args:
        engine: "dense", "sparse" or "fbgemm".
        optimizer: of the last two: "rowwise_adagrad", or "adam" with "sparse".
        learning_rate: of that optimizer; None for the optimizer's own default. Dense tables have the network's.

    Raises:
        InputError: no such engine or optimizer, an optimizer that the engine does not have, a learning rate that is not
            positive, or fbgemm is not installed.
    """

    engine: str = "dense"
    optimizer: str = "rowwise_adagrad"
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("engine", ENGINES), ("optimizer", TABLE_OPTIMIZERS)):
            if getattr(self, name) not in allowed:
                raise InputError(f"table {name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if not 0 < self.rate < math.inf:
            raise InputError(f"table learning rate must be above 0 and finite, got {self.rate}")
        if self.engine == "fbgemm":
            if self.optimizer != FUSED_OPTIMIZER:
                raise InputError(f"tables of fbgemm are trained by {FUSED_OPTIMIZER}, got {self.optimizer!r}")
            if not has_fbgemm():
                raise InputError("tables of fbgemm need fbgemm-gpu-cpu: pip install 'fbgemm-gpu-cpu>=1.8'")

    @property
    def rate(self) -> float:
        """The learning rate that is used."""
        return TABLE_OPTIMIZERS[self.optimizer] if self.learning_rate is None else self.learning_rate


def has_fbgemm() -> bool:
    """Whether fbgemm is installed."""
    return importlib.util.find_spec("fbgemm_gpu") is not None


def resolve_engine(wanted: str, optimizer: str, rows: int, device: torch.device) -> str:
    """The engine that "auto" stands for: dense up to DENSE_ROWS rows, above fbgemm where it can be, else sparse.

    Raises:
        InputError: fbgemm on another device than the CPU.
    """
    if wanted == "fbgemm" and device.type != "cpu":
        raise InputError(f"tables of fbgemm run on the CPU here, got device {device}; take sparse")
    if wanted != "auto":
        return wanted
    if rows <= DENSE_ROWS:
        return "dense"
    fused = device.type == "cpu" and optimizer == FUSED_OPTIMIZER and has_fbgemm()
    return "fbgemm" if fused else "sparse"


class Table(nn.Module, ABC):
    """Rows of embeddings, (rows, dim). Row PADDING_ROW reads as zeros and is never trained."""

    @property
    @abstractmethod
    def rows(self) -> Tensor:
        """The table itself, (rows, dim), to be read or filled in place without gradient."""

    @abstractmethod
    def look_up(self, rows: Tensor) -> Tensor:
        """rows (...) int64 → (..., dim)."""


class ParameterTable(Table):
    """A parameter ``weight``."""

    def __init__(self, rows: int, dim: int, options: TableOptions) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, dim))

    @property
    def rows(self) -> Tensor:
        return self.weight.detach()


class DenseTable(ParameterTable):
    """A parameter like any other."""

    def look_up(self, rows: Tensor) -> Tensor:
        return rows_of(self.weight, rows)


class SparseTable(ParameterTable):
    """A parameter whose gradient is sparse."""

    def look_up(self, rows: Tensor) -> Tensor:
        return F.embedding(rows, self.weight, padding_idx=PADDING_ROW, sparse=True)


def rows_of(weight: Tensor, rows: Tensor) -> Tensor:
    """weight (V, dim), rows (...) → (..., dim); row PADDING_ROW gets no gradient, which is as large as the weight."""
    if weight.device.type == "cpu":
        return cast(Tensor, _Rows.apply(weight, rows))
    # On a GPU index_add_ would make every repeated row, padding above all, wait for an atomic addition.
    return F.embedding(rows, weight, padding_idx=PADDING_ROW)


class _Rows(torch.autograd.Function):
    """Rows of a table on the CPU. Row PADDING_ROW is never trained.

    The same as F.embedding, in float32 to the bit. The backward of that adds row by row through the dispatcher, which
    takes many times as long.
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.table_rows = table.shape[0]
        return table.index_select(0, rows.flatten()).view(*rows.shape, table.shape[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return _Sums.apply(gradient.reshape(-1, gradient.shape[-1]), rows.flatten(), ctx.table_rows), None


class _Sums(torch.autograd.Function):
    """values (n, dim), rows (n,) → (table_rows, dim), in each row the sum of its values; in PADDING_ROW zeros."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, rows: Tensor, table_rows: int) -> Tensor:
        ctx.save_for_backward(rows)
        if values.dtype != torch.float32 or table_rows > ROWS_PER_VALUE * len(rows):
            total = values.new_zeros(table_rows, values.shape[1]).index_add_(0, rows, values)
            total[PADDING_ROW] = 0
            return total
        # Grouped by counting, every row is the sum of one bag: several times as fast as adding in the values' order.
        permutation, _, offsets = group_by_scenario(rows, table_rows)
        padding = int(offsets[PADDING_ROW + 1])
        offsets = (offsets - padding).clamp_(min=0)
        return F.embedding_bag(permutation[padding:], values, offsets, mode="sum", include_last_offset=True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (rows,) = ctx.saved_tensors
        return _Rows.apply(gradient, rows) * (rows != PADDING_ROW).unsqueeze(1), None, None


class FbgemmTable(Table):
    """One table of fbgemm's, trained inside backward by row-wise Adagrad."""

    def __init__(self, rows: int, dim: int, options: TableOptions) -> None:
        from fbgemm_gpu.split_embedding_configs import EmbOptimType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation
        from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
            ComputeDevice,
            SplitTableBatchedEmbeddingBagsCodegen,
        )

        super().__init__()
        engine = SplitTableBatchedEmbeddingBagsCodegen(
            [(rows, dim, EmbeddingLocation.HOST, ComputeDevice.CPU)],
            optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
            learning_rate=options.rate,
            eps=EPSILON,
            bounds_check_mode=BoundsCheckMode.FATAL,
        )
        # Not a submodule: its tensors go by our names in a state dict, and no other optimizer may see them.
        self._engine = (engine,)

    @property
    def rows(self) -> Tensor:
        return cast(Tensor, self._engine[0].split_embedding_weights()[0])

    @property
    def squares(self) -> Tensor:
        """(rows,) the optimizer's sums of mean squares."""
        return cast(Tensor, self._engine[0].split_optimizer_states()[0][0])

    def look_up(self, rows: Tensor) -> Tensor:
        # A padding cell is an empty bag, which reads as zeros and has no gradient; any other a bag of one.
        flat = rows.flatten()
        present = flat != PADDING_ROW
        offsets = F.pad(present.cumsum(0), (1, 0))
        found: Tensor = self._engine[0](flat[present], offsets)
        return found.view(*rows.shape, -1)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.rows

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        key = f"{prefix}weight"
        _, _, missing, _, errors = rest
        if key not in state_dict:
            missing.append(key)
        elif state_dict[key].shape != self.rows.shape:
            errors.append(f"size mismatch for {key}: {tuple(state_dict[key].shape)} and {tuple(self.rows.shape)}")
        else:
            self.rows.copy_(state_dict[key])


_TABLES: dict[str, type[Any]] = {"dense": DenseTable, "sparse": SparseTable, "fbgemm": FbgemmTable}
_options = TableOptions()


@contextmanager
def table_options(options: TableOptions) -> Iterator[None]:
    """Models that are built inside keep their tables so."""
    global _options
    before, _options = _options, options
    try:
        yield
    finally:
        _options = before


def make_table(rows: int, dim: int) -> Table:
    """An uninitialised table, as :func:`table_options` says; dense without it."""
    table: Table = _TABLES[_options.engine](rows, dim, _options)
    return table


class RowwiseAdagrad(torch.optim.Optimizer):
    """Row-wise Adagrad for sparse gradients: s_r += mean(g_r²), w_r −= η g_r / (√s_r + ε). Other rows stay.

    Args:
        parameters: (rows, dim) each.
        lr: η.
    """

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update from the gradients, which are sparse or None."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["squares"] = parameter.new_zeros(parameter.shape[0])
                gradient = parameter.grad.coalesce()
                rows, values = gradient.indices()[0], gradient.values()
                squares = state["squares"].index_add_(0, rows, values.square().mean(dim=1))
                rate = group["lr"] / (squares[rows].sqrt() + EPSILON)
                parameter.index_add_(0, rows, values * rate.unsqueeze(1), alpha=-1)
