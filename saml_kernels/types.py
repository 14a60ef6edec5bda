"""The named tuples that functions and layers exchange."""

from collections.abc import Sequence
from typing import NamedTuple

import torch.utils._pytree as pytree
from torch import Tensor


class TrunkParams(NamedTuple):
    """Parameters of the multi-branch trunk, one entry per layer l = 1..L in every list.

    M scenarios, branch widths d_0 = D_l, d_1..d_L, auxiliary widths a_0 = D_g, a_1..a_L. All tensors share
    dtype and device with the inputs.
    """

    branch_weights: Sequence[Tensor]
    """W_k^l, (M, d_{l-1} + a_l, d_l): rows of the branch stream first, then of the auxiliary stream."""
    branch_biases: Sequence[Tensor]
    """b_k^l, (M, d_l)."""
    aux_weights: Sequence[Tensor]
    """Wa^l, (a_{l-1}, a_l)."""
    aux_biases: Sequence[Tensor]
    """ba^l, (a_l,)."""
    gate_weights: Sequence[Tensor | None]
    """U_k^l, (M, d_l, d_l) or (M, d_l, 1) for a scalar gate; None where layer l has no mutual unit."""
    gate_biases: Sequence[Tensor | None]
    """u_k^l, (M, d_l) or (M, 1); None where layer l has no mutual unit."""


class TrunkOutput(NamedTuple):
    """What the multi-branch trunk returns."""

    own: Tensor
    """V_t^L of every sample's own branch t, (B, d_L)."""
    aux: Tensor
    """A^L, (B, a_L)."""
    scores: tuple[Tensor | None, ...] | None
    """Per layer the samples' own rows of α, (B, M) with own entry 0, None without a mutual unit; None unless asked."""


class Grouping(NamedTuple):
    """A batch's rows grouped by scenario. All tensors int64, on the device of the ids."""

    permutation: Tensor
    """(B,): rows in stable order of their scenario; sorted = x[permutation]."""
    inverse: Tensor
    """(B,): x = sorted[inverse]."""
    offsets: Tensor
    """(M + 1,): the rows of scenario k are sorted[offsets[k]:offsets[k + 1]]."""


# torch.export.save writes them by these names, which must stay.
for _type in (TrunkParams, TrunkOutput, Grouping):
    pytree._register_namedtuple(_type, serialized_type_name=f"saml_kernels.{_type.__name__}")
