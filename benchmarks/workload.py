"""What is timed: a cell's shapes, its random inputs, the float64 reference, and how many operations the trunk needs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

import saml_kernels
from peers.scoring import clamped_norm, ratio_weights
from saml_kernels import TrunkParams

DISTRIBUTIONS = ("uniform", "zipf")
KINK_MARGIN = 1e-4
"""Rows with a ReLU input nearer to 0 than this are replaced; over ten times the largest float32 error seen there."""
FOREIGN_DTYPES = (None, torch.bfloat16)
"""The precisions of foreign streams that contenders use; the margin holds in each."""
REFERENCE_ROWS = 1024
"""Rows per chunk of the float64 reference, whose streams would not fit in memory for the largest cells."""


@dataclass(frozen=True)
class Cell:
    """Shapes of one trunk and one batch: one mutual unit after layer 1, relu, score "ratio", vector gate."""

    B: int
    M: int
    local_dim: int
    global_dim: int
    hidden_dims: tuple[int, ...]
    """d_1..d_L, and the auxiliary widths a_1..a_L as well."""
    distribution: str = "uniform"
    """Of the scenarios: "uniform", or "zipf" (scenario k has probability ∝ 1 / (k + 1))."""

    def __post_init__(self) -> None:
        if self.distribution not in DISTRIBUTIONS:
            raise ValueError(f"distribution must be one of {', '.join(DISTRIBUTIONS)}, got {self.distribution!r}")
        if self.M < 2 or self.B < 1:
            raise ValueError(f"a cell needs B ≥ 1 rows and M ≥ 2 scenarios, got B = {self.B}, M = {self.M}")


@dataclass(frozen=True)
class Problem:
    """One batch, its parameters, and the fixed cotangents ∂loss/∂own (B, d_L) and ∂loss/∂aux (B, a_L)."""

    x_local: Tensor
    x_global: Tensor
    scenario: Tensor
    params: TrunkParams
    cotangents: tuple[Tensor, Tensor]

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor that receives a gradient, with its name."""
        yield "x_local", self.x_local
        yield "x_global", self.x_global
        for name, tensors in self.params._asdict().items():
            for layer, tensor in enumerate(tensors, start=1):
                if tensor is not None:
                    yield f"{name}[{layer}]", tensor

    def to(self, dtype: torch.dtype) -> "Problem":
        """The same values in ``dtype``, as leaves that require a gradient."""

        def leaf(tensor: Tensor) -> Tensor:
            return tensor.detach().to(dtype).requires_grad_()

        return Problem(
            leaf(self.x_local),
            leaf(self.x_global),
            self.scenario,
            _map(leaf, self.params),
            (self.cotangents[0].to(dtype), self.cotangents[1].to(dtype)),
        )

    def on(self, device: str) -> "Problem":
        """The same values on another device; nothing is copied where they are there already."""
        return Problem(
            self.x_local.to(device),
            self.x_global.to(device),
            self.scenario.to(device),
            _map(lambda tensor: tensor.to(device), self.params),
            (self.cotangents[0].to(device), self.cotangents[1].to(device)),
        )

    def copy(self) -> "Problem":
        """The same values elsewhere in memory, as leaves that require a gradient."""

        def leaf(tensor: Tensor) -> Tensor:
            return tensor.detach().clone().requires_grad_()

        own, aux = self.cotangents
        return Problem(
            leaf(self.x_local),
            leaf(self.x_global),
            self.scenario.clone(),
            _map(leaf, self.params),
            (own.clone(), aux.clone()),
        )

    def rows(self, index: Tensor | slice) -> "Problem":
        """The batch's rows ``index``, over the same parameters."""
        return replace(
            self,
            x_local=self.x_local[index],
            x_global=self.x_global[index],
            scenario=self.scenario[index],
            cotangents=(self.cotangents[0][index], self.cotangents[1][index]),
        )


