"""What trains what: the stop-gradient rules entry by entry, from the loss of one sample at a time.

A sample of scenario t trains the parameters of scenario t, its own rows of x_local and x_global, and the auxiliary
network. Every foreign stream is a constant to it. "No gradient" means exactly zero, not small.
"""

import dataclasses

import problems
import pytest
import torch
from problems import TRUNK_BACKENDS, Case, make, skip_unavailable

pytestmark = pytest.mark.cpu
on_every_backend = pytest.mark.parametrize("backend", TRUNK_BACKENDS)

M, LAYERS, ROW = 3, 3, 4
MUTUAL = pytest.mark.parametrize("mutual_layers", [(1,), (2,), (1, 3), (1, 2, 3), ()], ids=str)
OWN = pytest.mark.parametrize("own", range(M))
SCORE = pytest.mark.parametrize("score", ["ratio", "softmax"])


def trunk(mutual_layers, backend, **options):
    """A trunk in which no unit is dead, and a batch in which scenario 0, 1, 2 come twice each."""
    case = Case(
        M=M, B=6, hidden_dims=(6, 5, 4), aux_dims=(5, 4, 3), mutual_layers=mutual_layers, activation="tanh", **options
    )
    problem = dataclasses.replace(make(case), scenario=torch.tensor([0, 1, 2, 2, 1, 0]))
    return problem.to(torch.float64, problems.device_of(backend))


def gradients(problem, backend, output="own", rows=slice(None)):
    """Gradients by .backward(), so that a parameter without one shows as None."""
    leaves = problem.leaves()
    with skip_unavailable(backend):
        y = getattr(leaves.run(backend=backend), output)[rows]
    y.backward(torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype, device=y.device).reshape(y.shape))
    return {name: tensor.grad for name, tensor in leaves.named()}


def with_row_of(problem, own):
    scenario = problem.scenario.clone()
    scenario[ROW] = own
    return dataclasses.replace(problem, scenario=scenario)


def others(count, one):
    return [k for k in range(count) if k != one]


def per_scenario(gradient):
    return {name: g for name, g in gradient.items() if name.startswith(("branch", "gate"))}


@on_every_backend
@MUTUAL
@OWN
@SCORE
def test_one_sample_trains_its_own_scenario_alone(mutual_layers, own, score, backend):
    gradient = gradients(with_row_of(trunk(mutual_layers, backend, score=score), own), backend, rows=ROW)
    slices = per_scenario(gradient)
    assert len(slices) == 2 * LAYERS + 2 * len(mutual_layers)
    for name, g in slices.items():
        assert not g[others(M, own)].any(), f"{name}: a foreign slice has gradient"
        assert g[own].abs().sum() > 0, f"{name}: the own slice has none"


@on_every_backend
@OWN
def test_both_halves_of_the_branch_weights_are_trained(own, backend):
    """[V ; A]: the branch stream's rows come first, the auxiliary stream's after them; one sample reaches each row."""
    gradient = gradients(with_row_of(trunk((1, 2), backend), own), backend, rows=ROW)
    for layer in range(1, LAYERS + 1):
        assert gradient[f"branch_weights[{layer}]"][own].abs().sum(-1).all()


@on_every_backend
@MUTUAL
def test_one_sample_trains_every_auxiliary_layer_through_its_own_branch(mutual_layers, backend):
    gradient = gradients(trunk(mutual_layers, backend), backend, rows=ROW)
    for layer in range(1, LAYERS + 1):
        assert gradient[f"aux_weights[{layer}]"].any()
        assert gradient[f"aux_biases[{layer}]"].any()


@on_every_backend
@MUTUAL
def test_auxiliary_loss_trains_the_auxiliary_network_alone(mutual_layers, backend):
    gradient = gradients(trunk(mutual_layers, backend), backend, output="aux", rows=ROW)
    for layer in range(1, LAYERS + 1):
        assert gradient.pop(f"aux_weights[{layer}]").any()
        assert gradient.pop(f"aux_biases[{layer}]").any()
    x_global = gradient.pop("x_global")
    assert x_global[ROW].any()
    assert not x_global[others(6, ROW)].any()
    for name, g in gradient.items():
        assert g is None or not g.any(), name


@on_every_backend
@MUTUAL
@pytest.mark.parametrize("stop_gradient", [True, False])
def test_one_sample_reaches_its_own_inputs_alone(mutual_layers, stop_gradient, backend):
    gradient = gradients(trunk(mutual_layers, backend, stop_gradient=stop_gradient), backend, rows=ROW)
    for name in ("x_local", "x_global"):
        assert gradient[name][ROW].abs().all()
        assert not gradient[name][others(6, ROW)].any()


@on_every_backend
@MUTUAL
@OWN
@SCORE
def test_views_of_foreign_branches_get_no_gradient(mutual_layers, own, score, backend):
    problem = with_row_of(trunk(mutual_layers, backend, per_branch=True, score=score), own)
    x_local = gradients(problem, backend, rows=ROW)["x_local"]
    assert x_local.shape == (6, M, 4)
    assert x_local[ROW, own].abs().all()
    assert not x_local[ROW, others(M, own)].any()
    assert not x_local[others(6, ROW)].any()


