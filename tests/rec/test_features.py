"""x_g and x_l: tables and attention against loops over samples, and what a sample trains."""

import copy
import math

import pytest
import torch

from saml_rec.data.schema import FeatureSpec, Schema
from saml_rec.errors import InputError
from saml_rec.models import SAML
from saml_rec.models.attention import attend, attend_formula
from saml_rec.models.features import ScenarioAwareAttention, ScenarioAwareEmbedding, ScenarioAwareFeatures

M, V, DIM, B = 3, 9, 4, 6
IDS = torch.tensor([0, 1, 5, 8, 5, 2])
SCENARIO = torch.tensor([0, 2, 2, 0, 1, 2])
# Rows of length 3, 0, 1, 2, 3, 1; the empty one, and ids 1 (unknown) and 8 (the last).
BAGS = torch.tensor([[3, 1, 8], [0, 0, 0], [4, 0, 0], [2, 2, 0], [8, 5, 6], [1, 0, 0]])


def embedding(scenario_aware=True, seed=0):
    torch.manual_seed(seed)
    return ScenarioAwareEmbedding(M, V, DIM, scenario_aware).double()


def trained(module):
    """The module with weights as training would leave them: no row is zero but that of empty cells."""
    with torch.no_grad():
        for tables in (m for m in module.modules() if isinstance(m, ScenarioAwareEmbedding)):
            for table in (tables.global_table, tables.local_tables):
                if table is not None:
                    table[..., 1:, :] = torch.randn_like(table[..., 1:, :])
    return module


def looked_up(tables, ids, scenario=SCENARIO):
    """Global and own local embeddings of ids (B,) or (B, n)."""
    return tuple(x.view(*ids.shape, DIM) for x in tables(ids.view(len(ids), -1), scenario))


def gradients_of(tables):
    """Of the global table (V, dim) and of the local ones (M, V, dim)."""
    gradient, rows = tables.table.weight.grad, tables.vocabulary_size
    return gradient[:rows], gradient[rows:].unflatten(0, (-1, rows))


# --- embedding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scenario_aware", [True, False])
def test_tables_start_normal_with_two_rows_of_zeros(scenario_aware):
    torch.manual_seed(0)
    tables = ScenarioAwareEmbedding(4, 500, 16, scenario_aware)
    shapes = {name: tuple(table.shape) for name, table in tables.named_parameters()}
    assert shapes == {"table.weight": (2500 if scenario_aware else 500, 16)}
    for table in (tables.global_table, tables.local_tables) if scenario_aware else (tables.global_table,):
        assert not table[..., :2, :].any()
        assert table[..., 2:, :].std().item() == pytest.approx(0.05, rel=0.05)
        assert table[..., 2:, :].mean().abs() < 0.003
    if scenario_aware:
        first, *others = tables.local_tables
        assert all(not torch.equal(first, other) for other in (tables.global_table, *others))


@pytest.mark.parametrize("ids", [IDS, BAGS], ids=["one", "bags"])
def test_lookups_are_a_loop_over_samples(ids):
    tables = trained(embedding())
    zeros = torch.zeros(DIM, dtype=torch.float64)
    expected_global, expected_local = [], []
    for own, values in zip(SCENARIO.tolist(), ids.view(B, -1).tolist(), strict=True):
        expected_global += [tables.global_table[value] if value else zeros for value in values]
        expected_local += [tables.local_tables[own, value] if value else zeros for value in values]
    shape = (*ids.shape, DIM)
    found_global, found_local = looked_up(tables, ids)
    assert torch.equal(found_global, torch.stack(expected_global).view(shape))
    assert torch.equal(found_local, torch.stack(expected_local).view(shape))


