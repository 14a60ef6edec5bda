"""The compiled CPU kernels on strided, empty, non-finite inputs and in poisoned memory."""

import dataclasses

import problems
import pytest
import torch
from cpp_runs import CPP_ONLY, NAMES, SEVERAL_TILES, assert_identical, run
from problems import FLOAT32_TOLERANCE, Case, assert_close, make, with_gradients

pytestmark = CPP_ONLY


def transposed(t):
    return t.mT.contiguous().mT if t.ndim >= 2 else t


def sliced(t):
    return torch.stack([t, torch.full_like(t, float("nan"))], dim=-1)[..., 0]


def expanded(t):
    return t[:1].expand_as(t) if t.shape[0] > 0 else t


@pytest.mark.parametrize("layout", [transposed, sliced, expanded])
@pytest.mark.parametrize("case", SEVERAL_TILES[1:3], ids=str)
def test_layout_does_not_show(case, layout):
    strided = make(case).to(torch.float32).map(layout)
    ids = torch.stack([strided.scenario, -strided.scenario], dim=1)[:, 0]
    out = run(dataclasses.replace(strided, scenario=ids))
    assert_identical(out, run(strided.map(lambda t: t.clone(memory_format=torch.contiguous_format))))


def test_layout_of_the_cotangent_does_not_show():
    problem = make(SEVERAL_TILES[0]).to(torch.float32)
    gradients = []
    for cotangent in (torch.ones(()).expand(1003, 17), torch.ones(1003, 17), torch.ones(17, 1003).t()):
        leaves = problem.leaves()
        gradients.append(torch.autograd.grad(leaves.run(backend="cpp").own, leaves.x_local, cotangent)[0])
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


def test_id_type_does_not_show():
    problem = make(SEVERAL_TILES[0]).to(torch.float32)
    narrow = dataclasses.replace(problem, scenario=problem.scenario.int())
    assert_identical(run(narrow), run(problem))


@pytest.mark.parametrize("per_branch", [False, True], ids=["shared", "views"])
@pytest.mark.parametrize("foreign_dtype", [None, torch.bfloat16, torch.int8], ids=["full", "bfloat16", "int8"])
@pytest.mark.parametrize(
    "sizes",
    # The auxiliary rows of a weight then start past the first slice of its gradient.
    [{"B": 0}, {"B": 1}, {"local_dim": 0, "aux_dims": (110, 3)}, {"global_dim": 0}, {"local_dim": 0, "global_dim": 0}],
    ids=str,
)
def test_empty_sizes(sizes, foreign_dtype, per_branch, capability):
    for mutual_layers in ((), (1,), (1, 2)):
        case = Case(mutual_layers=mutual_layers, per_branch=per_branch, foreign_dtype=foreign_dtype, **sizes)
        problem = make(case)
        ref = with_gradients(lambda p: p.run(backend="reference", return_scores=True), problem)
        assert_close(run(problem.to(torch.float32)), ref, FLOAT32_TOLERANCE if foreign_dtype is None else 1e-3)


@pytest.mark.parametrize("activation", problems.ACTIVATIONS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("field", ["x_local", "foreign view", "x_global"])
def test_non_finite_inputs_stay_in_their_rows(field, value, activation, capability):
    case = Case(
        M=3,
        B=100,
        local_dim=17,
        hidden_dims=(17, 33),
        aux_dims=(9, 5),
        mutual_layers=(1, 2),
        activation=activation,
        per_branch=field == "foreign view",
    )
    clean = make(case).to(torch.float32)
    dirty = clean.map(lambda t: t.clone())
    row = 41
    if field == "foreign view":
        dirty.x_local[row, (clean.scenario[row] + 1) % case.M, 3] = value
    else:
        getattr(dirty, field)[row, 3] = value
    out, ref = run(dirty), run(clean)
    others = torch.arange(case.B) != row
    for name in ("own", "aux", "scores[1]", "scores[2]", "∂x_local", "∂x_global"):
        assert torch.equal(out[name][others], ref[name][others]), name
    if field != "x_global":
        assert torch.equal(out["aux"], ref["aux"])
    if value != value:
        assert out["own"][row].isnan().all()
        assert out["aux"][row].isnan().all() == (field == "x_global")
    # Of the parameters only those of the row's scenario, and the auxiliary network, can have met the value.
    for name in NAMES[2:]:
        if not name.startswith("aux"):
            elsewhere = torch.arange(case.M) != clean.scenario[row]
            assert torch.equal(out[f"∂{name}"][elsewhere], ref[f"∂{name}"][elsewhere]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("case", SEVERAL_TILES[1:], ids=str)
def test_nothing_reads_uninitialised_memory(case, recompute, dtype, capability, request):
    problem = make(dataclasses.replace(case, B=103)).to(dtype)
    clean = run(problem, recompute=recompute)
    request.getfixturevalue("poisoned_empty")
    out = run(problem, recompute=recompute)
    assert not any(tensor.isnan().any() for tensor in out.values())
    assert_identical(out, clean)
