"""A tile of a product with its epilogue, forward δ(bias + [A1 ; A2] W) or backward (addend + [A1 ; A2] Wᵀ) ∘ δ'.

Both factors of a concatenation run through one loop over k: two loops would take twice the shared memory.
"""

import triton
import triton.language as tl

from saml_kernels.backends.triton.functions import IDENTITY, activate, activate_backward
from saml_kernels.backends.triton.tables import ELEMENT, FLOAT32, address, column, occurs, pick, pick_multiple

# Addresses of a product.
A1 = tl.constexpr(0)
A2 = tl.constexpr(1)
W1 = tl.constexpr(2)
W2 = tl.constexpr(3)
BIAS = tl.constexpr(4)
OUT = tl.constexpr(5)
VALUE = tl.constexpr(6)
ARGUMENT = tl.constexpr(7)
ADDEND = tl.constexpr(8)
# Of a product of rounded factors, instead of A2 and W2.
A_SCALE = tl.constexpr(1)
W_SCALE = tl.constexpr(3)


@triton.jit
def rows_of(row, caller, TABLES: tl.constexpr, NAME: tl.constexpr, stage):
    """Rows of an operand: sorted ones, or where they stand in the caller's order."""
    values: tl.constexpr = column(TABLES, NAME)
    if len(values) > 1:
        return tl.where(pick(TABLES, NAME, stage) == 1, caller, row)
    elif values[0] == 1:
        return caller
    else:
        return row


@triton.jit
def activate_any(z, code, TABLES: tl.constexpr):
    """δ of the stage. A branch and no choice, so that only one is computed."""
    values: tl.constexpr = column(TABLES, "activation")
    if len(values) == 1:
        z = activate(z, values[0])
    else:
        for id in tl.static_range(7):
            if id != IDENTITY and occurs(TABLES, "activation", id):
                if code == id:
                    z = activate(z, id)
    return z


@triton.jit
def activate_backward_any(dv, v, z, code, TABLES: tl.constexpr):
    """δ' of the stage."""
    values: tl.constexpr = column(TABLES, "activation")
    if len(values) == 1:
        dv = activate_backward(dv, v, z, values[0])
    else:
        for id in tl.static_range(7):
            if id != IDENTITY and occurs(TABLES, "activation", id):
                if code == id:
                    dv = activate_backward(dv, v, z, id)
    return dv


@triton.jit
def store_result(base, base32, places, index, mask, value, stage, TABLES, STAGES: tl.constexpr, ALIGNED: tl.constexpr):
    """To the stage's result, in the inputs' type or in float32."""
    if occurs(TABLES, "out_type", ELEMENT) and occurs(TABLES, "out_type", FLOAT32):
        if pick(TABLES, "out_type", stage) == FLOAT32:
            tl.store(address(base32, places, OUT, stage, STAGES, ALIGNED) + index, value, mask=mask)
        else:
            tl.store(address(base, places, OUT, stage, STAGES, ALIGNED) + index, value, mask=mask)
    elif occurs(TABLES, "out_type", FLOAT32):
        tl.store(address(base32, places, OUT, stage, STAGES, ALIGNED) + index, value, mask=mask)
    else:
        tl.store(address(base, places, OUT, stage, STAGES, ALIGNED) + index, value, mask=mask)


@triton.jit
def load_addend(base, base32, places, index, mask, stage, TABLES, STAGES: tl.constexpr, ALIGNED: tl.constexpr):
    """What is added before δ', float32, 0 for a stage that has none."""
    kind = pick(TABLES, "addend", stage)
    value = tl.zeros(index.shape, tl.float32)
    if occurs(TABLES, "addend", ELEMENT):
        there = address(base, places, ADDEND, stage, STAGES, ALIGNED)
        value += tl.load(there + index, mask=mask & (kind == ELEMENT), other=0.0).to(tl.float32)
    if occurs(TABLES, "addend", FLOAT32):
        there = address(base32, places, ADDEND, stage, STAGES, ALIGNED)
        value += tl.load(there + index, mask=mask & (kind == FLOAT32), other=0.0)
    return value


