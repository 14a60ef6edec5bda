"""The models as whole things: logits and losses against a loop over samples, what trains what, copies, bad options."""

import copy
import io
import itertools
import math
import pickle

import naive
import pytest
import torch
from torch import nn

from saml_rec.data.schema import FeatureSpec, Schema
from saml_rec.errors import InputError
from saml_rec.models import MODELS, ScenarioModel
from saml_rec.models.registry import hyperparameters, is_fitted

M, V, B = 3, 9, 8
SCHEMA = Schema(
    label="click",
    scenario="country",
    features=(
        FeatureSpec("user", "sparse", dim=3),
        FeatureSpec("item", "sparse", dim=4, scenario_aware=True),
        FeatureSpec("tags", "multi", dim=2, scenario_aware=True),
        FeatureSpec("age", "dense"),
        FeatureSpec("history", "sequence", item="item", heads=2),
    ),
)
SIZES = {"user": V, "item": V, "tags": V}
NETWORKS = [name for name in MODELS if not is_fitted(name)]
every_network = pytest.mark.parametrize("name", NETWORKS)
every_scenario = pytest.mark.parametrize("own", range(M))


def build(name, dtype=torch.float64, seed=0, **options):
    # Where all scenarios start alike, nothing could be told apart.
    start = {"branch_init": "independent"} if name == "saml" else {}
    torch.manual_seed(seed)
    model = MODELS[name](SCHEMA, M, vocabulary_sizes=SIZES, **{"hidden_dims": (6, 4)} | start | options)
    with torch.no_grad():
        for parameter in model.features.embeddings.parameters():
            parameter.mul_(10)  # far enough from zero that every unit has something to do
    return model.to(dtype)


def make_batch(size=B, scenario=None, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randint(1, V, shape, generator=generator)

    lengths = torch.arange(size)[:, None] % 4
    return {
        "scenario": torch.arange(size) % M if scenario is None else scenario,
        "label": torch.randint(2, (size,), generator=generator).to(dtype),
        "dense": torch.randn(size, 2, generator=generator).to(dtype),
        "features": {
            "user": draw(size),
            "item": draw(size),
            "tags": draw(size, 3) * (torch.arange(3) < lengths),
            "history": draw(size, 3) * (torch.arange(3) < lengths),
        },
    }


def rows_of(batch, rows):
    """The batch's rows as a batch of their own, padded as before."""
    chosen = {name: value[rows] for name, value in batch.items() if name != "features"}
    return chosen | {"features": {name: ids[rows] for name, ids in batch["features"].items()}}


def gradients(loss, model):
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, materialize_grads=True), strict=True))


