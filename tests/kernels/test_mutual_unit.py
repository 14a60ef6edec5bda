"""mutual_unit against the oracle, against finite differences and against the closed form of its score gradient."""

import itertools

import naive
import problems
import pytest
import torch
from problems import FLOAT32_TOLERANCE, FLOAT64_TOLERANCE, relative_error, skip_unavailable

import saml_kernels

pytestmark = pytest.mark.cpu
on_every_backend = pytest.mark.parametrize("backend", problems.backends("mutual_unit"))
both_scores = pytest.mark.parametrize("score", ["ratio", "softmax"])
EVERY_OPTION = list(itertools.product(["ratio", "softmax"], ["vector", "scalar"], [True, False]))


def make(M=4, B=9, d=5, gate="vector", dtype=torch.float64, seed=0):
    """Streams with a common direction, so that Σ c_ij stays away from 0."""
    generator = torch.Generator().manual_seed(seed)
    width = d if gate == "vector" else 1
    v = 0.7 + torch.randn(B, M, d, generator=generator)
    weight = torch.randn(M, d, width, generator=generator) / d**0.5
    bias = torch.randn(M, width, generator=generator)
    scenario = torch.randint(M, (B,), generator=generator)
    return v.to(dtype), scenario, weight.to(dtype), bias.to(dtype)


def with_gradients(function, v, scenario, weight, bias, **options):
    """Output, α and the gradients for a random cotangent, all on the CPU."""
    leaves = [t.detach().requires_grad_() for t in (v, weight, bias)]
    out, alpha = function(leaves[0], scenario, *leaves[1:], **options)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out.device, out.dtype)
    gradients = torch.autograd.grad(out, leaves, cotangent, allow_unused=True, materialize_grads=True)
    values = [t.detach().cpu() for t in (out, alpha, *gradients)]
    return dict(zip(("out", "alpha", "dv", "dweight", "dbias"), values, strict=True))


def kernel(v, scenario, weight, bias, *, backend, **options):
    moved = (t.to(problems.device_of(backend)) for t in (v, scenario, weight, bias))
    with skip_unavailable(backend):
        return with_gradients(saml_kernels.mutual_unit, *moved, backend=backend, return_scores=True, **options)


@on_every_backend
@pytest.mark.parametrize("M", [1, 2, 3, 8])
@pytest.mark.parametrize(("score", "gate", "stop_gradient"), EVERY_OPTION)
def test_parity(M, score, gate, stop_gradient, backend):
    inputs = make(M=M, gate=gate)
    options = {"score": score, "stop_gradient": stop_gradient, "temperature": 0.3}
    ref = with_gradients(naive.mutual_unit, *inputs, **options)
    problems.assert_close(kernel(*inputs, backend=backend, **options), ref, FLOAT64_TOLERANCE)
    narrow = kernel(*make(M=M, gate=gate, dtype=torch.float32), backend=backend, **options)
    problems.assert_close(narrow, ref, FLOAT32_TOLERANCE)


@on_every_backend
def test_scores_are_returned_on_request_only(backend):
    v, scenario, weight, bias = (t.to(problems.device_of(backend)) for t in make())
    with skip_unavailable(backend):
        out = saml_kernels.mutual_unit(v, scenario, weight, bias, backend=backend)
    assert isinstance(out, torch.Tensor)
    assert out.shape == (9, 5)


# --- degenerate scores ----------------------------------------------------------------------------------------------


def gradient_without_scores(v, scenario, weight, bias, alpha, cotangent):
    """dV_t of V_t + g ∘ N with α held constant, in closed form: m + U (g (1 − g) ∘ m ∘ N)."""
    rows = torch.arange(v.shape[0])
    own, U = v[rows, scenario], weight[scenario]
    heard = torch.einsum("bm,bmd->bd", alpha, v)
    gate = torch.sigmoid(torch.einsum("bd,bde->be", own, U) + bias[scenario])
    through_gate = (cotangent * heard * gate * (1 - gate)).reshape(len(rows), -1, v.shape[2])
    if U.shape[2] == 1:
        through_gate = (cotangent * heard).sum(1, keepdim=True) * gate * (1 - gate)
    else:
        through_gate = through_gate.squeeze(1)
    return cotangent + torch.einsum("bde,be->bd", U, through_gate), gate, heard


def score_gradient(v, scenario, alpha, gate, cotangent, score, temperature):
    """What reaches V_t through the scores, in closed form, one sample at a time.

    dα_j = ⟨g ∘ m, V_j⟩;  dz_j = α_j (dα_j − Σ_i α_i dα_i);  dc_j = dz_j / S − Σ_i dz_i c_i / S², or dz_j / τ;
    dV_t = Σ_j dc_j (V_j / ‖V_j‖ − c_j V_t / ‖V_t‖) / ‖V_t‖
    """
    result = torch.zeros_like(cotangent)
    for n, t in enumerate(scenario.tolist()):
        others = [j for j in range(v.shape[1]) if j != t]
        own, unit = v[n, t], {j: v[n, j] / v[n, j].norm() for j in others}
        c = {j: float(own @ unit[j] / own.norm()) for j in others}
        dalpha = {j: float((gate[n] * cotangent[n]) @ v[n, j]) for j in others}
        mean = sum(float(alpha[n, j]) * dalpha[j] for j in others)
        dz = {j: float(alpha[n, j]) * (dalpha[j] - mean) for j in others}
        if score == "ratio":
            S = sum(c.values())
            shift = sum(dz[j] * c[j] for j in others) / S**2
            dc = {j: dz[j] / S - shift for j in others}
        else:
            dc = {j: dz[j] / temperature for j in others}
        for j in others:
            result[n] += dc[j] * (unit[j] - c[j] * own / own.norm()) / own.norm()
    return result


