"""Where the rows of an embedding table are kept and how they are trained: the engines behind ``--tables``.

dense    the gradient is as large as the table, and the model's own optimizer trains all of it
sparse   the gradient has the rows of the batch, and a lazy optimizer trains those
fbgemm   table-batched embeddings of fbgemm-gpu-cpu; the optimizer is part of backward
torchrec the same in several processes: each has a part of the rows, and look-ups go to where they are

A batch costs all but the first what it reads, however many rows there are, and rows that it does not read stay as they
are: no weight decay. Weights are the same tensor by the same name in all of them, and so is what row-wise Adagrad has
summed up, so that any engine goes on from any other's.
"""

import importlib.util
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain, islice, repeat
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saml_kernels import group_by_scenario
from saml_rec.errors import InputError
from saml_rec.processes import ALONE, Processes

PADDING_ROW = 0
ENGINES = ("dense", "sparse", "fbgemm", "torchrec")
FUSED = ("fbgemm", "torchrec")
"""Those that train in backward."""
TABLE_OPTIMIZERS = {"rowwise_adagrad": 0.02, "adam": 0.001}
"""With the learning rate that each has unless another is given."""
FUSED_OPTIMIZER = "rowwise_adagrad"
"""The one that fbgemm has on the CPU."""
DENSE_ROWS = 100_000
"""Rows of all tables together up to which "auto" keeps them dense."""
ROWS_PER_VALUE = 8
"""A table with more rows than so many times the values added to it is not worth counting through."""
EPSILON = 1e-8
TABLE, ROWS = "table", "rows"  # names that torchrec asks for
TORCHREC_LINE = (
    "pip install --no-deps 'torchrec>=1.8' torchmetrics==1.0.3 && pip install tensordict lightning-utilities "
    "pyre-extensions typing-inspect tqdm"
)
"""Its metadata ask for fbgemm's CUDA package, so it is installed without what it asks for."""


