"""The modules: how they start, how they are saved, copied and converted, and that they compute their function."""

import copy
import io
import pickle
import re

import naive
import problems
import pytest
import torch
from problems import FLOAT64_TOLERANCE, relative_error, skip_unavailable
from torch import nn
from torch.nn.utils import parametrize, prune

import saml_kernels
from saml_kernels.layers import GroupedMLP, MultiBranchMLP, MutualUnit

pytestmark = pytest.mark.cpu
on_every_backend = pytest.mark.parametrize("backend", problems.TRUNK_BACKENDS)

M, B = 3, 11
LAYERS = {
    "MultiBranchMLP": lambda **o: MultiBranchMLP(M, 4, 5, (6, 3), (5, 2), mutual_layers=(1,), **o),
    "MultiBranchMLP scalar": lambda **o: MultiBranchMLP(M, 4, 5, (6, 3), mutual_layers=(2, 1), gate="scalar", **o),
    "MultiBranchMLP no mutual": lambda **o: MultiBranchMLP(M, 4, 5, (6, 3), mutual_layers=(), **o),
    "GroupedMLP": lambda **o: GroupedMLP(M, 4, (6, 3), **o),
    "GroupedMLP logit": lambda **o: GroupedMLP(M, 4, (6, 1), output_activation="identity", **o),
    "MutualUnit": lambda **o: MutualUnit(M, 4, **o),
    "MutualUnit scalar": lambda **o: MutualUnit(M, 4, gate="scalar", score="softmax", **o),
}
every_layer = pytest.mark.parametrize("build", LAYERS.values(), ids=LAYERS.keys())


def inputs(layer, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    scenario = torch.randint(M, (B,), generator=generator)
    if isinstance(layer, MultiBranchMLP):
        return normal(B, 4), normal(B, 5), scenario
    return normal(B, M, 4) if isinstance(layer, MutualUnit) else normal(B, 4), scenario


def outputs(result):
    """Every output tensor of any of the layers."""
    return [result.own, result.aux] if isinstance(result, saml_kernels.TrunkOutput) else [result]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(outputs(a), outputs(b), strict=True))


# --- how they start -------------------------------------------------------------------------------------------------


def weights_with_biases(layer):
    """(weight (..., inputs, outputs), bias) pairs of a layer."""
    if isinstance(layer, MutualUnit):
        return [(layer.gate_weight, layer.gate_bias)]
    if isinstance(layer, GroupedMLP):
        return list(zip(layer.weights, layer.biases, strict=True))
    p = layer.params()
    pairs = [*zip(p.branch_weights, p.branch_biases), *zip(p.aux_weights, p.aux_biases)]  # noqa: B905
    return pairs + [pair for pair in zip(p.gate_weights, p.gate_biases, strict=True) if pair[0] is not None]


@pytest.mark.parametrize(
    "layer",
    [
        lambda: MultiBranchMLP(4, 60, 30, (80, 50), (70, 40), mutual_layers=(1, 2)),
        lambda: GroupedMLP(4, 60, (80, 50)),
        lambda: MutualUnit(4, 60),
    ],
    ids=["MultiBranchMLP", "GroupedMLP", "MutualUnit"],
)
def test_starts_like_nn_linear(layer):
    """Uniform in ±1/√inputs, inputs counted per branch: mean 0, standard deviation bound/√3, bound nearly reached."""
    torch.manual_seed(0)
    for weight, bias in weights_with_biases(layer()):
        bound = weight.shape[-2] ** -0.5
        for tensor in (weight, bias):
            assert tensor.abs().max() <= bound
            assert tensor.abs().max() > 0.9 * bound
            spread = bound / 3**0.5
            assert abs(tensor.mean()) < 5 * spread / tensor.numel() ** 0.5
        assert weight.std().item() == pytest.approx(spread, rel=0.03)
        if weight.ndim == 3:
            assert all(not torch.equal(weight[0], other) for other in weight[1:]), "branches start alike"


@every_layer
def test_seed_decides_the_start(build):
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(build().state_dict())
    first, again, other = states
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


@every_layer
def test_every_tensor_is_a_parameter(build):
    layer = build()
    parameters = dict(layer.named_parameters())
    assert set(parameters) == set(layer.state_dict())
    assert all(p.requires_grad for p in parameters.values())
    used = {id(t) for pair in weights_with_biases(layer) for t in pair}
    assert used == {id(p) for p in parameters.values()}