def own_gradient(results, scenario):
    return results["dv"][torch.arange(scenario.shape[0]), scenario]


def cotangent_of(out):
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out.dtype)


@on_every_backend
@both_scores
@pytest.mark.parametrize("gate", ["vector", "scalar"])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e3])
def test_score_part_of_the_gradient(score, gate, scale, backend):
    """The score part is a fraction of dV_t, so a wrong one hides in a comparison of the whole; here it stands alone.

    Cosines do not see the streams' lengths, so dV_t's score part must be right for short and for long streams.
    """
    v, scenario, weight, bias = make(M=5, B=20, gate=gate)
    v = v * scale
    results = kernel(v, scenario, weight, bias, score=score, temperature=0.3, backend=backend)
    cotangent = cotangent_of(results["out"])
    rest, gate_values, _ = gradient_without_scores(v, scenario, weight, bias, results["alpha"], cotangent)
    expected = score_gradient(v, scenario, results["alpha"], gate_values, cotangent, score, 0.3)
    assert expected.norm() > 0
    assert relative_error(own_gradient(results, scenario) - rest, expected) < 1e-8


def opposed_streams():
    """Σ_{j≠0} c_0j = 0 although no cosine is: V_1 and V_2 mirror each other across the plane normal to V_0."""
    v = torch.tensor([[[2.0, 0.0, 0.0], [3.0, 4.0, 0.0], [-3.0, 0.0, 4.0]]], dtype=torch.float64)
    _, _, weight, bias = make(M=3, B=1, d=3)
    return v, torch.tensor([0]), weight, bias


@on_every_backend
@pytest.mark.parametrize("tilt", [0.0, 1e-8, -1e-8])
@pytest.mark.parametrize("stop_gradient", [True, False])
def test_vanishing_score_sum_weighs_evenly_and_passes_no_gradient(tilt, stop_gradient, backend):
    v, scenario, weight, bias = opposed_streams()
    v[0, 1, 0] += tilt
    results = kernel(v, scenario, weight, bias, stop_gradient=stop_gradient, backend=backend)
    assert torch.equal(results["alpha"], torch.tensor([[0.0, 0.5, 0.5]], dtype=torch.float64))
    cotangent = cotangent_of(results["out"])
    rest, gate, _ = gradient_without_scores(v, scenario, weight, bias, results["alpha"], cotangent)
    assert relative_error(own_gradient(results, scenario), rest) < 1e-12
    foreign = 0.5 * gate * cotangent if not stop_gradient else torch.zeros_like(cotangent)
    assert relative_error(results["dv"][0, 1:], foreign.expand(2, -1)) < 1e-12


@on_every_backend
@pytest.mark.parametrize("tilt", [1e-4, -1e-4])
def test_small_score_sum_is_not_yet_degenerate(tilt, backend):
    v, scenario, weight, bias = opposed_streams()
    v[0, 1, 0] += tilt
    results = kernel(v, scenario, weight, bias, backend=backend)
    ref = with_gradients(naive.mutual_unit, v, scenario, weight, bias)
    # Ratios near ±1e5 saturate the softmax: the greater one takes all.
    assert results["alpha"].max() == 1.0
    problems.assert_close(results, ref, 1e-6)


@on_every_backend
@pytest.mark.parametrize("stop_gradient", [True, False])
def test_zero_streams_of_ratio_scores(stop_gradient, backend):
    """A zero own stream makes every cosine and their sum 0; a zero foreign stream only its own cosine."""
    v, _, weight, bias = make(M=3, B=3)
    v[0, 0] = 0.0
    v[1] = 0.0
    v[2, 1] = 0.0
    scenario = torch.tensor([0, 0, 0])
    results = kernel(v, scenario, weight, bias, stop_gradient=stop_gradient, backend=backend)
    ref = with_gradients(naive.mutual_unit, v, scenario, weight, bias, stop_gradient=stop_gradient)
    problems.assert_close(results, ref, FLOAT64_TOLERANCE)
    assert results["alpha"][:2].tolist() == [[0.0, 0.5, 0.5]] * 2


@on_every_backend
def test_zero_own_stream_of_softmax_scores(backend):
    """There the cosine is ⟨V_t, V_j⟩ / (ε ‖V_j‖), whose slope is 1/ε: large, finite, and the oracle's."""
    v, _, weight, bias = make(M=3, B=2)
    v[0, 0] = 0.0
    scenario = torch.tensor([0, 0])
    results = kernel(v, scenario, weight, bias, score="softmax", backend=backend)
    ref = with_gradients(naive.mutual_unit, v, scenario, weight, bias, score="softmax")
    problems.assert_close(results, ref, FLOAT64_TOLERANCE)