@pytest.mark.parametrize("ids", [IDS, BAGS], ids=["one", "bags"])
def test_only_the_rows_that_were_read_are_trained(ids):
    """In the global table every id of the batch but 0; in local tables those of the scenario's own rows."""
    tables = trained(embedding())
    found_global, found_local = looked_up(tables, ids)
    (found_global.sum() + 2 * found_local.sum()).backward()
    of_global, of_local = gradients_of(tables)
    for value in range(V):
        count = (ids == value).sum().item() if value else 0
        assert (of_global[value] == count).all()
        for k in range(M):
            own = 2 * (ids[SCENARIO.eq(k)] == value).sum().item() if value else 0
            assert (of_local[k, value] == own).all()


def test_training_keeps_empty_cells_at_zero_and_moves_unknown_values():
    tables = embedding()
    optimizer = torch.optim.AdamW(tables.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (torch.cat(looked_up(tables, BAGS)) - 1).square().sum().backward()
        optimizer.step()
    for found in looked_up(tables, BAGS):
        assert not found[BAGS == 0].any()
        assert (found[BAGS == 1] > 0.1).all()
    assert not tables.local_tables[1, 1].any(), "scenario 1 read no unknown value"


def test_a_bag_of_one_empty_cell():
    tables = trained(embedding())
    empty = torch.zeros(2, 1, dtype=torch.int64)
    assert not any(found.any() for found in looked_up(tables, empty, torch.tensor([1, 2])))


def test_tables_of_runs_of_version_0_1_are_loaded():
    """They kept the global table and the local ones apart."""
    old, new = trained(embedding(seed=1)), embedding(seed=2)
    new.load_state_dict({"global_table": old.global_table.clone(), "local_tables": old.local_tables.clone()})
    assert torch.equal(new.table.weight, old.table.weight)
    without, plain = embedding(scenario_aware=False), torch.randn(V, DIM, dtype=torch.float64)
    without.load_state_dict({"global_table": plain})
    assert torch.equal(without.table.weight, plain)


# --- attention ------------------------------------------------------------------------------------------------------


def naive_attention(query_weight, key_weight, value_weight, item, key_rows, value_rows, heads):
    """One sample: item (dim,), the valid rows (n, dim) of keys and values; the heads' outputs side by side."""
    width = item.shape[0] // heads
    if len(key_rows) == 0:
        return torch.zeros_like(item)
    outputs = []
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        query = query_weight[part] @ item
        scores = [(key_weight[part] @ row) @ query / math.sqrt(width) for row in key_rows]
        total = sum(torch.exp(score) for score in scores)
        weighted = [
            torch.exp(s) / total * (value_weight[part] @ row) for s, row in zip(scores, value_rows, strict=True)
        ]
        outputs.append(sum(weighted))
    return torch.cat(outputs)


def attention_inputs(dim, lengths, seed=0):
    """Item and sequence, global and local, and the mask. Positions past the length hold noise that must not show."""
    generator = torch.Generator().manual_seed(seed)
    width = max(*lengths, 1)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    n = len(lengths)
    valid = torch.arange(width) < torch.tensor(lengths)[:, None]
    return normal(n, dim), normal(n, width, dim), normal(n, dim), normal(n, width, dim), valid


def global_attention(layer, item, sequence, valid):
    """Of a layer without a local one."""
    return layer(item.unsqueeze(0), sequence.unsqueeze(0), valid)[0]


def both_attentions(layer, item, sequence, item_local, sequence_local, valid):
    """Global and local, (2, B, dim)."""
    return layer(torch.stack([item, item_local]), torch.stack([sequence, sequence_local]), valid)


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("lengths", [(3, 0, 1, 5), (0, 0), (4, 4, 4)], ids=str)
def test_attention_is_the_formula_sample_by_sample(heads, lengths):
    torch.manual_seed(1)
    layer = ScenarioAwareAttention(8, heads, scenario_aware=True).double()
    item, sequence, item_local, sequence_local, valid = attention_inputs(8, lengths)
    outputs = both_attentions(layer, item, sequence, item_local, sequence_local, valid)

    def loop(query, key, items, keys):
        weights = (query.weight, key.weight, layer.value.weight)
        rows = [naive_attention(*weights, items[i], keys[i, :n], sequence[i, :n], heads) for i, n in enumerate(lengths)]
        return torch.stack(rows)

    expected = (
        loop(layer.query_global, layer.key_global, item, sequence),
        loop(layer.query_local, layer.key_local, item_local, sequence_local),
    )
    for output, reference in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, reference, rtol=1e-12, atol=1e-13)
        assert not output[torch.tensor(lengths) == 0].any()

    if not any(lengths):
        return  # the loop's result depends on nothing
    leaves = [item, sequence, item_local, sequence_local, *layer.parameters()]
    cotangent = torch.randn(2, len(lengths), 8, dtype=torch.float64)
    gradients = torch.autograd.grad((outputs * cotangent).sum(), leaves)
    references = torch.autograd.grad((torch.stack(expected) * cotangent).sum(), leaves)
    for gradient, reference in zip(gradients, references, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_sequences_without_a_valid_position_give_zeros_and_finite_gradients(dtype):
    layer = ScenarioAwareAttention(4, 2, scenario_aware=True).to(dtype)
    item, sequence, item_local, sequence_local, valid = (
        tensor.detach().to(dtype).requires_grad_() if tensor.is_floating_point() else tensor
        for tensor in attention_inputs(4, (0, 2, 0))
    )
    result = both_attentions(layer, item, sequence, item_local, sequence_local, valid).flatten(0, 1)
    assert not result[[0, 2, 3, 5]].any()
    assert result[[1, 4]].all()
    result.square().sum().backward()
    for tensor in (item, sequence, item_local, sequence_local, *layer.parameters()):
        assert tensor.grad.isfinite().all()
    for tensor in (item, sequence, item_local, sequence_local):
        assert not tensor.grad[[0, 2]].any()


def test_padding_does_not_show():
    """More padding, or other numbers in it, change nothing."""
    layer = ScenarioAwareAttention(4, 2, scenario_aware=False).double()
    item, sequence, _, _, valid = attention_inputs(4, (3, 1))
    longer = torch.cat([sequence, 1e3 * torch.randn(2, 4, 4, dtype=torch.float64)], dim=1)
    other = torch.where(valid.unsqueeze(2), sequence, -7.0)
    expected = global_attention(layer, item, sequence, valid)
    padded = global_attention(layer, item, longer, torch.cat([valid, torch.zeros(2, 4, dtype=torch.bool)], dim=1))
    torch.testing.assert_close(padded, expected, rtol=1e-13, atol=1e-14)
    assert torch.equal(global_attention(layer, item, other, valid), expected)


def test_values_are_shared_and_queries_and_keys_are_not():
    layer = ScenarioAwareAttention(4, 2, scenario_aware=True).double()
    item, sequence, item_local, sequence_local, valid = attention_inputs(4, (3, 2))

    def trained_by(output):
        leaves = dict(layer.named_parameters()) | {
            "item": item,
            "sequence": sequence,
            "item_local": item_local,
            "sequence_local": sequence_local,
        }
        gradients = torch.autograd.grad(output.square().sum(), list(leaves.values()), allow_unused=True)
        return {name for name, g in zip(leaves, gradients, strict=True) if g is not None and g.any()}

    of_global = {"query_global.weight", "key_global.weight", "value.weight", "item", "sequence"}
    of_local = {"query_local.weight", "key_local.weight", "value.weight", "item_local", "sequence_local", "sequence"}
    for view, expected in enumerate((of_global, of_local)):
        assert trained_by(both_attentions(layer, item, sequence, item_local, sequence_local, valid)[view]) == expected


def attended(views, lengths=(3, 0, 1, 5), heads=2, dim=4):
    """Probes, sequence and mask of :func:`attend`."""
    generator = torch.Generator().manual_seed(3)
    batch, width = len(lengths), max(1, *lengths)
    probes, sequence = (
        torch.randn(views, batch, size, dim, generator=generator, dtype=torch.float64).requires_grad_()
        for size in (heads, width)
    )
    return probes, sequence, torch.arange(width) < torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("views", [1, 2])
def test_attend_is_its_formula(views):
    probes, sequence, valid = attended(views)
    output, expected = attend(probes, sequence, valid), attend_formula(probes, sequence, valid)
    torch.testing.assert_close(output, expected, rtol=1e-13, atol=1e-14)
    cotangent = torch.randn_like(output)
    pairs = (torch.autograd.grad((y * cotangent).sum(), (probes, sequence)) for y in (output, expected))
    for gradient, reference in zip(*pairs, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-12, atol=1e-13)


def test_large_numbers_in_padding_and_probes_stay_finite_in_float16():
    probes, sequence, valid = attended(2)
    probes, sequence = (100 * probes.detach().half()).requires_grad_(), (20 * sequence.detach().half()).requires_grad_()
    output = attend(probes, sequence, valid)
    output.sum().backward()
    assert all(x.isfinite().all() for x in (output, probes.grad, sequence.grad))
    assert not output[:, 1].any()


@pytest.mark.parametrize("views", [1, 2])
def test_first_and_second_derivatives_of_attend(views):
    probes, sequence, valid = attended(views, lengths=(2, 0, 3))
    assert torch.autograd.gradcheck(lambda p, s: attend(p, s, valid), (probes, sequence))
    assert torch.autograd.gradgradcheck(lambda p, s: attend(p, s, valid), (probes, sequence))


def test_attend_takes_operands_of_any_stride():
    probes, sequence, valid = attended(2)
    expected = attend(probes, sequence, valid)
    strided = [x.detach().transpose(0, 3).contiguous().transpose(0, 3).requires_grad_() for x in (probes, sequence)]
    output = attend(*strided, valid)
    assert torch.equal(output, expected)
    gradients = torch.autograd.grad(output.square().sum(), strided)
    for gradient, reference in zip(
        gradients, torch.autograd.grad(expected.square().sum(), (probes, sequence)), strict=True
    ):
        torch.testing.assert_close(gradient, reference, rtol=1e-12, atol=1e-13)


def test_attention_under_autocast():
    layer = ScenarioAwareAttention(4, 2, scenario_aware=True)
    inputs = [x.float().detach().requires_grad_() for x in attention_inputs(4, (3, 0, 2))[:4]]
    valid = attention_inputs(4, (3, 0, 2))[4]
    expected = both_attentions(layer, *inputs, valid)
    with torch.autocast("cpu", torch.bfloat16):
        output = both_attentions(layer, *inputs, valid)
    # The projections are rounded to the 8 bits of bfloat16.
    torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.02)
    output.float().square().sum().backward()
    assert all(x.grad.isfinite().all() for x in inputs)


