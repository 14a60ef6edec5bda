"""group_by_scenario: a stable sort of the rows by scenario, and where each scenario's rows lie."""

import hypothesis
import problems
import pytest
import torch
from hypothesis import strategies as st
from problems import skip_unavailable

import saml_kernels

pytestmark = pytest.mark.cpu
on_every_backend = pytest.mark.parametrize("backend", problems.backends("group_by_scenario"))


def group(scenario, M, backend):
    with skip_unavailable(backend):
        return saml_kernels.group_by_scenario(scenario.to(problems.device_of(backend)), M, backend=backend)


def check(grouping, scenario, M):
    permutation, inverse, offsets = (t.cpu() for t in grouping)
    assert [t.dtype for t in grouping] == [torch.int64] * 3
    ids = scenario.long()
    assert torch.equal(permutation, torch.sort(ids, stable=True).indices)
    assert torch.equal(inverse[permutation], torch.arange(len(ids)))
    assert torch.equal(offsets, torch.cat([torch.zeros(1), torch.bincount(ids, minlength=M).cumsum(0)]).long())
    in_order = ids[permutation]
    assert torch.equal(in_order[inverse], ids)
    for k in range(M):
        assert (in_order[offsets[k] : offsets[k + 1]] == k).all()


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("B", [0, 1, 2, 63, 1000, 100_000])
@pytest.mark.parametrize("M", [1, 2, 7, 64])
def test_against_stable_sort(dtype, B, M, backend):
    scenario = torch.randint(M, (B,), dtype=dtype, generator=torch.Generator().manual_seed(B + M))
    check(group(scenario, M, backend), scenario, M)


def dominated(B, M):
    return torch.where(torch.rand(B, generator=torch.Generator().manual_seed(0)) < 0.99, M // 2, M - 1)


@on_every_backend
@pytest.mark.parametrize(
    ("scenario", "M"),
    [
        (dominated(100_000, 8), 8),
        (torch.full((5000,), 3), 5),
        (torch.full((5000,), 0), 1),
        (torch.tensor([4]), 5),
        (torch.tensor([2, 0, 2, 0]), 5000),  # more scenarios than rows
        (torch.arange(3000).flip(0), 3000),
        (torch.arange(3000) % 2 * 999, 1000),
    ],
    ids=["dominated", "one", "single", "one row", "many absent", "descending", "first and last"],
)
def test_uneven_batches(scenario, M, backend):
    check(group(scenario, M, backend), scenario, M)


@on_every_backend
def test_strided_ids(backend):
    wide = torch.randint(5, (300, 3), generator=torch.Generator().manual_seed(0))
    check(group(wide[:, 1], 5, backend), wide[:, 1], 5)
    constant = torch.tensor([2]).expand(40)
    check(group(constant, 5, backend), constant, 5)
    check(group(wide[1:, 0], 5, backend), wide[1:, 0], 5)


@on_every_backend
@hypothesis.given(data=st.data(), M=st.integers(1, 9))
def test_any_batch(backend, data, M):
    ids = data.draw(st.lists(st.integers(0, M - 1), max_size=40))
    dtype = data.draw(st.sampled_from([torch.int32, torch.int64]))
    scenario = torch.tensor(ids, dtype=dtype)
    check(group(scenario, M, backend), scenario, M)


@on_every_backend
def test_thread_count_does_not_show(backend, keep_num_threads):
    scenario = torch.randint(13, (100_003,), generator=torch.Generator().manual_seed(1))
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(group(scenario, 13, backend))
    for grouping in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], grouping, strict=True))


@on_every_backend
def test_nothing_reads_uninitialised_memory(backend, poisoned_empty):
    scenario = torch.tensor([2, 0, 2])
    check(group(scenario, 4, backend), scenario, 4)


def test_fields():
    grouping = saml_kernels.group_by_scenario(torch.tensor([1, 0, 1]), 2)
    assert isinstance(grouping, saml_kernels.Grouping)
    assert grouping.permutation.tolist() == [1, 0, 2]
    assert grouping.inverse.tolist() == [1, 0, 2]
    assert grouping.offsets.tolist() == [0, 1, 3]
    x = torch.tensor([[10.0], [20.0], [30.0]])
    assert torch.equal(x[grouping.permutation][grouping.inverse], x)


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("ids", "wrong", "row"),
    [([0, 1, 3, -7], 3, 2), ([0, -1, 9], -1, 1), ([2147483647], 2147483647, 0), ([2, 2, -2147483648], -2147483648, 2)],
    ids=str,
)
def test_first_offending_id_is_named(ids, wrong, row, dtype, backend):
    with pytest.raises(ValueError, match=rf"(?<![\d-]){wrong}\b") as error:
        group(torch.tensor(ids, dtype=dtype), 3, backend)
    message = str(error.value)
    assert f" {row}" in message.replace(f"{wrong}", "", 1)
    assert "\n" not in message


@on_every_backend
def test_offending_id_far_into_the_batch(backend, keep_num_threads):
    """Several threads may each see one: the first row counts."""
    torch.set_num_threads(4)
    scenario = torch.zeros(100_000, dtype=torch.int64)
    scenario[[77_777, 99_999, 51_234]] = torch.tensor([5, 6, 42])
    with pytest.raises(ValueError, match=r"42.*51234|51234.*42"):
        group(scenario, 3, backend)


@on_every_backend
def test_int64_ids_are_not_truncated(backend):
    with pytest.raises(ValueError, match=str(2**32)):
        group(torch.tensor([0, 2**32]), 3, backend)


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bool, torch.complex64])
def test_ids_are_integers(dtype, backend):
    with pytest.raises(TypeError, match=str(dtype).removeprefix("torch.")):
        group(torch.zeros(3, dtype=dtype), 3, backend)


@on_every_backend
@pytest.mark.parametrize("shape", [(), (3, 2), (3, 1, 1), (0, 2)], ids=str)
def test_ids_are_one_a_row(shape, backend):
    with pytest.raises(ValueError, match=r"\(B,\)|1-D|one-dimensional|1 dimension"):
        group(torch.zeros(shape, dtype=torch.int64), 3, backend)


@pytest.mark.parametrize("M", [0, -1])
def test_at_least_one_scenario(M):
    with pytest.raises(ValueError, match=rf"num_scenarios.*{M}"):
        saml_kernels.group_by_scenario(torch.zeros(0, dtype=torch.int64), M)


def test_ids_are_a_tensor():
    with pytest.raises(TypeError, match="list"):
        saml_kernels.group_by_scenario([0, 1], 2)
