"""How the CPU kernels cut the rows of a batch into tiles: csrc/cpu/row_tiles.h, compiled by itself."""

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

CSRC = Path(__file__).parents[2] / "csrc"
MOST_ROWS = 96
PROGRAM = """
#include <cstdio>

#include "cpu/row_tiles.h"

int main() {
  long rows, whole, least, threads;
  while (std::scanf("%ld %ld %ld %ld", &rows, &whole, &least, &threads) == 4) {
    const saml_kernels::RowTiles tiles = saml_kernels::row_tiles(rows, {whole, least}, threads);
    std::printf("%ld", static_cast<long>(tiles.most_rows()));
    for (long i = 0; i < tiles.count; ++i) {
      std::printf(" %ld %ld", static_cast<long>(tiles.begin(i)), static_cast<long>(tiles.end(i)));
    }
    std::printf("\\n");
    std::fflush(stdout);
  }
}
"""


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """cut(rows, multiples, threads) = (rows of the longest, its tiles as ranges)."""
    folder = tmp_path_factory.mktemp("row_tiles")
    source, program = folder / "tiles.cpp", folder / "tiles"
    source.write_text(PROGRAM)
    compiler = os.environ.get("CXX", "c++")
    subprocess.run(
        [compiler, "-std=c++20", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}", source, "-o", program], check=True
    )
    with subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as process:

        def ask(rows, multiples, threads):
            print(rows, *multiples, threads, file=process.stdin, flush=True)
            most, *ends = map(int, process.stdout.readline().split())
            return most, [range(begin, end) for begin, end in zip(ends[::2], ends[1::2], strict=True)]

        yield ask
        process.stdin.close()


multiples_of_kernels = st.sampled_from([(12, 4), (6, 4), (4, 4), (32, 32)])


@given(rows=st.integers(0, 20000), multiples=multiples_of_kernels, threads=st.integers(1, 70))
@example(rows=0, multiples=(12, 4), threads=2)
@example(rows=1, multiples=(32, 32), threads=64)
@example(rows=96, multiples=(12, 4), threads=1)
def test_tiles(cut, rows, multiples, threads):
    most, tiles = cut(rows, multiples, threads)
    assert [row for tile in tiles for row in tile] == list(range(rows))
    assert all(tiles)
    whole, least = multiples
    multiple = whole if rows >= 32 * whole * threads else least
    assert all(tile.start % multiple == 0 for tile in tiles)
    lengths = [len(tile) for tile in tiles]
    assert max(lengths, default=0) <= most <= MOST_ROWS
    # The last one ends with the batch.
    assert lengths[:-1] == sorted(lengths[:-1], reverse=True)
    assert max(lengths, default=0) - min(lengths, default=0) < 2 * multiple
    # Every thread gets as many, two at least, and no more than so many rows need.
    wanted = max(2 * threads if threads > 1 else 1, -(-rows // MOST_ROWS))
    if rows >= multiple * (wanted + threads):
        assert len(tiles) % threads == 0
        assert wanted <= len(tiles) < wanted + threads
        shares = [sum(lengths[thread::threads]) for thread in range(threads)]
        assert max(shares) - min(shares) < 2 * multiple


def test_batches_that_were_uneven(cut):
    """Once one of 56 rows behind eleven of 88, and 22 tiles for one thread where the other got 21."""
    _, tiles = cut(1024, (12, 4), 2)
    assert [len(tile) for tile in tiles] == [96] * 2 + [84] * 9 + [76]
    _, tiles = cut(4096, (12, 4), 2)
    assert [len(tile) for tile in tiles] == [96] * 34 + [84] * 9 + [76]
