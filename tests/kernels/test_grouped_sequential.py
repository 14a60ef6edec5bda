"""Towers with batch norms, dropout and activations that the kernels lack, against the plain loop over scenarios."""

import copy
import inspect
import warnings

import pytest
import torch
from layer_batches import TOLERANCE, B, D, M, batch
from problems import assert_close
from torch import nn

import saml_kernels
from saml_kernels import functional
from saml_kernels.layers import GroupedBatchNorm, GroupedMLP, GroupedSequential
from saml_kernels.layers.convert import ELEMENTWISE

pytestmark = pytest.mark.cpu

TOWERS = {
    "as torch-rechub": lambda: [
        nn.Linear(D, 6),
        nn.BatchNorm1d(6),
        nn.ReLU(),
        nn.Dropout(0.0),
        nn.Linear(6, 4),
        nn.BatchNorm1d(4),
        nn.ReLU(),
        nn.Linear(4, 1),
    ],
    "no bias before the norm": lambda: [nn.Linear(D, 4, bias=False), nn.BatchNorm1d(4), nn.SiLU(), nn.Linear(4, 2)],
    "norm of the input": lambda: [nn.BatchNorm1d(D), nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, 1)],
    "norm after the activation": lambda: [nn.Linear(D, 4), nn.ReLU(), nn.BatchNorm1d(4), nn.Linear(4, 1, bias=False)],
    "norm at the end": lambda: [nn.Linear(D, 4), nn.ReLU(), nn.BatchNorm1d(4)],
    # A small ε would cancel the gradients of all but the last.
    "two norms": lambda: [
        *(nn.BatchNorm1d(D, eps=0.1) for _ in "12"),
        nn.Linear(D, 2),
        *(nn.BatchNorm1d(2, eps=0.1) for _ in "12"),
    ],
    "mean of all batches": lambda: [nn.Linear(D, 3), nn.BatchNorm1d(3, momentum=None, eps=0.1), nn.Linear(3, 1)],
    "plain norm": lambda: [nn.Linear(D, 3), nn.BatchNorm1d(3, affine=False, momentum=0.5), nn.Linear(3, 1)],
    "norm without moving statistics": lambda: [nn.Linear(D, 3), nn.BatchNorm1d(3, track_running_stats=False)],
    "exact gelu": lambda: [nn.Linear(D, 4), nn.GELU(), nn.Linear(4, 1), nn.Sigmoid()],
    "another slope": lambda: [nn.Linear(D, 4), nn.LeakyReLU(0.2, inplace=True), nn.Linear(4, 1)],
    "activations that differ": lambda: [nn.Linear(D, 4), nn.ReLU(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)],
    "an activation first": lambda: [nn.ReLU(), nn.Linear(D, 2)],
    "activations one after the other": lambda: [nn.Linear(D, 2), nn.Tanh(), nn.ReLU(), nn.Linear(2, 2)],
    "bias in the last layer": lambda: [nn.Linear(D, 4, bias=False), nn.ReLU(), nn.Linear(4, 1)],
    "sequences in sequences": lambda: [nn.Sequential(nn.Linear(D, 4), nn.BatchNorm1d(4)), nn.Identity(), nn.Mish()],
}
if "bias" in inspect.signature(nn.BatchNorm1d).parameters:
    TOWERS["norm without a bias"] = lambda: [nn.Linear(D, 3), nn.BatchNorm1d(3, bias=False), nn.Linear(3, 1)]


def listed(build, seed=0):
    """A list of towers whose norms are away from their start."""
    torch.manual_seed(seed)
    towers = nn.ModuleList(nn.Sequential(*build()) for _ in range(M)).double()
    for module in towers.modules():
        if isinstance(module, nn.BatchNorm1d):
            for tensor in (module.weight, module.bias, module.running_mean):
                if tensor is not None:
                    tensor.data.normal_()
            if module.running_var is not None:
                module.running_var.uniform_(0.5, 2)
    return towers


def loop(towers, x, scenario):
    """Each tower on the rows of its scenario, those that have some."""
    out = None
    for k, tower in enumerate(towers):
        rows = (scenario == k).nonzero().squeeze(1)
        if len(rows):
            part = tower(x[rows])
            out = x.new_zeros(len(x), part.shape[1]) if out is None else out
            out = out.index_copy(0, rows, part)
    return out