def test_attention_without_local_part_has_no_local_parameters():
    names = {name for name, _ in ScenarioAwareAttention(4, 2, scenario_aware=False).named_parameters()}
    assert names == {"query_global.weight", "key_global.weight", "value.weight"}


# --- all features of a schema ---------------------------------------------------------------------------------------


def spec(name, kind="sparse", **options):
    return FeatureSpec(name=name, kind=kind, **options)


FEATURES = (
    spec("user", dim=3),
    spec("age", "dense"),
    spec("item", dim=4, scenario_aware=True),
    spec("tags", "multi", dim=5, scenario_aware=True, pooling="mean"),
    spec("words", "multi", dim=2, scenario_aware=True, pooling="sum"),
    spec("labels", "multi", dim=6),
    spec("history", "sequence", item="item", heads=2),
    spec("visited", "sequence", item="user", heads=3),
    spec("price", "dense"),
)
CATEGORICAL = ("user", "item", "tags", "words", "labels")


def schema_of(*features):
    return Schema(label="click", scenario="country", features=features)


def batch_of(schema, size=B, seed=0):
    """Random rows with every length from 0 on, so that some bags and sequences are empty."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randint(1, V, shape, generator=generator)

    features = {feature.name: draw(size) for feature in schema.of_kind("sparse")}
    for shift, feature in enumerate((*schema.of_kind("multi"), *schema.of_kind("sequence"))):
        lengths = (torch.arange(size) + shift) % 4
        features[feature.name] = draw(size, 3) * (torch.arange(3) < lengths[:, None])
    return {
        "scenario": torch.arange(size) % M,
        "label": torch.randint(2, (size,), generator=generator).float(),
        "dense": torch.randn(size, 2 * len(schema.of_kind("dense")), generator=generator),
        "features": features,
    }


def features_of(schema, **options):
    torch.manual_seed(0)
    sizes = {feature.name: V for kind in ("sparse", "multi") for feature in schema.of_kind(kind)}
    return trained(ScenarioAwareFeatures(schema, M, sizes, **options))


def columns(x):
    """Columns in an order that does not depend on that of the features."""
    return sorted(map(tuple, x.T.tolist()))


def assert_same_columns(x, y):
    assert x.shape == y.shape
    torch.testing.assert_close(torch.tensor(columns(x)), torch.tensor(columns(y)), rtol=1e-6, atol=1e-7)


def pooled(rows, bags, pooling):
    """rows(n, id) -> embedding; sum or mean over a bag's values, zeros for an empty bag."""
    outputs = []
    for n, bag in enumerate(bags.tolist()):
        values = [rows(n, value) for value in bag if value]
        total = torch.stack(values).sum(0) if values else torch.zeros_like(rows(0, 1))
        outputs.append(total / max(1, len(values)) if pooling == "mean" else total)
    return torch.stack(outputs)


