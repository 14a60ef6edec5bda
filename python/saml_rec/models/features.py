"""From a batch to the trunk's inputs x_g and x_l: scenario-aware embedding and attention (SAML, arXiv 2012.08952).

Every sparse feature has one global table; a scenario-aware one has M local tables besides. x_g takes the normalised
dense features, all global embeddings and global attention; x_l the own scenario's local embeddings and local attention.

Ids: 0 is an empty cell or padding, whose embedding is the zero vector and is never trained; 1 is an unknown or rare
value, whose embedding starts at zero and is trained by rare values; values seen in training follow.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from saml_rec.data.schema import FeatureSpec, Schema
from saml_rec.errors import InputError
from saml_rec.models.tables import make_table

PADDING_ID = 0
UNKNOWN_ID = 1
EMBEDDING_STD = 0.05

Batch = Mapping[str, Any]


class ScenarioAwareEmbedding(nn.Module):
    """A feature's global table and, if it is scenario-aware, its M local tables, as one table of rows.

    An id's global embedding is row id, its local one of scenario k row (1 + k) V + id. Empty cells read row 0 always.

    Args:
        num_scenarios: M.
        vocabulary_size: rows of one of them, V, the two reserved ids included.
        dim: width of an embedding.
        scenario_aware: whether there are local tables.
    """

    def __init__(self, num_scenarios: int, vocabulary_size: int, dim: int, scenario_aware: bool) -> None:
        super().__init__()
        self.vocabulary_size = vocabulary_size
        self.dim = dim
        self.num_local = num_scenarios if scenario_aware else 0
        self.table = make_table((1 + self.num_local) * vocabulary_size, dim)
        self.reset_parameters()

    @property
    def global_table(self) -> Tensor:
        """(V, dim), without gradient."""
        return self.table.rows[: self.vocabulary_size]

    @property
    def local_tables(self) -> Tensor | None:
        """(M, V, dim), without gradient."""
        if self.num_local == 0:
            return None
        return self.table.rows[self.vocabulary_size :].unflatten(0, (self.num_local, self.vocabulary_size))

    def reset_parameters(self) -> None:
        """Normal with standard deviation 0.05; zeros for empty cells and unknown values."""
        for table in (self.global_table, self.local_tables):
            if table is not None:
                nn.init.normal_(table, std=EMBEDDING_STD)
                table[..., : UNKNOWN_ID + 1, :] = 0

    def forward(self, ids: Tensor, scenario: Tensor) -> tuple[Tensor, Tensor | None]:
        """ids (B, n), scenario (B,) → global and own local embeddings, (B, n, dim) each; one look-up for both."""
        if self.num_local == 0:
            return self.table.look_up(ids), None
        own_table = (1 + scenario) * self.vocabulary_size
        local = torch.where(ids == PADDING_ID, PADDING_ID, own_table.unsqueeze(1) + ids)
        both = self.table.look_up(torch.cat([ids, local], dim=1))
        return both[:, : ids.shape[1]], both[:, ids.shape[1] :]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        # Runs of version 0.1 keep the tables apart.
        if f"{prefix}global_table" in state_dict:
            tables = [state_dict.pop(f"{prefix}global_table")]
            if (local := state_dict.pop(f"{prefix}local_tables", None)) is not None:
                tables.append(local.flatten(0, 1))
            state_dict[f"{prefix}table.weight"] = torch.cat(tables)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        return f"tables={1 + self.num_local}, vocabulary_size={self.vocabulary_size}, dim={self.dim}"


class ScenarioAwareAttention(nn.Module):
    """Multi-head attention of the target item over a behaviour sequence, global and local, with shared values.

        global: MultiHead(Q_g, K_g, V_g)      local: MultiHead(Q_l, K_l, V_g)

    Q_g and K_g project global embeddings, Q_l and K_l the own scenario's local embeddings; one pair of projections
    serves all scenarios, so that what is scenario-specific stays in the tables. The heads are concatenated without
    an output projection: the layer that reads them is linear. Positions that are not valid carry no weight, and a
    sequence without a valid one gives zeros.

    With one query a sample, both projections of the T positions fold into products with the sample's own vectors,
    which cost heads / dim as much and keep nothing of size (B, T, dim):

        ⟨Q_h x, K_h s_t⟩ = ⟨K_hᵀ Q_h x, s_t⟩      Σ_t α_t V_h s_t = V_h Σ_t α_t s_t

    Args:
        dim: width of the item's embedding, a multiple of ``heads``.
        heads: number of heads.
        scenario_aware: whether there is a local attention.
    """

    def __init__(self, dim: int, heads: int, scenario_aware: bool) -> None:
        super().__init__()
        self.heads = heads
        self.query_global = nn.Linear(dim, dim, bias=False)
        self.key_global = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.query_local = nn.Linear(dim, dim, bias=False) if scenario_aware else None
        self.key_local = nn.Linear(dim, dim, bias=False) if scenario_aware else None

    def global_attention(self, item: Tensor, sequence: Tensor, valid: Tensor) -> Tensor:
        """Global embeddings of item (B, dim) and sequence (B, T, dim), valid (B, T) bool → (B, dim)."""
        return self._attend(self.query_global(item), self.key_global, sequence, sequence, valid)

    def local_attention(
        self, item_local: Tensor, sequence_local: Tensor, sequence_global: Tensor, valid: Tensor
    ) -> Tensor:
        """Local embeddings of item and sequence, global ones of the sequence for the values → (B, dim)."""
        assert self.query_local is not None
        assert self.key_local is not None
        return self._attend(self.query_local(item_local), self.key_local, sequence_local, sequence_global, valid)

    def _attend(self, query: Tensor, key: nn.Linear, keys: Tensor, values: Tensor, valid: Tensor) -> Tensor:
        """query (B, dim), the inputs (B, T, dim) of the projections ``key`` and ``value`` → (B, dim)."""
        query = query.unflatten(-1, (self.heads, -1))
        key_weight, value_weight = (layer.weight.unflatten(0, (self.heads, -1)) for layer in (key, self.value))
        probe = torch.einsum("bhe,hed->bhd", query / math.sqrt(query.shape[-1]), key_weight)
        affinity = probe @ keys.mT
        # A finite fill keeps a row without valid positions free of NaN, in its gradient too.
        affinity = affinity.masked_fill(~valid.unsqueeze(1), torch.finfo(affinity.dtype).min)
        weight = torch.softmax(affinity, dim=-1) * valid.unsqueeze(1)
        return torch.einsum("bhd,hed->bhe", weight @ values, value_weight).flatten(1)


class ScenarioAwareFeatures(nn.Module):
    """All features of a schema: a batch → x_g (B, global_dim), x_l (B, local_dim).

    Args:
        schema: the features.
        num_scenarios: M.
        vocabulary_sizes: per sparse and multi-valued feature the rows of its tables.
        dropout: of both outputs.
        local: False builds no local tables; x_l then has width 0.
    """

    def __init__(
        self,
        schema: Schema,
        num_scenarios: int,
        vocabulary_sizes: Mapping[str, int],
        dropout: float = 0.0,
        local: bool = True,
    ) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise InputError(f"dropout must lie in [0, 1), got {dropout}")
        self.num_scenarios = num_scenarios
        self.embeddings = nn.ModuleDict()
        self.attentions = nn.ModuleDict()
        self.dropout = nn.Dropout(dropout)
        # With each feature, whether it has local tables here; with a sequence, its item.
        self._categorical: list[tuple[FeatureSpec, bool]] = []
        self._sequences: list[tuple[FeatureSpec, FeatureSpec, bool]] = []
        for feature in (*schema.of_kind("sparse"), *schema.of_kind("multi")):
            aware = local and feature.scenario_aware
            self.embeddings[_key(feature.name)] = ScenarioAwareEmbedding(
                num_scenarios, vocabulary_sizes[feature.name], feature.dim, aware
            )
            self._categorical.append((feature, aware))
        for feature in schema.of_kind("sequence"):
            assert feature.item is not None
            item = schema.feature(feature.item)
            aware = local and item.scenario_aware
            self.attentions[_key(feature.name)] = ScenarioAwareAttention(item.dim, feature.heads, aware)
            self._sequences.append((feature, item, aware))
        # The sequences that read a feature's tables.
        self._sequences_of = {
            feature.name: [sequence.name for sequence, item, _ in self._sequences if item is feature]
            for feature, _ in self._categorical
        }
        self.global_dim = (
            2 * len(schema.of_kind("dense"))
            + sum(feature.dim for feature, _ in self._categorical)
            + sum(item.dim for _, item, _ in self._sequences)
        )
        self.local_dim = sum(feature.dim for feature, aware in self._categorical if aware) + sum(
            item.dim for _, item, aware in self._sequences if aware
        )

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """A batch as EncodedTable makes it → x_g, x_l. InputError for scenario ids that do not fit."""
        scenario: Tensor = batch["scenario"]
        check_scenario_ids(scenario, self.num_scenarios)
        ids: Mapping[str, Tensor] = batch["features"]
        x_global, x_local = [batch["dense"]], []

        global_of: dict[str, Tensor] = {}
        local_of: dict[str, Tensor] = {}

        for feature, aware in self._categorical:
            pool = _POOLING[feature.pooling] if feature.kind == "multi" else _one
            values = ids[feature.name]
            names = [feature.name, *self._sequences_of[feature.name]]
            # In one look-up: the gradient of each may be as large as the table.
            columns = [ids[name] if ids[name].dim() == 2 else ids[name].unsqueeze(1) for name in names]
            found = self._table(feature.name)(columns[0] if len(columns) == 1 else torch.cat(columns, dim=1), scenario)
            widths = [column.shape[1] for column in columns]
            for of, embeddings in zip((global_of, local_of), found, strict=True):
                if embeddings is not None:
                    of.update(zip(names, embeddings.split(widths, dim=1), strict=True))
            x_global.append(pool(global_of[feature.name], values))
            if aware:
                x_local.append(pool(local_of[feature.name], values))

        for feature, item, aware in self._sequences:
            attention = self.attentions[_key(feature.name)]
            assert isinstance(attention, ScenarioAwareAttention)
            target, sequence = global_of[item.name].squeeze(1), global_of[feature.name]
            valid = ids[feature.name] != PADDING_ID
            x_global.append(attention.global_attention(target, sequence, valid))
            if aware:
                own_target = local_of[item.name].squeeze(1)
                x_local.append(attention.local_attention(own_target, local_of[feature.name], sequence, valid))
        empty = scenario.new_empty((scenario.shape[0], 0), dtype=x_global[0].dtype)
        return self.dropout(torch.cat(x_global, dim=1)), self.dropout(torch.cat([empty, *x_local], dim=1))

    def _table(self, name: str) -> ScenarioAwareEmbedding:
        table = self.embeddings[_key(name)]
        assert isinstance(table, ScenarioAwareEmbedding)
        return table


def table_rows(schema: Schema, num_scenarios: int, vocabulary_sizes: Mapping[str, int]) -> int:
    """Rows of all tables together, of a model that has the local ones."""
    features = [*schema.of_kind("sparse"), *schema.of_kind("multi")]
    return sum(vocabulary_sizes[f.name] * (1 + num_scenarios * f.scenario_aware) for f in features)


def check_scenario_ids(scenario: Tensor, num_scenarios: int) -> None:
    """InputError unless ``scenario`` is (B,) int64 and, where reading it costs no wait, in [0, num_scenarios)."""
    if scenario.dtype != torch.int64 or scenario.dim() != 1:
        raise InputError(f"scenario must be (B,) int64, got {tuple(scenario.shape)} {scenario.dtype}")
    if scenario.device.type == "cpu" and scenario.numel() > 0:
        low, high = (int(bound) for bound in scenario.aminmax())
        if low < 0 or high >= num_scenarios:
            raise InputError(f"scenario ids must lie in [0, {num_scenarios}), got {low if low < 0 else high}")


def _key(name: str) -> str:
    # Module names may not hold dots; the escape keeps distinct names distinct.
    return "feature_" + name.replace("%", "%25").replace(".", "%2E")


def _one(embedding: Tensor, ids: Tensor) -> Tensor:
    return embedding.squeeze(1)


def _sum(embedding: Tensor, ids: Tensor) -> Tensor:
    return embedding.sum(dim=1)


def _mean(embedding: Tensor, ids: Tensor) -> Tensor:
    count = (ids != PADDING_ID).sum(dim=1, keepdim=True).clamp(min=1)
    return embedding.sum(dim=1) / count


_POOLING = {"sum": _sum, "mean": _mean}
