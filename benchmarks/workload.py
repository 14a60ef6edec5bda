"""What is timed: a cell's shapes, and how many operations the trunk needs."""

from dataclasses import dataclass
from itertools import pairwise

from saml_kernels.testing.problem import Case


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
    """Of the scenarios, as saml_kernels.testing.problem.Case has it."""

    def __post_init__(self) -> None:
        if self.M < 2 or self.B < 1:
            raise ValueError(f"a cell needs B ≥ 1 rows and M ≥ 2 scenarios, got B = {self.B}, M = {self.M}")
        self.case()

    def case(self, seed: int = 0) -> Case:
        """As saml_kernels.testing.problem makes it."""
        shapes = self.B, self.M, self.local_dim, self.global_dim, self.hidden_dims
        return Case(*shapes, distribution=self.distribution, seed=seed)


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


def numbers_read(cell: Cell, own_scenarios: int) -> int:
    """Weights and biases that a forward pass cannot do without, where so many scenarios have rows.

    With a_0 = D_g, d_0 = D_l, one mutual unit after layer 1, and S scenarios with rows:

        auxiliary   Σ_l (a_{l−1} + 1) a_l
        layer 1     M (d_0 + a_1 + 1) d_1               all branches
        gate        S (d_1 + 1) d_1
        tail        S Σ_{l>1} (d_{l−1} + a_l + 1) d_l
    """
    d = cell.hidden_dims[0]
    auxiliary = sum((before + 1) * width for before, width in pairwise((cell.global_dim, *cell.hidden_dims)))
    layer_one = cell.M * (cell.local_dim + d + 1) * d
    tail = sum((before + width + 1) * width for before, width in pairwise(cell.hidden_dims))
    return auxiliary + layer_one + own_scenarios * ((d + 1) * d + tail)