@on_every_backend
@both_scores
def test_norms_below_epsilon(score, backend):
    """max(‖V‖, ε): a stream shorter than ε has cosines smaller than its angle alone gives."""
    v, _, weight, bias = make(M=3, B=4)
    v[0, 0] *= 1e-9
    v[1, 1] *= 1e-9
    scenario = torch.zeros(4, dtype=torch.int64)
    options = {"score": score, "temperature": 0.5}
    results = kernel(v, scenario, weight, bias, backend=backend, **options)
    problems.assert_close(results, with_gradients(naive.mutual_unit, v, scenario, weight, bias, **options), 1e-9)


@on_every_backend
@both_scores
@pytest.mark.parametrize("stop_gradient", [True, False])
@pytest.mark.parametrize("zero", [[0], [1], [0, 1, 2]], ids=str)
def test_second_derivative_at_zero_streams(zero, stop_gradient, score, backend):
    """Below ε the norm is the constant ε, so it has no second derivative that could be 0 · ∞."""
    v, _, weight, bias = make(M=3, B=2)
    v[0, zero] = 0.0
    scenario = torch.tensor([0, 0])
    options = {"score": score, "stop_gradient": stop_gradient}

    def second(function, **keywords):
        leaves = [t.detach().requires_grad_() for t in (v, weight, bias)]
        out, _ = function(leaves[0], scenario, *leaves[1:], **options, **keywords)
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    with skip_unavailable(backend):
        out = second(saml_kernels.mutual_unit, backend=backend, return_scores=True)
    for gradient, expected in zip(out, second(naive.mutual_unit), strict=True):
        # Sample by sample, scenario by scenario: 1/ε makes the numbers at the zero stream dwarf all others.
        assert all(relative_error(a, b) < 1e-9 for a, b in zip(gradient, expected, strict=True))


# --- finite differences ---------------------------------------------------------------------------------------------


@on_every_backend
@both_scores
@pytest.mark.parametrize("gate", ["vector", "scalar"])
def test_gradcheck_of_the_own_stream(score, gate, backend):
    """The foreign streams are inputs here, so holding them fixed makes stop-gradient's derivative the ordinary one."""
    v, scenario, weight, bias = make(M=3, B=4, d=3, gate=gate)
    rows = torch.arange(4)

    def function(own, own_weight, own_bias):
        with skip_unavailable(backend):
            return saml_kernels.mutual_unit(
                v.index_put((rows, scenario), own),
                scenario,
                weight.index_put((scenario[:1],), own_weight),
                bias.index_put((scenario[:1],), own_bias),
                score=score,
                backend=backend,
            )

    scenario = torch.full_like(scenario, 1)
    inputs = [v[rows, scenario], weight[1:2].clone(), bias[1:2].clone()]
    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in inputs])
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@on_every_backend
@both_scores
@pytest.mark.parametrize("gate", ["vector", "scalar"])
def test_gradcheck_without_stop_gradient(score, gate, backend):
    v, scenario, weight, bias = make(M=3, B=3, d=3, gate=gate)
    inputs = [t.requires_grad_() for t in (v, weight, bias)]

    def function(v, weight, bias):
        with skip_unavailable(backend):
            return saml_kernels.mutual_unit(
                v, scenario, weight, bias, score=score, stop_gradient=False, backend=backend
            )

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


# --- layouts and sizes ----------------------------------------------------------------------------------------------


@on_every_backend
@pytest.mark.parametrize("stop_gradient", [True, False])
def test_layouts(stop_gradient, backend):
    v, scenario, weight, bias = make()
    strided = (
        v.transpose(0, 1).contiguous().transpose(0, 1),
        scenario.repeat_interleave(2)[::2],
        weight.mT.contiguous().mT,
        bias[:1].expand(4, -1),
    )
    options = {"stop_gradient": stop_gradient}
    ref = with_gradients(naive.mutual_unit, *strided, **options)
    problems.assert_close(kernel(*strided, backend=backend, **options), ref, FLOAT64_TOLERANCE)


@on_every_backend
@pytest.mark.parametrize("M", [1, 3])
def test_empty_batch(M, backend):
    v, scenario, weight, bias = make(M=M)
    results = kernel(v[:0], scenario[:0], weight, bias, backend=backend)
    assert results["out"].shape == (0, 5)
    assert results["alpha"].shape == (0, M)
    assert not results["dweight"].any()
    assert not results["dbias"].any()


@on_every_backend
def test_foreign_streams_get_no_gradient(backend):
    v, scenario, weight, bias = make(M=4, B=20)
    results = kernel(v, scenario, weight, bias, backend=backend)
    foreign = torch.ones(20, 4, dtype=torch.bool)
    foreign[torch.arange(20), scenario] = False
    assert not results["dv"][foreign].any()
    assert results["dv"][~foreign].abs().sum(1).all()
