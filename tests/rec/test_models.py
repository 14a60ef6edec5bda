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
every_model = pytest.mark.parametrize("name", MODELS)
every_scenario = pytest.mark.parametrize("own", range(M))


def build(name, dtype=torch.float64, seed=0, **options):
    torch.manual_seed(seed)
    model = MODELS[name](SCHEMA, M, vocabulary_sizes=SIZES, **{"hidden_dims": (6, 4)} | options)
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


@every_model
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


@every_model
def test_state_dict_round_trip(name):
    model, other, batch = build(name), build(name, seed=1), make_batch()
    assert not torch.equal(other(batch).logit, model(batch).logit)
    state = through(torch.save, lambda file: torch.load(file, weights_only=True), model.state_dict())
    assert set(state) == {key for key, _ in (*model.named_parameters(), *model.named_buffers())}
    other.load_state_dict(state)
    assert torch.equal(other(batch).logit, model(batch).logit)


@every_model
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
    ("name", "training"), [pair for pair in itertools.product(MODELS, (True, False)) if pair not in NEVER_ALONE]
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


@every_model
def test_loss_is_the_mean_over_samples(name):
    model, batch = build(name).eval(), make_batch()
    alone = [model.loss(rows_of(batch, [n])).item() for n in range(B)]
    assert model.loss(batch).item() == pytest.approx(sum(alone) / B, rel=1e-12)


@every_model
def test_scoring_needs_no_label(name):
    model, batch = build(name), make_batch()
    expected = model(batch).logit
    del batch["label"]
    assert torch.equal(model(batch).logit, expected)


@every_model
def test_seed_decides_the_start(name):
    first, again, other = (build(name, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    # STAR's scenarios start alike, and its statistics are not drawn.
    drawn = [
        key for key in first if name != "star" or not key.startswith(("norm.", "network.weights", "network.biases"))
    ]
    assert not any(torch.equal(first[key], other[key]) for key in drawn)


@every_model
def test_dropout_acts_in_training_only(name):
    model, batch = build(name, dropout=0.5), make_batch()
    assert not torch.equal(model(batch).logit, model(batch).logit)
    model.eval()
    assert torch.equal(model(batch).logit, model(batch).logit)
    without = build(name).eval()
    without.load_state_dict(model.state_dict())
    assert torch.equal(model(batch).logit, without(batch).logit)


@every_model
def test_training_learns_a_rule_that_differs_between_scenarios(name):
    """Even items are liked in scenario 0, odd ones in scenario 1; in scenario 2 the age decides."""
    batch = make_batch(size=240, dtype=torch.float32)
    item, age = batch["features"]["item"], batch["dense"][:, 0]
    rules = torch.stack([item % 2 == 0, item % 2 == 1, age > 0])
    batch["label"] = rules[batch["scenario"], torch.arange(240)].float()
    model = build(name, torch.float32, hidden_dims=(16, 8) if name == "saml" else (16,))
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
        *(
            (name, options, message)
            for name in MODELS
            for options, message in (
                ({"activation": "swish"}, "activation must be one of .*, got 'swish'"),
                ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
                ({"backend": "cuda"}, "backend must be one of .*, got 'cuda'"),
            )
        ),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        build(name, **options)


@every_model
def test_bad_scenario_ids(name):
    batch = make_batch(scenario=torch.full((B,), M))
    with pytest.raises(InputError, match=r"^scenario ids must lie in \[0, 3\), got 3$"):
        build(name)(batch)


@every_model
def test_one_scenario(name):
    torch.manual_seed(0)
    model = MODELS[name](SCHEMA, 1, vocabulary_sizes=SIZES)
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


def test_hmoe_is_its_parts():
    model, batch = build("hmoe"), make_batch()
    x, scenario = model.features(batch)[0], batch["scenario"]
    predictions = torch.sigmoid(model.mixture.logits(model.bottom.views(x, scenario), scenario))
    weights = torch.softmax(model.mixture.weight_networks(x, scenario), 1)
    torch.testing.assert_close(model(batch).logit, torch.logit((weights * predictions).sum(1)))


@pytest.mark.parametrize(
    ("name", "own_parameters"),
    [
        ("star", ("network.weights", "network.biases", "norm.weight", "norm.bias", "scenario_embedding")),
        ("hmoe", ("mixture.networks", "mixture.weight_networks", "bottom.gate")),
        ("mmoe", ("towers", "bottom.gate")),
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


@every_model
def test_parameter_counts(name):
    """What the papers' formulas need besides the features; x has 3 + 4 + 2 + 2 + attention's 4 numbers."""
    x, hidden, tower, experts = 15, 6, 4, 4
    model = {
        "saml": lambda: build("saml", hidden_dims=(6, 5)),
        "star": lambda: build("star", hidden_dims=(hidden,), scenario_dim=3, aux_dims=(7,)),
    }.get(name, lambda: build(name, hidden_dims=(hidden,), tower_dims=(tower,)))()
    assert model.features.global_dim == x
    local = model.features.local_dim
    expected = {
        # Auxiliary network and head; every branch reads its level's auxiliary layer; gates; heads read the aux logit.
        "saml": mlp_parameters(x, 6, 5, 1)
        + M * (mlp_parameters(local + 6, 6) + mlp_parameters(6 + 5, 5) + mlp_parameters(6, 6) + mlp_parameters(6, 1)),
        # M + 1 networks, scales and shifts; the scenarios' embedding; the auxiliary network.
        "star": (M + 1) * (mlp_parameters(x, hidden, 1) + 2 * x) + M * 3 + mlp_parameters(3 + x, 7, 1),
        # Experts; for each scenario a gate, a network, and the weights of its mixture.
        "hmoe": experts * mlp_parameters(x, hidden)
        + M * (mlp_parameters(x, experts) + mlp_parameters(hidden, tower, 1) + mlp_parameters(x, M)),
        "mmoe": experts * mlp_parameters(x, hidden)
        + M * (mlp_parameters(x, experts) + mlp_parameters(hidden, tower, 1)),
        "shared_bottom": mlp_parameters(x, hidden) + M * mlp_parameters(hidden, tower, 1),
    }[name]
    count = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in model.features.parameters())
    assert count == expected


def test_a_model_without_forward_cannot_be_made():
    class Headless(ScenarioModel):
        pass

    with pytest.raises(TypeError, match=r"abstract.*forward"):
        Headless(SCHEMA, M, SIZES, 0.0)