def test_default_sizes():
    params = MultiBranchMLP(2, 10, 20, device="meta").params()
    assert [tuple(w.shape) for w in params.branch_weights] == [(2, 522, 512), (2, 768, 256), (2, 384, 128)]
    assert [tuple(w.shape) for w in params.aux_weights] == [(20, 512), (512, 256), (256, 128)]
    assert [w if w is None else tuple(w.shape) for w in params.gate_weights] == [(2, 512, 512), None, None]
    assert [b if b is None else tuple(b.shape) for b in params.gate_biases] == [(2, 512), None, None]


@pytest.mark.parametrize(
    ("mutual_layers", "gated"), [((), []), ((2,), [2]), ((3, 1), [1, 3]), ([1, 2, 3], [1, 2, 3])], ids=str
)
def test_mutual_layers_decide_the_gates(mutual_layers, gated):
    params = MultiBranchMLP(2, 3, 3, (5, 4, 3), mutual_layers=mutual_layers, gate="scalar").params()
    assert [layer for layer, w in enumerate(params.gate_weights, start=1) if w is not None] == gated
    assert [layer for layer, b in enumerate(params.gate_biases, start=1) if b is not None] == gated
    assert all(w.shape[2] == 1 for w in params.gate_weights if w is not None)


@pytest.mark.parametrize(
    ("layer", "told"),
    [
        (
            MultiBranchMLP(
                3, 4, 5, (6, 7), (8, 9), gate="scalar", score="softmax", temperature=0.25, stop_gradient=False
            ),
            ("3", "4", "5", "6, 7", "8, 9", "scalar", "softmax", "0.25", "stop_gradient=False"),
        ),
        (MultiBranchMLP(3, 4, 5, (6,), foreign_dtype=torch.int8, activation="gelu"), ("int8", "gelu")),
        (GroupedMLP(3, 4, (6, 7), activation="silu"), ("3", "4", "6, 7", "silu")),
        (MutualUnit(3, 17, score="softmax"), ("3", "17", "softmax")),
    ],
    ids=["MultiBranchMLP", "foreign_dtype", "GroupedMLP", "MutualUnit"],
)
def test_repr_tells_the_options(layer, told):
    first_line = repr(layer).replace("\n", " ")
    assert all(word in first_line for word in told)


# --- saved, copied, converted ---------------------------------------------------------------------------------------


@every_layer
def test_state_dict_round_trip(build):
    source, target = build(), build()
    x = inputs(source)
    assert not same(source(*x), target(*x))
    buffer = io.BytesIO()
    torch.save(source.state_dict(), buffer)
    buffer.seek(0)
    target.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    assert same(source(*x), target(*x))


@every_layer
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_compute_the_same_and_share_nothing(build, duplicate):
    layer = build()
    twin = duplicate(layer)
    x = inputs(layer)
    before = outputs(layer(*x))
    assert same(layer(*x), twin(*x))
    assert repr(twin) == repr(layer)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(layer(*x)), strict=True))


@every_layer
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.bfloat16, 5e-2), (torch.float16, 5e-3)])
def test_conversion(build, dtype, tolerance):
    torch.manual_seed(0)
    layer = build()
    x = inputs(layer)
    before = outputs(layer(*x))
    layer.to(dtype)
    after = outputs(layer(*(t.to(dtype) if t.is_floating_point() else t for t in x)))
    assert all(t.dtype == dtype for t in after)
    # An output may cancel where a stream does not; the width of these outputs makes that at most a factor of ten.
    assert all(relative_error(a, b) < tolerance for a, b in zip(after, before, strict=True))


@every_layer
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_argument(build, dtype):
    layer = build(dtype=dtype)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert all(t.dtype == dtype for t in outputs(layer(*inputs(layer, dtype))))


@every_layer
def test_meta_device(build):
    """Built without memory, given memory, then filled from a checkpoint: the way large models start."""
    source, layer = build(), build(device="meta")
    assert all(p.is_meta for p in layer.parameters())
    layer = layer.to_empty(device="cpu")
    layer.load_state_dict(source.state_dict())
    x = inputs(layer)
    assert same(layer(*x), source(*x))
    layer.reset_parameters()
    assert not same(layer(*x), source(*x))


