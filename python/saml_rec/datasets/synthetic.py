"""Multi-scenario data with a planted relation between the scenarios, to see what a model recovers of it.

There are M scenarios, M base tastes, U users, I items and 12 tags. Item v carries a set G_v of one to three tags,
user u has a favourite tag f_u, and these are standard normal: the appeal a_jv of item v and c_jg of tag g to base
taste j, the user's leniency b_u, and the number x_n of row n:

    t_j(v)  = √0.6 a_jv + √0.4 Σ_{g∈G_v} c_jg / √|G_v|                        base taste j, variance 1 over items
    T_i(v)  = Σ_j R_ij t_j(v) / ‖R_i‖₂                                        taste of scenario i, variance 1
    logit_n = 1.2 T_i(v) + 0.6 b_u + 0.5 x_n + 1.2 [f_u ∈ G_v] − 0.8          i, u, v: scenario, user, item of row n
    label_n ~ Bernoulli(sigmoid(logit_n))

R (M, M) is the planted relation. Its rows sum to 1: R_ii = 0.5, and the other half is spread over j ≠ i by a
Dirichlet(0.3, .., 0.3) draw, which favours one or two relatives (M = 1: R = [[1]]). Two scenarios share taste as far as
⟨R_i, R_k⟩ / (‖R_i‖ ‖R_k‖) is large.

The relation "twin" is R = I but for the last scenario, whose taste is that of one other, drawn, and of no third: who
serves the last scenario can learn from its twin's rows, and from nobody else's.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from sklearn.metrics import log_loss, roc_auc_score

from saml_rec.datasets.behaviour import add_behaviour_sequence, last_liked
from saml_rec.datasets.output import make_directory
from saml_rec.errors import InputError
from saml_rec.files import replacing, write_json

TAGS = 12
MOST_TAGS = 3
OWN_TASTE = 0.5
RELATIVES = 0.3  # Dirichlet concentration of the other tastes
ITEM_SHARE = 0.6
WEIGHTS = {"taste": 1.2, "user": 0.6, "price": 0.5, "favourite_tag": 1.2, "constant": -0.8}
MISSING_PRICES = 0.05
HISTORY = 20
START = 1_704_067_200  # 2024-01-01, in seconds since 1970
LONGEST_GAP = 60  # seconds between two rows; some are 0
CHUNK_ROWS = 2**17
FEWEST_ROWS = 10  # of a scenario, so that a split by time leaves some for training

SCHEMA = f"""\
label = "label"
scenario = "scenario"
time = "timestamp"
group = "user_id"
split = [0.8, 0.1, 0.1]

[features.user_id]
kind = "sparse"
dim = 8

[features.item_id]
kind = "sparse"
scenario_aware = true
dim = 8

[features.tags]
kind = "multi"
scenario_aware = true
dim = 8

[features.price]
kind = "dense"

