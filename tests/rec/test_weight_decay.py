"""Which parameters weight decay shrinks, and that the others stay where nothing trains them."""

import pytest
import torch
from torch import nn

from saml_kernels.layers import STARMLP, GroupedMLP, MixtureOfExperts, MultiBranchMLP, MutualUnit, PartitionedNorm
from saml_rec.data import prepare
from saml_rec.data.schema import load_schema
from saml_rec.errors import InputError
from saml_rec.models import MODELS
from saml_rec.models.construction import build_model
from saml_rec.models.registry import is_fitted
from saml_rec.models.tables import TableOptions, make_table, table_options
from saml_rec.sealed import load, save
from saml_rec.training import TrainOptions, train
from saml_rec.training.decay import without_decay
from saml_rec.training.optimizers import Optimizers

RATE, DECAY = 0.1, 2.0
LEFT = 1 - RATE * DECAY

M = 3
LAYERS = {
    "linear": (lambda: nn.Linear(4, 2), {"bias"}),
    "towers": (lambda: GroupedMLP(M, 4, (3, 1)), {"biases.0", "biases.1"}),
    "norm": (lambda: PartitionedNorm(M, 4), {"weight", "shared_weight", "bias", "shared_bias"}),
    "star": (lambda: STARMLP(M, 4, (2,)), {"weights.0", "biases.0", "shared_biases.0"}),
    "unit": (lambda: MutualUnit(M, 4), {"gate_weight", "gate_bias"}),
    "trunk": (
        lambda: MultiBranchMLP(M, 4, 3, (5,), mutual_layers=(1,)),
        {"branch_biases.0", "aux_biases.0", "gate_weights.1", "gate_biases.1"},
    ),
    "experts, one gate": (lambda: MixtureOfExperts(2, 4, (3,)), {"biases.0", "gate.bias"}),
    "experts, a gate each": (lambda: MixtureOfExperts(2, 4, (3,), M), {"biases.0", "gate.biases.0"}),
    "scenario embedding": (lambda: nn.Embedding(M, 2), set()),
    "table": (lambda: make_table(9, 2), set()),
}


@pytest.fixture(scope="module")
def schema(small_dataset):
    return load_schema(small_dataset.schema)


@pytest.fixture(scope="module")
def data(small_dataset, schema):
    return prepare(small_dataset.data, schema, seed=0)


def moved(model, optimizers):
    """By parameter whether a step without gradient leaves it (1), or shrinks it as decay does (LEFT)."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(1, 2)
            parameter.grad = torch.zeros_like(parameter)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizers.step()
    found = {}
    for name, parameter in model.named_parameters():
        ratio = parameter.detach() / before[name]
        assert torch.equal(parameter.detach(), before[name]) or torch.allclose(ratio, torch.tensor(LEFT)), name
        found[name] = round(float(ratio.flatten()[0]), 6)
    return found


@pytest.mark.parametrize(("make", "exempt"), LAYERS.values(), ids=LAYERS)
def test_what_nothing_trains_shrinks_unless_it_is_exempt(make, exempt):
    layer = make()
    found = moved(layer, Optimizers(layer, RATE, DECAY, TableOptions()))
    assert {name for name, ratio in found.items() if ratio == 1} == exempt
    assert set(without_decay(layer)) == exempt


@pytest.mark.parametrize("name", [name for name in MODELS if not is_fitted(name)])
def test_every_model_has_both_kinds(schema, data, name):
    model = build_model(name, {}, schema, data.encoder)
    found = moved(model, Optimizers(model, RATE, DECAY, TableOptions()))
    assert {parameter for parameter, ratio in found.items() if ratio == 1} == set(without_decay(model))
    assert set(found.values()) == {1.0, LEFT}


def test_scenarios_without_rows_keep_their_factors(schema, data):
    """STAR on rows of one scenario: its others' factors are 1 still, however strong the decay."""
    torch.manual_seed(0)
    model = build_model("star", {}, schema, data.encoder)
    optimizers = Optimizers(model, RATE, DECAY, TableOptions())
    table = data.tables["train"]
    rows = (table.scenario == 0).nonzero().squeeze(1)
    for _ in range(3):
        optimizers.zero_grad()
        model.loss(table.batch(rows)).backward()
        optimizers.step()
    for weight in (*model.network.weights, model.norm.weight):
        assert torch.equal(weight[1:], torch.ones_like(weight[1:]))
        assert not torch.equal(weight[0], torch.ones_like(weight[0]))


def test_tables_that_are_not_dense_are_never_decayed():
    options = TableOptions("sparse")
    with table_options(options):
        model = nn.ModuleDict({"table": make_table(9, 2), "network": nn.Linear(2, 2)})
    optimizers = Optimizers(model, RATE, DECAY, options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(1, 2)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model["network"].weight.grad = torch.zeros(2, 2)
    model["table"].look_up(torch.tensor([3])).mul(0).sum().backward()
    optimizers.step()
    assert torch.equal(model["table"].weight, before["table.weight"])
    assert torch.allclose(model["network"].weight, before["network.weight"] * LEFT)


@pytest.mark.parametrize("saved", [None, ["trunk.gate_biases.1"]], ids=["all were decayed", "others were not"])
def test_a_run_with_other_groups_is_refused(data, schema, train_one_epoch, tmp_path, saved):
    options = TrainOptions(epochs=3, batch_size=64, model_options={"hidden_dims": (8, 4)})
    run = train_one_epoch(data, schema, options, tmp_path / "run")
    content = load(run / "checkpoint.pt", "checkpoint")
    before = content.pop("without_decay")
    assert before
    save(run / "checkpoint.pt", "checkpoint", content | ({} if saved is None else {"without_decay": saved}))
    held = (run / "checkpoint.pt").read_bytes()
    with pytest.raises(InputError, match="cannot resume, in this version weight decay shrinks other parameters"):
        train(data, schema, options, run, resume=True)
    assert (run / "checkpoint.pt").read_bytes() == held
