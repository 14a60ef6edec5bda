"""Tile sizes, warps and stages, by kernel and element size: data, so that no call ever tunes.

The batch size is no key; only the number of parts of a weight gradient (1 to 16) follows from it and is compiled in.
Not yet measured on a GPU: chosen so that every configuration compiles for sm_80, sm_90, sm_100 and gfx942 without
spills and within their shared memory (docs/gpu-kernels.md).
"""

from typing import NamedTuple

import torch

from saml_kernels.backends.triton.availability import INTERPRETED


class ProductConfig(NamedTuple):
    """C tile rows × columns, steps of k, warps, stages of the software pipeline."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


class RowConfig(NamedTuple):
    """A kernel that goes over rows: elements of the (rows, M, d) block in registers, columns of d at a time, warps."""

    elements: int
    columns: int
    warps: int


# By bytes of an element.
PRODUCTS = {2: ProductConfig(64, 128, 64, 8, 3), 4: ProductConfig(64, 64, 32, 4, 3)}
WEIGHT_GRADIENTS = {2: ProductConfig(64, 128, 64, 4, 3), 4: ProductConfig(64, 64, 32, 4, 3)}
MUTUAL = RowConfig(4096, 128, 4)
# The table holds (M, M) cosines in registers: by M padded, columns of d at a time and warps. More columns spill.
TABLES = {16: (64, 4), 32: (16, 8), 64: (16, 8)}
ELEMENTWISE = RowConfig(1024, 1024, 4)
# Small tiles reach every edge with small tensors.
INTERPRETED_PRODUCT = ProductConfig(16, 32, 16, 4, 1)
INTERPRETED_MUTUAL = RowConfig(512, 16, 4)

MAXIMUM_SPLITS = 16
"""Of a weight gradient's rows, summed in order afterwards, so that one large scenario does not hold up the others."""
ROWS_PER_SPLIT = 4096


def product(dtype: torch.dtype) -> ProductConfig:
    """For products of activations and weights."""
    return INTERPRETED_PRODUCT if INTERPRETED else PRODUCTS[dtype.itemsize]


def weight_gradient(dtype: torch.dtype) -> ProductConfig:
    """For sums of outer products; ``rows`` and ``columns`` are the weight's, ``depth`` runs over the batch."""
    return INTERPRETED_PRODUCT if INTERPRETED else WEIGHT_GRADIENTS[dtype.itemsize]


def mutual() -> RowConfig:
    """For the mutual unit's kernels."""
    return INTERPRETED_MUTUAL if INTERPRETED else MUTUAL


def splits(rows: int) -> int:
    """Parts into which a weight gradient's rows are cut; depends on the batch size alone."""
    if INTERPRETED:
        return 1 + (rows > 64)
    return max(1, min(MAXIMUM_SPLITS, rows // ROWS_PER_SPLIT))
