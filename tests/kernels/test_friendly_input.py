"""Sizes and ids as other people's code has them: numpy's numbers, ids of any integer type, one a row or in a column."""

import numpy as np
import pytest
import torch
from layer_batches import B, D, M, batch

import saml_kernels
from saml_kernels.layers import (
    STARMLP,
    GatedTowers,
    GateUnit,
    GroupedMLP,
    MixtureOfExperts,
    MultiBranchMLP,
    MutualUnit,
    PartitionedNorm,
    ProgressiveExperts,
    ScoreMixture,
)

pytestmark = pytest.mark.cpu

FLOAT = {"dtype": torch.float64}
LAYERS = {
    "MultiBranchMLP": lambda i, f: MultiBranchMLP(i(M), i(D), i(D), (i(4), i(3)), mutual_layers=(i(1),), **FLOAT),
    "MutualUnit": lambda i, f: MutualUnit(i(M), i(D), temperature=f(0.5), score="softmax", **FLOAT),
    "GroupedMLP": lambda i, f: GroupedMLP(i(M), i(D), (i(4), i(3)), **FLOAT),
    "STARMLP": lambda i, f: STARMLP(i(M), i(D), (i(4), i(3)), **FLOAT),
    "PartitionedNorm": lambda i, f: PartitionedNorm(i(M), i(D), eps=f(2**-10), momentum=f(0.5), **FLOAT),
    "ScoreMixture": lambda i, f: ScoreMixture(i(M), i(D), (i(4),), **FLOAT),
    "MixtureOfExperts": lambda i, f: MixtureOfExperts(i(2), i(D), (i(4),), num_scenarios=i(M), **FLOAT),
    "GateUnit": lambda i, f: GateUnit(i(D), i(4), i(D), num_scenarios=i(M), scale=f(1.5), **FLOAT),
    "GatedTowers": lambda i, f: GatedTowers(i(M), i(D), i(D), (i(4), i(1)), i(3), scale=f(1.5), **FLOAT),
    "ProgressiveExperts": lambda i, f: ProgressiveExperts(i(M), i(D), ((i(4),), (i(3),)), i(2), i(1), **FLOAT),
}


def inputs_of(layer, x, scenario):
    if isinstance(layer, MultiBranchMLP | GatedTowers):
        return x, x.flip(1), scenario
    if isinstance(layer, GateUnit):
        return x, x.flip(1), scenario
    if isinstance(layer, MutualUnit):
        return torch.stack([x, x.flip(1), x.flip(0)], dim=1), scenario
    return x, scenario


def output_of(layer, x, scenario):
    output = layer(*inputs_of(layer, x, scenario))
    return output.own if isinstance(layer, MultiBranchMLP) else output


@pytest.mark.parametrize("name", LAYERS)
def test_numpy_numbers_are_sizes(name):
    torch.manual_seed(0)
    plain = LAYERS[name](int, float)
    torch.manual_seed(0)
    layer = LAYERS[name](np.int64, np.float32)
    x, scenario = batch()
    assert torch.equal(output_of(layer, x, scenario), output_of(plain, x, scenario))
    # Neither a description nor a compiler meets a number of numpy's.
    assert repr(layer) == repr(plain)
    for module in layer.modules():
        assert not any(isinstance(value, np.generic) for value in vars(module).values())


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("column", [False, True])
@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.int16, torch.int32, torch.uint8, torch.uint16, torch.uint32, torch.uint64]
)
def test_layers_take_ids_of_every_integer_type(name, dtype, column):
    layer = LAYERS[name](int, float).eval()
    x, scenario = batch()
    given = scenario.to(dtype)
    assert torch.equal(output_of(layer, x, given[:, None] if column else given), output_of(layer, x, scenario))


FUNCTIONS = {
    "grouped_mlp": lambda x, s: saml_kernels.grouped_mlp(x, s, [torch.ones(M, D, 2)], [torch.ones(M, 2)]),
    "branch_scores": lambda x, s: saml_kernels.branch_scores(x, s, [torch.ones(M, D, 2)], [torch.ones(M, 2)]),
    "mutual_unit": lambda x, s: saml_kernels.mutual_unit(
        torch.stack([x] * M, 1), s, torch.ones(M, D, D), torch.ones(M, D)
    ),
    "group_by_scenario": lambda x, s: saml_kernels.group_by_scenario(s, np.int32(M)).permutation,
    "views": lambda x, s: MixtureOfExperts(2, D, (4,), num_scenarios=M).views(x, s),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_functions_take_columns_of_short_ids(function):
    x, scenario = batch()
    outputs = []
    for given in (scenario, scenario[:, None], scenario.to(torch.uint8)[:, None]):
        torch.manual_seed(0)
        outputs.append(function(x.float(), given))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize(
    ("given", "error", "told"),
    [
        (torch.zeros(B), TypeError, "scenario must be int32 or int64 or another integer type, got torch.float32"),
        (torch.zeros(B, dtype=torch.bool), TypeError, "got torch.bool"),
        (torch.zeros(B, 2, dtype=torch.int8), ValueError, r"must have shape \(B,\) or \(B, 1\), got \(20, 2\)"),
        (torch.full((B, 1), -1, dtype=torch.int8), ValueError, r"must lie in \[0, 3\)"),
        (torch.full((B,), 2**63, dtype=torch.uint64), ValueError, r"must lie in \[0, 3\)"),
    ],
)
def test_ids_that_are_refused(given, error, told):
    x, _ = batch()
    with pytest.raises(error, match=told):
        GroupedMLP(M, D, (2,), **FLOAT)(x, given)


@pytest.mark.parametrize("size", [np.float64(3), np.bool_(True), "3", torch.tensor(2.0)])
def test_sizes_that_are_no_integers_are_refused(size):
    with pytest.raises(TypeError, match="num_scenarios must be an int, got"):
        GroupedMLP(size, D, (2,))


def test_compiled_layers_take_columns_of_short_ids():
    layer = GroupedMLP(M, D, (4, 2), **FLOAT)
    x, scenario = batch()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, scenario.to(torch.int16)[:, None]), layer(x, scenario))