@on_every_backend
@MUTUAL
def test_shared_x_local_is_reached_through_the_own_branch_alone(mutual_layers, backend):
    """Its gradient is the own view's, when every branch gets the same values as a view of its own."""
    shared = trunk(mutual_layers, backend)
    views = dataclasses.replace(shared, x_local=shared.x_local[:, None].expand(-1, M, -1))
    rows = torch.arange(6, device=shared.scenario.device)
    own_view = gradients(views, backend)["x_local"][rows, shared.scenario]
    assert problems.relative_error(gradients(shared, backend)["x_local"], own_view) < 1e-14


@on_every_backend
@MUTUAL
@pytest.mark.parametrize("absent", range(M))
@pytest.mark.parametrize("per_branch", [False, True], ids=["shared", "views"])
def test_absent_scenario_gets_exactly_zero(mutual_layers, absent, per_branch, backend):
    problem = trunk(mutual_layers, backend, per_branch=per_branch)
    present = torch.tensor(others(M, absent), device=problem.scenario.device)
    problem = dataclasses.replace(problem, scenario=present[torch.arange(6) % 2])
    gradient = gradients(problem, backend)
    for name, g in per_scenario(gradient).items():
        assert g is not None, name
        assert not g[absent].any(), name
        assert g[present].flatten(1).abs().sum(1).all(), name
    if per_branch:
        assert not gradient["x_local"][:, absent].any()


@on_every_backend
@MUTUAL
def test_empty_batch_gives_zero_gradients(mutual_layers, backend):
    problem = trunk(mutual_layers, backend)
    problem = dataclasses.replace(
        problem, x_local=problem.x_local[:0], x_global=problem.x_global[:0], scenario=problem.scenario[:0]
    )
    leaves = problem.leaves()
    with skip_unavailable(backend):
        out = leaves.run(backend=backend)
    (out.own.sum() + out.aux.sum()).backward()
    for name, tensor in leaves.named():
        assert tensor.grad is not None, name
        assert tensor.grad.shape == tensor.shape
        assert not tensor.grad.any(), name


@on_every_backend
def test_one_scenario_leaves_its_gates_untrained(backend):
    """M = 1 is the identity: the gate gets a gradient tensor, of zeros."""
    problem = make(Case(M=1, B=4)).to(torch.float64, problems.device_of(backend))
    gradient = gradients(problem, backend)
    for name in ("gate_weights[1]", "gate_biases[1]"):
        assert gradient[name] is not None
        assert not gradient[name].any()


@on_every_backend
@pytest.mark.parametrize("output", ["own", "aux"])
def test_batch_gradient_is_the_sum_over_its_samples(output, backend):
    problem = trunk((1, 2), backend)
    leaves = problem.leaves()
    with skip_unavailable(backend):
        y = getattr(leaves.run(backend=backend), output)
    inputs = [tensor for _, tensor in leaves.named()]
    options = {"allow_unused": True, "materialize_grads": True}
    whole = torch.autograd.grad(y.sum(), inputs, retain_graph=True, **options)
    parts = [torch.autograd.grad(y[n].sum(), inputs, retain_graph=True, **options) for n in range(6)]
    for gradient, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        assert problems.relative_error(gradient, torch.stack(pieces).sum(0)) < 1e-13


# --- without stop-gradient ------------------------------------------------------------------------------------------


@on_every_backend
@pytest.mark.parametrize(
    ("mutual_layers", "layers", "gates"),
    [((1,), {1}, set()), ((2,), {1, 2}, set()), ((1, 3), {1, 2, 3}, {1}), ((), set(), set())],
    ids=str,
)
@SCORE
def test_everything_that_is_heard_is_trained(mutual_layers, layers, gates, score, backend):
    """Foreign branches are heard up to the last mutual layer, foreign gates at the mutual layers before it."""
    own = 1
    problem = with_row_of(trunk(mutual_layers, backend, score=score, stop_gradient=False, per_branch=True), own)
    gradient = gradients(problem, backend, rows=ROW)
    for kind, reached in [("branch", layers), ("gate", gates)]:
        for layer in range(1, LAYERS + 1):
            for part in ("weights", "biases"):
                g = gradient.get(f"{kind}_{part}[{layer}]")
                if g is None:
                    continue
                assert g[own].any()
                assert [g[k].any().item() for k in others(M, own)] == [layer in reached] * 2, (kind, part, layer)
    assert gradient["x_local"][ROW, others(M, own)].any().item() == bool(mutual_layers)


@on_every_backend
def test_stop_gradient_changes_gradients_only(backend):
    stopped, full = (trunk((1, 2), backend, stop_gradient=flag) for flag in (True, False))
    with skip_unavailable(backend):
        a, b = (p.run(backend=backend, return_scores=True) for p in (stopped, full))
    assert problems.relative_error(a.own, b.own) < 1e-14
    assert problems.relative_error(a.scores[1], b.scores[1]) < 1e-14
    a, b = gradients(stopped, backend), gradients(full, backend)
    assert problems.relative_error(a["x_global"], b["x_global"]) > 1e-3
    assert problems.relative_error(a["aux_weights[1]"], b["aux_weights[1]"]) > 1e-3
