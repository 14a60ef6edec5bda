"""One kernel runs any list of stages: a layer in a launch, or a whole trunk in a single persistent one.

Work is cut into items, (stage, tile of rows, part), in an order in which whatever an item needs comes before it: step
by step, every stage one tile, later stages some steps behind (``lag``). Programs draw items from a counter, so the
first unfinished item is always in some program's hands, and nothing it waits for can be behind it: the launch ends
however many programs run at once. An item counts itself done after its stores; what depends on it waits until all
items of the tile have. A tile of one scenario (number u) ends at row (u + 1)·ROWS at most, so it needs tiles of any
rows with numbers up to u only; a tile of any rows needs tiles of one scenario with numbers up to u + M. The last
program sets all counters back to zero.
"""

import triton
import triton.language as tl

from saml_kernels.backends.triton.functions import number_of_tiles, scenario_of, scenario_tile, tile_of_row
from saml_kernels.backends.triton.mutual import (
    ALPHA,
    D_GATE,
    D_MUTUAL,
    D_OWN,
    GATE,
    MIXED,
    MUTUAL,
    STREAMS,
    own_row_backward_group,
    own_row_group,
    table_row,
)
from saml_kernels.backends.triton.product import foreign_product_item, product_item
from saml_kernels.backends.triton.rounding import FIRST, ROUNDED, SCALE, SECOND, round_rows_group
from saml_kernels.backends.triton.tables import (
    FIELDS,
    FOREIGN_PRODUCT,
    MUTUAL_BACKWARD,
    MUTUAL_OWN_ROW,
    MUTUAL_TABLE,
    PRODUCT,
    ROUND_ROWS,
    entry,
    occurs,
    pick,
)

TICKET = tl.constexpr(0)
FINISHED = tl.constexpr(1)
READY = tl.constexpr(2)
"""Counters: the next item, programs at their end, and from here on stage by stage the items done of every tile."""


