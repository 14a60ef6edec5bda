"""Layers and the models made of them, each also in plain PyTorch, written once for two ways to run towers.

A way decides what a *stream* is: of :class:`Grouped` a list, the rows of every scenario for themselves; of
:class:`EveryTower` (M, B, width), all rows through what every scenario has, of which the own is picked at the end, as
public code does. Formulas are those of docs/computation.md.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from saml_kernels.layers import (
    STARMLP,
    GatedTowers,
    GateUnit,
    GroupedMLP,
    MixtureOfExperts,
    ProgressiveExperts,
    ScoreMixture,
)

EXPERTS: Final = 4
"""Of MMoE and HMoE; PLE has one for each scenario and a shared one."""
DOMAIN_DIM: Final = 16
"""Width of PEPNet's domain prior."""
PRIOR_DIM: Final = 64
"""Width of PEPNet's other priors together."""
GATE_DIM: Final = 64
"""Hidden width of PEPNet's gates."""

Tensors = Sequence[Tensor]


@dataclass(frozen=True)
class Cell:
    """One layer's shapes."""

    layer: str
    B: int
    M: int
    in_dim: int
    hidden_dims: tuple[int, ...]


class Grouped:
    """Rows sorted by scenario, once; each scenario's rows through what is its own. A stream is a list of M parts."""

    picks = False

    def __init__(self, scenario: Tensor, num_scenarios: int) -> None:
        self.scenario, self.permutation = torch.sort(scenario, stable=True)
        self.sizes = torch.bincount(scenario, minlength=num_scenarios).tolist()

    def rows(self, x: Tensor) -> Tensor:
        """x (B, …) in the order in which this way has rows."""
        return x[self.permutation]

    def split(self, x: Tensor) -> Any:
        """Such rows as a stream."""
        return list(x.split(self.sizes))

    def leave(self, streams: Any) -> Tensor:
        """Every row's own of a stream, in the caller's order."""
        return torch.cat(streams)[torch.argsort(self.permutation)]

    def each(self, function: Callable[..., Tensor], *streams: Any) -> Any:
        """An elementwise function of streams."""
        return [function(*parts) for parts in zip(*streams, strict=True)]

    def relu(self, x: Any) -> Any:
        """Of a stream, or of rows (…, B, width)."""
        return self.each(torch.relu, x) if isinstance(x, list) else x.relu()

    def linear(self, streams: Any, weight: Tensor, bias: Tensor) -> Any:
        """Every scenario's layer on its stream; weight (M, K, N), bias (M, N)."""
        parts = zip(streams, weight.unbind(0), bias.unbind(0), strict=True)
        return [torch.addmm(b, part, w) for part, w, b in parts]

    def own(self, outputs: Tensor) -> Any:
        """Outputs (B, M, d) of rows as the stream of scenarios' own."""
        return [part[:, k] for k, part in enumerate(outputs.split(self.sizes))]

    def mix(self, logits: Any, outputs: Tensor) -> Any:
        """Σ_e softmax(logits)_e E_e with a stream of logits (…, E) and outputs (B, E, d) of rows."""
        return self.each(
            lambda each, part: torch.bmm(torch.softmax(each, 1).unsqueeze(1), part).squeeze(1),
            logits,
            outputs.split(self.sizes),
        )


class EveryTower:
    """All rows through what every scenario has, as batched products; the own is picked last. A stream is (M, B, …)."""

    picks = True

    def __init__(self, scenario: Tensor, num_scenarios: int) -> None:
        self.scenario, self.num_scenarios = scenario, num_scenarios

    def rows(self, x: Tensor) -> Tensor:
        return x

    def split(self, x: Tensor) -> Any:
        return x.expand(self.num_scenarios, *x.shape)

    def leave(self, streams: Any) -> Tensor:
        own: Tensor = streams.transpose(0, 1)[torch.arange(len(self.scenario)), self.scenario]
        return own

    def each(self, function: Callable[..., Tensor], *streams: Any) -> Any:
        return function(*streams)

    def relu(self, x: Any) -> Any:
        return x.relu()

    def linear(self, streams: Any, weight: Tensor, bias: Tensor) -> Any:
        return torch.baddbmm(bias.unsqueeze(1), streams, weight)

    def own(self, outputs: Tensor) -> Any:
        return outputs.transpose(0, 1)

    def mix(self, logits: Any, outputs: Tensor) -> Any:
        return torch.einsum("mbe,bed->mbd", torch.softmax(logits, 2), outputs)


