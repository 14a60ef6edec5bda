"""STAR's partitioned normalisation: statistics scenario by scenario, in training and evaluation."""

import copy

import pytest
import torch
from layer_batches import TOLERANCE, B, D, M, batch, randomised
from problems import assert_close
from torch import nn

from saml_kernels.layers import PartitionedNorm

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize("combine", ["product", "sum"])
def test_partitioned_norm_in_training_is_batch_norm_scenario_by_scenario(combine):
    layer = randomised(PartitionedNorm(M, D, combine=combine, dtype=torch.float64))
    z, scenario = batch()
    ref = torch.empty_like(z)
    for k in range(M):
        rows = z[scenario == k]
        scale = layer.shared_weight * layer.weight[k] if combine == "product" else layer.shared_weight + layer.weight[k]
        ref[scenario == k] = nn.functional.batch_norm(
            rows, None, None, scale, layer.shared_bias + layer.bias[k], training=True, eps=layer.eps
        )
    assert_close({"out": layer(z, scenario)}, {"out": ref}, TOLERANCE)


MOMENTUM = 0.3


def moving(layer):
    return {"mean": layer.running_mean, "var": layer.running_var}


def test_moving_statistics_are_batch_norms():
    """Its cumulative mean over the first 1/momentum batches, then its moving one."""
    layer = PartitionedNorm(M, D, momentum=MOMENTUM, dtype=torch.float64)
    norms = [nn.BatchNorm1d(D, momentum=None, dtype=torch.float64) for _ in range(M)]
    for seed in range(6):
        z, scenario = batch(seed)
        layer(z, scenario)
        for k, norm in enumerate(norms):
            norm.momentum = None if seed < 3 else MOMENTUM
            norm(z[scenario == k])
        ref = {
            "mean": torch.stack([norm.running_mean for norm in norms]),
            "var": torch.stack([norm.running_var for norm in norms]),
        }
        assert_close(moving(layer), ref, TOLERANCE)
    assert layer.num_batches_tracked.tolist() == [6] * M