def table_of(features, name):
    return features.embeddings[f"feature_{name}"]


@torch.no_grad()
def expected_parts(features, schema, batch):
    """Name of a feature -> what it adds to x_g, and to x_l."""
    scenario, ids = batch["scenario"].tolist(), batch["features"]
    to_global, to_local = {"dense": batch["dense"]}, {}
    for feature in (*schema.of_kind("sparse"), *schema.of_kind("multi")):
        table, pooling = table_of(features, feature.name), feature.pooling
        bags = ids[feature.name].view(len(scenario), -1)
        to_global[feature.name] = pooled(lambda n, i, t=table: t.global_table[i], bags, pooling)
        if feature.scenario_aware:
            to_local[feature.name] = pooled(lambda n, i, t=table: t.local_tables[scenario[n], i], bags, pooling)
    for feature in schema.of_kind("sequence"):
        table, layer = table_of(features, feature.item), features.attentions[f"feature_{feature.name}"]
        value = layer.value.weight
        global_rows, local_rows = [], []
        for n, own in enumerate(scenario):
            item, past = ids[feature.item][n], [i for i in ids[feature.name][n].tolist() if i]
            tables = table.global_table
            weights = (layer.query_global.weight, layer.key_global.weight, value)
            global_rows.append(naive_attention(*weights, tables[item], tables[past], tables[past], feature.heads))
            if feature.scenario_aware:
                local = table.local_tables[own]
                weights = (layer.query_local.weight, layer.key_local.weight, value)
                local_rows.append(naive_attention(*weights, local[item], local[past], tables[past], feature.heads))
        to_global[feature.name] = torch.stack(global_rows)
        if local_rows:
            to_local[feature.name] = torch.stack(local_rows)
    return to_global, to_local


