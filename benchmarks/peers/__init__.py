"""What a user would write instead of saml_kernels.multi_branch, each idea as good as it allows.

Every peer is ``trunk(x_local, x_global, scenario, params) -> (own, aux)`` with autograd: x_local (B, D_l), x_global
(B, D_g), scenario (B,), a saml_kernels.TrunkParams; own (B, d_L) is V_t^L, aux (B, a_L) is A^L. They cover what the
benchmarks time and no more: one mutual unit after layer 1, relu, score "ratio", a vector gate, stop-gradient on foreign
streams, M ≥ 2. Formulas in docs/computation.md.
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, Final, NamedTuple, TypeAlias

from torch import Tensor

from peers import all_towers, grouped, grouped_mm, loop_gather
from saml_kernels import TrunkParams

Trunk: TypeAlias = Callable[[Tensor, Tensor, Tensor, TrunkParams], tuple[Tensor, Tensor]]


class Peer(NamedTuple):
    """One way to write the trunk."""

    function: Trunk
    summary: str
    stream_copies: int
    """About how many (B, M, d_1) tensors a training step holds at its peak, to refuse what does not fit in memory."""
    devices: tuple[str, ...] = ("cpu", "cuda")
    """Where it takes part in benchmarks."""
    inductor_options: Mapping[str, Any] = MappingProxyType({})
    """Of torch.compile."""
    waits: str | None = None
    """What it waits for the device for, which rules out a CUDA graph; None: nothing."""


# Else torch 2.13 writes layer 1's gradient over the own stream, which the gate's weight gradient has still to read.
_NOTHING_IN_PLACE: Final = MappingProxyType({"inplace_buffers": False})

PEERS: Final = {
    "all_towers": Peer(
        all_towers.trunk, "all towers for all rows, the whole M×M table of scores, then the own row is picked", 10
    ),
    "loop_gather": Peer(
        loop_gather.trunk, "a Python loop over the scenarios' towers, all rows through each, stack and gather", 5
    ),
    "grouped": Peer(
        grouped.trunk,
        "rows grouped by scenario; layer 1 of all branches as one product, then the own branch alone, forward and "
        "backward",
        3,
        inductor_options=_NOTHING_IN_PLACE,
        waits="the number of rows of each scenario",
    ),
    "grouped_mm": Peer(
        grouped_mm.trunk,
        "grouped, with torch._grouped_mm, which reads the groups on the device, for the products by scenario",
        3,
        devices=("cuda",),
    ),
    "grouped_onednn": Peer(
        partial(grouped.trunk, products=grouped.ONEDNN),
        "grouped, with every product through oneDNN (a private operator of torch) in place of MKL",
        3,
        devices=("cpu",),
        inductor_options=_NOTHING_IN_PLACE,
    ),
}