def assert_same_gradients(model, loss, expected):
    actual, reference = gradients(loss, model), gradients(expected, model)
    for name, gradient in actual.items():
        torch.testing.assert_close(gradient, reference[name], rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
        assert gradient.any(), f"{name} is not trained: the comparison says nothing about it"


def naive_bce(logit, label):
    probability = 1 / (1 + torch.exp(-logit))
    return -(torch.log(probability) if label == 1 else torch.log(1 - probability))


def naive_saml(model, batch):
    """(logit, aux_logit, BCE of each), one sample at a time; x_g and x_l are test_features' business."""
    x_global, x_local = model.features(batch)
    if model.scenario_embedding is not None:
        embedded = [model.scenario_embedding.weight[own] for own in batch["scenario"].tolist()]
        x_global = torch.cat([x_global, torch.stack(embedded)], dim=1)
    options = {key: getattr(model.trunk, key) for key in ("activation", "score", "temperature", "stop_gradient")}
    trunk = naive.multi_branch(x_local, x_global, batch["scenario"], model.trunk.params(), **options)
    (head_weights,), (head_biases,) = model.head.weights, model.head.biases
    logits, aux_logits = [], []
    for n, own in enumerate(batch["scenario"].tolist()):
        aux_logit = model.aux_head.weight[0] @ trunk.aux[n] + model.aux_head.bias[0]
        *stream_weights, aux_weight = head_weights[own, :, 0]
        logit = sum(w * v for w, v in zip(stream_weights, trunk.own[n], strict=True))
        logits.append(logit + aux_weight * aux_logit + head_biases[own, 0])
        aux_logits.append(aux_logit)
    return torch.stack(logits), torch.stack(aux_logits)


def mean_bce(logits, labels):
    return sum(naive_bce(logit, label) for logit, label in zip(logits, labels.tolist(), strict=True)) / len(labels)


# --- SAML -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"aux_loss_weight": 0.3},
        {"hidden_dims": (6, 5, 4), "aux_dims": (5, 3, 2), "mutual_layers": (1, 2), "activation": "tanh"},
        {"gate": "scalar", "score": "softmax", "temperature": 0.3, "activation": "silu"},
        {"mutual_layers": ()},
        {"hidden_dims": (5,)},
        {"scenario_dim": 0},
    ],
    ids=str,
)
def test_saml_is_the_formula_sample_by_sample(options):
    model, batch = build("saml", **options), make_batch()
    logits, aux_logits = naive_saml(model, batch)
    output = model(batch)
    assert output.logit.shape == output.aux_logit.shape == (B,)
    torch.testing.assert_close(output.logit, logits, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(output.aux_logit, aux_logits, rtol=1e-11, atol=1e-12)
    weight = options.get("aux_loss_weight", 1.0)
    expected = mean_bce(logits, batch["label"]) + weight * mean_bce(aux_logits, batch["label"])
    loss = model.loss(batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert_same_gradients(model, loss, expected)


def test_aux_loss_weight_zero_is_the_own_loss_alone():
    model, batch = build("saml", aux_loss_weight=0.0), make_batch()
    assert model.loss(batch).item() == pytest.approx(mean_bce(model(batch).logit, batch["label"]).item(), rel=1e-12)


def test_the_auxiliary_network_is_told_the_scenario():
    """By an embedding that its own rows train; in the paper's form it is not."""
    told, paper, batch = build("saml"), build("saml", scenario_dim=0), make_batch()
    moved = {**batch, "scenario": (batch["scenario"] + 1) % M}
    assert (told(moved).aux_logit != told(batch).aux_logit).all()
    assert torch.equal(paper(moved).aux_logit, paper(batch).aux_logit)
    assert told.scenario_embedding.weight.shape == (M, 8)
    assert paper.scenario_embedding is None
    told.loss(rows_of(batch, batch["scenario"] == 1)).backward()
    assert told.scenario_embedding.weight.grad.any(1).tolist() == [False, True, False]


def test_own_logit_reads_the_aux_logit():
    """Moving the auxiliary head's bias moves the own logit by the weight its scenario gives the auxiliary logit."""
    model, batch = build("saml"), make_batch()
    before = model(batch)
    with torch.no_grad():
        model.aux_head.bias += 0.5
    after = model(batch)
    weight = model.head.weights[0][batch["scenario"], -1, 0]
    torch.testing.assert_close(after.aux_logit, before.aux_logit + 0.5)
    torch.testing.assert_close(after.logit, before.logit + 0.5 * weight)


def scenario_parameters(model):
    """Name -> gradient of what belongs to single scenarios, first dimension M."""
    found = {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if name.startswith(("trunk.branch", "trunk.gate", "head."))
    }
    for name, tables in model.features.embeddings.items():
        if tables.num_local:
            found[name] = tables.table.weight.grad[tables.vocabulary_size :].unflatten(0, (M, -1))
    return found


@every_scenario
@pytest.mark.parametrize("mutual_layers", [(1,), (1, 2), ()], ids=str)
def test_samples_train_their_own_scenario_alone(own, mutual_layers):
    model = build("saml", mutual_layers=mutual_layers, activation="tanh")
    model.loss(make_batch(scenario=torch.full((B,), own))).backward()
    slices = scenario_parameters(model)
    assert len(slices) == 2 * 2 + 2 * len(mutual_layers) + 2 + 2
    for name, gradient in slices.items():
        assert gradient[own].any(), name
        assert not gradient[[k for k in range(M) if k != own]].any(), name


@every_scenario
def test_scenario_without_a_sample_is_not_trained(own):
    """Also not when its streams are read by all others."""
    model = build("saml", activation="tanh")
    others = torch.tensor([k for k in range(M) if k != own])
    model.loss(make_batch(scenario=others[torch.arange(B) % 2])).backward()
    for name, gradient in scenario_parameters(model).items():
        assert not gradient[own].any(), name
        assert gradient[others].flatten(1).any(1).all(), name


def test_shared_parameters_are_trained_by_every_sample():
    model = build("saml", activation="tanh")
    for n in range(1, B):  # row 0 has an empty history and no tags
        alone = gradients(model.loss(rows_of(make_batch(), [n])), model)
        for name in ("trunk.aux_weights.0", "trunk.aux_weights.1", "aux_head.weight"):
            assert alone[name].any(), name
        rows = model.features.embeddings["feature_user"].vocabulary_size
        assert alone["features.embeddings.feature_user.table.weight"][:rows].any()


# --- shared bottom --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"hidden_dims": (7, 5), "tower_dims": (4, 3), "activation": "silu"},
        {"hidden_dims": (), "tower_dims": (4,)},
        {"hidden_dims": (6,), "tower_dims": (), "activation": "tanh"},
        {"hidden_dims": (), "tower_dims": ()},
    ],
    ids=str,
)
def test_shared_bottom_is_a_loop_over_towers(options):
    options = {"hidden_dims": (6,), "tower_dims": (4,)} | options
    model, batch = build("shared_bottom", **options), make_batch()
    delta = {"relu": nn.ReLU, "silu": nn.SiLU, "tanh": nn.Tanh}[options.get("activation", "relu")]
    bottom = nn.Sequential(*(module for layer in model.bottom for module in (layer, delta())))

    def tower(own, x):
        layers = list(zip(model.towers.weights, model.towers.biases, strict=True))
        for weight, bias in layers[:-1]:
            x = delta()(x @ weight[own] + bias[own])
        weight, bias = layers[-1]
        return (x @ weight[own] + bias[own])[0]

    x_global, x_local = model.features(batch)
    assert x_local.shape == (B, 0)
    logits = torch.stack([tower(own, bottom(x)) for own, x in zip(batch["scenario"].tolist(), x_global, strict=True)])
    torch.testing.assert_close(model(batch).logit, logits, rtol=1e-11, atol=1e-12)
    expected, loss = mean_bce(logits, batch["label"]), model.loss(batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert_same_gradients(model, loss, expected)
    assert len(model.bottom) == len(options["hidden_dims"])
    assert len(model.towers.weights) == len(options["tower_dims"]) + 1


@every_scenario
def test_towers_are_trained_by_their_scenario_alone(own):
    model = build("shared_bottom", activation="tanh")
    model.loss(make_batch(scenario=torch.full((B,), own))).backward()
    for parameter in model.towers.parameters():
        assert parameter.grad[own].any()
        assert not parameter.grad[[k for k in range(M) if k != own]].any()


# --- both -----------------------------------------------------------------------------------------------------------


def through(save, load, model):
    buffer = io.BytesIO()
    save(model, buffer)
    buffer.seek(0)
    return load(buffer)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: through(torch.save, lambda file: torch.load(file, weights_only=False), model),
}