def test_composition():
    schema = schema_of(*FEATURES)
    features, batch = features_of(schema), batch_of(schema)
    x_global, x_local = features(batch)
    to_global, to_local = expected_parts(features, schema, batch)
    assert set(to_global) == {"dense", *CATEGORICAL, "history", "visited"}
    assert set(to_local) == {"item", "tags", "words", "history"}
    assert_same_columns(x_global, torch.cat(list(to_global.values()), dim=1))
    assert_same_columns(x_local, torch.cat(list(to_local.values()), dim=1))


def test_widths():
    features = features_of(schema_of(*FEATURES))
    assert features.global_dim == 2 * 2 + (3 + 4 + 5 + 2 + 6) + (4 + 3)
    assert features.local_dim == (4 + 5 + 2) + 4
    x_global, x_local = features(batch_of(schema_of(*FEATURES), size=5))
    assert x_global.shape == (5, features.global_dim)
    assert x_local.shape == (5, features.local_dim)


@pytest.mark.parametrize("pooling", ["mean", "sum"])
def test_empty_bags_give_zeros_and_finite_gradients(pooling):
    schema = schema_of(spec("tags", "multi", dim=4, scenario_aware=True, pooling=pooling))
    features = features_of(schema)
    batch = batch_of(schema, size=3) | {"features": {"tags": torch.tensor([[0, 0], [3, 3], [0, 0]])}}
    outputs = features(batch)
    for x in outputs:
        assert not x[[0, 2]].any()
        assert x[1].all()
    torch.cat(outputs, dim=1).sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in features.parameters())