class Margins(Grouped):
    """Grouped, and the smallest |z| at a relu that a row's gradient passes, (B,) in the caller's order."""

    def __init__(self, scenario: Tensor, num_scenarios: int) -> None:
        super().__init__(scenario, num_scenarios)
        self.smallest = torch.full(scenario.shape, torch.inf, dtype=torch.float64)

    def relu(self, x: Any) -> Any:
        rows = torch.cat(x) if isinstance(x, list) else x
        if rows.requires_grad:
            nearest = rows.detach().abs().movedim(-2, 0).flatten(1).amin(1)
            self.smallest[self.permutation] = self.smallest[self.permutation].minimum(nearest)
        return super().relu(x)


Way = Grouped | EveryTower


def towers(way: Way, streams: Any, weights: Tensors, biases: Tensors, last_relu: bool = False) -> Any:
    """A stream through every scenario's layers, relu between them."""
    last = len(weights) - 1
    for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        streams = way.linear(streams, weight, bias)
        streams = streams if index == last and not last_relu else way.relu(streams)
    return streams


def experts(way: Way, x: Tensor, weights: Tensors, biases: Tensors) -> Tensor:
    """All experts on all rows: (B, E, d)."""
    streams = x.expand(len(weights[0]), -1, -1)
    for weight, bias in zip(weights, biases, strict=True):
        streams = way.relu(torch.baddbmm(bias.reshape(len(weight), 1, -1), streams, weight))
    return streams.transpose(0, 1)


def plain_towers(layer: GroupedMLP, inputs: Tensors, way: Way) -> Tensor:
    return way.leave(towers(way, way.split(way.rows(inputs[0])), *parameters(layer)))


def plain_star(layer: STARMLP, inputs: Tensors, way: Way) -> Tensor:
    weights = [own * shared for own, shared in zip(layer.weights, layer.shared_weights, strict=True)]
    biases = [own + shared for own, shared in zip(layer.biases, layer.shared_biases, strict=True)]
    return way.leave(towers(way, way.split(way.rows(inputs[0])), weights, biases))


class MMoE(nn.Module):
    """Experts, a gate and a tower for each scenario."""

    def __init__(self, cell: Cell, backend: str) -> None:
        super().__init__()
        *widths, last = cell.hidden_dims
        self.bottom = MixtureOfExperts(EXPERTS, cell.in_dim, widths, cell.M, backend=backend)
        self.towers = GroupedMLP(cell.M, widths[-1], (last, 1), output_activation="identity", backend=backend)

    def forward(self, x: Tensor, scenario: Tensor) -> Tensor:
        """(B, 1)."""
        return self.towers(self.bottom(x, scenario), scenario)


def plain_mmoe(model: MMoE, inputs: Tensors, way: Way) -> Tensor:
    x, bottom = way.rows(inputs[0]), model.bottom
    outputs = experts(way, x, *parameters(bottom))
    mixed = way.mix(towers(way, way.split(x), *parameters(bottom.gate)), outputs)
    return way.leave(towers(way, mixed, *parameters(model.towers)))


class HMoE(nn.Module):
    """Experts under a gate for each scenario, whose views all scenarios' networks score."""

    def __init__(self, cell: Cell, backend: str) -> None:
        super().__init__()
        *widths, last = cell.hidden_dims
        self.bottom = MixtureOfExperts(EXPERTS, cell.in_dim, widths, cell.M, backend=backend)
        self.mixture = ScoreMixture(cell.M, widths[-1], (last,), backend=backend, weight_dim=cell.in_dim)

    def forward(self, x: Tensor, scenario: Tensor) -> Tensor:
        """(B,)."""
        return self.mixture(self.bottom.views(x, scenario), scenario, weight_input=x)