def gradients(out, x, module):
    module.zero_grad()
    (x_gradient,) = torch.autograd.grad((out * out.detach().cos()).sum(), x, retain_graph=True)
    (out * out.detach().cos()).sum().backward()
    return x_gradient


def assert_same(fused, towers, x, scenario):
    """Outputs, gradients and, of norms, moving statistics."""
    x = x.clone().requires_grad_()
    out, expected = fused(x, scenario), loop(towers, x, scenario)
    assert_close({"out": out}, {"out": expected.detach()}, TOLERANCE)
    assert_close({"x": gradients(out, x, fused)}, {"x": gradients(expected, x, towers)}, TOLERANCE)
    ours, theirs = {}, {}
    # A tower without a row has None in the loop, zeros here.
    for place, tower in enumerate(fused.to_towers()):
        ours |= {f"{place} {name}": value.double() for name, value in tower.state_dict().items()}
    grads = copy.deepcopy(fused)
    for parameter, own in zip(grads.parameters(), fused.parameters(), strict=True):
        parameter.data.copy_(own.grad)
    for place, tower in enumerate(grads.to_towers()):
        ours |= {f"{place} grad of {name}": value for name, value in tower.named_parameters()}
    for place, tower in enumerate(towers):
        flat = nn.Sequential(*(m for m in tower.modules() if not isinstance(m, nn.Sequential | nn.Identity)))
        flat = nn.Sequential(*(m for m in flat if not (isinstance(m, nn.Dropout) and m.p == 0)))
        theirs |= {f"{place} {name}": value.double() for name, value in flat.state_dict().items()}
        theirs |= {
            f"{place} grad of {name}": torch.zeros_like(p) if p.grad is None else p.grad
            for name, p in flat.named_parameters()
        }
    # A bias before a norm has no gradient but for rounding.
    nothing = [name for name, value in theirs.items() if value.abs().max() < 1e-13]
    assert all(ours[name].abs().max() < 1e-13 for name in nothing)
    assert_close(*({n: v for n, v in each.items() if n not in nothing} for each in (ours, theirs)), TOLERANCE)


@pytest.mark.parametrize("build", TOWERS.values(), ids=TOWERS)
def test_towers_in_training_and_evaluation(build):
    towers = listed(build)
    fused = GroupedSequential.from_towers(towers)
    for seed in range(3):
        x, scenario = batch(seed)
        # Once without a row of scenario 1.
        assert_same(fused, towers, x, scenario if seed != 1 else scenario.where(scenario != 1, 2))
    assert_same(fused.eval(), towers.eval(), *batch(9))
    assert_same(fused.train(), towers.train(), *batch(10))


@pytest.mark.parametrize("kind", ELEMENTWISE)
def test_every_activation_that_torch_computes(kind):
    towers = listed(lambda: [nn.Linear(D, 4), kind(), nn.Linear(4, 2), kind()])
    assert_same(GroupedSequential.from_towers(towers), towers, *batch())


@pytest.mark.parametrize(
    ("name", "training", "evaluation"),
    [
        ("as torch-rechub", 3, 1),
        ("no bias before the norm", 2, 1),
        ("norm of the input", 1, 1),
        ("norm after the activation", 2, 1),
        ("exact gelu", 2, 2),
        ("activations that differ", 2, 2),
        ("bias in the last layer", 1, 1),
    ],
)
def test_how_many_calls_of_the_kernels_a_forward_is(monkeypatch, name, training, evaluation):
    calls = []
    grouped_mlp = functional.grouped_mlp
    monkeypatch.setattr(functional, "grouped_mlp", lambda *a, **b: calls.append(1) or grouped_mlp(*a, **b))
    fused = GroupedSequential.from_towers(listed(TOWERS[name]))
    for mode, expected in ((True, training), (False, evaluation)):
        calls.clear()
        fused.train(mode)(*batch())
        assert len(calls) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision_is_that_of_the_loop(dtype):
    exact = listed(TOWERS["as torch-rechub"])
    towers = copy.deepcopy(exact).to(dtype)
    exact.load_state_dict(towers.state_dict())
    fused = GroupedSequential.from_towers(towers)
    x, scenario = batch(rows=200)
    x = x.to(dtype)
    for mode in (True, False):
        reference = loop(exact.train(mode), x.double(), scenario)
        theirs = (loop(towers.train(mode), x, scenario).double() - reference).norm() / reference.norm()
        out = fused.train(mode)(x, scenario)
        assert out.dtype == dtype
        error = (out.double() - reference).norm() / reference.norm()
        assert error <= (1e-5 if dtype == torch.float32 else 2 * theirs)