@every_network
@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES.keys())
def test_copies_are_equal_and_independent(name, duplicate):
    model, batch = build(name, dropout=0.3).eval(), make_batch()
    before = model(batch).logit
    other = duplicate(model)
    assert not other.training
    assert torch.equal(other(batch).logit, before)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(model(batch).logit, before)
    assert not other(batch).logit.any()


@every_network
def test_state_dict_round_trip(name):
    model, other, batch = build(name), build(name, seed=1), make_batch()
    assert not torch.equal(other(batch).logit, model(batch).logit)
    state = through(torch.save, lambda file: torch.load(file, weights_only=True), model.state_dict())
    assert set(state) == {key for key, _ in (*model.named_parameters(), *model.named_buffers())}
    other.load_state_dict(state)
    assert torch.equal(other(batch).logit, model(batch).logit)


@every_network
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.03)], ids=str)
def test_other_types_agree_with_float64(name, dtype, tolerance):
    """A batch is float32 whatever the model's type is."""
    batch = make_batch(dtype=torch.float32)
    expected = build(name)
    model = build(name).to(dtype)
    assert model(batch).logit.dtype == dtype
    assert expected(batch).logit.dtype == torch.float64
    reference = expected(batch).logit
    assert (model(batch).logit.double() - reference).norm() < tolerance * reference.norm()
    assert model.loss(batch).item() == pytest.approx(expected.loss(batch).item(), rel=tolerance)
    model.loss(batch).backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in model.parameters())


# STAR normalises by a scenario's rows of the batch while it trains; in evaluation it must not.
NEVER_ALONE = {("star", True)}


@pytest.mark.parametrize(
    ("name", "training"), [pair for pair in itertools.product(NETWORKS, (True, False)) if pair not in NEVER_ALONE]
)
def test_score_does_not_depend_on_the_rest_of_the_batch(name, training):
    model, batch = build(name).train(training), make_batch(size=11)
    together = model(batch)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    shuffled = model(rows_of(batch, order))
    for logits, moved, column in zip(together, shuffled, range(len(together)), strict=True):
        torch.testing.assert_close(moved, logits[order], rtol=0, atol=1e-12)
        alone = torch.cat([model(rows_of(batch, [n]))[column] for n in range(11)])
        torch.testing.assert_close(alone, logits, rtol=0, atol=1e-12)


