"""From a batch to the trunk's inputs x_g and x_l: scenario-aware embedding and attention (SAML, arXiv 2012.08952).

Every sparse feature has one global table; a scenario-aware one has M local tables besides. x_g takes the normalised
dense features, all global embeddings and global attention; x_l the own scenario's local embeddings and local attention.

Ids: 0 is an empty cell or padding, whose embedding is the zero vector and is never trained; 1 is an unknown or rare
value, whose embedding starts at zero and is trained by rare values; values seen in training follow.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from saml_rec.data.schema import FeatureSpec, Schema
from saml_rec.errors import InputError
from saml_rec.models.attention import attend
from saml_rec.models.tables import look_up_all, make_table

PADDING_ID = 0
UNKNOWN_ID = 1
EMBEDDING_STD = 0.05
ROWS_AT_ONCE = 2**16
BRANCH_VIEWS = ("own", "each")

Batch = Mapping[str, Any]


class ScenarioAwareEmbedding(nn.Module):
    """A feature's global table and, if it is scenario-aware, its M local tables, as one table of rows.

    An id's global embedding is row id, its local one of scenario k row (1 + k) V + id. Empty cells read row 0 always.

    Args:
        num_scenarios: M.
        vocabulary_size: rows of one of them, V, the two reserved ids included.
        dim: width of an embedding.
        scenario_aware: whether there are local tables.
        feature: its name, by which its table may have a learning rate of its own.
        alike: whether all local tables start from the same numbers.
    """

    def __init__(
        self,
        num_scenarios: int,
        vocabulary_size: int,
        dim: int,
        scenario_aware: bool,
        feature: str = "",
        alike: bool = False,
    ) -> None:
        super().__init__()
        self.vocabulary_size = vocabulary_size
        self.alike = alike
        self.dim = dim
        self.num_local = num_scenarios if scenario_aware else 0
        self.table = make_table((1 + self.num_local) * vocabulary_size, dim, feature)
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
        size, count = self.vocabulary_size, self.num_local
        # Rows that are drawn, and where they go.
        local = (size, range(size, (1 + count) * size, size)) if self.alike else (count * size, (size,))
        for rows, starts in ((size, (0,)), local):
            done = 0
            # A part at a time, whole blocks of torch's random numbers: a process may have few of the rows.
            while done < rows and starts:
                part = rows - done if rows - done < 2 * ROWS_AT_ONCE else ROWS_AT_ONCE
                drawn = torch.empty(part, self.dim).normal_(std=EMBEDDING_STD)
                for start in starts:
                    self.table.fill(start + done, drawn)
                done += part
        for table in range(1 + self.num_local):
            self.table.fill(table * self.vocabulary_size, torch.zeros(UNKNOWN_ID + 1, self.dim))

    def rows(self, ids: Tensor, scenario: Tensor) -> Tensor:
        """ids (B, ...), scenario (B,) → their rows, (views, B, ...): global and, with local tables, own local ones."""
        if self.num_local == 0:
            return ids.unsqueeze(0)
        own_table = ((1 + scenario) * self.vocabulary_size).view(-1, *(1,) * (ids.dim() - 1))
        return torch.stack([ids, torch.where(ids == PADDING_ID, PADDING_ID, own_table + ids)])

    def forward(self, ids: Tensor, scenario: Tensor) -> Tensor:
        """ids (B, ...), scenario (B,) → (views, B, ..., dim): global and, with local tables, own local embeddings."""
        return self.table.look_up(self.rows(ids, scenario))

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

    def forward(self, item: Tensor, sequence: Tensor, valid: Tensor) -> Tensor:
        """Views (global, and local if there is one) of item and sequence → of the attention.

        Args:
            item: (views, B, dim).
            sequence: (views, B, T, dim).
            valid: (B, T) bool.

        Returns:
            (views, B, dim).
        """
        layers = [(self.query_global, self.key_global)]
        if self.query_local is not None and self.key_local is not None:
            layers.append((self.query_local, self.key_local))
        query, key = (torch.stack([layer.weight for layer in each]) for each in zip(*layers, strict=True))
        # Heads in front of the batch, (views, heads, B, ·), where their own projections act.
        query = (item @ query.mT).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        probes = (query / math.sqrt(query.shape[-1])) @ key.unflatten(1, (self.heads, -1))
        sums = attend(probes.transpose(1, 2), sequence, valid).transpose(1, 2)
        return (sums @ self.value.weight.unflatten(0, (self.heads, -1)).mT).transpose(1, 2).flatten(2)


class ScenarioAwareFeatures(nn.Module):
    """All features of a schema: a batch → x_g (B, global_dim), x_l (B, local_dim).

    With branch_views "each", x_l is (B, M, local_dim): view k reads scenario k's tables. The views of foreign scenarios
    are constants, for a row trains its own scenario's tables only.

    Args:
        schema: the features.
        num_scenarios: M.
        vocabulary_sizes: per sparse and multi-valued feature the rows of its tables.
        dropout: of both outputs; the views of a row lose the same features.
        local: False builds no local tables; x_l then has width 0.
        id_dropout: probability with which an id becomes the unknown one in training, so that the embedding of unknown
            values is trained.
        branch_views: "own" or "each".
        alike: whether a feature's local tables start from the same numbers.
    """

    def __init__(
        self,
        schema: Schema,
        num_scenarios: int,
        vocabulary_sizes: Mapping[str, int],
        dropout: float = 0.0,
        local: bool = True,
        id_dropout: float = 0.0,
        branch_views: str = "own",
        alike: bool = False,
    ) -> None:
        super().__init__()
        for name, probability in (("dropout", dropout), ("id_dropout", id_dropout)):
            if not 0 <= probability < 1:
                raise InputError(f"{name} must lie in [0, 1), got {probability}")
        if branch_views not in BRANCH_VIEWS:
            raise InputError(f"branch_views must be one of {', '.join(BRANCH_VIEWS)}, got {branch_views!r}")
        self.num_scenarios = num_scenarios
        self.id_dropout = id_dropout
        self.branch_views = branch_views
        self.embeddings = nn.ModuleDict()
        self.attentions = nn.ModuleDict()
        self.dropout = nn.Dropout(dropout)
        # A sequence with the item whose tables it reads.
        self._categorical: list[FeatureSpec] = [*schema.of_kind("sparse"), *schema.of_kind("multi")]
        self._sequences: list[tuple[FeatureSpec, FeatureSpec]] = []
        # Widths of what the features add, and of those that have local tables here.
        widths, local_widths = [2 * len(schema.of_kind("dense"))], []
        for feature in self._categorical:
            aware = local and feature.scenario_aware
            self.embeddings[_key(feature.name)] = ScenarioAwareEmbedding(
                num_scenarios, vocabulary_sizes[feature.name], feature.dim, aware, feature.name, alike
            )
            widths.append(feature.dim)
            local_widths += [feature.dim] * aware
        for feature in schema.of_kind("sequence"):
            assert feature.item is not None
            item = schema.feature(feature.item)
            aware = local and item.scenario_aware
            self.attentions[_key(feature.name)] = ScenarioAwareAttention(item.dim, feature.heads, aware)
            self._sequences.append((feature, item))
            widths.append(item.dim)
            local_widths += [item.dim] * aware
        self.global_dim, self.local_dim = sum(widths), sum(local_widths)
        self.global_widths = dict(
            zip(["", *(f.name for f in self._categorical), *(f.name for f, _ in self._sequences)], widths, strict=True)
        )
        # The sequences that read a feature's tables.
        self._sequences_of = {
            feature.name: [sequence.name for sequence, item in self._sequences if item is feature]
            for feature in self._categorical
        }

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """A batch as EncodedTable makes it → x_g, x_l. InputError for scenario ids that do not fit."""
        scenario: Tensor = batch["scenario"]
        check_scenario_ids(scenario, self.num_scenarios)
        ids = self._known_ids(batch["features"])
        x_global, x_local = self._views(ids, batch["dense"], scenario)
        if self.branch_views == "own":
            return self.dropout(x_global), self.dropout(x_local)
        rows = torch.arange(len(scenario), device=scenario.device)
        with torch.no_grad():
            every = [
                self._views(ids, batch["dense"], torch.full_like(scenario, k))[1] for k in range(self.num_scenarios)
            ]
        x_local = torch.stack(every, dim=1).index_put((rows, scenario), x_local)
        return self.dropout(x_global), x_local * self.dropout(torch.ones_like(x_local[:, :1]))

    def global_part(self, x_global: Tensor, features: Sequence[str]) -> Tensor:
        """Of x_g (B, global_dim) what single features gave, side by side, (B, sum of their widths)."""
        starts = dict(zip(self.global_widths, accumulate(self.global_widths.values(), initial=0), strict=False))
        parts = [x_global[:, starts[name] : starts[name] + self.global_widths[name]] for name in features]
        return torch.cat(parts, dim=1)

    def _known_ids(self, ids: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """In training some become unknown."""
        if not self.training or self.id_dropout == 0:
            return ids

        def dropped(each: Tensor) -> Tensor:
            chosen = torch.rand(each.shape, device=each.device) < self.id_dropout
            return each.masked_fill(chosen & (each != PADDING_ID), UNKNOWN_ID)

        return {name: dropped(each) for name, each in ids.items()}

    def _views(self, ids: Mapping[str, Tensor], dense: Tensor, scenario: Tensor) -> tuple[Tensor, Tensor]:
        """x_g and x_l from the tables of ``scenario``."""
        x_global: list[Tensor] = [dense]
        x_local: list[Tensor] = []

        def add(views: Tensor) -> None:
            """Views of one feature, (views, B, dim)."""
            of_global, *of_local = views.unbind()
            x_global.append(of_global)
            x_local.extend(of_local)

        wanted = []
        for feature in self._categorical:
            embedding = self.embeddings[_key(feature.name)]
            assert isinstance(embedding, ScenarioAwareEmbedding)
            names = [feature.name, *self._sequences_of[feature.name]]
            wanted.append((embedding.table, [embedding.rows(ids[name], scenario) for name in names]))
        found: dict[str, Tensor] = {}
        for feature, embeddings in zip(self._categorical, look_up_all(wanted), strict=True):
            found |= zip([feature.name, *self._sequences_of[feature.name]], embeddings, strict=True)
            embedded = found[feature.name]
            add(_POOLING[feature.pooling](embedded, ids[feature.name]) if feature.kind == "multi" else embedded)
        for feature, item in self._sequences:
            attention = self.attentions[_key(feature.name)]
            add(attention(found[item.name], found[feature.name], ids[feature.name] != PADDING_ID))
        empty = scenario.new_empty((scenario.shape[0], 0), dtype=x_global[0].dtype)
        return torch.cat(x_global, dim=1), torch.cat([empty, *x_local], dim=1)


def table_rows(schema: Schema, num_scenarios: int, vocabulary_sizes: Mapping[str, int]) -> int:
    """Rows of all tables together, of a model that has the local ones."""
    features = [*schema.of_kind("sparse"), *schema.of_kind("multi")]
    return sum(vocabulary_sizes[f.name] * (1 + num_scenarios * f.scenario_aware) for f in features)


def check_scenario_ids(scenario: Tensor, num_scenarios: int) -> None:
    """InputError unless ``scenario`` is (B,) int64 and, where reading it costs no wait, in [0, num_scenarios)."""
    if scenario.dtype != torch.int64 or scenario.dim() != 1:
        raise InputError(f"scenario must be (B,) int64, got {tuple(scenario.shape)} {scenario.dtype}")
    # Traced code has no numbers to read: there the layers' kernels check the ids.
    readable = scenario.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable and scenario.numel() > 0:
        low, high = (int(bound) for bound in scenario.aminmax())
        if low < 0 or high >= num_scenarios:
            raise InputError(f"scenario ids must lie in [0, {num_scenarios}), got {low if low < 0 else high}")


def _key(name: str) -> str:
    # Module names may not hold dots; the escape keeps distinct names distinct.
    return "feature_" + name.replace("%", "%25").replace(".", "%2E")


def _sum(embedding: Tensor, ids: Tensor) -> Tensor:
    return embedding.sum(dim=2)


def _mean(embedding: Tensor, ids: Tensor) -> Tensor:
    count = (ids != PADDING_ID).sum(dim=1, keepdim=True).clamp(min=1)
    return embedding.sum(dim=2) / count


_POOLING = {"sum": _sum, "mean": _mean}