@pytest.mark.parametrize("first", [0, 50], ids=["from the start", "first seen in batch 50"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_one_batch_of_a_scenario_gives_its_statistics(first, dtype):
    layer = PartitionedNorm(M, D, dtype=dtype)
    for seed in range(first):
        z, scenario = batch(seed)
        layer(z[scenario != 1].to(dtype), scenario[scenario != 1])
    assert torch.equal(layer.running_mean[1], torch.zeros(D, dtype=dtype))
    assert torch.equal(layer.running_var[1], torch.ones(D, dtype=dtype))
    z, scenario = batch(99)
    z = 5 + 3 * z.to(dtype)
    layer(z, scenario)
    rows = z[scenario == 1].double()
    ref = (rows - rows.mean(0)) / (rows.var(0) + layer.eps).sqrt()
    out = layer.eval()(z, scenario)[scenario == 1]
    assert_close({"out": out}, {"out": ref}, 1e-5 if dtype == torch.float32 else TOLERANCE)


@pytest.mark.parametrize("rows", [0, 1])
def test_a_scenario_without_statistics_keeps_what_it_starts_from(rows):
    layer = PartitionedNorm(M, D)
    for seed in range(20):
        z, scenario = batch(seed)
        scenario[scenario == 2] = 1
        scenario[:rows] = 2
        layer(z.float(), scenario)
    assert torch.equal(layer.running_mean[2], torch.zeros(D))
    assert torch.equal(layer.running_var[2], torch.ones(D))
    assert layer.num_batches_tracked.tolist() == [20, 20, 0]


def test_statistics_saved_without_a_count_go_on_by_the_momentum():
    layer, (z, scenario) = PartitionedNorm(M, D, momentum=MOMENTUM, dtype=torch.float64), batch()
    for seed in range(5):
        layer(*batch(seed))
    saved = layer.state_dict()
    del saved["num_batches_tracked"]
    other = PartitionedNorm(M, D, momentum=MOMENTUM, dtype=torch.float64)
    other.load_state_dict(saved)
    assert "num_batches_tracked" not in saved
    for each in (layer, other):
        each(z, scenario)
    assert_close(moving(other), moving(layer), TOLERANCE)


def test_evaluation_does_not_depend_on_the_rest_of_the_batch():
    layer = randomised(PartitionedNorm(M, D, dtype=torch.float64))
    for seed in range(3):
        layer(*batch(seed))
    layer.eval()
    z, scenario = batch(9)
    whole = layer(z, scenario)
    alone = torch.cat([layer(z[n : n + 1], scenario[n : n + 1]) for n in range(B)])
    assert torch.equal(whole, alone)
    assert all(torch.equal(a, b) for a, b in zip(layer.state_dict().values(), layer.state_dict().values(), strict=True))


@pytest.mark.parametrize("rows", [0, 1])
def test_a_scenario_with_no_or_one_row_is_safe(rows):
    layer = PartitionedNorm(M, D, dtype=torch.float64)
    z, scenario = batch()
    layer(z, scenario)
    before = layer.running_mean.clone(), layer.running_var.clone()
    scenario = torch.cat([torch.ones(B - rows, dtype=torch.int64), torch.full((rows,), 2)])
    leaf = z.clone().requires_grad_()
    out = layer(leaf, scenario)
    out.square().sum().backward()
    assert out.isfinite().all()
    assert leaf.grad.isfinite().all()
    # Statistics of scenarios 0 and 2 stay, those of scenario 1 move.
    for now, was in zip((layer.running_mean, layer.running_var), before, strict=True):
        assert torch.equal(now[[0, 2]], was[[0, 2]])
        assert not torch.equal(now[1], was[1])
    if rows == 1:
        expected = (z[-1] - before[0][2]) / (before[1][2] + layer.eps).sqrt()
        assert_close({"out": out[-1]}, {"out": expected}, TOLERANCE)


def test_statistics_are_saved_and_follow_to_another_dtype():
    layer = PartitionedNorm(M, D)
    layer(batch()[0].float(), batch()[1])
    other = PartitionedNorm(M, D)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.running_var, layer.running_var)
    assert torch.equal(other.num_batches_tracked, layer.num_batches_tracked)
    assert layer.half().num_batches_tracked.dtype == torch.int64
    assert layer.double().running_mean.dtype == torch.float64


def test_an_empty_batch_changes_nothing():
    layer = PartitionedNorm(M, D)
    before = layer.running_var.clone()
    assert layer(torch.empty(0, D), torch.empty(0, dtype=torch.int64)).shape == (0, D)
    assert torch.equal(layer.running_var, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_of_low_precision_are_taken_in_float32(dtype):
    """In bfloat16 a count of rows stops at 256."""
    z, scenario = batch(rows=3000)
    z, exact = (3 + z).to(dtype), PartitionedNorm(M, D)
    layer = PartitionedNorm(M, D, dtype=dtype)
    out, expected = layer(z, scenario), exact(z.float(), scenario)
    assert out.dtype == layer.running_var.dtype == dtype
    bound = {"out": expected, "mean": exact.running_mean, "var": exact.running_var}
    found = {"out": out.float(), "mean": layer.running_mean.float(), "var": layer.running_var.float()}
    assert_close(found, bound, torch.finfo(dtype).eps)


def test_partitioned_norm_compiles_into_one_graph():
    layer, (z, scenario) = PartitionedNorm(M, D, dtype=torch.float64), batch()
    other = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert_close({"out": compiled(z, scenario)}, {"out": other(z, scenario)}, TOLERANCE)
        assert_close(moving(layer), moving(other), TOLERANCE)
    assert layer.num_batches_tracked.tolist() == [2] * M


def test_gradient_of_the_batch_statistics():
    layer = randomised(PartitionedNorm(M, 2, dtype=torch.float64))
    z, scenario = batch(rows=8, width=2)
    assert torch.autograd.gradcheck(lambda leaf: layer(leaf, scenario), z.requires_grad_())