def test_second_derivatives():
    towers = listed(TOWERS["exact gelu"])
    fused = GroupedSequential.from_towers(towers)
    x, scenario = batch()
    results = []
    for function in (lambda x: fused(x, scenario), lambda x: loop(towers, x, scenario)):
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(function(leaf).square().sum(), leaf, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), leaf)[0])
    assert_close({"x": results[0]}, {"x": results[1]}, TOLERANCE)


def test_dropout_is_that_of_every_row_and_only_in_training():
    layer = GroupedSequential(GroupedMLP(M, D, (50,), "identity", dtype=torch.float64), nn.Dropout(0.3))
    x, scenario = batch(rows=400)
    torch.manual_seed(0)
    kept = layer.eval()(x, scenario)
    dropped = layer.train()(x, scenario)
    zeros = dropped == 0
    assert torch.allclose(dropped[~zeros], kept[~zeros] / 0.7)
    # 20,000 draws: five standard deviations are 0.016.
    assert abs(zeros.double().mean() - 0.3) < 0.016
    assert not torch.equal(layer(x, scenario), dropped)
    (gradient,) = torch.autograd.grad(dropped.sum(), layer.steps[0].biases[0])
    columns = [(~zeros[scenario == k]).double().sum(0) / 0.7 for k in range(M)]
    assert_close({"bias": gradient}, {"bias": torch.stack(columns)}, TOLERANCE)


def test_dropout_goes_through_fuse():
    model = nn.ModuleDict({"towers": listed(lambda: [nn.Linear(D, 4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 1)])})
    expected = loop(model["towers"].eval(), *batch())
    assert saml_kernels.fuse(model) == ("towers",)
    assert_close({"out": model["towers"](*batch())}, {"out": expected}, TOLERANCE)
    model.train()
    assert not torch.equal(model["towers"](*batch()), model["towers"](*batch()))


def test_a_scenario_with_one_row_is_told():
    towers = listed(TOWERS["as torch-rechub"])
    fused = GroupedSequential.from_towers(towers)
    x = torch.randn(5, D, dtype=torch.float64)
    scenario = torch.tensor([0, 0, 2, 1, 1])
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        loop(towers, x, scenario)
    before = copy.deepcopy(fused.state_dict())
    with pytest.raises(ValueError, match="scenario 2 has one row in the batch: batch norm in training needs at least"):
        fused(x, scenario)
    for name, tensor in fused.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert fused.eval()(x, scenario).shape == (5, 1)


def test_an_empty_batch_has_no_rows_in_training_either():
    fused = GroupedSequential.from_towers(listed(TOWERS["as torch-rechub"]))
    before = copy.deepcopy(fused.state_dict())
    assert fused(torch.zeros(0, D, dtype=torch.float64), torch.zeros(0, dtype=torch.int64)).shape == (0, 1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in fused.state_dict().items())


