"""A few cells under pytest-benchmark: pytest benchmarks. The figures of docs/benchmarks.md come from trunk.py."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from contenders import CPP, CPP_FOREIGN, EAGER_PEERS, REFERENCE, Contender
from saml_kernels import available_backends
from saml_kernels.testing.accuracy import AccuracyGate, without_kinks
from saml_kernels.testing.problem import PASSES, make
from workload import Cell

CELLS = (
    Cell(256, 8, 256, 256, (512, 256, 128)),
    Cell(1024, 4, 64, 128, (128, 64, 32)),
    Cell(1, 2, 8, 8, (8,)),
)
UNAVAILABLE = {backend: reason for backend, reason in available_backends().items() if reason is not None}
CONTENDERS = (*EAGER_PEERS, REFERENCE, CPP, CPP_FOREIGN)


@cache
def gate(cell: Cell) -> AccuracyGate:
    return AccuracyGate(without_kinks(make(cell.case()), {contender.foreign_dtype for contender in CONTENDERS}))


@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda contender: contender.name)
@pytest.mark.parametrize("kind", PASSES)
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: f"B{cell.B}-M{cell.M}-{cell.hidden_dims[0]}")
def test_trunk(benchmark: Callable[..., Any], cell: Cell, kind: str, contender: Contender) -> None:
    if contender.implementation in UNAVAILABLE:
        pytest.skip(UNAVAILABLE[contender.implementation])
    function = contender.function()
    assert gate(cell).judge(function, contender.dtype, contender.foreign_dtype).failure is None
    benchmark(gate(cell).problems(contender.dtype).call(kind, function))