@dataclass(frozen=True)
class TableOptions:
    """How tables are kept and trained.

    Args:
        engine: "dense", "sparse", "fbgemm" or "torchrec".
        optimizer: of all but the first: "rowwise_adagrad", or "adam" with "sparse".
        learning_rate: of that optimizer; None for the optimizer's own default. Dense tables have the network's.
        learning_rates: of single features' tables, by the feature's name.

    Raises:
        InputError: no such engine or optimizer, an optimizer that the engine does not have, a learning rate that is not
            positive, or fbgemm or torchrec is not installed.
    """

    engine: str = "dense"
    optimizer: str = "rowwise_adagrad"
    learning_rate: float | None = None
    learning_rates: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, allowed in (("engine", ENGINES), ("optimizer", TABLE_OPTIMIZERS)):
            if getattr(self, name) not in allowed:
                raise InputError(f"table {name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for rate in (self.rate, *self.learning_rates.values()):
            if not 0 < rate < math.inf:
                raise InputError(f"table learning rate must be above 0 and finite, got {rate}")
        if self.engine == "dense" and self.learning_rates:
            raise InputError("dense tables are trained with the network, at its learning rate")
        if self.engine in FUSED:
            if self.optimizer != FUSED_OPTIMIZER:
                raise InputError(f"tables of {self.engine} are trained by {FUSED_OPTIMIZER}, got {self.optimizer!r}")
            if not has_fbgemm():
                raise InputError(f"tables of {self.engine} need fbgemm-gpu-cpu: pip install 'fbgemm-gpu-cpu>=1.8'")
            if self.engine == "torchrec" and not has_torchrec():
                raise InputError(f"tables in several processes need torchrec: {TORCHREC_LINE}")

    def of_feature(self, name: str) -> "TableOptions":
        """For the table of one feature."""
        return replace(self, learning_rate=self.learning_rates.get(name, self.learning_rate), learning_rates={})

    @property
    def rate(self) -> float:
        """The learning rate that is used, but for single features."""
        return TABLE_OPTIMIZERS[self.optimizer] if self.learning_rate is None else self.learning_rate


def has_fbgemm() -> bool:
    """Whether fbgemm is installed."""
    return importlib.util.find_spec("fbgemm_gpu") is not None


def has_torchrec() -> bool:
    """Whether torchrec is installed."""
    return importlib.util.find_spec("torchrec") is not None


def resolve_engine(wanted: str, optimizer: str, rows: int, device: torch.device, processes: Processes = ALONE) -> str:
    """The engine that "auto" stands for: dense up to DENSE_ROWS rows; above, fbgemm where it can be, else sparse.

    In several processes torchrec above.

    Raises:
        InputError: fbgemm on another device than the CPU, an engine for one process in several, or the other way round.
    """
    if processes.are_several and wanted in ("sparse", "fbgemm"):
        raise InputError(f"tables of {wanted} are in one process; in {processes.count} take torchrec, dense or auto")
    if not processes.are_several and wanted == "torchrec":
        raise InputError("tables of torchrec are in several processes, started by torchrun; in one take fbgemm or auto")
    if wanted in FUSED and device.type != "cpu":
        raise InputError(f"tables of {wanted} run on the CPU here, got device {device}; take sparse or dense")
    if wanted != "auto":
        return wanted
    if rows <= DENSE_ROWS:
        return "dense"
    if processes.are_several:
        return "torchrec"
    fused = device.type == "cpu" and optimizer == FUSED_OPTIMIZER and has_fbgemm()
    return "fbgemm" if fused else "sparse"


class Table(nn.Module, ABC):
    """Rows of embeddings, (num_rows, dim). Row PADDING_ROW reads as zeros and is never trained."""

    def __init__(self, num_rows: int, dim: int) -> None:
        super().__init__()
        self.num_rows, self.dim = num_rows, dim

    @property
    @abstractmethod
    def rows(self) -> Tensor:
        """The rows that this process has, (rows, dim), to be read or filled in place without gradient."""

    @property
    def first_row(self) -> int:
        """Of those that this process has."""
        return 0

    @property
    def squares(self) -> Tensor | None:
        """(rows,) what row-wise Adagrad has summed up, of a table that is trained in backward."""
        return None

    def fill(self, start: int, values: Tensor) -> None:
        """Rows from ``start`` on; those that this process does not have are passed over."""
        first = max(start, self.first_row)
        stop = min(start + len(values), self.first_row + len(self.rows))
        if first < stop:
            self.rows[first - self.first_row : stop - self.first_row] = values[first - start : stop - start]

    @abstractmethod
    def look_up(self, rows: Tensor) -> Tensor:
        """rows (...) int64 → (..., dim)."""


class ParameterTable(Table):
    """A parameter ``weight``, and the learning rate that it is to have."""

    def __init__(self, num_rows: int, dim: int, rate: float) -> None:
        super().__init__(num_rows, dim)
        self.rate = rate
        self.weight = nn.Parameter(torch.empty(num_rows, dim))

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
        return cast(Tensor, _Rows.apply((1,), weight, rows)[0])
    # On a GPU index_add_ would make every repeated row, padding above all, wait for an atomic addition.
    return F.embedding(rows, weight, padding_idx=PADDING_ROW)


def look_up_all(wanted: Sequence[tuple[Table, Sequence[Tensor]]]) -> list[tuple[Tensor, ...]]:
    """Per table all that is wanted of it, rows (...) int64 each → (..., dim) each. Every table is read once."""
    dense = [table.weight for table, _ in wanted if isinstance(table, DenseTable) and table.weight.device.type == "cpu"]
    if dense and len(dense) == len(wanted):
        # One function for all of them: a call and its backward cost as much as the rows of a short feature.
        counts = tuple(len(each) for _, each in wanted)
        found = iter(_Rows.apply(counts, *dense, *(rows for _, each in wanted for rows in each)))
        return [tuple(islice(found, count)) for count in counts]
    return [_look_up_parts(table, each) for table, each in wanted]


def _look_up_parts(table: Table, parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """In one look-up: the gradient of each may be as large as the table."""
    if len(parts) == 1:
        return (table.look_up(parts[0]),)
    found = table.look_up(torch.cat([rows.flatten() for rows in parts])).split([rows.numel() for rows in parts])
    return tuple(part.view(*rows.shape, -1) for part, rows in zip(found, parts, strict=True))


class _Rows(torch.autograd.Function):
    """Rows of tables on the CPU: of table i ``counts[i]`` tensors of rows. Row PADDING_ROW is never trained.

    The same as F.embedding, with one tensor of rows a table in float32 to the bit. The backward of that adds row by row
    through the dispatcher, which takes many times as long.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        # Arguments without names: see saml_kernels.autograd.
        counts, *tensors = arguments
        tables, rows = tensors[: len(counts)], tensors[len(counts) :]
        ctx.save_for_backward(*rows)
        ctx.counts, ctx.table_rows = counts, [len(table) for table in tables]
        of = chain.from_iterable(map(repeat, tables, counts))
        return tuple(
            table.index_select(0, each.flatten()).view(*each.shape, table.shape[1])
            for table, each in zip(of, rows, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        values = (gradient.reshape(-1, gradient.shape[-1]) for gradient in gradients)
        rows = (each.flatten() for each in ctx.saved_tensors)
        of_tables: list[Tensor | None] = []
        for count, table_rows, needed in zip(ctx.counts, ctx.table_rows, ctx.needs_input_grad[1:], strict=False):
            parts = *islice(values, count), *islice(rows, count)
            of_tables.append(_Sums.apply(table_rows, *parts) if needed else None)
        return None, *of_tables, *repeat(None, len(gradients))


class _Sums(torch.autograd.Function):
    """values (n, dim) each, then as many rows (n,) → (table_rows, dim), the sum of each row's; zeros in PADDING_ROW."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        table_rows, *parts = arguments
        values, rows = parts[: len(parts) // 2], parts[len(parts) // 2 :]
        ctx.save_for_backward(*rows)
        # Where its bags begin is read from the data, which traced code cannot.
        grouped = values[0].dtype == torch.float32 and not torch.compiler.is_compiling()
        if grouped and table_rows <= ROWS_PER_VALUE * sum(map(len, rows)):
            first, *others = map(_grouped_sum, values, rows, repeat(table_rows))
            return sum(others, first)
        total = values[0].new_zeros(table_rows, values[0].shape[1])
        for each, at in zip(values, rows, strict=True):
            total.index_add_(0, at, each)
        total[PADDING_ROW] = 0
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows = ctx.saved_tensors
        found = _Rows.apply((len(rows),), gradient, *rows)
        of_values = (each * (at != PADDING_ROW).unsqueeze(1) for each, at in zip(found, rows, strict=True))
        return None, *of_values, *repeat(None, len(rows))


def _grouped_sum(values: Tensor, rows: Tensor, table_rows: int) -> Tensor:
    """As _Sums. Every row is the sum of one bag: several times as fast as adding in the order of the values."""
    permutation, _, offsets = group_by_scenario(rows, table_rows)
    padding = int(offsets[PADDING_ROW + 1])
    offsets = (offsets - padding).clamp_(min=0)
    return F.embedding_bag(permutation[padding:], values, offsets, mode="sum", include_last_offset=True)


class FusedTable(Table):
    """A table that is trained inside backward by row-wise Adagrad, and whose rows may be in several processes.

    Its state dict has all rows in the first process and none in the others. To make one, and to load one, all processes
    have to.
    """

    def __init__(self, num_rows: int, dim: int, processes: Processes) -> None:
        super().__init__(num_rows, dim)
        self.processes = processes

    @property
    @abstractmethod
    def squares(self) -> Tensor:
        """(rows,) what row-wise Adagrad has summed up."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.processes.to_first(self.rows, self.num_rows)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        key = f"{prefix}weight"
        _, _, missing, _, errors = rest
        if key not in state_dict:
            missing.append(key)
            return
        expected = (self.num_rows if self.processes.is_first else 0, self.dim)
        if (given := tuple(state_dict[key].shape)) != expected:
            errors.append(f"size mismatch for {key}: {given} in the file, {expected} here")
            return
        self.processes.fill_from_first(self.rows, state_dict[key])


class FbgemmTable(FusedTable):
    """One table of fbgemm's, all of it in this process."""

    def __init__(self, num_rows: int, dim: int, options: TableOptions, processes: Processes) -> None:
        from fbgemm_gpu.split_embedding_configs import EmbOptimType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation
        from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
            ComputeDevice,
            SplitTableBatchedEmbeddingBagsCodegen,
        )

        super().__init__(num_rows, dim, processes)
        engine = SplitTableBatchedEmbeddingBagsCodegen(
            [(num_rows, dim, EmbeddingLocation.HOST, ComputeDevice.CPU)],
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
        return cast(Tensor, self._engine[0].split_optimizer_states()[0][0])

    def look_up(self, rows: Tensor) -> Tensor:
        # A padding cell is an empty bag, which reads as zeros and has no gradient; any other a bag of one.
        flat = rows.flatten()
        present = flat != PADDING_ROW
        offsets = F.pad(present.cumsum(0), (1, 0))
        found: Tensor = self._engine[0](flat[present], offsets)
        return found.view(*rows.shape, -1)


class TorchrecTable(FusedTable):
    """One table of torchrec's, sharded by rows: process r has the r-th of ``count`` parts of ⌈rows / count⌉.

    A look-up sends the rows that are wanted to the processes that have them, and backward the gradients.
    """

    def __init__(self, num_rows: int, dim: int, options: TableOptions, processes: Processes) -> None:
        import torch.distributed as dist
        from fbgemm_gpu.split_embedding_configs import EmbOptimType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
        from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
        from torchrec import EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
        from torchrec.distributed.embedding import EmbeddingCollectionSharder
        from torchrec.distributed.embedding_types import EmbeddingComputeKernel
        from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise
        from torchrec.distributed.types import ShardingEnv

        super().__init__(num_rows, dim, processes)
        config = EmbeddingConfig(name=TABLE, embedding_dim=dim, num_embeddings=num_rows, feature_names=[ROWS])
        collection = EmbeddingCollection(tables=[config], device=torch.device("meta"))
        sharder = EmbeddingCollectionSharder(
            fused_params={
                "optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
                "learning_rate": options.rate,
                "eps": EPSILON,
            }
        )
        plan = construct_module_sharding_plan(
            collection,
            {TABLE: row_wise(compute_kernel=EmbeddingComputeKernel.FUSED.value)},
            sharder,
            local_size=processes.machine_count,
            world_size=processes.count,
            device_type="cpu",
        )
        environment = ShardingEnv.from_process_group(dist.group.WORLD)
        # Not a submodule: its tensors go by our names in a state dict, and no other optimizer may see them.
        self._engine = (sharder.shard(collection, plan, environment, torch.device("cpu")),)
        for module in chain.from_iterable(each.modules() for each in self._engine[0]._lookups):
            if isinstance(module, SplitTableBatchedEmbeddingBagsCodegen):
                # A bag for every row gives the same, and on the CPU its backward takes a ninth of the time.
                module.pooling_mode = PoolingMode.SUM
                module.register_forward_pre_hook(_bags_of_one, with_kwargs=True)
        self._jagged = KeyedJaggedTensor
        self._rows = self._engine[0].state_dict()[f"embeddings.{TABLE}.weight"].local_shards()[0].tensor
        state = self._engine[0].fused_optimizer.state_dict()["state"][f"embeddings.{TABLE}.weight"]
        self._squares = state[f"{TABLE}.momentum1"].local_shards()[0].tensor

    @property
    def rows(self) -> Tensor:
        return cast(Tensor, self._rows)

    @property
    def first_row(self) -> int:
        return self.processes.rank * -(-self.num_rows // self.processes.count)

    @property
    def squares(self) -> Tensor:
        return cast(Tensor, self._squares)

    def look_up(self, rows: Tensor) -> Tensor:
        flat = rows.flatten()
        if flat.numel() and not 0 <= flat.min() <= flat.max() < self.num_rows:
            raise IndexError(f"rows must lie in [0, {self.num_rows}), got {int(flat.min())} to {int(flat.max())}")
        # Padding is not asked for: it reads as zeros and has no gradient. One sequence of all rows, however many.
        present = (flat != PADDING_ROW).nonzero().squeeze(1)
        lengths = torch.tensor([len(present)], dtype=torch.int32)
        asked = self._jagged(keys=[ROWS], values=flat[present], lengths=lengths)
        found = self._engine[0](asked)[ROWS].values()
        whole = found.new_zeros(len(flat), self.dim).index_copy(0, present, found)
        return whole.view(*rows.shape, self.dim)


def _bags_of_one(module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
    """For fbgemm's table: the same indices, each a bag of its own."""
    return args, {**given, "offsets": torch.arange(len(given["indices"]) + 1)}


def _parameter_table(kind: type[ParameterTable]) -> Callable[[int, int, TableOptions, Processes], Table]:
    return lambda num_rows, dim, options, processes: kind(num_rows, dim, options.rate)


_TABLES: dict[str, Callable[[int, int, TableOptions, Processes], Table]] = {
    "dense": _parameter_table(DenseTable),
    "sparse": _parameter_table(SparseTable),
    "fbgemm": FbgemmTable,
    "torchrec": TorchrecTable,
}
_options, _processes = TableOptions(), ALONE


@contextmanager
def table_options(options: TableOptions, processes: Processes = ALONE) -> Iterator[None]:
    """Models that are built inside keep their tables so, in these processes."""
    global _options, _processes
    before = _options, _processes
    _options, _processes = options, processes
    try:
        yield
    finally:
        _options, _processes = before


def make_table(rows: int, dim: int, feature: str = "") -> Table:
    """An uninitialised table of a feature, as :func:`table_options` says; dense without it."""
    # An engine that draws numbers for rows that are filled later draws its own: every engine starts alike.
    with torch.random.fork_rng(devices=[]):
        return _TABLES[_options.engine](rows, dim, _options.of_feature(feature), _processes)


class RowwiseAdagrad(torch.optim.Optimizer):
    """Row-wise Adagrad for sparse gradients: s_r += mean(g_r²), w_r −= η g_r / (√s_r + ε). Other rows stay.

    Args:
        parameters: (rows, dim) each.
        lr: η.
    """

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    def squares_of(self, parameter: Tensor) -> Tensor:
        """s of a parameter, (rows,)."""
        state = self.state[parameter]
        if not state:
            state["squares"] = parameter.new_zeros(parameter.shape[0])
        return cast(Tensor, state["squares"])

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update from the gradients, which are sparse or None."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                gradient = parameter.grad.coalesce()
                rows, values = gradient.indices()[0], gradient.values()
                squares = self.squares_of(parameter).index_add_(0, rows, values.square().mean(dim=1))
                rate = group["lr"] / (squares[rows].sqrt() + EPSILON)
                parameter.index_add_(0, rows, values * rate.unsqueeze(1), alpha=-1)