@every_layer
def test_training_step_moves_every_parameter_of_scenarios_in_the_batch(build):
    torch.manual_seed(0)
    layer = build()
    before = copy.deepcopy(layer.state_dict())
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    sum(t.square().sum() for t in outputs(layer(*inputs(layer)))).backward()
    optimizer.step()
    assert all(not torch.equal(before[name], now) for name, now in layer.state_dict().items())


@every_layer
def test_autocast_computes_in_bfloat16(build):
    torch.manual_seed(0)
    layer = build()
    x = inputs(layer)
    full = outputs(layer(*x))
    with torch.autocast("cpu", torch.bfloat16):
        low = outputs(layer(*x))
    assert all(t.dtype == torch.bfloat16 for t in low)
    assert all(t.isfinite().all() for t in low)
    assert all(relative_error(a, b) < 5e-2 for a, b in zip(low, full, strict=True))
    sum(t.float().square().sum() for t in low).backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters())


@every_layer
def test_inference_mode(build):
    layer = build()
    x = inputs(layer)
    with torch.inference_mode():
        result = layer(*x)
    assert same(result, layer(*x))
    assert all(t.is_inference() for t in outputs(result))


@every_layer
def test_train_and_eval_are_the_same(build):
    layer = build()
    x = inputs(layer)
    assert same(layer.train()(*x), layer.eval()(*x))


# --- what they compute ----------------------------------------------------------------------------------------------


@on_every_backend
@pytest.mark.parametrize(
    "options",
    [
        {"mutual_layers": (1,)},
        {"mutual_layers": (1, 2), "gate": "scalar", "score": "softmax", "temperature": 0.4},
        {"mutual_layers": (2,), "activation": "gelu", "stop_gradient": False},
        {"mutual_layers": (1, 2), "activation": "silu", "foreign_dtype": torch.int8},
        {"mutual_layers": (), "activation": "tanh", "aux_dims": (7, 2)},
    ],
    ids=str,
)
def test_multi_branch_mlp_is_multi_branch(options, backend):
    """Against the function and against the oracle, so that an option lost on the way shows."""
    torch.manual_seed(0)
    device = problems.device_of(backend)
    layer = MultiBranchMLP(M, 4, 5, (6, 3), backend=backend, device=device, dtype=torch.float64, **options)
    x = [t.to(device) for t in inputs(layer, torch.float64)]
    keywords = {k: v for k, v in options.items() if k not in ("mutual_layers", "gate", "aux_dims")}
    with skip_unavailable(backend):
        result = layer(*x, return_scores=True)
        function = saml_kernels.multi_branch(*x, layer.params(), backend=backend, return_scores=True, **keywords)
    assert same(result, function)
    parameters = list(layer.parameters())
    options_of_grad = {"allow_unused": True, "materialize_grads": True}
    gradients = torch.autograd.grad(result.own.sum() + result.aux.square().sum(), parameters, **options_of_grad)
    # On a CPU the oracle reads the layer's own parameters.
    ref = naive.multi_branch(*x, layer.params(), **keywords)
    expected = torch.autograd.grad(ref.own.sum() + ref.aux.square().sum(), parameters, **options_of_grad)
    assert relative_error(result.own, ref.own) < FLOAT64_TOLERANCE
    assert relative_error(result.aux, ref.aux) < FLOAT64_TOLERANCE
    for a, b in zip(gradients, expected, strict=True):
        assert relative_error(a, b) < FLOAT64_TOLERANCE
    for a, b in zip(result.scores, ref.scores, strict=True):
        assert (a is None) == (b is None)
        assert a is None or relative_error(a, b) < FLOAT64_TOLERANCE


def towers_of(layer, activation, last):
    """The same parameters as M nn.Sequential towers of nn.Linear."""
    towers = []
    for k in range(layer.num_scenarios):
        modules = []
        for weight, bias in weights_with_biases(layer):
            linear = nn.Linear(weight.shape[1], weight.shape[2], dtype=weight.dtype)
            linear.weight = nn.Parameter(weight[k].detach().t().clone())
            linear.bias = nn.Parameter(bias[k].detach().clone())
            modules += [linear, activation()]
        towers.append(nn.Sequential(*modules[:-1], last()))
    return towers