@triton.jit
def wait_for(
    counters,
    offsets,
    dependency,
    tile,
    own,
    first,
    end,
    row0,
    rows,
    tiles,
    TABLES: tl.constexpr,
    M: tl.constexpr,
    M_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Returns when ``dependency`` (-1: nothing) is done with the rows first to end."""
    if dependency >= 0:
        need = pick(TABLES, "items", dependency)
        dependency_own = pick(TABLES, "own", dependency)
        lowest = tile
        highest = tile
        if own != dependency_own:
            if dependency_own == 1:
                lowest = tile_of_row(offsets, first, row0, rows, M, M_PADDED, ROWS)
                highest = tile_of_row(offsets, end - 1, row0, rows, M, M_PADDED, ROWS)
            else:
                lowest = (first // ROWS).to(tl.int32)
                highest = ((end - 1) // ROWS).to(tl.int32)
        ready = counters + READY + dependency * tiles
        for u in range(lowest, highest + 1):
            while tl.atomic_add(ready + u, 0, sem="acquire") < need:
                pass


@triton.jit(do_not_specialize=["rows", "row0", "programs", "inverse_temperature"])
def stage_kernel(
    base,
    rounded,
    base32,
    places,
    permutation,
    offsets,
    counters,
    rows,
    row0,
    programs,
    inverse_temperature,
    TABLES: tl.constexpr,
    STAGES: tl.constexpr,
    PERSISTENT: tl.constexpr,
    ITEMS_PER_STEP: tl.constexpr,
    OWN_ITEMS_PER_STEP: tl.constexpr,
    ANY_ROWS_LAG: tl.constexpr,
    OWN_LAG: tl.constexpr,
    M: tl.constexpr,
    M_PADDED: tl.constexpr,
    SCORE: tl.constexpr,
    BACKWARD: tl.constexpr,
    KEEP: tl.constexpr,
    LARGEST: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr,
    MULTIPLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    ITEM_ROWS: tl.constexpr,
    GROUP_ELEMENTS: tl.constexpr,
    WHOLE_ELEMENTS: tl.constexpr,
):
    """Rows row0 to row0 + rows of the sorted batch. ``base``, ``rounded``, ``base32`` give the addresses' types."""
    dense_tiles = (rows + ROWS - 1) // ROWS
    tiles = dense_tiles + M
    # Steps with items of all stages, as long as one on tiles of any rows has some; then those on one scenario's only.
    full_steps = tl.zeros((), tl.int32)
    if occurs(TABLES, "own", 0):
        full_steps += dense_tiles + ANY_ROWS_LAG
    own_steps = tl.zeros((), tl.int32)
    if occurs(TABLES, "own", 1):
        own_steps += number_of_tiles(offsets, row0, rows, M, M_PADDED, ROWS) + OWN_LAG
    full_items = full_steps * ITEMS_PER_STEP
    total = full_items + tl.maximum(own_steps - full_steps, 0) * OWN_ITEMS_PER_STEP
    if PERSISTENT:
        item = tl.atomic_add(counters + TICKET, 1)
    else:
        item = tl.program_id(0)
    while item < total:
        stage = tl.zeros((), tl.int32)
        if item < full_items:
            step = item // ITEMS_PER_STEP
            part = item % ITEMS_PER_STEP
            for s in tl.static_range(1, STAGES):
                stage += (part >= entry(TABLES, "first_item", s)).to(tl.int32)
            part -= pick(TABLES, "first_item", stage)
        else:
            step = full_steps + (item - full_items) // max(OWN_ITEMS_PER_STEP, 1)
            part = (item - full_items) % max(OWN_ITEMS_PER_STEP, 1)
            for s in tl.static_range(STAGES):
                if entry(TABLES, "own", s) == 1:
                    stage = tl.where(part >= entry(TABLES, "first_own_item", s), s, stage)
            part -= pick(TABLES, "first_own_item", stage)
        tile = step - pick(TABLES, "lag", stage)
        own = pick(TABLES, "own", stage)
        kind = pick(TABLES, "kind", stage)
        first = tl.zeros((), tl.int64)
        end = tl.zeros((), tl.int64)
        t = tl.zeros((), tl.int32)
        if tile >= 0:
            if own == 1:
                t, first, end = scenario_tile(offsets, tile, row0, rows, M, M_PADDED, ROWS)
            else:
                first = tile.to(tl.int64) * ROWS
                end = tl.minimum(first + ROWS, rows)
            end = tl.minimum(end, first + ROWS)
        if first < end:
            if PERSISTENT:
                dependency_1 = pick(TABLES, "dependency_1", stage)
                dependency_2 = pick(TABLES, "dependency_2", stage)
                wait_for(
                    counters, offsets, dependency_1, tile, own, first, end, row0, rows, tiles, TABLES, M, M_PADDED, ROWS
                )
                wait_for(
                    counters, offsets, dependency_2, tile, own, first, end, row0, rows, tiles, TABLES, M, M_PADDED, ROWS
                )
            if occurs(TABLES, "kind", PRODUCT) or occurs(TABLES, "kind", FOREIGN_PRODUCT):
                column_tiles = pick(TABLES, "column_tiles", stage)
                branch = t
                if own == 0:
                    branch = part // column_tiles
                scenario = tl.zeros((ROWS,), tl.int32) + t
                if occurs(TABLES, "own", 0) and (
                    occurs(TABLES, "value", 1)
                    or occurs(TABLES, "argument", 1)
                    or occurs(TABLES, "kind", FOREIGN_PRODUCT)
                ):
                    scenario = scenario_of(offsets, row0 + first + tl.arange(0, ROWS), M, M_PADDED)
                if occurs(TABLES, "kind", PRODUCT):
                    if kind == PRODUCT:
                        product_item(
                            base,
                            base32,
                            places,
                            permutation,
                            stage,
                            branch,
                            scenario,
                            first,
                            end,
                            part % column_tiles,
                            TABLES,
                            STAGES,
                            BACKWARD,
                            BACKWARD,
                            PRECISION,
                            ALIGNED,
                            MULTIPLE,
                            ROWS,
                            COLUMNS,
                            DEPTH,
                        )
                if occurs(TABLES, "kind", FOREIGN_PRODUCT):
                    if kind == FOREIGN_PRODUCT:
                        foreign_product_item(
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
                            part % column_tiles,
                            TABLES,
                            STAGES,
                            M,
                            LARGEST > 0,
                            ALIGNED,
                            MULTIPLE,
                            ROWS,
                            COLUMNS,
                            # As many bytes a step whatever the type.
                            DEPTH
                            * base.dtype.element_ty.primitive_bitwidth
                            // rounded.dtype.element_ty.primitive_bitwidth,
                        )
            for s in tl.static_range(STAGES):
                if entry(TABLES, "kind", s) != PRODUCT and entry(TABLES, "kind", s) != FOREIGN_PRODUCT:
                    if stage == s:
                        rows_item(
                            places,
                            s,
                            permutation,
                            offsets,
                            row0,
                            t,
                            part,
                            first,
                            end,
                            # 0, which the compiler does not know: what is counted from it stays inside the loop.
                            # Taken out of it, indices of every stage would occupy registers all the time.
                            tl.multiple_of(tl.minimum(item, 0), 256),
                            inverse_temperature,
                            TABLES,
                            M,
                            M_PADDED,
                            SCORE,
                            KEEP,
                            LARGEST,
                            ITEM_ROWS,
                            GROUP_ELEMENTS,
                            WHOLE_ELEMENTS,
                        )
            if PERSISTENT:
                # All threads' stores before the count that releases them.
                tl.debug_barrier()
                tl.atomic_add(counters + READY + stage * tiles + tile, 1, sem="release")
        if PERSISTENT:
            item = tl.atomic_add(counters + TICKET, 1)
        else:
            item = total
    if PERSISTENT:
        tl.debug_barrier()
        if tl.atomic_add(counters + FINISHED, 1) == programs - 1:
            used = tiles * STAGES + READY
            for start in range(0, used, 1024):
                place = start + tl.arange(0, 1024)
                tl.store(counters + place, 0, mask=place < used)


@triton.jit
def rows_item(
    places,
    STAGE: tl.constexpr,
    permutation,
    offsets,
    row0,
    t,
    part,
    first,
    end,
    zero,
    inverse_temperature,
    TABLES: tl.constexpr,
    M: tl.constexpr,
    M_PADDED: tl.constexpr,
    SCORE: tl.constexpr,
    KEEP: tl.constexpr,
    LARGEST: tl.constexpr,
    ITEM_ROWS: tl.constexpr,
    GROUP_ELEMENTS: tl.constexpr,
    WHOLE_ELEMENTS: tl.constexpr,
):
    """ITEM_ROWS rows of a stage that is no product, group by group as the registers hold them."""
    kind: tl.constexpr = entry(TABLES, "kind", STAGE)
    field: tl.constexpr = STAGE * FIELDS
    n: tl.constexpr = entry(TABLES, "n", STAGE)
    if kind == ROUND_ROWS:
        k1: tl.constexpr = entry(TABLES, "k1", STAGE)
        k2: tl.constexpr = entry(TABLES, "k2", STAGE)
        inputs: tl.constexpr = entry(TABLES, "column_tiles", STAGE)
        block: tl.constexpr = power_of_2(n, 256)
        rounded_rows: tl.constexpr = group_rows(GROUP_ELEMENTS, block, ITEM_ROWS)
        branch = (part % inputs).to(tl.int64)
        begin = first + (part // inputs) * ITEM_ROWS
        for done in range(0, ITEM_ROWS, rounded_rows):
            row = begin + done + tl.arange(0, rounded_rows)
            live = row < end
            first_row = row
            second_row = row
            if entry(TABLES, "a1_gathered", STAGE) == 1:
                first_row = tl.load(permutation + row, mask=live, other=0)
            if entry(TABLES, "a2_gathered", STAGE) == 1:
                second_row = tl.load(permutation + row, mask=live, other=0)
            round_rows_group(
                places[field + FIRST],
                places[field + SECOND],
                places[field + ROUNDED],
                places[field + SCALE],
                first_row * entry(TABLES, "a1_row", STAGE) + branch * entry(TABLES, "a1_branch", STAGE),
                second_row * entry(TABLES, "a2_row", STAGE),
                row * (inputs * n) + branch * n,
                row * inputs + branch,
                live,
                zero,
                k1,
                k2,
                n,
                LARGEST,
                rounded_rows,
                block,
            )
    elif kind == MUTUAL_TABLE:
        table_branches: tl.constexpr = power_of_2(M_PADDED, 0, 16)
        table_block: tl.constexpr = table_columns(n, table_branches)
        for done in range(0, ITEM_ROWS):
            row = first + part * ITEM_ROWS + done
            if row < end:
                scenario = tl.sum(scenario_of(offsets, row0 + row + tl.zeros((1,), tl.int64), M, M_PADDED), 0)
                table_row(
                    places[field + STREAMS],
                    places[field + GATE],
                    places[field + ALPHA],
                    places[field + MUTUAL],
                    places[field + MIXED],
                    inverse_temperature,
                    scenario,
                    row,
                    tl.load(permutation + row),
                    zero,
                    KEEP,
                    M,
                    table_branches,
                    n,
                    entry(TABLES, "gate", STAGE),
                    SCORE,
                    table_block,
                )
    else:
        whole: tl.constexpr = power_of_2(n, 0) * M_PADDED <= WHOLE_ELEMENTS
        columns: tl.constexpr = power_of_2(n, 0 if whole else 64)
        group: tl.constexpr = group_rows(GROUP_ELEMENTS, columns * M_PADDED, ITEM_ROWS)
        for done in range(0, ITEM_ROWS, group):
            row = first + part * ITEM_ROWS + done + tl.arange(0, group)
            live = row < end
            caller = tl.load(permutation + row, mask=live, other=0)
            v_row = row
            if entry(TABLES, "a1_gathered", STAGE) == 1:
                v_row = caller
            if kind == MUTUAL_OWN_ROW:
                mutual_row = row
                if entry(TABLES, "out_gathered", STAGE) == 1:
                    mutual_row = caller
                own_row_group(
                    places[field + STREAMS],
                    places[field + GATE],
                    places[field + ALPHA],
                    places[field + MUTUAL],
                    inverse_temperature,
                    t,
                    row,
                    v_row,
                    caller,
                    mutual_row,
                    live,
                    zero,
                    M,
                    M_PADDED,
                    n,
                    entry(TABLES, "gate", STAGE),
                    SCORE,
                    group,
                    columns,
                    whole,
                )
            elif kind == MUTUAL_BACKWARD:
                own_row_backward_group(
                    places[field + STREAMS],
                    places[field + GATE],
                    places[field + ALPHA],
                    places[field + D_MUTUAL],
                    places[field + D_OWN],
                    places[field + D_GATE],
                    inverse_temperature,
                    t,
                    row,
                    v_row,
                    caller,
                    live,
                    zero,
                    M,
                    M_PADDED,
                    n,
                    entry(TABLES, "gate", STAGE),
                    SCORE,
                    group,
                    columns,
                    whole,
                )


@triton.constexpr_function
def power_of_2(count: int, limit: int, least: int = 1) -> int:
    """The next power of two, at most ``limit`` where that is not 0, at least ``least``."""
    power: int = max(triton.next_power_of_2(count), least)
    return min(power, limit) if limit else power


@triton.constexpr_function
def group_rows(elements: int, columns: int, most: int) -> int:
    """Rows whose blocks hold ``elements`` together."""
    return max(1, min(elements // columns, most))


@triton.constexpr_function
def table_columns(width: int, branches: int) -> int:
    """Columns of d that the table takes at a time; the matrix unit wants 16, more than these spill."""
    return max(16, min(triton.next_power_of_2(width), {16: 64, 32: 16, 64: 16}[branches]))