@pytest.mark.parametrize("name", TOWERS)
def test_an_unmodified_forward_goes_on_as_before(name):
    """Every tower on every row, then a mask: statistics of all rows, as the list's."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.towers = listed(TOWERS[name])

        def forward(self, x, scenario):
            outputs = torch.stack([tower(x) for tower in self.towers], dim=1)
            return outputs[torch.arange(len(x)), scenario]

    model, fused = Model(), Model()
    saml_kernels.fuse(fused)
    for mode in (True, True, False):
        x, scenario = batch()
        out, expected = fused.train(mode)(x, scenario), model.train(mode)(x, scenario)
        assert_close({"out": out}, {"out": expected.detach()}, TOLERANCE)
    for again, tower in zip(fused.towers.fused.to_towers(), model.towers, strict=True):
        ours, theirs = again.state_dict().values(), tower.state_dict().values()
        for index, (own, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_close({f"{index}": own.double()}, {f"{index}": other.double()}, TOLERANCE)


@pytest.mark.parametrize("name", TOWERS)
def test_state_of_the_list_is_loaded(name):
    model = nn.ModuleDict({"towers": listed(TOWERS[name])})
    other = nn.ModuleDict({"towers": listed(TOWERS[name], seed=1)})
    saml_kernels.fuse(model)
    x, scenario = batch()
    model.load_state_dict(other.state_dict())
    expected = loop(other["towers"].eval(), x, scenario)
    assert_close({"out": model.eval()["towers"](x, scenario)}, {"out": expected}, TOLERANCE)
    # And its own, there and back.
    again = copy.deepcopy(model)
    for parameter in again.parameters():
        parameter.data.zero_()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again["towers"](x, scenario), model["towers"](x, scenario))


def test_half_a_state_of_the_list_is_refused():
    model = nn.ModuleDict({"towers": listed(TOWERS["exact gelu"])})
    state = model.state_dict()
    saml_kernels.fuse(model)
    del state["towers.1.0.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*towers\.fused\.steps\.0\.weights\.0"):
        model.load_state_dict(state)


def test_a_norm_that_is_frozen_in_evaluation_stays_so():
    towers = listed(TOWERS["as torch-rechub"])
    for tower in towers:
        tower[1].eval()
        tower[0].bias.requires_grad_(False)
    model = nn.ModuleDict({"towers": towers})
    reference = copy.deepcopy(towers)
    saml_kernels.fuse(model)
    fused = model["towers"].fused
    assert [step.training for step in fused.steps if isinstance(step, GroupedBatchNorm)] == [False, True]
    assert [p.requires_grad for p in fused.steps[0].parameters()] == [True, False]
    x, scenario = batch()
    assert_close({"out": model["towers"](x, scenario)}, {"out": loop(reference, x, scenario)}, TOLERANCE)


@pytest.mark.parametrize(("name", "mode"), [("mean of all batches", True), ("as torch-rechub", False)])
def test_compiled_whole(name, mode):
    fused = GroupedSequential.from_towers(listed(TOWERS[name])).train(mode)
    other = copy.deepcopy(fused)
    x, scenario = batch()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    assert_close({"out": compiled(x, scenario)}, {"out": other(x, scenario)}, TOLERANCE)
    for own, expected in zip(fused.buffers(), other.buffers(), strict=True):
        assert torch.allclose(own.double(), expected.double())


def test_a_dict_of_towers():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            towers = listed(TOWERS["as torch-rechub"])
            self.towers = nn.ModuleDict({"web": towers[0], "app": towers[1], "shop": towers[2]})

        def forward(self, x):
            return {name: tower(x) for name, tower in self.towers.items()}

    model = Model().eval()
    x, scenario = batch()
    expected, looped = model(x), loop(model.towers.values(), x, scenario)
    state = model.state_dict()
    assert saml_kernels.fuse(model) == ("towers",)
    for name, out in model(x).items():
        assert_close({name: out}, {name: expected[name]}, TOLERANCE)
    towers = model.towers
    assert (list(towers), list(towers.keys()), len(towers)) == (["web", "app", "shop"],) * 2 + (3,)
    assert "app" in towers
    assert "desk" not in towers
    assert_close({"out": towers["app"](x)}, {"out": expected["app"]}, TOLERANCE)
    assert_close({"out": [*towers.values()][2](x)}, {"out": expected["shop"]}, TOLERANCE)
    assert_close({"out": towers(x, scenario)}, {"out": looped}, TOLERANCE)
    with pytest.raises(KeyError, match="desk"):
        towers["desk"]
    with pytest.raises(TypeError, match="cannot be exchanged, added or removed"):
        towers["desk"] = nn.Linear(D, 1)
    with pytest.raises(TypeError, match="cannot be exchanged, added or removed"):
        towers.update({})
    for parameter in model.parameters():
        parameter.data.zero_()
    model.load_state_dict(state)
    assert_close({"out": towers(x, scenario)}, {"out": looped}, TOLERANCE)


def test_numbered_keys_in_another_order_are_refused():
    towers = listed(TOWERS["exact gelu"])
    model = nn.Module()
    model.towers = nn.ModuleDict({"1": towers[1], "0": towers[0], "2": towers[2]})
    with pytest.raises(ValueError, match="its keys 1, 0, 2 are numbers in another order"):
        saml_kernels.fuse(model, ["towers"])


def test_slices_and_iteration_of_a_fused_list():
    model = nn.Module()
    model.towers = listed(TOWERS["exact gelu"])
    x, _ = batch()
    expected = [tower(x) for tower in model.towers]
    saml_kernels.fuse(model)
    for part in (slice(1, None), slice(None, None, -1), slice(-2, 1), slice(0, 99), slice(None)):
        got = model.towers[part]
        assert len(got) == len(expected[part])
        for tower, wanted in zip(got, expected[part], strict=True):
            assert_close({"out": tower(x)}, {"out": wanted.detach()}, TOLERANCE)
    assert_close({"out": model.towers[torch.tensor(-1)](x)}, {"out": expected[-1].detach()}, TOLERANCE)
    assert [tower(x).shape for tower in reversed(model.towers)] == [(B, 1)] * M


@pytest.mark.parametrize(
    ("act", "error", "told"),
    [
        (lambda towers: towers.append(nn.Linear(D, 1)), TypeError, "cannot be exchanged, added or removed"),
        (lambda towers: towers.__setitem__(0, nn.Linear(D, 1)), TypeError, "cannot be exchanged"),
        (lambda towers: towers.__delitem__(0), TypeError, "cannot be exchanged"),
        (lambda towers: towers.__add__([]), TypeError, "cannot be exchanged"),
        (lambda towers: towers["0"], TypeError, "str"),
        (lambda towers: towers[1.0], TypeError, "float"),
        (lambda towers: towers[3], IndexError, "tower 3 of 3"),
        (lambda towers: towers[0][0], TypeError, "a function of rows, no sequence of modules"),
        (
            lambda towers: towers[0].weight,
            AttributeError,
            r"without 'weight': its parameters are in .*\.fused",
        ),
    ],
)
def test_what_a_fused_list_is_not(act, error, told):
    model = nn.Module()
    model.towers = listed(TOWERS["exact gelu"])
    saml_kernels.fuse(model)
    with pytest.raises(error, match=told):
        act(model.towers)


def test_an_optimizer_that_holds_what_is_replaced_is_told():
    model = nn.Module()
    model.towers, model.bottom = listed(TOWERS["exact gelu"]), nn.Linear(2, 2)
    before = torch.optim.Adagrad(model.parameters())
    others = torch.optim.SGD(model.bottom.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match=r"^Adagrad holds 12 parameters that fuse\(\) replaces, such as towers\.0"):
        saml_kernels.fuse(model)
    del before
    again = nn.Module()
    again.towers = listed(TOWERS["exact gelu"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        saml_kernels.fuse(again)
    assert others.param_groups


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        (lambda t: t[1].__setitem__(1, nn.GELU("tanh")), ValueError, r"towers\[0\]\[1\] is GELU.*towers\[1\]\[1\] is"),
        (lambda t: t[2].append(nn.ReLU()), ValueError, r"towers\[0\] has 4 modules and towers\[2\] 5"),
        (lambda t: t[1].eval(), ValueError, r"in one mode, but towers\[1\]\[0\] is not in that of towers\[0\]\[0\]"),
        (lambda t: t[0].__setitem__(1, nn.Softmax(dim=1)), TypeError, r"towers\[0\]\[1\] must be .*got Softmax"),
        (lambda t: t[0].__setitem__(1, nn.BatchNorm1d(9)), ValueError, r"\[0\]\[1\] must read the 4 columns before it"),
        (lambda t: t[0].__setitem__(1, nn.SyncBatchNorm(4)), TypeError, r"got SyncBatchNorm"),
    ],
)
def test_towers_that_differ_are_refused(change, error, told):
    towers = listed(TOWERS["exact gelu"])
    change(towers)
    model = nn.Module()
    model.towers = towers
    with pytest.raises(error, match=told):
        saml_kernels.fuse(model, ["towers"])


@pytest.mark.parametrize(
    ("build", "error", "told"),
    [
        (lambda: GroupedSequential(), ValueError, "at least one GroupedMLP"),
        (lambda: GroupedSequential(GroupedMLP(2, 3, (2,)), nn.Linear(2, 2)), TypeError, "step 1 must be a GroupedMLP"),
        (lambda: GroupedSequential(GroupedMLP(2, 3, (2,)), GroupedBatchNorm(3, 2)), ValueError, "number.*got 2, 3"),
        (lambda: GroupedBatchNorm(0, 2), ValueError, "num_scenarios must be at least 1"),
        (lambda: GroupedBatchNorm(2, 2, eps=0.0), ValueError, "eps must be finite and above 0"),
        (
            lambda: GroupedBatchNorm(2, 3)(torch.zeros(4, 2), torch.zeros(4).long()),
            ValueError,
            r"x must have shape \(B, 3\), got \(4, 2\)",
        ),
        (lambda: GroupedBatchNorm(2, 3)(torch.zeros(4, 3), torch.full((4,), 2)), ValueError, r"must lie in \[0, 2\)"),
        (lambda: GroupedBatchNorm(2, 3)(torch.zeros(4, 3), torch.zeros(3).long()), ValueError, "as x has B = 4 rows"),
    ],
)
def test_what_cannot_be_is_refused(build, error, told):
    with pytest.raises(error, match=told):
        build()


class Wrapped(nn.Module):
    """As torch-rechub's MLP: layers made in a loop, and a forward that runs them."""

    def __init__(self, dims=(6, 4), dropout=0.0):
        super().__init__()
        layers, width = [], D
        for dim in dims:
            layers += [nn.Linear(width, dim), nn.BatchNorm1d(dim), nn.ReLU(), nn.Dropout(p=dropout)]
            width = dim
        self.mlp = nn.Sequential(*layers)
        self.head = nn.Linear(width, 1)

    def forward(self, x):
        return self.head(self.mlp(x))