@pytest.mark.parametrize(("pooling", "factor"), [("mean", 1), ("sum", 3)])
def test_pooling_of_equal_values(pooling, factor):
    schema = schema_of(spec("tags", "multi", dim=4, scenario_aware=True, pooling=pooling))
    features = features_of(schema)
    batch = batch_of(schema, size=1) | {"features": {"tags": torch.tensor([[5, 5, 5, 0]])}}
    table = table_of(features, "tags")
    for x, row in zip(features(batch), (table.global_table[5], table.local_tables[0, 5]), strict=True):
        torch.testing.assert_close(x[0], factor * row)


@pytest.mark.parametrize("own", range(M))
def test_a_scenario_trains_its_own_local_tables_alone(own):
    schema = schema_of(*FEATURES)
    features = features_of(schema)
    batch = batch_of(schema) | {"scenario": torch.full((B,), own)}
    x_global, x_local = features(batch)
    (x_global.square().sum() + x_local.square().sum()).backward()
    for name in ("item", "tags", "words"):
        of_global, gradient = gradients_of(table_of(features, name))
        assert not of_global[0].any()
        assert gradient[own].any()
        assert not gradient[[k for k in range(M) if k != own]].any()
        assert not gradient[:, 0].any()


def test_x_global_does_not_read_the_scenario():
    """The same row in another scenario: another x_l, the same x_g."""
    schema = schema_of(*FEATURES)
    features, batch = features_of(schema), batch_of(schema)
    x_global, x_local = features(batch)
    moved_global, moved_local = features(batch | {"scenario": (batch["scenario"] + 1) % M})
    assert torch.equal(x_global, moved_global)
    assert not torch.equal(x_local, moved_local)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "features",
    [
        (spec("user", dim=3), spec("age", "dense"), spec("tags", "multi", dim=5)),
        (spec("user", dim=4), spec("seen", "sequence", item="user")),
        (spec("age", "dense"),),
    ],
    ids=["mixed", "sequence", "dense only"],
)
def test_without_scenario_aware_features(features, dtype):
    """x_l has width 0, and SAML still tells the scenarios apart and trains."""
    schema = schema_of(*features)
    sizes = {feature.name: V for kind in ("sparse", "multi") for feature in schema.of_kind(kind)}
    torch.manual_seed(0)
    model = SAML(schema, M, vocabulary_sizes=sizes, hidden_dims=(6, 4), branch_init="independent").to(dtype)
    trained(model)
    batch = batch_of(schema)
    x_global, x_local = model.features(batch)
    assert model.features.local_dim == 0
    assert x_local.shape == (B, 0)
    assert x_global.shape == (B, model.features.global_dim)
    model.loss(batch).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    moved = model(batch | {"scenario": (batch["scenario"] + 1) % M})
    assert (model(batch).logit != moved.logit).all()