@triton.jit
def product_item(
    base,
    base32,
    places,
    permutation,
    stage,
    branch,
    scenario,
    first,
    end,
    column_tile,
    TABLES: tl.constexpr,
    STAGES: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BACKWARD: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr,
    MULTIPLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Rows first to end, ROWS at most, of one branch. ``scenario`` (ROWS,) is each row's own, where that matters."""
    row = first.to(tl.int64) + tl.arange(0, ROWS)
    live = row < end
    caller = row
    if (
        occurs(TABLES, "a1_gathered", 1)
        or occurs(TABLES, "a2_gathered", 1)
        or occurs(TABLES, "out_gathered", 1)
        or occurs(TABLES, "value_gathered", 1)
        or occurs(TABLES, "addend_gathered", 1)
    ):
        caller = tl.load(permutation + row, mask=live, other=0)
    wide = branch.to(tl.int64)
    K1 = pick_multiple(TABLES, "k1", stage, MULTIPLE)
    K2 = pick_multiple(TABLES, "k2", stage, MULTIPLE)
    N = pick_multiple(TABLES, "n", stage, MULTIPLE)
    n = column_tile * COLUMNS + tl.arange(0, COLUMNS)

    a1_row = rows_of(row, caller, TABLES, "a1_gathered", stage) * pick_multiple(TABLES, "a1_row", stage, MULTIPLE)
    a1_branch = wide * pick_multiple(TABLES, "a1_branch", stage, MULTIPLE)
    w1_start = wide * pick_multiple(TABLES, "w1_branch", stage, MULTIPLE) + pick_multiple(
        TABLES, "w1_start", stage, MULTIPLE
    )
    w1_step = pick_multiple(TABLES, "w1_step", stage, MULTIPLE)
    a1 = address(base, places, A1, stage, STAGES, ALIGNED)
    w1 = address(base, places, W1, stage, STAGES, ALIGNED)
    steps_1 = (K1 + DEPTH - 1) // DEPTH
    steps_2 = (K2 + DEPTH - 1) // DEPTH
    two: tl.constexpr = not occurs(TABLES, "k2", 0) or len(column(TABLES, "k2")) > 1
    if two:
        # One base and a choice of offsets: a choice of pointers would not be known to be aligned.
        a2 = address(base, places, A2, stage, STAGES, ALIGNED)
        w2 = address(base, places, W2, stage, STAGES, ALIGNED)
        bytes_each: tl.constexpr = base.dtype.element_ty.primitive_bitwidth // 8
        a2_start = (a2.to(tl.int64) - a1.to(tl.int64)) // bytes_each
        w2_start = (w2.to(tl.int64) - w1.to(tl.int64)) // bytes_each
        w2_start += wide * pick_multiple(TABLES, "w2_branch", stage, MULTIPLE)
        w2_start += pick_multiple(TABLES, "w2_start", stage, MULTIPLE)
        a2_row = rows_of(row, caller, TABLES, "a2_gathered", stage) * pick_multiple(TABLES, "a2_row", stage, MULTIPLE)
        w2_step = pick_multiple(TABLES, "w2_step", stage, MULTIPLE)

    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(0, steps_1 + steps_2):
        k0 = step * DEPTH
        width = K1
        a_start = a1_branch
        a_row = a1_row
        w_start = w1_start
        w_step = w1_step
        if two:
            of_second = step >= steps_1
            k0 = tl.where(of_second, step - steps_1, step) * DEPTH
            width = tl.where(of_second, K2, K1)
            a_start = tl.where(of_second, a2_start, a1_branch)
            a_row = tl.where(of_second, a2_row, a1_row)
            w_start = tl.where(of_second, w2_start, w1_start)
            w_step = tl.where(of_second, w2_step, w1_step)
            if ALIGNED:
                width = tl.multiple_of(width, MULTIPLE)
                a_start = tl.multiple_of(a_start, MULTIPLE)
                w_start = tl.multiple_of(w_start, MULTIPLE)
                w_step = tl.multiple_of(w_step, MULTIPLE)
        k = k0 + tl.arange(0, DEPTH)
        a_tile = tl.load(
            a1 + (a_start + a_row[:, None] + k[None, :]), mask=live[:, None] & (k < width)[None, :], other=0.0
        )
        if TRANSPOSED:
            w_index = (n.to(tl.int64) * w_step)[None, :] + k[:, None]
        else:
            w_index = (k.to(tl.int64) * w_step)[:, None] + n[None, :]
        w_tile = tl.load(w1 + (w_start + w_index), mask=(k < width)[:, None] & (n < N)[None, :], other=0.0)
        total = tl.dot(a_tile, w_tile, total, input_precision=PRECISION)

    if occurs(TABLES, "bias", 1):
        bias = address(base, places, BIAS, stage, STAGES, ALIGNED)
        has_bias = pick(TABLES, "bias", stage) == 1
        total += tl.load(bias + wide * N + n, mask=(n < N) & has_bias, other=0.0).to(tl.float32)[None, :]
    # Columns count from the tile's first, so that the compiler finds constant distances between addresses.
    first_column = (column_tile * COLUMNS).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    inside = live[:, None] & (columns < N - column_tile * COLUMNS)[None, :]
    code = pick(TABLES, "activation", stage)

    if BACKWARD:
        if occurs(TABLES, "addend", ELEMENT, FLOAT32):
            addend_row = rows_of(row, caller, TABLES, "addend_gathered", stage) * pick_multiple(
                TABLES, "addend_row", stage, MULTIPLE
            )
            start = wide * pick_multiple(TABLES, "addend_branch", stage, MULTIPLE) + first_column
            index = (addend_row + start)[:, None] + columns[None, :]
            total += load_addend(base, base32, places, index, inside, stage, TABLES, STAGES, ALIGNED)
        v = total
        if occurs(TABLES, "value", 1):
            value_row = rows_of(row, caller, TABLES, "value_gathered", stage) * pick_multiple(
                TABLES, "value_row", stage, MULTIPLE
            )
            start = wide * pick_multiple(TABLES, "value_branch", stage, MULTIPLE) + first_column
            there = address(base, places, VALUE, stage, STAGES, ALIGNED) + start
            has_value = pick(TABLES, "value", stage) == 1
            v = tl.load(there + value_row[:, None] + columns[None, :], mask=inside & has_value, other=0.0)
            v = v.to(tl.float32)
        z = v
        if occurs(TABLES, "argument", 1):
            there = address(base, places, ARGUMENT, stage, STAGES, ALIGNED) + first_column
            has_argument = pick(TABLES, "argument", stage) == 1
            z = tl.load(there + (row * N)[:, None] + columns[None, :], mask=inside & has_argument, other=0.0)
            z = z.to(tl.float32)
        result = activate_backward_any(total, v, z, code, TABLES)
    else:
        own = inside
        if occurs(TABLES, "value", 1) or occurs(TABLES, "argument", 1):
            own = inside & ((scenario == branch) | (pick(TABLES, "shared", stage) == 1))[:, None]
        if occurs(TABLES, "argument", 1):
            has_argument = pick(TABLES, "argument", stage) == 1
            there = address(base, places, ARGUMENT, stage, STAGES, ALIGNED) + first_column
            tl.store(there + (row * N)[:, None] + columns[None, :], total, mask=own & has_argument)
        result = activate_any(total, code, TABLES)
        if occurs(TABLES, "value", 1):
            value_row = rows_of(row, caller, TABLES, "value_gathered", stage) * pick_multiple(
                TABLES, "value_row", stage, MULTIPLE
            )
            start = wide * pick_multiple(TABLES, "value_branch", stage, MULTIPLE) + first_column
            has_value = pick(TABLES, "value", stage) == 1
            there = address(base, places, VALUE, stage, STAGES, ALIGNED) + start
            tl.store(there + value_row[:, None] + columns[None, :], result, mask=own & has_value)
    out_row = rows_of(row, caller, TABLES, "out_gathered", stage) * pick_multiple(TABLES, "out_row", stage, MULTIPLE)
    index = (out_row + (wide * pick_multiple(TABLES, "out_branch", stage, MULTIPLE) + first_column))[:, None] + columns[
        None, :
    ]
    store_result(base, base32, places, index, inside, result, stage, TABLES, STAGES, ALIGNED)


@triton.jit
def foreign_product_item(
    base,
    rounded,
    base32,
    places,
    permutation,
    stage,
    branch,
    scenario,
    first,
    end,
    column_tile,
    TABLES: tl.constexpr,
    STAGES: tl.constexpr,
    M: tl.constexpr,
    SCALED: tl.constexpr,
    ALIGNED: tl.constexpr,
    MULTIPLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """δ(bias + s_row s_column (Â Ŵ)) of a foreign branch, from factors rounded to another type.

    Â is (B, k) or (B, M, k), Ŵ (M, n, k); rows of the branch's own scenario are left to a product in full precision.
    """
    row = first.to(tl.int64) + tl.arange(0, ROWS)
    live = row < end
    wide = branch.to(tl.int64)
    # Rounded rows are padded to whole vectors.
    K = pick_multiple(TABLES, "k1", stage, 16)
    N = pick_multiple(TABLES, "n", stage, MULTIPLE)
    n = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    a = address(rounded, places, A1, stage, STAGES, True)
    w = address(rounded, places, W1, stage, STAGES, True)
    a += wide * pick_multiple(TABLES, "a1_branch", stage, 16)
    a_row = row * pick_multiple(TABLES, "a1_row", stage, 16)
    w += wide * pick_multiple(TABLES, "w1_branch", stage, 16)
    if SCALED and rounded.dtype.element_ty == tl.int8:
        total = tl.zeros((ROWS, COLUMNS), tl.int32)
    else:
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
    nothing = tl.zeros((), tl.float32).to(rounded.dtype.element_ty)
    for k0 in range(0, K, DEPTH):
        k = k0 + tl.arange(0, DEPTH)
        a_tile = tl.load(a + (a_row[:, None] + k[None, :]), mask=live[:, None] & (k < K)[None, :], other=nothing)
        w_index = (n.to(tl.int64) * K)[None, :] + k[:, None]
        w_tile = tl.load(w + w_index, mask=(k < K)[:, None] & (n < N)[None, :], other=nothing)
        total = tl.dot(a_tile, w_tile, total, out_dtype=total.dtype)
    z = total.to(tl.float32)
    if SCALED:
        # One scale per row of Â: (B,) or (B, M).
        shared = pick(TABLES, "a1_branch", stage) == 0
        a_scale = address(base32, places, A_SCALE, stage, STAGES, False)
        a_scale += tl.where(shared, row, row * M + wide)
        w_scale = address(base32, places, W_SCALE, stage, STAGES, False) + wide * N + n
        z *= tl.load(a_scale, mask=live, other=0.0)[:, None]
        z *= tl.load(w_scale, mask=n < N, other=0.0)[None, :]
    bias = address(base, places, BIAS, stage, STAGES, ALIGNED)
    z += tl.load(bias + wide * N + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    mask = (live & (scenario != branch))[:, None] & (n < N)[None, :]
    caller = row
    if occurs(TABLES, "out_gathered", 1):
        caller = tl.load(permutation + row, mask=live, other=0)
    out_row = rows_of(row, caller, TABLES, "out_gathered", stage) * pick_multiple(TABLES, "out_row", stage, MULTIPLE)
    start = wide * pick_multiple(TABLES, "out_branch", stage, MULTIPLE) + (column_tile * COLUMNS).to(tl.int64)
    index = (out_row + start)[:, None] + tl.arange(0, COLUMNS)[None, :]
    result = activate_any(z, pick(TABLES, "activation", stage), TABLES)
    tl.store(address(base, places, OUT, stage, STAGES, ALIGNED) + index, result, mask=mask)