def plain_hmoe(model: HMoE, inputs: Tensors, way: Way) -> Tensor:
    """In training the foreign scores of :class:`Grouped` leave no graph; the own one is computed with one.

    The logit is 2 artanh Σ W_tj tanh(s_j / 2), as near 1/2 the difference of logarithms cancels.
    """
    x, bottom = way.rows(inputs[0]), model.bottom
    outputs, gates, networks = experts(way, x, *parameters(bottom)), parameters(bottom.gate), model.mixture.networks
    everyone = EveryTower(way.scenario, networks.num_scenarios)
    with torch.set_grad_enabled(torch.is_grad_enabled() and way.picks):
        views = everyone.mix(towers(everyone, everyone.split(x), *gates), outputs)
        scores = towers(everyone, views, *parameters(networks)).squeeze(2).t()
    if torch.is_grad_enabled():
        t = way.scenario.unsqueeze(1)
        if way.picks:
            own = scores.gather(1, t)
        else:
            mixed = way.mix(towers(way, way.split(x), *gates), outputs)
            own = torch.cat(towers(way, mixed, *parameters(networks)))
        scores = scores.detach().scatter(1, t, own)
    weights = towers(way, way.split(x), *parameters(model.mixture.weight_networks))
    tilt = way.each(lambda w, s: (torch.softmax(w, -1) * torch.tanh(s / 2)).sum(-1), weights, way.split(scores))
    return 2 * torch.atanh(way.leave(tilt))


class PEPNet(nn.Module):
    """EPNet on x, then gated towers."""

    def __init__(self, cell: Cell, backend: str) -> None:
        super().__init__()
        self.epnet = GateUnit(DOMAIN_DIM + cell.in_dim, GATE_DIM, cell.in_dim, backend=backend)
        self.ppnet = GatedTowers(
            cell.M,
            cell.in_dim,
            PRIOR_DIM,
            (*cell.hidden_dims, 1),
            GATE_DIM,
            output_activation="identity",
            backend=backend,
        )

    def forward(self, x: Tensor, domain: Tensor, priors: Tensor, scenario: Tensor) -> Tensor:
        """(B, 1)."""
        x = self.epnet(torch.cat([domain, x.detach()], dim=1), x)
        return self.ppnet(x, priors, scenario)


def plain_pepnet(model: PEPNet, inputs: Tensors, way: Way) -> Tensor:
    x, domain, priors = map(way.rows, inputs)
    (U, V), (u, v) = parameters(model.epnet.network)
    hidden = way.relu(torch.addmm(u[0], torch.cat([domain, x.detach()], dim=1), U[0]))
    x = model.epnet.scale * torch.sigmoid(torch.addmm(v[0], hidden, V[0])) * x
    read = way.split(torch.cat([priors, x.detach()], dim=1))
    streams = way.split(x)
    ppnet = model.ppnet
    # The gates' first layers side by side, as they all read the same.
    hidden = towers(way, read, *parameters(ppnet.gate_inputs), last_relu=True)
    layers = list(zip(ppnet.gate_outputs, *parameters(ppnet.towers), strict=True))
    for index, (gate, weight, bias) in enumerate(layers):
        columns = slice(index * GATE_DIM, (index + 1) * GATE_DIM)
        z = towers(way, way.each(lambda h, columns=columns: h[..., columns], hidden), *parameters(gate))
        streams = way.each(lambda z, h: ppnet.scale * torch.sigmoid(z) * h, z, streams)
        streams = towers(way, streams, [weight], [bias], last_relu=index < len(layers) - 1)
    return way.leave(streams)