def wrapped_model(kind=Wrapped):
    model = nn.Module()
    torch.manual_seed(0)
    model.towers = nn.ModuleList(kind() for _ in range(M)).double()
    return model


@pytest.mark.parametrize("mode", [True, False])
def test_a_class_that_runs_modules_one_after_the_other(mode):
    model, other = wrapped_model().train(mode), wrapped_model().train(mode)
    state = other.state_dict()
    assert saml_kernels.fuse(model) == ("towers",)
    x, scenario = batch()
    assert_close({"out": model.towers(x, scenario)}, {"out": loop(other.towers, x, scenario)}, TOLERANCE)
    assert {module.training for module in model.towers.modules()} == {mode}
    model.load_state_dict(state)
    assert torch.equal(model.towers.fused.steps[0].weights[0][1], state["towers.1.mlp.0.weight"].t())


class Doubles(Wrapped):
    def forward(self, x):
        return super().forward(x) * 2


class Residual(Wrapped):
    def forward(self, x):
        return self.head(self.mlp(x)) + x.sum(1, keepdim=True)


class OnlyInTraining(Wrapped):
    def forward(self, x):
        return self.head(self.mlp(x)) if self.training else self.mlp(x)


class Branches(Wrapped):
    def forward(self, x):
        return self.head(self.mlp(x)) if x.sum() > 0 else x