@pytest.mark.parametrize(
    ("activation", "output_activation", "modules"),
    [
        ("relu", None, (nn.ReLU, nn.ReLU)),
        ("relu", "identity", (nn.ReLU, nn.Identity)),
        ("leaky_relu", "tanh", (nn.LeakyReLU, nn.Tanh)),
        ("gelu", None, (lambda: nn.GELU(approximate="tanh"),) * 2),
        ("silu", "identity", (nn.SiLU, nn.Identity)),
    ],
)
@pytest.mark.parametrize("hidden_dims", [(6, 3), (5, 1), (1,)], ids=str)
def test_grouped_mlp_is_a_loop_over_towers(activation, output_activation, modules, hidden_dims):
    torch.manual_seed(0)
    layer = GroupedMLP(
        M, 4, hidden_dims, activation=activation, output_activation=output_activation, dtype=torch.float64
    )
    towers = towers_of(layer, *modules)
    x, scenario = inputs(layer, torch.float64)
    x_out, x_ref = x.clone().requires_grad_(), x.clone().requires_grad_()
    out = layer(x_out, scenario)
    ref = torch.zeros(B, hidden_dims[-1], dtype=torch.float64)
    for k, tower in enumerate(towers):
        ref = ref.index_put((torch.where(scenario == k)[0],), tower(x_ref[scenario == k]))
    assert out.shape == (B, hidden_dims[-1])
    assert relative_error(out, ref) < FLOAT64_TOLERANCE

    cotangent = torch.randn(out.shape, dtype=torch.float64)
    out.backward(cotangent)
    ref.backward(cotangent)
    assert relative_error(x_out.grad, x_ref.grad) < FLOAT64_TOLERANCE
    for i, (weight, bias) in enumerate(weights_with_biases(layer)):
        linears = [tower[2 * i] for tower in towers]
        assert relative_error(weight.grad, torch.stack([m.weight.grad.t() for m in linears])) < FLOAT64_TOLERANCE
        assert relative_error(bias.grad, torch.stack([m.bias.grad for m in linears])) < FLOAT64_TOLERANCE


@pytest.mark.parametrize("gate", ["vector", "scalar"])
@pytest.mark.parametrize("score", ["ratio", "softmax"])
@pytest.mark.parametrize("stop_gradient", [True, False])
def test_mutual_unit_is_the_oracle(gate, score, stop_gradient):
    torch.manual_seed(0)
    layer = MutualUnit(M, 4, gate=gate, score=score, temperature=0.3, stop_gradient=stop_gradient, dtype=torch.float64)
    v, scenario = inputs(layer, torch.float64)
    v = (v + 0.7).requires_grad_()
    out, alpha = layer(v, scenario, return_scores=True)
    ref, expected_alpha = naive.mutual_unit(
        v,
        scenario,
        layer.gate_weight,
        layer.gate_bias,
        score=score,
        temperature=0.3,
        stop_gradient=stop_gradient,
    )
    leaves = [v, layer.gate_weight, layer.gate_bias]
    gradients = torch.autograd.grad(out.square().sum(), leaves)
    expected = torch.autograd.grad(ref.square().sum(), leaves)
    assert torch.equal(layer(v, scenario), out)
    for a, b in zip((out, alpha, *gradients), (ref, expected_alpha, *expected), strict=True):
        assert relative_error(a, b) < FLOAT64_TOLERANCE


@every_layer
def test_double_backward(build):
    """A gradient penalty trains the layer, and finite differences agree with how.

    They can judge a parameter that no foreign stream reads: the own slice of the last layer's weights, or of its gate.
    """
    torch.manual_seed(0)
    layer = build(dtype=torch.float64)
    x, *rest, _ = inputs(layer, torch.float64)
    x = (x + 0.7).requires_grad_()
    own = torch.full((B,), 1)

    def penalty(parameters):
        result = torch.func.functional_call(layer, parameters, (x, *rest, own))
        (gradient,) = torch.autograd.grad(sum(t.square().sum() for t in outputs(result)), x, create_graph=True)
        return gradient.square().sum()

    parameters = {name: p.detach().requires_grad_() for name, p in layer.named_parameters()}
    name, last = [(n, p) for n, p in parameters.items() if p.ndim == 3][-1]
    (second,) = torch.autograd.grad(penalty(parameters), last)
    direction = torch.zeros_like(last)
    direction[1] = torch.randn_like(last[1])
    step = 1e-6 * direction
    up, down = (penalty(parameters | {name: moved}).item() for moved in (last + step, last - step))
    assert (second * direction).sum().item() == pytest.approx((up - down) / 2e-6, rel=1e-5)