class PLE(nn.Module):
    """Levels of experts, a tower for each scenario."""

    def __init__(self, cell: Cell, backend: str, levels: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.experts = ProgressiveExperts(cell.M, cell.in_dim, levels, backend=backend)
        *_, width, last = cell.hidden_dims
        self.towers = GroupedMLP(cell.M, width, (last, 1), output_activation="identity", backend=backend)

    def forward(self, x: Tensor, scenario: Tensor) -> Tensor:
        """(B, 1)."""
        return self.towers(self.experts(x, scenario), scenario)


def plain_ple(model: PLE, inputs: Tensors, way: Way) -> Tensor:
    """With up to two levels, one expert for each scenario and a shared one."""
    shared = way.rows(inputs[0])
    streams = way.split(shared)
    levels: list[Any] = list(model.experts.levels)
    for level in levels:
        logits = towers(way, streams, *parameters(level.gate))
        common = experts(way, shared, *parameters(level.shared_experts))
        if level is levels[-1]:
            own = towers(way, streams, *parameters(level.own_experts), last_relu=True)
        else:
            # All experts, for the shared stream; at the first level they all read x.
            every = experts(way, shared, *parameters(level.own_experts))
            own = way.own(every)
            share = torch.softmax(level.shared_gate(shared), 1).unsqueeze(1)
            shared = torch.bmm(share, torch.cat([every, common], 1)).squeeze(1)
        streams = way.each(_mix_two, logits, own, way.split(common))
    return way.leave(towers(way, streams, *parameters(model.towers)))


def _mix_two(logits: Tensor, own: Tensor, common: Tensor) -> Tensor:
    shares = torch.softmax(logits, -1)
    return shares[..., :1] * own + shares[..., 1:] * common.squeeze(-2)


def parameters(layer: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and biases, layer by layer."""
    return list(layer.weights), list(layer.biases)


@dataclass(frozen=True)
class Kind:
    """A layer or model, and how plain PyTorch gets from its parameters to its output."""

    make: Callable[[Cell, str], nn.Module]
    """For a cell and a backend; forward takes the inputs and the scenarios."""
    plain: Callable[[Any, Tensors, Any], Tensor]
    first_columns: Callable[[Cell], int]
    """Columns of the first layer that a row is multiplied with."""
    scenarios: tuple[int, ...] = (8,)
    """M's it is timed at."""
    more_inputs: tuple[int, ...] = ()
    """Widths of what it reads besides x."""


def _mlp(layer: Any) -> Callable[[Cell, str], nn.Module]:
    """A layer of towers that end in a logit."""

    def make(cell: Cell, backend: str) -> nn.Module:
        module: nn.Module = layer(
            cell.M, cell.in_dim, (*cell.hidden_dims, 1), output_activation="identity", backend=backend
        )
        return module

    return make


def _levels(cell: Cell, number: int) -> list[tuple[int, ...]]:
    """The experts' layers in one level, or each in a level of its own."""
    widths = cell.hidden_dims[:-1]
    return [widths] if number == 1 else [(width,) for width in widths]


KINDS: Final = {
    "towers (GroupedMLP)": Kind(_mlp(GroupedMLP), plain_towers, lambda cell: cell.hidden_dims[0], (8, 32)),
    "STAR (STARMLP)": Kind(_mlp(STARMLP), plain_star, lambda cell: cell.hidden_dims[0], (8, 32)),
    "HMoE": Kind(HMoE, plain_hmoe, lambda cell: EXPERTS * cell.hidden_dims[0], (8, 32)),
    "PEPNet": Kind(PEPNet, plain_pepnet, lambda cell: cell.hidden_dims[0], more_inputs=(DOMAIN_DIM, PRIOR_DIM)),
    "PLE, one level": Kind(
        lambda cell, backend: PLE(cell, backend, _levels(cell, 1)), plain_ple, lambda cell: 2 * cell.hidden_dims[0]
    ),
    "PLE, two levels": Kind(
        lambda cell, backend: PLE(cell, backend, _levels(cell, 2)),
        plain_ple,
        lambda cell: (cell.M + 1) * cell.hidden_dims[0],
    ),
    "MMoE": Kind(MMoE, plain_mmoe, lambda cell: EXPERTS * cell.hidden_dims[0]),
}
