"""Every operation on 300 random calls of this run's seed against float64, and on 100 against itself on changed batches.

The latter need no reference: what happens to results when rows trade places or leave, and when scenarios trade names
with their parameters.
"""

import hypothesis
import pytest
import torch
from budget import examples
from hypothesis import strategies as st
from problems import backends
from random_calls import CALLS, Call, check_against_oracle, check_same, scenarios, seeds

import saml_kernels

BACKEND = "auto"
"""The kernels, and the reference for what they leave to it, such as stop_gradient=False."""
pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif("cpp" not in backends("multi_branch"), reason="needs the compiled extension"),
]
every_operation = pytest.mark.parametrize("operation", CALLS)


def drawn(data, operation, **options):
    call = data.draw(CALLS[operation](**options))
    return call, call.results(BACKEND)


@every_operation
@examples(300)
@hypothesis.given(data=st.data())
def test_errors_are_within_the_bounds(operation, data):
    call, out = drawn(data, operation)
    check_against_oracle(call, BACKEND)
    (dtype,) = {tensor.dtype for tensor in call.tensors.values()}
    assert {tensor.dtype for name, tensor in out.items() if "scores" not in name} == {dtype}
    if len(call.scenario) == 0:
        assert not any(tensor.any() for tensor in out.values())


@pytest.mark.parametrize("wrong", [None, "output", "gradient"])
def test_the_judge_of_a_sigmoid_that_is_one_in_float32(wrong):
    """Its derivative is 0 in float32 and 1e-9 in float64; what is wrong otherwise is not forgiven for it."""

    def function(tensors, scenario, *, backend):
        del scenario
        x = tensors["x"]
        if wrong == "gradient" and backend == BACKEND:
            return {"out": torch.sigmoid(x) + 9e-9 * x - (9e-9 * x).detach()}
        return {"out": torch.sigmoid(x) * (1.001 if wrong == "output" and backend == BACKEND else 1)}

    call = Call(
        tensors={"x": torch.tensor([20.0])},
        of_rows=("x",),
        of_scenarios=(),
        with_columns=(),
        scenario=torch.tensor([0]),
        M=1,
        cotangents={"out": torch.ones(1)},
        function=function,
        options={},
    )
    if wrong is None:
        check_against_oracle(call, BACKEND)
        return
    with pytest.raises(AssertionError, match="relative errors"):
        check_against_oracle(call, BACKEND)


@every_operation
@examples(100)
@hypothesis.given(data=st.data())
def test_other_batches_and_other_names(operation, data):
    call, out = drawn(data, operation, types=st.just(torch.float64), smallest=1)
    generator = torch.Generator().manual_seed(data.draw(seeds))
    check_permuted_rows(call, out, torch.randperm(len(call.scenario), generator=generator))
    check_two_parts(call, out, int(torch.randint(len(call.scenario) + 1, (1,), generator=generator)))
    check_relabelled(call, out, torch.randperm(call.M, generator=generator).tolist())
    if operation != "expert_outputs" and call.options.get("stop_gradient", True):
        check_alone(call, out, int(call.scenario[0]))


def check_permuted_rows(call, out, order):
    """Of permuted rows come permuted results, and the same sums over the batch."""
    permuted = {name: each if name in of_batch(call) else each[order] for name, each in out.items()}
    check_same(call, call.rows(order).results(BACKEND), permuted)


def check_two_parts(call, out, cut):
    """Rows get what they get alone; what belongs to the whole batch is the sum of the parts'."""
    head, tail = (call.rows(part).results(BACKEND) for part in (slice(cut), slice(cut, None)))
    parts = {
        name: head[name] + tail[name] if name in of_batch(call) else torch.cat([head[name], tail[name]]) for name in out
    }
    check_same(call, parts, out)


def check_relabelled(call, out, labels):
    """Scenarios relabelled with all that is theirs change nothing."""
    renamed = call.relabelled(labels).results(BACKEND)
    for name, each in renamed.items():
        of = name.removeprefix("∂")
        each = each[labels] if of in call.of_scenarios else each
        renamed[name] = each[:, labels] if of in call.with_columns else each
    check_same(call, renamed, out)


def check_alone(call, out, own):
    """Without the rows of others, a scenario's rows get the same, and train its parameters the same and no others'."""
    rows = (call.scenario == own).nonzero().flatten()
    alone = call.rows(rows).results(BACKEND)
    of_scenarios = {f"∂{name}" for name in call.of_scenarios}
    by_scenario_or_row = out.keys() - (of_batch(call) - of_scenarios)
    found = {name: alone[name][own] if name in of_scenarios else alone[name] for name in by_scenario_or_row}
    check_same(
        call, found, {name: out[name][own] if name in of_scenarios else out[name][rows] for name in by_scenario_or_row}
    )
    others = [k for k in range(call.M) if k != own]
    assert not any(alone[name][others].any() for name in of_scenarios)
    for name in {*call.with_columns} & {*call.of_rows}:
        assert not alone[f"∂{name}"][:, others].any()


def of_batch(call):
    """Names of results that are of the whole batch: gradients of parameters."""
    return {f"∂{name}" for name in call.tensors if name not in call.of_rows}


@examples(300)
@hypothesis.given(data=st.data(), M=st.integers(1, 40), B=st.integers(0, 200))
def test_grouping(data, M, B):
    """Rows by scenario, in their order within each; the inverse; and where scenarios begin."""
    scenario = data.draw(scenarios(M, B))
    grouping = saml_kernels.group_by_scenario(scenario, M, backend=BACKEND)
    ids = scenario.tolist()
    expected = sorted(range(B), key=ids.__getitem__)
    assert grouping.permutation.tolist() == expected
    assert [expected[place] for place in grouping.inverse.tolist()] == list(range(B))
    assert grouping.offsets.tolist() == [sum(each < k for each in ids) for k in range(M + 1)]
