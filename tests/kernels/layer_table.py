"""Every layer once, small, with batches of any number of rows: what PyTorch's tools are tested on."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from _pytest.mark import ParameterSet
from torch import Tensor, nn

from saml_kernels import TrunkOutput, layers

M = 3


def _x(rows: int, *widths: int) -> Tensor:
    return torch.randn(rows, *widths)


def _ids(rows: int) -> Tensor:
    return torch.randint(M, (rows,))


def _x_and_ids(rows: int) -> tuple[Tensor, ...]:
    return _x(rows, 5), _ids(rows)


def _x_and_every_id(rows: int) -> tuple[Tensor, ...]:
    """As batch norm in training takes them: two rows of a scenario, or none."""
    return _x(rows, 5), torch.arange(rows) % min(M, max(1, rows // 2))


def _sequential() -> nn.Module:
    first, last = (layers.GroupedMLP(M, *widths, "identity") for widths in ((5, (6,)), (6, (3,))))
    return layers.GroupedSequential(first, layers.GroupedBatchNorm(M, 6).eval(), nn.LeakyReLU(0.2), last)


def _trunk_inputs(rows: int) -> tuple[Tensor, ...]:
    return _x(rows, 5), _x(rows, 4), _ids(rows)


@dataclass(frozen=True)
class Row:
    """A layer and its batches."""

    layer: str
    """Name of its class."""
    make: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Tensor, ...]]
    """Of a number of rows, in forward's order."""
    variant: str = ""
    least_rows: int = 1
    """In training."""

    def __str__(self) -> str:
        return self.layer + (f"-{self.variant}" if self.variant else "")

    def __call__(self, rows: int, seed: int = 0) -> tuple[nn.Module, tuple[Tensor, ...]]:
        torch.manual_seed(seed)
        return self.make(), self.inputs(rows)


ROWS = (
    Row("MultiBranchMLP", lambda: layers.MultiBranchMLP(M, 5, 4, (6, 3)), _trunk_inputs),
    Row(
        "MultiBranchMLP",
        lambda: layers.MultiBranchMLP(M, 5, 4, (6, 3), (4, 2), (1, 2), activation="gelu"),
        _trunk_inputs,
        "mutual12",
    ),
    Row("MultiBranchMLP", lambda: layers.MultiBranchMLP(M, 5, 4, (6,), mutual_layers=()), _trunk_inputs, "no_mutual"),
    Row("MutualUnit", lambda: layers.MutualUnit(M, 5), lambda rows: (_x(rows, M, 5), _ids(rows))),
    Row("GroupedMLP", lambda: layers.GroupedMLP(M, 5, (6, 3)), _x_and_ids),
    Row("GroupedMLP", lambda: layers.GroupedMLP(M, 5, (3,)), _x_and_ids, "one_layer"),
    Row("STARMLP", lambda: layers.STARMLP(M, 5, (6, 3)), _x_and_ids),
    Row("GroupedSequential", _sequential, _x_and_ids),
    Row("GroupedBatchNorm", lambda: layers.GroupedBatchNorm(M, 5), _x_and_every_id, least_rows=2),
    Row("PartitionedNorm", lambda: layers.PartitionedNorm(M, 5), _x_and_ids),
    Row("ScoreMixture", lambda: layers.ScoreMixture(M, 5, (6,)), _x_and_ids),
    Row("MixtureOfExperts", lambda: layers.MixtureOfExperts(4, 5, (6, 3)), lambda rows: (_x(rows, 5),)),
    Row("MixtureOfExperts", lambda: layers.MixtureOfExperts(4, 5, (6, 3), M), _x_and_ids, "by_scenario"),
    Row("GateUnit", lambda: layers.GateUnit(5, 4, 6), lambda rows: (_x(rows, 5), _x(rows, 6))),
    Row(
        "GateUnit",
        lambda: layers.GateUnit(5, 4, 6, M),
        lambda rows: (_x(rows, 5), _x(rows, 6), _ids(rows)),
        "by_scenario",
    ),
    Row(
        "GatedTowers",
        lambda: layers.GatedTowers(M, 5, 4, (6, 3), 4),
        lambda rows: (_x(rows, 5), _x(rows, 4), _ids(rows)),
    ),
    Row("ProgressiveExperts", lambda: layers.ProgressiveExperts(M, 5, ((6,),)), _x_and_ids, "one_level"),
    Row("ProgressiveExperts", lambda: layers.ProgressiveExperts(M, 5, ((6,), (4,), (3,)), 2), _x_and_ids),
)


QUICK = ("MultiBranchMLP", "GroupedMLP-one_layer", "PartitionedNorm", "ProgressiveExperts-one_level")


def rows_of(quick: tuple[str, ...] = QUICK) -> list[ParameterSet]:
    """All rows as parameters of a test that takes its time: slow ones but for the quick."""
    return [pytest.param(row, id=str(row), marks=[] if str(row) in quick else pytest.mark.slow) for row in ROWS]


def first_output(output: Tensor | TrunkOutput) -> Tensor:
    """What a loss reads."""
    return output if isinstance(output, Tensor) else output.own