class TwoInputs(Wrapped):
    def forward(self, x, y=None):
        return self.head(self.mlp(x))


class OwnLinear(Wrapped):
    class Scaled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    def __init__(self):
        super().__init__()
        self.head = self.Scaled(4, 1)


def hooked():
    tower = Wrapped()
    tower.mlp.register_forward_hook(lambda *_: None)
    return tower


def patched():
    tower = Wrapped()
    tower.forward = lambda x: x
    return tower


class Keeps(Wrapped):
    """Keeps what it sees, and counts."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.seen = x
        self.calls += 1
        return self.head(self.mlp(x)) + self.calls


def test_reading_a_class_leaves_no_trace_in_it():
    model = wrapped_model(Keeps)
    with pytest.raises(TypeError, match="got Keeps: its forward does something else"):
        saml_kernels.fuse(model, ["towers"])
    assert all(tower.calls == 0 and not hasattr(tower, "seen") for tower in model.towers)


@pytest.mark.parametrize(
    ("kind", "error", "told"),
    [
        (Doubles, TypeError, "run modules one after the other, got Doubles: its forward does something else at "),
        (Residual, TypeError, "got Residual: its forward does something else"),
        (OnlyInTraining, TypeError, "must run the same modules in training and evaluation, OnlyInTraining does not"),
        (Branches, TypeError, "got Branches: .*control flow"),
        (TwoInputs, TypeError, "got TwoInputs: its forward does something else"),
        (OwnLinear, TypeError, "got OwnLinear: its forward does something else"),
        (hooked, ValueError, r"towers\[0\]\.mlp must have no hooks"),
        (patched, ValueError, r"towers\[0\] must have the forward of its class"),
    ],
)
def test_classes_that_do_something_else_are_refused(kind, error, told):
    model = wrapped_model(kind)
    model.towers[1].eval()
    modes = [module.training for module in model.modules()]
    with pytest.raises(error, match=told):
        saml_kernels.fuse(model, ["towers"])
    assert [module.training for module in model.modules()] == modes
