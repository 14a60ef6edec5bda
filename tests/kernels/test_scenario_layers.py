"""STAR's and HMoE's layers, mixtures of experts: formulas, who trains what, batches of mixed scenarios."""

import copy

import pytest
import torch
from problems import assert_close
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import saml_kernels
from saml_kernels.layers import STARMLP, MixtureOfExperts, PartitionedNorm, ScoreMixture

pytestmark = pytest.mark.cpu
M, B, D = 3, 20, 5
TOLERANCE = 1e-10


def batch(seed=0, rows=B, width=D):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return x, torch.randint(M, (rows,), generator=generator)


def randomised(module, seed=1):
    """Every parameter moved away from its start, where W_t = 1 would hide which factor is which."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


# --- STARMLP --------------------------------------------------------------------------------------------------------


def star_by_hand(layer, x, scenario):
    rows = []
    for row, t in zip(x, scenario.tolist(), strict=True):
        for index in range(len(layer.hidden_dims)):
            weight = layer.weights[index][t] * layer.shared_weights[index]
            row = row @ weight + layer.biases[index][t] + layer.shared_biases[index]
            row = row if index == len(layer.hidden_dims) - 1 else row.relu()
        rows.append(row)
    return torch.stack(rows)


def test_star_is_the_formula_with_every_gradient():
    layer = randomised(STARMLP(M, D, (6, 2), output_activation="identity", dtype=torch.float64))
    x, scenario = batch()

    def evaluate(function):
        leaf = x.clone().requires_grad_()
        out = function(leaf)
        gradients = torch.autograd.grad(out.square().sum(), (leaf, *layer.parameters()))
        return {str(i): tensor.detach() for i, tensor in enumerate((out, *gradients))}

    ref = evaluate(lambda leaf: star_by_hand(layer, leaf, scenario))
    assert_close(evaluate(lambda leaf: layer(leaf, scenario)), ref, TOLERANCE)


def test_star_starts_with_scenarios_alike():
    layer = STARMLP(M, D, (4, 3), dtype=torch.float64)
    x, _ = batch()
    outputs = [layer(x, torch.full((B,), k)) for k in range(M)]
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    assert sum(p.numel() for p in layer.parameters()) == (M + 1) * (D * 4 + 4 + 4 * 3 + 3)


@pytest.mark.parametrize("own", range(M))
def test_star_rows_train_their_own_scenario_and_the_shared_network(own):
    layer = STARMLP(M, D, (4, 1), "tanh", dtype=torch.float64)
    layer(batch()[0], torch.full((B,), own)).sum().backward()
    for parameter in (*layer.weights, *layer.biases):
        assert [bool(parameter.grad[k].any()) for k in range(M)] == [k == own for k in range(M)]
    assert all(parameter.grad.any() for parameter in (*layer.shared_weights, *layer.shared_biases))


# --- PartitionedNorm ------------------------------------------------------------------------------------------------


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


def test_moving_statistics_are_batch_norms():
    layer = PartitionedNorm(M, D, momentum=0.3, dtype=torch.float64)
    norms = [nn.BatchNorm1d(D, momentum=0.3, dtype=torch.float64) for _ in range(M)]
    for seed in range(4):
        z, scenario = batch(seed)
        layer(z, scenario)
        for k, norm in enumerate(norms):
            norm(z[scenario == k])
    ref = {
        "mean": torch.stack([norm.running_mean for norm in norms]),
        "var": torch.stack([norm.running_var for norm in norms]),
    }
    assert_close({"mean": layer.running_mean, "var": layer.running_var}, ref, TOLERANCE)


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


def test_layers_run_under_autocast():
    x, scenario = batch()
    x = x.float()
    layers = {
        "norm": PartitionedNorm(M, D),
        "star": STARMLP(M, D, (4, 1)),
        "mixture": ScoreMixture(M, D, (4,)),
        "experts": MixtureOfExperts(2, D, (4,), M),
    }
    for name, layer in layers.items():
        expected = layer.eval()(x, scenario).detach()
        with torch.autocast("cpu", torch.bfloat16):
            # As a product before the layer would leave it.
            out = layer(x.bfloat16(), scenario)
        assert_close({name: out.float()}, {name: expected}, 0.03)


def test_partitioned_norm_compiles_into_one_graph():
    layer, (z, scenario) = PartitionedNorm(M, D, dtype=torch.float64), batch()
    other = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_close({"out": compiled(z, scenario)}, {"out": other(z, scenario)}, TOLERANCE)
    assert_close({"var": layer.running_var}, {"var": other.running_var}, TOLERANCE)


def test_gradient_of_the_batch_statistics():
    layer = randomised(PartitionedNorm(M, 2, dtype=torch.float64))
    z, scenario = batch(rows=8, width=2)
    assert torch.autograd.gradcheck(lambda leaf: layer(leaf, scenario), z.requires_grad_())


# --- ScoreMixture ---------------------------------------------------------------------------------------------------


def mixture_by_hand(layer, x, scenario):
    rows = []
    for row, t in zip(x, scenario.tolist(), strict=True):
        weights = torch.softmax(layer.gate(row), 0)
        total = 0
        for j in range(M):
            v = row
            for index, (weight, bias) in enumerate(zip(layer.networks.weights, layer.networks.biases, strict=True)):
                v = v @ weight[j] + bias[j]
                v = v if index == len(layer.networks.weights) - 1 else v.relu()
            total = total + weights[j] * torch.sigmoid(v if j == t else v.detach())
        rows.append(torch.logit(total).squeeze())
    return torch.stack(rows)


def test_score_mixture_is_the_formula_with_every_gradient():
    layer = randomised(ScoreMixture(M, D, (6,), dtype=torch.float64))
    x, scenario = batch()

    def evaluate(function):
        out = function(x)
        gradients = torch.autograd.grad(out.square().sum(), tuple(layer.parameters()))
        return {str(i): tensor.detach() for i, tensor in enumerate((out, *gradients))}

    assert_close(
        evaluate(lambda x: layer(x, scenario)), evaluate(lambda x: mixture_by_hand(layer, x, scenario)), TOLERANCE
    )


@pytest.mark.parametrize("own", range(M))
def test_rows_train_their_own_network_and_the_gate(own):
    layer = ScoreMixture(M, D, (6,), "tanh", dtype=torch.float64)
    layer(batch()[0], torch.full((B,), own)).sum().backward()
    for parameter in layer.networks.parameters():
        assert [bool(parameter.grad[k].any()) for k in range(M)] == [k == own for k in range(M)]
    assert layer.gate.weight.grad.any()


def test_mixture_of_extreme_predictions_stays_finite():
    layer = ScoreMixture(M, D, (6,), dtype=torch.float64)
    x, scenario = batch()
    out = layer(1e4 * x, scenario)
    out.sum().backward()
    assert out.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_every_scenario_scores_every_row():
    layer = ScoreMixture(M, D, (6,), dtype=torch.float64)
    x, scenario = batch()
    logits = layer.logits(x, scenario)
    assert logits.shape == (B, M)
    for k in range(M):
        assert_close({"s": logits[:, k]}, {"s": layer.networks(x, torch.full((B,), k)).squeeze(1)}, TOLERANCE)


# --- MixtureOfExperts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scenarios", [None, M])
def test_mixture_of_experts_is_the_formula(scenarios):
    layer = randomised(MixtureOfExperts(4, D, (6, 2), scenarios, dtype=torch.float64))
    x, scenario = batch()
    rows = []
    for row, t in zip(x, scenario.tolist(), strict=True):
        logits = layer.gate(row) if scenarios is None else row @ layer.gate.weights[0][t] + layer.gate.biases[0][t]
        experts = []
        for k in range(4):
            v = row
            for weight, bias in zip(layer.weights, layer.biases, strict=True):
                v = (v @ weight[k] + bias[k, 0]).relu()
            experts.append(v)
        rows.append(torch.softmax(logits, 0) @ torch.stack(experts))
    out = layer(x) if scenarios is None else layer(x, scenario)
    assert_close({"out": out}, {"out": torch.stack(rows)}, TOLERANCE)


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "told"),
    [
        (lambda: STARMLP(0, D, (4,)), ValueError, "num_scenarios must be at least 1"),
        (lambda: STARMLP(M, D, ()), ValueError, "hidden_dims must name at least one layer"),
        (lambda: STARMLP(M, D, (4,), "rellu"), ValueError, "did you mean 'relu'"),
        (lambda: PartitionedNorm(M, 0), ValueError, "dim must be at least 1"),
        (lambda: PartitionedNorm(M, D, eps=0), ValueError, "eps must be finite and above 0"),
        (lambda: PartitionedNorm(M, D, momentum=1.5), ValueError, "momentum must be at most 1"),
        (lambda: PartitionedNorm(M, D, combine="add"), ValueError, "combine must be one of"),
        (lambda: ScoreMixture(M, D, foreign_dtype=torch.float16), ValueError, "foreign_dtype must be None or one of"),
        (lambda: MixtureOfExperts(0, D), ValueError, "num_experts must be at least 1"),
        (lambda: MixtureOfExperts(2, D)(torch.zeros(1, D), torch.zeros(1)), ValueError, "there is one gate"),
        (lambda: MixtureOfExperts(2, D, num_scenarios=M)(torch.zeros(1, D)), ValueError, "the scenario of every row"),
        (lambda: PartitionedNorm(M, D)(torch.zeros(2, 4), torch.zeros(2).long()), ValueError, "z must have shape"),
        (lambda: PartitionedNorm(M, D)(torch.zeros(1, D), torch.tensor([M])), ValueError, r"must lie in \[0, 3\)"),
        (
            lambda: PartitionedNorm(M, D)(torch.zeros(1, D), torch.zeros(1)),
            TypeError,
            "scenario must be int32 or int64",
        ),
    ],
)
def test_bad_input(make, error, told):
    with pytest.raises(error, match=told):
        make()


# --- towers as lists ------------------------------------------------------------------------------------------------


def towers(count=M, activation=nn.ReLU, last=None, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return nn.ModuleList(
        nn.Sequential(
            nn.Linear(D, 7, dtype=dtype),
            activation(),
            nn.Dropout(0.0),
            nn.Linear(7, 2, dtype=dtype),
            *([last()] if last else []),
        )
        for _ in range(count)
    )


ACTIVATIONS = [nn.ReLU, nn.LeakyReLU, nn.SiLU, nn.Tanh, lambda: nn.GELU(approximate="tanh")]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("last", [None, nn.ReLU])
def test_from_towers_and_back(activation, last):
    listed = towers(activation=activation, last=last)
    fused = saml_kernels.layers.GroupedMLP.from_towers(listed)
    x, scenario = batch()
    ref = torch.stack([listed[t](row) for row, t in zip(x, scenario.tolist(), strict=True)])
    assert_close({"out": fused(x, scenario)}, {"out": ref}, TOLERANCE)
    again = fused.to_towers()
    for k in range(M):
        assert_close({"out": again[k](x)}, {"out": listed[k](x)}, TOLERANCE)


def test_sequences_in_sequences_identities_and_one_activation_object():
    def tower():
        act = nn.Tanh()
        first = nn.Sequential(nn.Linear(D, 4), act, nn.Identity())
        return nn.Sequential(first, nn.Sequential(nn.Linear(4, 3), act), nn.Linear(3, 1)).double()

    listed = [tower() for _ in range(M)]
    fused = saml_kernels.layers.GroupedMLP.from_towers(listed)
    assert (fused.hidden_dims, fused.activation, fused.output_activation) == ((4, 3, 1), "tanh", "identity")
    x, scenario = batch()
    ref = torch.stack([listed[t](row) for row, t in zip(x, scenario.tolist(), strict=True)])
    assert_close({"out": fused(x, scenario)}, {"out": ref}, TOLERANCE)


class SquaredLinear(nn.Linear):
    """A linear layer by class, and something else by what it computes."""

    def forward(self, x):
        return super().forward(x).square()


def hooked(module):
    module.register_forward_hook(lambda *_: None)
    return module


@pytest.mark.parametrize(
    ("listed", "error", "told"),
    [
        ([], ValueError, "towers must hold at least one tower"),
        ([nn.ReLU()], TypeError, r"towers\[0\] must be an nn\.Sequential"),
        ([nn.Sequential(nn.ReLU())], ValueError, r"towers\[0\]\[0\] must follow an nn\.Linear"),
        ([nn.Sequential()], ValueError, "must hold at least one nn.Linear"),
        ([nn.Sequential(nn.Linear(2, 2, bias=False))], ValueError, "must have a bias"),
        ([nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))], ValueError, "dropout with p = 0.5"),
        ([nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))], TypeError, "must be an nn.Linear or a known activation"),
        ([nn.Sequential(nn.Linear(2, 2), nn.GELU())], TypeError, "must be an nn.Linear or a known activation"),
        (
            [nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))],
            ValueError,
            "one activation after every layer but the last",
        ),
        ([nn.Linear(2, 2), nn.Linear(2, 3)], ValueError, r"towers\[0\] has widths \(2, 2\) and towers\[1\] \(2, 3\)"),
        ([nn.Linear(2, 2), nn.Linear(2, 2).double()], ValueError, "must share one dtype and device"),
        ([nn.Linear(2, 2)] * 2, ValueError, "must not share parameters"),
        ([nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)], ValueError, r"linear layer 0 of towers\[1\] is not"),
        ([SquaredLinear(2, 2)], TypeError, r"towers\[0\] must be an nn\.Sequential"),
        ([nn.Sequential(SquaredLinear(2, 2))], TypeError, "must be an nn.Linear or a known activation"),
        ([nn.Sequential(weight_norm(nn.Linear(2, 2)))], TypeError, "must be an nn.Linear or a known activation"),
        ([hooked(nn.Linear(2, 2))], ValueError, r"towers\[0\] must have no hooks"),
        ([nn.Sequential(hooked(nn.Sequential(nn.Linear(2, 2))))], ValueError, r"towers\[0\]\[0\] must have no hooks"),
    ],
)
def test_towers_that_are_refused(listed, error, told):
    with pytest.raises(error, match=told):
        saml_kernels.layers.GroupedMLP.from_towers(listed)


class SomebodysModel(nn.Module):
    """As public code has it: every tower on every row, then a mask."""

    def __init__(self):
        super().__init__()
        self.bottom = nn.Linear(D, D, dtype=torch.float64)
        self.towers = towers()
        self.heads = nn.ModuleList(nn.Linear(2, 1, dtype=torch.float64) for _ in range(M))
        self.other = nn.ModuleList([nn.Dropout(0.5), nn.Linear(3, 3)])

    def forward(self, batch):
        x, scenario = self.bottom(batch["x"]), batch["domain_indicator"].squeeze(1)
        out = torch.zeros(len(x), 1, dtype=torch.float64)
        for k, (tower, head) in enumerate(zip(self.towers, self.heads, strict=True)):
            out = torch.where((scenario == k)[:, None], head(tower(x)), out)
        return out


def test_fuse_keeps_outputs_and_gradients_of_an_unmodified_forward():
    model = SomebodysModel()
    x, scenario = batch()
    inputs = {"x": x, "domain_indicator": scenario[:, None]}
    expected = model(inputs)
    expected.square().sum().backward()
    gradients = [tower[0].weight.grad.t() for tower in model.towers]
    bottom = model.bottom.weight.grad.clone()
    model.zero_grad()

    assert saml_kernels.fuse(model) == ("towers", "heads")
    assert isinstance(model.other, nn.ModuleList)
    out = model(inputs)
    assert_close({"out": out}, {"out": expected.detach()}, TOLERANCE)
    out.square().sum().backward()
    assert_close(
        {"tower": model.towers.fused.weights[0].grad, "bottom": model.bottom.weight.grad},
        {"tower": torch.stack(gradients), "bottom": bottom},
        TOLERANCE,
    )
    # And the call that is fast gives the same.
    shared = model.bottom(x)
    assert_close({"out": model.heads(model.towers(shared, scenario), scenario)}, {"out": expected.detach()}, TOLERANCE)


def test_fused_towers_behave_as_the_list():
    model = SomebodysModel()
    saml_kernels.fuse(model, ["towers"])
    assert isinstance(model.heads, nn.ModuleList)
    assert len(model.towers) == M == len(list(model.towers))
    x, _ = batch()
    assert torch.equal(model.towers[-1](x), model.towers[M - 1](x))
    with pytest.raises(IndexError, match="tower 3 of 3"):
        model.towers[3]


def test_fuse_keeps_frozen_parameters_frozen():
    model = SomebodysModel()
    model.towers.requires_grad_(False)
    saml_kernels.fuse(model)
    assert not any(p.requires_grad for p in model.towers.parameters())
    assert all(p.requires_grad for p in model.heads.parameters())


def test_fuse_keeps_a_frozen_layer_frozen():
    model = SomebodysModel()
    for tower in model.towers:
        tower[0].requires_grad_(False)
    saml_kernels.fuse(model)
    assert [p.requires_grad for p in model.towers.fused.weights] == [False, True]
    assert [p.requires_grad for p in model.towers.fused.biases] == [False, True]


def test_fuse_leaves_towers_that_the_model_uses_elsewhere():
    model = SomebodysModel()
    model.first_tower = model.towers[0]
    assert saml_kernels.fuse(model) == ("heads",)
    with pytest.raises(ValueError, match=r"its parameters are also first_tower\.0\.bias, first_tower\.0\.weight"):
        saml_kernels.fuse(model, ["towers"])


def test_a_fused_model_trains_copies_and_loads():
    model = SomebodysModel()
    saml_kernels.fuse(model)
    x, scenario = batch()
    inputs = {"x": x, "domain_indicator": scenario[:, None]}
    other = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = model(inputs).square().sum()
    before.backward()
    optimizer.step()
    assert model(inputs).square().sum() < before
    assert torch.equal(other(inputs).square().sum(), before)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(inputs), model(inputs))


@pytest.mark.parametrize(
    ("model", "names", "told"),
    [
        (nn.Linear(2, 2), None, "no list of towers to fuse"),
        (SomebodysModel(), ["tower"], r"must be of nn\.ModuleList in the model \(towers, heads, other\), got 'tower'"),
        (towers(), None, "the model itself is the list"),
    ],
)
def test_fuse_refuses(model, names, told):
    with pytest.raises(ValueError, match=told):
        saml_kernels.fuse(model, names)


@pytest.mark.parametrize("shape", [(B,), (B, 1)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32])
def test_adapter_for_dicts(shape, dtype):
    layer = saml_kernels.layers.GroupedMLP.from_towers(towers())
    adapter = saml_kernels.DomainIndicatorAdapter(layer, feature="dense")
    x, scenario = batch()
    out = adapter({"dense": x, "domain_indicator": scenario.reshape(shape).to(dtype)})
    assert torch.equal(out, layer(x, scenario))


@pytest.mark.parametrize(
    ("given", "error", "told"),
    [
        ({"domain_indicator": torch.zeros(1)}, KeyError, "the batch must hold 'x'"),
        ({"x": torch.zeros(1, D), "domain_indicator": torch.zeros(1, 2)}, ValueError, r"\(B,\) or \(B, 1\)"),
        ({"x": torch.zeros(1, D), "domain_indicator": torch.tensor([0.5])}, ValueError, "whole numbers"),
    ],
)
def test_adapter_refuses(given, error, told):
    adapter = saml_kernels.DomainIndicatorAdapter(STARMLP(M, D, (2,)))
    with pytest.raises(error, match=told):
        adapter(given)