def make(cell: Cell, seed: int = 0, *, avoid_kinks: bool = True, device: str = "cpu") -> Problem:
    """Random inputs of unit variance and weights that keep it, float32; the same numbers on every device.

    The gradient of relu jumps at 0: a row with an input of it within rounding distance of 0 would tell two correct
    computations apart by whole entries of its gradient. ``avoid_kinks`` makes such rows copies of other rows; where no
    gradient is judged, False saves the time that finding them takes.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator) * scale

    aux_weights, aux_biases, branch_weights, branch_biases = [], [], [], []
    M, previous, previous_aux = cell.M, cell.local_dim, cell.global_dim
    for d in cell.hidden_dims:
        aux_weights.append(normal(previous_aux, d, scale=(2 / previous_aux) ** 0.5))
        aux_biases.append(normal(d, scale=0.1))
        branch_weights.append(normal(M, previous + d, d, scale=(2 / (previous + d)) ** 0.5))
        branch_biases.append(normal(M, d, scale=0.1))
        previous = previous_aux = d
    first, without_unit = cell.hidden_dims[0], [None] * (len(cell.hidden_dims) - 1)
    params = TrunkParams(
        branch_weights,
        branch_biases,
        aux_weights,
        aux_biases,
        [normal(M, first, first, scale=first**-0.5), *without_unit],
        [normal(M, first, scale=0.1), *without_unit],
    )

    weights = torch.ones(M) if cell.distribution == "uniform" else 1 / torch.arange(1, M + 1)
    problem = Problem(
        normal(cell.B, cell.local_dim),
        normal(cell.B, cell.global_dim),
        torch.multinomial(weights, cell.B, replacement=True, generator=generator),
        params,
        (normal(cell.B, cell.hidden_dims[-1]), normal(cell.B, cell.hidden_dims[-1])),
    )
    problem = problem.on(device)
    if not avoid_kinks:
        return problem
    index = torch.arange(cell.B, device=device)
    margins = [relu_margin(problem, foreign_dtype) for foreign_dtype in FOREIGN_DTYPES]
    near_kink = torch.stack(margins).amin(0) < KINK_MARGIN
    safe = index[~near_kink]
    if len(safe) == 0:
        raise ValueError(f"every row of seed {seed} has a ReLU input within {KINK_MARGIN} of 0; take another seed")
    index[near_kink] = safe[torch.arange(cell.B - len(safe), device=device) % len(safe)]
    return problem.rows(index)


def relu_margin(problem: Problem, foreign_dtype: torch.dtype | None = None) -> Tensor:
    """(B,) the smallest |z| under a relu that a row's gradient passes: auxiliary network and own branch, in float64.

    ``foreign_dtype`` None or torch.bfloat16, as in saml_kernels.multi_branch.
    """

    def rounded(tensor: Tensor) -> Tensor:
        return tensor if foreign_dtype is None else tensor.to(foreign_dtype).double()

    params = _map(Tensor.double, problem.params)
    device = problem.scenario.device
    margin = torch.full(problem.scenario.shape, torch.inf, dtype=torch.float64, device=device)
    for k in range(params.branch_weights[0].shape[0]):
        for rows in (problem.scenario == k).nonzero().squeeze(1).split(REFERENCE_ROWS):
            aux, own = problem.x_global[rows].double(), problem.x_local[rows].double()
            for layer, (weight, bias) in enumerate(zip(params.branch_weights, params.branch_biases, strict=True)):
                aux = aux @ params.aux_weights[layer] + params.aux_biases[layer]
                margin[rows] = margin[rows].minimum(aux.abs().amin(1))
                aux = aux.relu()
                inputs = torch.cat([own, aux], 1)
                own = inputs @ weight[k] + bias[k]
                margin[rows] = margin[rows].minimum(own.abs().amin(1))
                own = own.relu()
                gate_weight, gate_bias = params.gate_weights[layer], params.gate_biases[layer]
                if gate_weight is not None and gate_bias is not None:
                    streams = (rounded(inputs) @ rounded(weight) + bias[:, None]).relu()  # (M, n, d)
                    cosine = (own * streams).sum(2) / (clamped_norm(own) * clamped_norm(streams))
                    alpha = ratio_weights(cosine.t(), torch.arange(len(weight), device=device) == k)
                    mix = torch.einsum("nj,jnd->nd", alpha, streams)
                    own = own + torch.sigmoid(own @ gate_weight[k] + gate_bias[k]) * mix
    return margin


def reference(problem: Problem, foreign_dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """own, aux and the gradient "∂name" of every tensor, by backend "reference" in float64 on the problem's values."""
    wide = problem.to(torch.float64)
    names = [name for name, _ in wide.named()]
    own, aux, per_row = [], [], {"x_local": [], "x_global": []}  # type: ignore[var-annotated]
    sums: dict[str, Tensor] = {}
    for start in range(0, len(problem.scenario), REFERENCE_ROWS):
        chunk = wide.rows(slice(start, start + REFERENCE_ROWS))
        output = saml_kernels.multi_branch(
            chunk.x_local,
            chunk.x_global,
            chunk.scenario,
            chunk.params,
            foreign_dtype=foreign_dtype,
            backend="reference",
        )
        gradients = torch.autograd.grad(
            [output.own, output.aux], [tensor for _, tensor in chunk.named()], chunk.cotangents
        )
        own.append(output.own.detach())
        aux.append(output.aux.detach())
        for name, gradient in zip(names, gradients, strict=True):
            if name in per_row:
                per_row[name].append(gradient)
            else:
                sums[name] = sums[name] + gradient if name in sums else gradient
    return {
        "own": torch.cat(own),
        "aux": torch.cat(aux),
        **{f"∂{name}": torch.cat(parts) for name, parts in per_row.items()},
        **{f"∂{name}": gradient for name, gradient in sums.items()},
    }