def test_local_false_builds_no_local_tables():
    schema = schema_of(*FEATURES)
    whole, features = features_of(schema), features_of(schema, local=False)
    assert {name for name, _ in features.named_parameters()} == {n for n in whole.state_dict() if "local" not in n}
    of_global = {n: w[:V] if n.endswith("table.weight") else w for n, w in whole.state_dict().items()}
    features.load_state_dict(of_global, strict=False)
    x_global, x_local = features(batch_of(schema))
    assert features.local_dim == 0
    assert x_local.shape == (B, 0)
    assert torch.equal(x_global, whole(batch_of(schema))[0])


def test_dropout_only_in_training_mode():
    schema = schema_of(*FEATURES)
    features, batch = features_of(schema, dropout=0.5), batch_of(schema)
    features.eval()
    kept = features(batch)
    assert all(torch.equal(a, b) for a, b in zip(kept, features(batch), strict=True))
    features.train()
    for dropped, whole in zip(features(batch), kept, strict=True):
        gone = (dropped == 0) & (whole != 0)
        assert 0.2 < gone.float().mean() < 0.8
        torch.testing.assert_close(dropped[~gone], 2 * whole[~gone])


@pytest.mark.parametrize("dropout", [-0.1, 1.0, math.nan])
def test_dropout_out_of_range(dropout):
    with pytest.raises(InputError, match=r"^dropout must lie in \[0, 1\), got"):
        ScenarioAwareFeatures(schema_of(spec("age", "dense")), M, {}, dropout)


@pytest.mark.parametrize(
    ("scenario", "message"),
    [
        (torch.tensor([0, 1, M]), r"scenario ids must lie in \[0, 3\), got 3"),
        (torch.tensor([0, -1, 1]), r"scenario ids must lie in \[0, 3\), got -1"),
        (torch.tensor([0.0, 1.0, 2.0]), r"scenario must be \(B,\) int64, got \(3,\) torch.float32"),
        (torch.tensor([0, 1, 2], dtype=torch.int32), r"scenario must be \(B,\) int64, got \(3,\) torch.int32"),
        (torch.tensor([[0], [1], [2]]), r"scenario must be \(B,\) int64, got \(3, 1\) torch.int64"),
        (torch.tensor(1), r"scenario must be \(B,\) int64, got \(\) torch.int64"),
    ],
)
def test_bad_scenario_ids(scenario, message):
    schema = schema_of(*FEATURES)
    features, batch = features_of(schema), batch_of(schema, size=3)
    with pytest.raises(InputError, match=f"^{message}$"):
        features(batch | {"scenario": scenario})


def test_empty_batch():
    schema = schema_of(*FEATURES)
    x_global, x_local = (features := features_of(schema))(batch_of(schema, size=0))
    assert x_global.shape == (0, features.global_dim)
    assert x_local.shape == (0, features.local_dim)


ODD_NAMES = ("a.b", "a%2Eb", "a%b", "a%25b", "global table", "ключ", "forward", "training")


def test_odd_names_stay_distinct():
    """Dots are no module names, and an escape must not make two names one."""
    schema = schema_of(*(spec(name, dim=2 + i, scenario_aware=True) for i, name in enumerate(ODD_NAMES)))
    features = features_of(schema)
    assert len(features.embeddings) == len(ODD_NAMES)
    x_global, x_local = features(batch_of(schema))
    assert x_global.shape[1] == x_local.shape[1] == sum(range(2, 2 + len(ODD_NAMES)))
    other = copy.deepcopy(features)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(features.state_dict())
    assert torch.equal(other(batch_of(schema))[0], x_global)


def test_odd_names_of_sequences():
    schema = schema_of(spec("i.d", dim=4, scenario_aware=True), spec("p.a%st", "sequence", item="i.d"))
    x_global, x_local = features_of(schema)(batch_of(schema))
    assert x_global.shape == x_local.shape == (B, 8)
