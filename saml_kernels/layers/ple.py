"""PLE's progressive extraction (RecSys 2020): levels of experts of the scenarios' own and of shared ones."""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from saml_kernels import checks, functional
from saml_kernels.layers.common import Layer, check_ids, check_widths, describe, entries, mix, reset_children, weigh
from saml_kernels.layers.grouped_mlp import GroupedMLP


class ProgressiveExperts(Layer):
    """Progressive layered extraction, its tasks being scenarios: at every level, with streams g_k and s (x at first),

        g_k ← mix(gate_k(g_k); own experts of k on g_k, shared experts on s)
        s   ← mix(gate_s(s); own experts of all scenarios k on g_k, shared experts on s)

    where mix(z; E) = Σ_e softmax(z)_e E_e. A row of scenario t gets g_t of the last level.

    The last level has no shared stream, so there a row runs through, and trains, its own scenario's experts and the
    shared ones only; with one level that is the whole layer (CGC). Before it all experts run for all rows, because the
    shared stream reads them all, and through it a row trains the experts of every scenario.

    Args:
        num_scenarios: M.
        in_dim: width of x.
        levels: per level the widths of an expert's layers, each followed by the activation.
        own_experts: of each scenario at every level.
        shared_experts: at every level.
        activation: of the experts.
        backend: as :func:`saml_kernels.grouped_mlp` and :func:`saml_kernels.expert_outputs`.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: options and sizes that cannot be used.
    """

    def __init__(
        self,
        num_scenarios: int,
        in_dim: int,
        levels: Sequence[Sequence[int]] = ((64,),),
        own_experts: int = 1,
        shared_experts: int = 1,
        activation: str = "relu",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_scenarios = checks.check_integer("num_scenarios", num_scenarios, 1)
        in_dim = checks.check_integer("in_dim", in_dim, 1)
        own_experts = checks.check_integer("own_experts", own_experts, 1)
        shared_experts = checks.check_integer("shared_experts", shared_experts, 1)
        if len(levels) == 0:
            raise ValueError("levels must name at least one level, got none")
        levels = [check_widths(f"level {number} of levels", widths) for number, widths in enumerate(levels, start=1)]
        self.num_scenarios = num_scenarios
        self.in_dim = in_dim
        self.own_experts = own_experts
        self.shared_experts = shared_experts
        self.backend = backend
        self.levels = nn.ModuleList()
        counts = num_scenarios, own_experts, shared_experts
        for number, widths in enumerate(levels, start=1):
            has_shared = number < len(levels)
            self.levels.append(_Level(*counts, in_dim, widths, activation, has_shared, backend, device, dtype))
            in_dim = widths[-1]

    def reset_parameters(self) -> None:
        """Fresh weights, from torch's global generator."""
        reset_children(self)

    def forward(self, x: Tensor, scenario: Tensor) -> Tensor:
        """x (B, in_dim), scenario (B,) → (B, d of the last level)."""
        checks.check_shape("x", x, ("B", self.in_dim))
        scenario = check_ids(scenario, self.num_scenarios)
        checks.check_shape("scenario", scenario, (x.shape[0],), " as x has B = {} rows", x.shape[0])
        levels: list[Any] = list(self.levels)
        last = levels[-1]
        # Of the streams g_k, one for all k where they are the same; the last level reads g_t alone.
        streams = own = shared = x
        for level, after in pairwise(levels):
            if after is last:
                own, shared = level.own_and_shared(streams, shared, scenario)
            else:
                streams, shared = level.all_and_shared(streams, shared)
        out: Tensor = last.own(own, shared, scenario)
        return out

    if TYPE_CHECKING:
        __call__ = forward

    def extra_repr(self) -> str:
        return describe(self, "num_scenarios in_dim own_experts shared_experts backend")


class _Level(Layer):
    """Experts and gates of one level.

    Streams g_k are (B, d), the same one for all k, or (B, M, d). Own experts lie scenario by scenario: expert e of
    scenario k is tower k n + e of ``own_experts``, n of them to a scenario.
    """

    def __init__(
        self,
        num_scenarios: int,
        own_experts: int,
        shared_experts: int,
        in_dim: int,
        widths: Sequence[int],
        activation: str,
        has_shared_stream: bool,
        backend: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()

        def towers(count: int, widths: Sequence[int], activation: str) -> GroupedMLP:
            return GroupedMLP(count, in_dim, widths, activation, backend=backend, device=device, dtype=dtype)

        self.num_scenarios = num_scenarios
        self.per_scenario = own_experts
        self.own_experts = towers(num_scenarios * own_experts, widths, activation)
        self.shared_experts = towers(shared_experts, widths, activation)
        self.gate = towers(num_scenarios, (own_experts + shared_experts,), "identity")
        self.shared_gate: nn.Linear | None = None
        if has_shared_stream:
            experts = num_scenarios * own_experts + shared_experts
            self.shared_gate = nn.Linear(in_dim, experts, device=device, dtype=dtype)

    def own(self, own: Tensor, shared: Tensor, scenario: Tensor) -> Tensor:
        """The next g_t (B, d'), from g_t (B, d) and s (B, d), through experts of t and shared ones only."""
        logits = self.gate(own, scenario)
        ids, rows = scenario, own
        if self.per_scenario > 1:
            each = torch.arange(self.per_scenario, device=scenario.device)
            ids = (scenario.long().unsqueeze(1) * self.per_scenario + each).flatten()
            rows = own.repeat_interleave(self.per_scenario, dim=0)
        outputs = self.own_experts(rows, ids).view(own.shape[0], self.per_scenario, -1)
        return mix(logits, outputs, _every(self.shared_experts, shared))

    def own_and_shared(self, streams: Tensor, shared: Tensor, scenario: Tensor) -> tuple[Tensor, Tensor]:
        """The next g_t (B, d') and s (B, d') from all g_k and s."""
        rows, t = torch.arange(shared.shape[0], device=shared.device), scenario.long()
        every, common = _every(self.own_experts, streams), _every(self.shared_experts, shared)
        own = self._shares(self.gate(streams if streams.dim() == 2 else streams[rows, t], scenario))
        of_every, of_common = self._shared_shares(shared)
        # Foreign experts with the weight 0, so that both mixtures read the experts once; picking the own ones would
        # write a gradient of the size of all.
        placed = of_every.new_zeros(rows.shape[0], self.num_scenarios, self.per_scenario)
        placed = placed.index_put((rows, t), own[0]).flatten(1)
        mixed = weigh(torch.stack([placed, of_every], 1), every) + weigh(torch.stack([own[1], of_common], 1), common)
        own_stream, shared_stream = mixed.unbind(1)
        return own_stream, shared_stream

    def all_and_shared(self, streams: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
        """All next g_k (B, M, d') and s (B, d') from all g_k and s."""
        every, common = _every(self.own_experts, streams), _every(self.shared_experts, shared)
        own_shares, common_shares = self._shares(_every(self.gate, streams))
        by_scenario = every.unflatten(1, (self.num_scenarios, self.per_scenario))
        own = torch.matmul(own_shares.unsqueeze(2).to(every.dtype), by_scenario).squeeze(2)
        of_every, of_common = (shares.unsqueeze(1) for shares in self._shared_shares(shared))
        return own + weigh(common_shares, common), (weigh(of_every, every) + weigh(of_common, common)).squeeze(1)

    def _shares(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """A scenario's gate's, (…, n) of its own experts and (…, m) of the shared ones."""
        own, common = torch.softmax(logits, dim=-1).tensor_split([self.per_scenario], dim=-1)
        return own, common

    def _shared_shares(self, shared: Tensor) -> tuple[Tensor, Tensor]:
        """The shared gate's, (B, M n) of all own experts and (B, m) of the shared ones."""
        assert self.shared_gate is not None
        every, common = torch.softmax(self.shared_gate(shared), dim=1).tensor_split(
            [self.num_scenarios * self.per_scenario], dim=1
        )
        return every, common


def _every(towers: GroupedMLP, streams: Tensor) -> Tensor:
    """Every tower on its stream, (B, towers, d'); every row trains every tower.

    ``streams`` (B, d) is read by all towers; of (B, M, d) stream k by the k-th of M equal groups of towers.
    """
    count = towers.num_scenarios
    if streams.dim() == 2:
        return functional.expert_outputs(
            streams,
            entries(towers.weights),
            entries(towers.biases),
            activation=towers.activation,
            backend=towers.backend,
        )
    # As rows of their own, each grouped to its tower: unlike in branch_scores no stream is a constant.
    batch, scenarios, _ = streams.shape
    rows = streams.repeat_interleave(count // scenarios, dim=1).flatten(0, 1)
    return towers(rows, torch.arange(count, device=rows.device).repeat(batch)).view(batch, count, -1)