[features.history]
kind = "sequence"
item = "item_id"
max_length = {HISTORY}
"""


def write_synthetic(
    out_dir: str | Path,
    *,
    scenarios: int = 4,
    rows: int = 20_000,
    users: int = 400,
    items: int = 200,
    seed: int = 0,
    smallest_share: float | None = None,
    relation: str = "drawn",
) -> tuple[Path, Path, Path]:
    """Write ``synthetic.csv``, its schema ``synthetic.toml`` and what was planted, ``synthetic-relation.json``.

    The table has scenario (``s0``, ``s1``, ..), label, timestamp (whole seconds, some equal), user_id, item_id, tags,
    price (x_n, 5 % missing) and history (the last 20 items the user liked at a strictly earlier time), ordered by time.
    Scenario k gets a share of the rows proportional to 1 / (k + 1). Users and items are drawn with probabilities
    proportional to 1 / √rank. The JSON holds the relation R, the rows and base rates of the scenarios, and the AUC and
    logloss of the true probabilities (which know the missing prices too): no model can be expected to beat them.

    Args:
        out_dir: made where it is missing; each file is replaced as a whole.
        scenarios: M.
        rows: in all.
        users, items: how many there are to draw from.
        seed: the same seed and sizes give the same files.
        smallest_share: share of the last scenario, at most 1 / M; the other shares keep their proportions.
        relation: "drawn" or "twin", which needs two scenarios.

    Returns:
        The paths of the table, the schema and the JSON.

    Raises:
        InputError: a size out of range, a scenario with fewer than 10 rows, or a directory that cannot be written to.
    """
    counts = _scenario_rows(scenarios, rows, smallest_share)
    for name, value in (("users", users), ("items", items)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, not {value}")
    if seed < 0:
        raise InputError(f"seed must be 0 or more, not {seed}")
    if relation not in RELATIONS:
        raise InputError(f"relation must be one of {', '.join(RELATIONS)}, not {relation!r}")
    if relation == "twin" and scenarios < 2:
        raise InputError(f"relation twin needs at least 2 scenarios, not {scenarios}")
    out = make_directory(out_dir)
    rng = np.random.default_rng(seed)
    rows_drawn = _draw(counts, users, items, RELATIONS[relation](scenarios, rng), rng)
    data_path, schema_path, relation_path = (
        out / name for name in ("synthetic.csv", "synthetic.toml", "synthetic-relation.json")
    )
    with replacing(data_path) as file:
        for number, chunk in enumerate(_chunks(rows_drawn)):
            chunk.write_csv(file, include_header=number == 0)
    with replacing(schema_path) as file:
        file.write(SCHEMA.encode())
    planted = _planted(rows_drawn)
    write_json(relation_path, {"seed": seed, "users": users, "items": items, **planted})
    return data_path, schema_path, relation_path


def _scenario_rows(scenarios: int, rows: int, smallest_share: float | None) -> np.ndarray:
    if scenarios < 1:
        raise InputError(f"scenarios must be at least 1, not {scenarios}")
    shares = 1 / np.arange(1, scenarios + 1)
    shares /= shares.sum()
    if smallest_share is not None:
        if not 0 < smallest_share <= 1 / scenarios:
            raise InputError(f"smallest_share must lie in (0, {1 / scenarios:g}], not {smallest_share}")
        shares[:-1] *= (1 - smallest_share) / (1 - shares[-1]) if scenarios > 1 else 1
        shares[-1] = smallest_share
    counts = np.diff(np.rint(np.cumsum(shares) * rows).astype(np.int64), prepend=0)
    if counts.min() < FEWEST_ROWS:
        raise InputError(
            f"{rows} rows give the smallest of {scenarios} scenarios {counts.min()}; at least {FEWEST_ROWS} are needed"
        )
    return counts


def _relation(scenarios: int, rng: np.random.Generator) -> np.ndarray:
    if scenarios == 1:
        return np.ones((1, 1))
    relation = np.eye(scenarios) * OWN_TASTE
    relation[~np.eye(scenarios, dtype=bool)] = (
        (1 - OWN_TASTE) * rng.dirichlet(np.full(scenarios - 1, RELATIVES), size=scenarios)
    ).ravel()
    return relation


def _twins(scenarios: int, rng: np.random.Generator) -> np.ndarray:
    relation = np.eye(scenarios)
    relation[-1] = relation[rng.integers(scenarios - 1)]
    return relation


RELATIONS = {"drawn": _relation, "twin": _twins}


@dataclass(frozen=True)
class _Drawn:
    """All rows as numbers, in types as narrow as they may be: 38 bytes a row. Strings are made a chunk at a time.

    Attributes:
        relation: R.
        scenario, user, item: (rows,) indices.
        price, probability: (rows,).
        is_missing, label: (rows,) bool.
        timestamp: (rows,) seconds since 1970.
        users, items: how many there are.
        has_tag: (items, TAGS) bool.
    """

    relation: NDArray[np.float64]
    scenario: NDArray[np.integer]
    user: NDArray[np.integer]
    item: NDArray[np.integer]
    price: NDArray[np.float64]
    probability: NDArray[np.float64]
    is_missing: NDArray[np.bool_]
    label: NDArray[np.bool_]
    timestamp: NDArray[np.int64]
    users: int
    items: int
    has_tag: NDArray[np.bool_]

    @property
    def scenario_names(self) -> list[str]:
        return _names("s", len(self.relation))


def _draw(counts: np.ndarray, users: int, items: int, relation: np.ndarray, rng: np.random.Generator) -> _Drawn:
    scenarios, rows = len(counts), int(counts.sum())
    has_tag = rng.random((items, TAGS)).argsort(axis=1) < rng.integers(1, MOST_TAGS + 1, items)[:, None]
    tag_appeal = rng.standard_normal((scenarios, TAGS)) @ (has_tag / np.sqrt(has_tag.sum(axis=1, keepdims=True))).T
    base_taste = np.sqrt(ITEM_SHARE) * rng.standard_normal((scenarios, items)) + np.sqrt(1 - ITEM_SHARE) * tag_appeal
    taste = relation @ base_taste / np.linalg.norm(relation, axis=1, keepdims=True)
    leniency = rng.standard_normal(users)
    favourite = rng.integers(0, TAGS, users)

    scenario = rng.permutation(np.repeat(np.arange(scenarios, dtype=np.int32), counts))
    user = _popular(users, rows, rng)
    item = _popular(items, rows, rng)
    price = rng.standard_normal(rows)
    probability = np.empty(rows)
    for start in range(0, rows, CHUNK_ROWS):
        part = slice(start, start + CHUNK_ROWS)
        logit = (
            WEIGHTS["taste"] * taste[scenario[part], item[part]]
            + WEIGHTS["user"] * leniency[user[part]]
            + WEIGHTS["price"] * price[part]
            + WEIGHTS["favourite_tag"] * has_tag[item[part], favourite[user[part]]]
            + WEIGHTS["constant"]
        )
        probability[part] = 1 / (1 + np.exp(-logit))
    label = rng.random(rows) < probability
    gaps = rng.integers(0, LONGEST_GAP + 1, rows)
    timestamp = (START + np.cumsum(gaps, out=gaps)).astype(np.int64)
    is_missing = rng.random(rows) < MISSING_PRICES
    return _Drawn(
        relation, scenario, user, item, price, probability, is_missing, label, timestamp, users, items, has_tag
    )


def _chunks(drawn: _Drawn) -> Iterator[pl.DataFrame]:
    """The rows of the table in order."""
    scenario_names, user_names = (np.array(names) for names in (drawn.scenario_names, _names("u", drawn.users)))
    item_names, tag_names = (np.array(names) for names in (_names("i", drawn.items), _names("t", TAGS)))
    tags = np.array(["|".join(tag_names[has]) for has in drawn.has_tag])
    roles = {"user": "user", "item": "item", "time": "time", "label": "label"}
    # What later rows may still have in their history; numbers, for there may be a history of every user's.
    before: pl.DataFrame | None = None
    for start in range(0, len(drawn.label), CHUNK_ROWS):
        part = slice(start, start + CHUNK_ROWS)
        scenario, user, item = drawn.scenario[part], drawn.user[part], drawn.item[part]
        label, timestamp = drawn.label[part].astype(np.int8), drawn.timestamp[part]
        events = pl.DataFrame({"user": user, "item": item, "time": timestamp, "label": label})
        log = events if before is None else pl.concat([before, events])
        told = add_behaviour_sequence(
            log.join(events, on="user", how="semi", maintain_order="left"), **roles, last=HISTORY
        )
        yield pl.DataFrame(
            {
                "scenario": scenario_names[scenario],
                "label": label,
                "timestamp": timestamp,
                "user_id": user_names[user],
                "item_id": item_names[item],
                "tags": tags[item],
                "price": pl.Series(drawn.price[part].round(6)).set(pl.Series(drawn.is_missing[part]), None),
                "history": _joined_names(told["history"].tail(len(events)), "i", drawn.items),
            }
        )
        before = last_liked(log, **roles, last=HISTORY)


def _joined_names(lists: pl.Series, prefix: str, count: int) -> pl.Series:
    """Lists of indices → their names as _names gives them, joined by a bar."""
    name = prefix + pl.element().cast(pl.String).str.zfill(len(str(count - 1)))
    return lists.to_frame("history").select(pl.col("history").list.eval(name).list.join("|")).to_series()


def _planted(drawn: _Drawn) -> dict[str, Any]:
    return {
        "scenarios": drawn.scenario_names,
        "relation": drawn.relation.tolist(),
        "bayes": {
            "overall": _bayes(drawn.label, drawn.probability),
            "scenarios": {
                name: _bayes(drawn.label[drawn.scenario == index], drawn.probability[drawn.scenario == index])
                for index, name in enumerate(drawn.scenario_names)
            },
        },
    }


def _popular(count: int, rows: int, rng: np.random.Generator) -> np.ndarray:
    weight = 1 / np.sqrt(np.arange(1, count + 1))
    return rng.choice(count, size=rows, p=weight / weight.sum()).astype(np.int32)


def _names(prefix: str, count: int) -> list[str]:
    """Names of one width, so that their order as strings is that of their numbers."""
    width = len(str(count - 1))
    return [f"{prefix}{index:0{width}d}" for index in range(count)]


def _bayes(label: np.ndarray, probability: np.ndarray) -> dict[str, float | int | None]:
    """Measures of the true probabilities; the AUC of a single class does not exist."""
    has_both = 0 < label.sum() < len(label)
    return {
        "rows": len(label),
        "base_rate": float(label.mean()),
        "auc": float(roc_auc_score(label, probability)) if has_both else None,
        "logloss": float(log_loss(label, probability, labels=[0, 1])),
    }