@every_network
def test_loss_is_the_mean_over_samples(name):
    model, batch = build(name).eval(), make_batch()
    alone = [model.loss(rows_of(batch, [n])).item() for n in range(B)]
    assert model.loss(batch).item() == pytest.approx(sum(alone) / B, rel=1e-12)


@every_network
def test_scoring_needs_no_label(name):
    model, batch = build(name), make_batch()
    expected = model(batch).logit
    del batch["label"]
    assert torch.equal(model(batch).logit, expected)


@every_network
def test_seed_decides_the_start(name):
    first, again, other = (build(name, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    # STAR's scenarios start alike, and its statistics are not drawn.
    drawn = [
        key for key in first if name != "star" or not key.startswith(("norm.", "network.weights", "network.biases"))
    ]
    assert not any(torch.equal(first[key], other[key]) for key in drawn)


@every_network
def test_dropout_acts_in_training_only(name):
    model, batch = build(name, dropout=0.5), make_batch()
    assert not torch.equal(model(batch).logit, model(batch).logit)
    model.eval()
    assert torch.equal(model(batch).logit, model(batch).logit)
    without = build(name).eval()
    without.load_state_dict(model.state_dict())
    assert torch.equal(model(batch).logit, without(batch).logit)


@every_network
def test_training_learns_a_rule_that_differs_between_scenarios(name):
    """Even items are liked in scenario 0, odd ones in scenario 1; in scenario 2 the age decides."""
    batch = make_batch(size=240, dtype=torch.float32)
    item, age = batch["features"]["item"], batch["dense"][:, 0]
    rules = torch.stack([item % 2 == 0, item % 2 == 1, age > 0])
    batch["label"] = rules[batch["scenario"], torch.arange(240)].float()
    # A network that is not told the scenario learns such a rule from tables of the scenario.
    options = {"local_features": True} if name == "mlp" else {}
    model = build(name, torch.float32, hidden_dims=(16, 8) if name == "saml" else (16,), **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    before = model.loss(batch).item()
    for _ in range(60):
        optimizer.zero_grad()
        model.loss(batch).backward()
        optimizer.step()
    correct = (model(batch).logit > 0) == (batch["label"] == 1)
    assert model.loss(batch).item() < 0.6 * before
    for own in range(M):
        assert correct[batch["scenario"] == own].float().mean() > 0.9


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("saml", {"hidden_dims": ()}, "hidden_dims must name at least one layer"),
        ("saml", {"hidden_dims": (6, 0)}, "every width in hidden_dims must be at least 1, got 0"),
        ("saml", {"hidden_dims": (6, 4), "aux_dims": (6,)}, "hidden_dims has 2 layers but aux_dims has 1"),
        ("saml", {"mutual_layers": (3,)}, r"mutual_layers must lie in 1\.\.2, got 3"),
        ("saml", {"gate": "matrix"}, "gate must be one of 'vector', 'scalar', got 'matrix'"),
        ("saml", {"score": "ratios"}, "score must be one of .*did you mean 'ratio'"),
        ("saml", {"temperature": 0.0}, "temperature must be finite and above 0, got 0.0"),
        ("saml", {"aux_loss_weight": -1.0}, "aux_loss_weight must be finite and at least 0, got -1.0"),
        ("saml", {"aux_loss_weight": math.nan}, "aux_loss_weight must be finite and at least 0, got nan"),
        ("shared_bottom", {"hidden_dims": (6, -1)}, "every width in hidden_dims must be at least 1, got -1"),
        ("shared_bottom", {"hidden_dims": (0,)}, "every width in hidden_dims must be at least 1, got 0"),
        ("shared_bottom", {"tower_dims": (0,)}, "every width in tower_dims must be at least 1, got 0"),
        ("saml", {"branch_views": "all"}, "branch_views must be one of own, each, got 'all'"),
        ("saml", {"branch_init": "equal"}, "branch_init must be one of .*, got 'equal'"),
        ("pepnet", {"gate_dim": 0}, "gate_dim must be at least 1, got 0"),
        ("pepnet", {"hidden_dims": ()}, "hidden_dims must name at least one layer of the towers, got none"),
        ("pepnet", {"prior_features": ("usr",)}, "prior_features: 'usr' is no sparse feature; did you mean 'user'"),
        ("pepnet", {"prior_features": ("tags",)}, "prior_features: 'tags' is no sparse feature; these are user, item"),
        ("ple", {"hidden_dims": ()}, "hidden_dims must name at least one level of experts, got none"),
        ("ple", {"own_experts": 0}, "own_experts must be at least 1, got 0"),
        ("mlp", {"hidden_dims": (0,)}, "every width in hidden_dims must be at least 1, got 0"),
        ("mlp_scenario", {"scenario_dim": 0}, "scenario_dim must be at least 1, got 0"),
        ("saml", {"scenario_dim": -1}, "scenario_dim must be at least 0, got -1"),
        *(
            (name, options, message)
            for name in NETWORKS
            for options, message in (
                ({"activation": "swish"}, "activation must be one of .*, got 'swish'"),
                ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
                ({"id_dropout": -0.1}, r"id_dropout must lie in \[0, 1\), got -0.1"),
                ({"backend": "cuda"}, "backend must be one of .*, got 'cuda'"),
            )
            if options.keys() <= hyperparameters(name).keys()
        ),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        build(name, **options)


@every_network
def test_bad_scenario_ids(name):
    batch = make_batch(scenario=torch.full((B,), M))
    with pytest.raises(InputError, match=r"^scenario ids must lie in \[0, 3\), got 3$"):
        build(name)(batch)


@every_network
def test_one_scenario(name):
    start = {"branch_init": "independent"} if name == "saml" else {}
    torch.manual_seed(0)
    model = MODELS[name](SCHEMA, 1, vocabulary_sizes=SIZES, **start)
    batch = make_batch(scenario=torch.zeros(B, dtype=torch.int64), dtype=torch.float32)
    model.loss(batch).backward()
    assert model(batch).logit.isfinite().all()
    gates = {key for key, _ in model.named_parameters() if "gate" in key or "weight_networks" in key}
    assert all(p.grad.any() for key, p in model.named_parameters() if key not in gates)


def test_star_is_its_parts():
    model, batch = build("star"), make_batch(size=40)
    model.train()(batch)  # moves the statistics away from their start
    model.eval()
    z = model.norm(model.features(batch)[0], batch["scenario"])
    aux = model.aux_network(torch.cat([model.scenario_embedding(batch["scenario"]), z], 1))
    expected = (model.network(z, batch["scenario"]) + aux).squeeze(1)
    torch.testing.assert_close(model(batch).logit, expected)
    # No activation on the logit: it follows its bias to either side.
    for sign in (-1, 1):
        with torch.no_grad():
            model.aux_network[-1].bias.fill_(sign * 5.0)
        assert (model(batch).logit.sign() == sign).all()


def test_hmoe_is_the_formula_sample_by_sample():
    model, batch = build("hmoe"), make_batch()
    x = model.features(batch)[0]
    bottom, networks, weighing = model.bottom, model.mixture.networks, model.mixture.weight_networks

    def layers(stack, k, row, activation):
        for number, (weight, bias) in enumerate(zip(stack.weights, stack.biases, strict=True), start=1):
            row = row @ weight[k] + bias[k].squeeze()
            row = activation(row) if number < len(stack.weights) or stack is bottom else row
        return row

    for n, own in enumerate(batch["scenario"].tolist()):
        experts = torch.stack([layers(bottom, e, x[n], torch.relu) for e in range(bottom.num_experts)])
        gates = [torch.softmax(layers(bottom.gate, j, x[n], torch.relu), 0) for j in range(M)]
        scores = torch.stack([torch.sigmoid(layers(networks, j, gates[j] @ experts, torch.relu)[0]) for j in range(M)])
        probability = torch.softmax(layers(weighing, own, x[n], torch.relu), 0) @ scores
        torch.testing.assert_close(model(batch).logit[n], torch.logit(probability))


def test_pepnet_is_the_formula_sample_by_sample():
    model, batch = build("pepnet", prior_features=("item",)), make_batch()
    x = model.features(batch)[0]
    item = model.features.embeddings["feature_item"](batch["features"]["item"], batch["scenario"])[0]

    def gate(weights, biases, k, prior):
        (first, second), (shift, last) = weights, biases
        return 2 * torch.sigmoid(torch.relu(prior @ first[k] + shift[k]) @ second[k] + last[k])

    domain, towers = model.embedding_gate.network, model.towers.towers
    (read,), (read_shift,) = model.towers.gate_inputs.weights, model.towers.gate_inputs.biases
    # Every layer's gate has its columns of the first layer, 32 of them.
    parts = zip(read.split(32, dim=2), read_shift.split(32, dim=1), model.towers.gate_outputs, strict=True)
    gates = [((w, of.weights[0]), (b, of.biases[0])) for w, b, of in parts]
    for n, own in enumerate(batch["scenario"].tolist()):
        asked = torch.cat([model.scenario_embedding.weight[own], x[n]])
        row = embedded = x[n] * gate(domain.weights, domain.biases, 0, asked)
        prior = torch.cat([item[n], embedded])
        for (weights, biases), weight, bias in zip(gates, towers.weights, towers.biases, strict=True):
            row = torch.relu((gate(weights, biases, own, prior) * row) @ weight[own] + bias[own])
        logit = row @ model.head.weights[0][own] + model.head.biases[0][own]
        torch.testing.assert_close(model(batch).logit[n], logit[0])


@pytest.mark.parametrize("local_features", [False, True])
def test_plain_networks_are_what_their_names_say(local_features):
    batch = make_batch()

    def dense(x, layers):
        for number, (weight, bias) in enumerate(layers, start=1):
            x = x @ weight + bias
            x = torch.relu(x) if number < len(layers) else x
        return x

    models = {name: build(name, local_features=local_features) for name in ("mlp", "mlp_scenario", "per_scenario")}
    inputs = {name: torch.cat(model.features(batch), 1) for name, model in models.items()}
    shared = {
        name: [(layer.weight.T, layer.bias) for layer in models[name].network.layers]
        for name in ("mlp", "mlp_scenario")
    }
    embedded = models["mlp_scenario"].scenario_embedding.weight[batch["scenario"]]
    networks = models["per_scenario"].networks
    expected = {
        "mlp": dense(inputs["mlp"], shared["mlp"]),
        "mlp_scenario": dense(torch.cat([embedded, inputs["mlp_scenario"]], 1), shared["mlp_scenario"]),
        "per_scenario": torch.stack(
            [
                dense(row, [(w[own], b[own]) for w, b in zip(networks.weights, networks.biases, strict=True)])
                for row, own in zip(inputs["per_scenario"], batch["scenario"].tolist(), strict=True)
            ]
        ),
    }
    for name, model in models.items():
        assert model.features.local_dim == (4 + 2 + 4 if local_features else 0)
        torch.testing.assert_close(model(batch).logit, expected[name].squeeze(1))


@every_network
def test_local_features_are_the_tables_every_model_may_read(name):
    # Of relu a unit may be dead for one row.
    with_tables, without = (build(name, local_features=local, activation="tanh") for local in (True, False))
    assert with_tables.features.local_dim == 10
    assert without.features.local_dim == 0
    batch = make_batch()
    tables = with_tables.features.embeddings["feature_item"].local_tables
    before = with_tables(batch).logit
    with torch.no_grad():
        tables[:] += 0.5 * torch.randn_like(tables)
    assert (with_tables(batch).logit != before).all()
    assert without(batch).logit.isfinite().all()


# --- which scenario a row is of -------------------------------------------------------------------------------------


@every_network
def test_scores_follow_the_scenario(name):
    """Other ids, other scores; a network without scenario keeps its own."""
    model = build(name).eval()
    batch = make_batch(size=30)
    moved = {**batch, "scenario": (batch["scenario"] + 1) % M}
    changed = (model(moved).logit != model(batch).logit).double().mean()
    assert changed == 0 if name == "mlp" else changed > 0.7


M_MANY = 7
"""A size that nothing else has: a dimension of this size is one of scenarios."""


def relabelled(model, order):
    """The model whose scenario order[k] is the given one's k: every dimension of scenarios permuted."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            for dimension, size in enumerate(tensor.shape):
                if size == M_MANY:
                    tensor.copy_(tensor.clone().index_select(dimension, torch.argsort(order)))
        for tables in other.features.embeddings.values():
            if tables.num_local:
                tables.local_tables.copy_(tables.local_tables.clone()[torch.argsort(order)])
    return other


@every_network
@pytest.mark.parametrize("options", [{}, {"local_features": True}], ids=str)
def test_relabelled_scenarios_score_alike(name, options):
    if name == "saml" and options:
        options = {"branch_views": "each", "score": "softmax", "mutual_layers": (1, 2)}
    # The shared stream's gate between two of PLE's levels is over all experts, the shared one included.
    widths = {"hidden_dims": (6,) if name == "ple" else (6, 4)}
    torch.manual_seed(0)
    model = MODELS[name](SCHEMA, M_MANY, vocabulary_sizes=SIZES, **widths | options).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    batch = make_batch(size=4 * M_MANY, scenario=torch.arange(4 * M_MANY) % M_MANY)
    order = torch.randperm(M_MANY, generator=torch.Generator().manual_seed(1))
    other = relabelled(model, order)
    moved = {**batch, "scenario": order[batch["scenario"]]}
    torch.testing.assert_close(other(moved).logit, model(batch).logit, rtol=1e-9, atol=1e-10)
    assert (name == "mlp" and not options) or not torch.allclose(model(moved).logit, model(batch).logit)


# --- views by branch, equal starts, unknown ids ---------------------------------------------------------------------


def test_each_branch_reads_its_own_scenarios_tables():
    model, batch = build("saml", branch_views="each"), make_batch()
    _, views = model.features(batch)
    assert views.shape == (B, M, model.features.local_dim)
    own = build("saml")
    for k in range(M):
        _, expected = own.features({**batch, "scenario": torch.full((B,), k)})
        torch.testing.assert_close(views[:, k], expected)


@every_scenario
def test_views_of_foreign_branches_train_nothing(own):
    model = build("saml", branch_views="each", activation="tanh", mutual_layers=(1, 2))
    model.loss(make_batch(scenario=torch.full((B,), own))).backward()
    for name, gradient in scenario_parameters(model).items():
        assert gradient[own].any(), name
        assert not gradient[[k for k in range(M) if k != own]].any(), name


def test_views_change_what_foreign_branches_say_and_nothing_without_them():
    batch = make_batch()
    for mutual_layers, alike in (((), True), ((1,), False)):
        own, each = (build("saml", branch_views=views, mutual_layers=mutual_layers) for views in ("own", "each"))
        assert torch.allclose(own(batch).logit, each(batch).logit) is alike


def test_dropout_takes_the_same_features_from_all_views():
    model = build("saml", branch_views="each", dropout=0.5)
    with torch.no_grad():
        for tables in model.features.embeddings.values():
            tables.table.weight.add_(1)
    lost = model.features(make_batch(size=50))[1] == 0
    assert 0.3 < lost.double().mean() < 0.7
    assert (lost == lost[:, :1]).all()


def test_scenarios_that_start_alike():
    # Without the embedding, which tells them apart from the start.
    start = {"branch_init": "shared", "branch_views": "each", "scenario_dim": 0}
    model, batch = build("saml", mutual_layers=(1, 2), **start), make_batch()
    for name, parameter in model.named_parameters():
        if name.startswith(("trunk.branch", "trunk.gate", "head.")):
            assert (parameter == parameter[:1]).all(), name
            assert parameter.any(), name
    for tables in model.features.embeddings.values():
        if tables.num_local:
            assert (tables.local_tables == tables.local_tables[:1]).all()
            assert tables.local_tables.any()
            assert not torch.equal(tables.local_tables[0], tables.global_table)
    scores = [model({**batch, "scenario": torch.full((B,), k)}).logit for k in range(M)]
    torch.testing.assert_close(scores[0], scores[1])
    # All foreign streams are alike, so they weigh alike.
    for weights in model.mutual_weights(batch).values():
        torch.testing.assert_close(weights[weights > 0], torch.full((B * (M - 1),), 1 / (M - 1)).double())


def test_scenarios_that_start_alike_part():
    model, batch = build("saml", branch_init="shared", activation="tanh"), make_batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        model.loss(batch).backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        if name.startswith(("trunk.branch", "trunk.gate", "head.")):
            assert (parameter[0] != parameter[1]).any(), name


@every_network
def test_some_ids_become_unknown_in_training(name):
    model, batch = build(name, id_dropout=0.5), make_batch(size=200)
    torch.manual_seed(0)
    drawn = model.features._known_ids(batch["features"])
    for feature, ids in batch["features"].items():
        changed = drawn[feature] != ids
        known = ids > 1
        assert (drawn[feature][changed] == 1).all()
        assert not changed[~known].any(), "an empty cell stays empty"
        assert changed[known].double().mean() == pytest.approx(0.5, abs=0.1)
    model.eval()
    assert all(
        torch.equal(ids, batch["features"][f]) for f, ids in model.features._known_ids(batch["features"]).items()
    )


@pytest.mark.parametrize(
    ("name", "own_parameters"),
    [
        ("star", ("network.weights", "network.biases", "norm.weight", "norm.bias", "scenario_embedding")),
        ("hmoe", ("mixture.networks", "mixture.weight_networks", "bottom.gate")),
        ("mmoe", ("towers", "bottom.gate")),
        ("pepnet", ("towers", "head", "scenario_embedding")),
        ("per_scenario", ("networks",)),
        ("mlp_scenario", ("scenario_embedding",)),
    ],
)
@every_scenario
def test_scenario_parameters_are_registered_and_trained_by_their_own_rows(name, own_parameters, own):
    model = build(name)
    batch = make_batch(size=12, scenario=torch.full((12,), own))
    model.loss(batch).backward()
    scenario_parameters = {key: p for key, p in model.named_parameters() if key.startswith(own_parameters)}
    assert len(scenario_parameters) >= len(own_parameters)
    for key, parameter in scenario_parameters.items():
        trained = parameter.grad.flatten(1).any(1) if parameter.grad.dim() > 1 else parameter.grad != 0
        assert trained.tolist() == [k == own for k in range(M)], key
    shared = {key: p for key, p in model.named_parameters() if key not in scenario_parameters}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in shared.values())


def mlp_parameters(*widths):
    return sum((before + 1) * after for before, after in itertools.pairwise(widths))


@every_network
def test_parameter_counts(name):
    """What the papers' formulas need besides the features; x has 3 + 4 + 2 + 2 + attention's 4 numbers."""
    x, hidden, tower, experts = 15, 6, 4, 4
    model = {
        "saml": lambda: build("saml", hidden_dims=(6, 5), scenario_dim=3),
        "star": lambda: build("star", hidden_dims=(hidden,), scenario_dim=3, aux_dims=(7,)),
        "pepnet": lambda: build("pepnet", hidden_dims=(hidden,), scenario_dim=3, gate_dim=5),
        "mlp": lambda: build("mlp", hidden_dims=(hidden,)),
        "mlp_scenario": lambda: build("mlp_scenario", hidden_dims=(hidden,), scenario_dim=3),
        "per_scenario": lambda: build("per_scenario", hidden_dims=(hidden,)),
    }.get(name, lambda: build(name, hidden_dims=(hidden,), tower_dims=(tower,)))()
    assert model.features.global_dim == x
    local = model.features.local_dim
    expected = {
        # The scenarios' embedding; auxiliary network and head; every branch reads its level's auxiliary layer; gates;
        # heads read the aux logit.
        "saml": M * 3
        + mlp_parameters(3 + x, 6, 5, 1)
        + M * (mlp_parameters(local + 6, 6) + mlp_parameters(6 + 5, 5) + mlp_parameters(6, 6) + mlp_parameters(6, 1)),
        # M + 1 networks, scales and shifts; the scenarios' embedding; the auxiliary network.
        "star": (M + 1) * (mlp_parameters(x, hidden, 1) + 2 * x) + M * 3 + mlp_parameters(3 + x, 7, 1),
        # Experts; for each scenario a gate, a network, and the weights of its mixture.
        "hmoe": experts * mlp_parameters(x, hidden)
        + M * (mlp_parameters(x, experts) + mlp_parameters(hidden, tower, 1) + mlp_parameters(x, M)),
        "mmoe": experts * mlp_parameters(x, hidden)
        + M * (mlp_parameters(x, experts) + mlp_parameters(hidden, tower, 1)),
        # Each scenario's expert, the shared one, gates over the two of them, towers.
        "ple": mlp_parameters(x, hidden)
        + M * (mlp_parameters(x, hidden) + mlp_parameters(x, 2) + mlp_parameters(hidden, tower, 1)),
        # The scenarios' embedding and its gate; a gate of the user's and item's 3 + 4 numbers before the one layer.
        "pepnet": M * 3
        + mlp_parameters(3 + x, 5, x)
        + M * (mlp_parameters(7 + x, 5, x) + mlp_parameters(x, hidden) + mlp_parameters(hidden, 1)),
        "shared_bottom": mlp_parameters(x, hidden) + M * mlp_parameters(hidden, tower, 1),
        "mlp": mlp_parameters(x, hidden, 1),
        "mlp_scenario": M * 3 + mlp_parameters(3 + x, hidden, 1),
        "per_scenario": M * mlp_parameters(x, hidden, 1),
    }[name]
    count = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in model.features.parameters())
    assert count == expected


def test_a_model_without_forward_cannot_be_made():
    class Headless(ScenarioModel):
        pass

    with pytest.raises(TypeError, match=r"abstract.*forward"):
        Headless(SCHEMA, M, SIZES, 0.0)