# --- scenarios that start alike -------------------------------------------------------------------------------------

ALIKE = {
    "GroupedMLP": lambda init: GroupedMLP(M, 4, (6, 3), init=init),
    "MultiBranchMLP": lambda init: MultiBranchMLP(M, 4, 5, (6, 3), mutual_layers=(1, 2), branch_init=init),
    "MultiBranchMLP scalar": lambda init: MultiBranchMLP(M, 4, 5, (6,), gate="scalar", branch_init=init),
}
every_alike = pytest.mark.parametrize("build", ALIKE.values(), ids=ALIKE.keys())


@every_alike
def test_shared_start_is_branch_0s_in_every_branch_and_gate(build):
    torch.manual_seed(0)
    independent = build("independent")
    torch.manual_seed(0)
    layer = build("shared")
    first = dict(independent.named_parameters())
    for name, parameter in layer.named_parameters():
        expected = first[name] if name.startswith("aux_") else first[name][:1].expand_as(parameter)
        assert torch.equal(parameter, expected), name
        assert parameter.is_contiguous()


@every_alike
def test_branches_that_start_alike_part_in_training(build):
    torch.manual_seed(0)
    layer = build("shared")
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    sum(t.square().sum() for t in outputs(layer(*inputs(layer)))).backward()
    optimizer.step()
    for name, parameter in layer.named_parameters():
        if not name.startswith("aux_"):
            assert not any(torch.equal(parameter[0], other) for other in parameter[1:]), name
    layer.reset_parameters()
    assert all(torch.equal(w[0], w[k]) for w, _ in weights_with_biases(layer) if w.dim() == 3 for k in range(M))
    assert "init='shared'" in repr(layer)


@every_alike
def test_a_start_that_does_not_exist(build):
    with pytest.raises(ValueError, match=r"init must be one of .* got 'same'"):
        build("same")


# --- parameters that change between calls ---------------------------------------------------------------------------


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_a_parameter_that_was_put_in_anothers_place_is_read():
    layer = MultiBranchMLP(M, 4, 5, (6, 3), (5, 2))
    x_local, x_global, scenario = inputs(layer)
    layer(x_local, x_global, scenario)
    layer.branch_biases[1] = nn.Parameter(torch.full((M, 3), 7.0))
    layer.gate_biases["1"] = nn.Parameter(torch.zeros(M, 6))
    params = layer.params()
    assert params.branch_biases[1] is layer.branch_biases[1]
    assert params.gate_biases[0] is layer.gate_biases["1"]
    expected = saml_kernels.multi_branch(x_local, x_global, scenario, params)
    assert same(layer(x_local, x_global, scenario), expected)


def test_parametrized_and_pruned_parameters_are_read():
    layer = MultiBranchMLP(M, 4, 5, (6, 3), (5, 2))
    before = layer.params()
    parametrize.register_parametrization(layer.branch_weights, "0", Doubled())
    prune.random_unstructured(layer.aux_weights, "1", amount=0.5)
    after = layer.params()
    assert torch.equal(after.branch_weights[0], 2 * before.branch_weights[0])
    assert after.branch_weights[1] is before.branch_weights[1]
    assert torch.equal(after.aux_weights[1], layer.aux_weights[1])
    assert (after.aux_weights[1] == 0).sum() == 5
    parametrize.remove_parametrizations(layer.branch_weights, "0")
    assert [tensor.shape for tensor in layer.params().branch_weights] == [w.shape for w in before.branch_weights]


@pytest.mark.parametrize(
    ("kind", "told", "change"),
    [
        (TypeError, "params.branch_biases[0] is torch.float64", lambda data: data.double()),
        (ValueError, "params.branch_biases[0] must have shape (3, 6)", lambda data: data[:, 1:]),
    ],
    ids=["type", "shape"],
)
def test_a_parameter_that_does_not_fit_any_more_is_told(kind, told, change):
    """Between two calls of the same layer, and behind torch's back."""
    layer = MultiBranchMLP(M, 4, 5, (6, 3), (5, 2))
    arguments = inputs(layer)
    layer(*arguments)
    layer.branch_biases[0].data = change(layer.branch_biases[0].data)
    with pytest.raises(kind, match=re.escape(told)):
        layer(*arguments)