@dataclass(frozen=True)
class Operations:
    """Floating-point operations (a multiplication and an addition count two) that the trunk needs for one batch."""

    forward: int
    backward: int
    layer_one: int
    """Of these, layer 1 of all branches, forward: one (B × D_l + a_1) by (D_l + a_1 × M·d_1) product."""

    @property
    def step(self) -> int:
        """Forward and backward."""
        return self.forward + self.backward


def operations(cell: Cell) -> Operations:
    """The trunk's operations, from the formulas and not from any implementation.

    With a_0 = D_g, d_0 = D_l and one mutual unit after layer 1, per row:

        auxiliary   Σ_l 2 a_{l−1} a_l
        layer 1     2 M (d_0 + a_1) d_1                 all branches
        gate        2 d_1²                              own branch
        scores      2 (2M − 1) d_1 + 2 (M − 1) d_1      M − 1 products, M norms; the mix
        tail        Σ_{l>1} 2 (d_{l−1} + a_l) d_l       own branch

    Backward needs the gradient of both factors of every own product, so twice auxiliary, gate, tail and 1/M of layer 1,
    and in the mutual unit M − 1 products p_j and the sum over j of dc_j V_j: 2 · 2 (M − 1) d_1. Activations, biases and
    the softmax are not counted.
    """
    M, d = cell.M, cell.hidden_dims[0]
    auxiliary = sum(2 * before * width for before, width in pairwise((cell.global_dim, *cell.hidden_dims)))
    layer_one = 2 * M * (cell.local_dim + d) * d
    gate = 2 * d * d
    scores = 2 * (2 * M - 1) * d + 2 * (M - 1) * d
    tail = sum(2 * (before + width) * width for before, width in pairwise(cell.hidden_dims))
    return Operations(
        forward=cell.B * (auxiliary + layer_one + gate + scores + tail),
        backward=cell.B * (2 * (auxiliary + layer_one // M + gate + tail) + 4 * (M - 1) * d),
        layer_one=cell.B * layer_one,
    )


def _map(function: Callable[[Tensor], Tensor], params: TrunkParams) -> TrunkParams:
    return TrunkParams._make([None if t is None else function(t) for t in tensors] for tensors in params)
