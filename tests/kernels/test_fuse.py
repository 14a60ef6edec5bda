"""Lists of towers read, fused and given back."""

import copy

import pytest
import torch
from layer_batches import TOLERANCE, B, D, M, batch
from problems import assert_close
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import saml_kernels
from saml_kernels.layers import STARMLP

pytestmark = pytest.mark.cpu


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
@pytest.mark.parametrize("bias", [True, False])
def test_from_towers_and_back(activation, last, bias):
    listed = towers(activation=activation, last=last)
    if not bias:
        for tower in listed:
            tower[0].bias = tower[3].bias = None
    fused = saml_kernels.layers.GroupedMLP.from_towers(listed)
    x, scenario = batch()
    ref = torch.stack([listed[t](row) for row, t in zip(x, scenario.tolist(), strict=True)])
    assert_close({"out": fused(x, scenario)}, {"out": ref}, TOLERANCE)
    assert len(list(fused.parameters())) == (4 if bias else 2)
    again = fused.to_towers()
    assert len(list(again.parameters())) == len(list(listed.parameters()))
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
        ([nn.Sequential(nn.ReLU(), nn.Linear(2, 2))], ValueError, r"towers\[0\]\[0\] must follow an nn\.Linear"),
        ([nn.Sequential(nn.ReLU())], ValueError, "must hold at least one nn.Linear"),
        ([nn.Sequential()], ValueError, "must hold at least one nn.Linear"),
        (
            [nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))],
            ValueError,
            "a bias in all of its linear layers",
        ),
        ([nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))], ValueError, "dropout with p = 0.5"),
        (
            [nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))],
            ValueError,
            r"\[1\] is BatchNorm1d\(2.*which the kernels do not",
        ),
        ([nn.Sequential(nn.Linear(2, 2), nn.GELU())], ValueError, r"\[1\] is GELU\(.*which the kernels do not"),
        (
            [nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))],
            ValueError,
            "one activation after every layer but the last",
        ),
        ([nn.Linear(2, 2), nn.Linear(2, 3)], ValueError, r"towers\[0\] has widths \(2, 2\) and towers\[1\] \(2, 3\)"),
        ([nn.Linear(2, 2), nn.Linear(2, 2).double()], ValueError, "must share one dtype and device"),
        ([nn.Linear(2, 2)] * 2, ValueError, "must not share parameters"),
        ([nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)], ValueError, r"towers\[1\] is not as towers\[0\]"),
        ([nn.Linear(3, 2), nn.Linear(3, 2, bias=False)], ValueError, r"towers\[0\] is Linear\(.*and towers\[1\] is"),
        ([nn.Sequential(nn.Linear(2, 2), nn.Linear(3, 2))], ValueError, r"\[1\] must read the 2 columns before it"),
        ([SquaredLinear(2, 2)], TypeError, r"towers\[0\] must be an nn\.Sequential"),
        ([nn.Sequential(SquaredLinear(2, 2))], TypeError, "nn.Dropout or a known activation, got SquaredLinear"),
        ([nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))], TypeError, "or a known activation, got LayerNorm"),
        ([nn.Sequential(weight_norm(nn.Linear(2, 2)))], TypeError, "nn.Dropout or a known activation"),
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


@pytest.mark.parametrize("training", [True, False])
def test_fused_towers_are_in_the_mode_of_the_list(training):
    model = nn.ModuleDict({"towers": towers()}).train(not training)
    model["towers"].train(training)
    saml_kernels.fuse(model)
    assert {module.training for module in model["towers"].modules()} == {training}
    assert model.training is not training


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
        (
            SomebodysModel(),
            ["tower"],
            r"names must be of nn\.ModuleList or nn\.ModuleDict in the model \(towers, heads, other\), got 'tower'",
        ),
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
