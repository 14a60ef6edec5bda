"""Scenario ids are names: relabelled with their parameters nothing changes, and another id is another score."""

from dataclasses import dataclass, field

import pytest
import torch
from layer_batches import TOLERANCE, B, D, M, batch, randomised
from problems import relative_error
from torch import nn

from saml_kernels.layers import (
    STARMLP,
    GatedTowers,
    GateUnit,
    GroupedMLP,
    MixtureOfExperts,
    MultiBranchMLP,
    MutualUnit,
    PartitionedNorm,
    ProgressiveExperts,
    ScoreMixture,
)

pytestmark = pytest.mark.cpu
WIDE = {"dtype": torch.float64}
NEW_LABELS = [2, 0, 1]


class HMoE(nn.Module):
    """Experts, views of them, and the mixture of their scores."""

    def __init__(self):
        super().__init__()
        self.bottom = MixtureOfExperts(4, D, (6, 3), M, **WIDE)
        self.mixture = ScoreMixture(M, 3, (4,), weight_dim=D, **WIDE)

    def forward(self, x, scenario):
        return self.mixture(self.bottom.views(x, scenario), scenario, weight_input=x)


class OwnBranch(nn.Module):
    """SAML's trunk: its own branch, as the auxiliary stream knows no scenario."""

    def __init__(self):
        super().__init__()
        self.trunk = MultiBranchMLP(M, D, 4, (6, 3), mutual_layers=(1, 2), **WIDE)

    def forward(self, x, x_global, scenario):
        return self.trunk(x, x_global, scenario).own


@dataclass(frozen=True)
class Case:
    """A layer, its inputs before the ids, and where its parameters and inputs are the scenarios'."""

    build: object
    inputs: tuple[tuple[int, ...], ...] = ((B, D),)
    shared: tuple[str, ...] = ()
    """Beginnings of names of parameters that are not the scenarios'; all others are, in dimension 0."""
    columns: tuple[str, ...] = ()
    """Beginnings of names whose last dimension is the scenarios' too."""
    first_rows: dict[str, int] = field(default_factory=dict)
    """Beginnings of names of which that many entries are the scenarios', the others shared."""
    views: bool = False
    """Dimension 1 of the input is the scenarios'."""


CASES = {
    "GroupedMLP": Case(lambda: GroupedMLP(M, D, (6, 2), output_activation="identity", **WIDE)),
    "STARMLP": Case(lambda: STARMLP(M, D, (6, 2), output_activation="identity", **WIDE), shared=("shared_",)),
    "PartitionedNorm": Case(lambda: PartitionedNorm(M, D, **WIDE), shared=("shared_",)),
    "MultiBranchMLP": Case(OwnBranch, ((B, D), (B, 4)), shared=("trunk.aux_",)),
    "MutualUnit": Case(lambda: MutualUnit(M, D, **WIDE), ((B, M, D),), views=True),
    "ScoreMixture": Case(lambda: ScoreMixture(M, D, (6,), **WIDE), columns=("weight_networks",)),
    "MixtureOfExperts": Case(lambda: MixtureOfExperts(4, D, (6, 2), M, **WIDE), shared=("weights", "biases")),
    "HMoE": Case(HMoE, shared=("bottom.weights", "bottom.biases"), columns=("mixture.weight_networks",)),
    "GateUnit": Case(lambda: GateUnit(4, 3, D, M, **WIDE), ((B, 4), (B, D))),
    "GatedTowers": Case(
        lambda: GatedTowers(M, D, 4, (6, 2), 3, output_activation="identity", **WIDE), ((B, D), (B, 4))
    ),
    "ProgressiveExperts, one level": Case(
        lambda: ProgressiveExperts(M, D, ((6, 3),), 2, 2, "tanh", **WIDE), shared=("levels.0.shared_experts",)
    ),
    "ProgressiveExperts, three levels": Case(
        lambda: ProgressiveExperts(M, D, ((4,), (3,), (2,)), 2, 1, "tanh", **WIDE),
        shared=tuple(f"levels.{level}.shared_experts" for level in range(3)),
        first_rows={f"levels.{level}.shared_gate": 2 * M for level in range(2)},
    ),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def inputs_of(case):
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in case.inputs]


def relabelled(tensor, dim=0, count=None):
    """What belonged to k belongs to NEW_LABELS[k]; of the first ``count`` entries, in M groups of the same size."""
    count = tensor.shape[dim] if count is None else count
    groups, rest = tensor.split([count, tensor.shape[dim] - count], dim)
    groups = groups.unflatten(dim, (M, -1))
    order = torch.tensor(NEW_LABELS).argsort()
    return torch.cat([groups.index_select(dim, order).flatten(dim, dim + 1), rest], dim)


@every_case
@pytest.mark.parametrize("training", [True, False])
def test_relabelled_scenarios_with_their_parameters_score_the_same(case, training):
    layer, twin = randomised(case.build()).train(training), case.build().train(training)
    state = {}
    for name, value in layer.state_dict().items():
        if not name.startswith(case.shared or "\0"):
            count = next((rows for start, rows in case.first_rows.items() if name.startswith(start)), None)
            value = relabelled(value, count=count)
        state[name] = relabelled(value, value.dim() - 1) if name.startswith(case.columns or "\0") else value
    twin.load_state_dict(state)
    inputs, scenario = inputs_of(case), batch()[1]
    out = layer(*inputs, scenario)
    moved = [relabelled(each, 1) if case.views else each for each in inputs]
    assert relative_error(twin(*moved, torch.tensor(NEW_LABELS)[scenario]), out) < TOLERANCE
    assert relative_error(layer(*inputs, torch.tensor(NEW_LABELS)[scenario]), out) > 1e-3, "the ids change nothing"


@every_case
def test_another_id_is_another_score(case):
    layer = randomised(case.build()).eval()
    inputs, scenario = inputs_of(case), batch()[1]
    out = layer(*inputs, scenario)
    for shift in range(1, M):
        changed = (layer(*inputs, (scenario + shift) % M) != out).reshape(B, -1).any(1)
        assert changed.all()


@every_case
def test_parameters_survive_a_round_trip(case):
    layer, twin = randomised(case.build()).eval(), case.build().eval()
    twin.load_state_dict(layer.state_dict())
    inputs, scenario = inputs_of(case), batch()[1]
    assert torch.equal(twin(*inputs, scenario), layer(*inputs, scenario))
