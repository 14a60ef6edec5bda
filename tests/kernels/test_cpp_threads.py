"""The compiled CPU kernels give the same bits on any number of threads, in threads and in forked processes."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from cpp_runs import CPP_ONLY, SEVERAL_TILES, assert_identical, run
from problems import Case, make
from torch.utils.data import DataLoader, Dataset

import saml_kernels

pytestmark = CPP_ONLY


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", SEVERAL_TILES, ids=str)
def test_results_are_the_same_bits(case, dtype, keep_num_threads):
    """Whatever the number of threads, from run to run, and with the streams computed again."""
    problem = make(case).to(dtype)
    torch.set_num_threads(1)
    once = run(problem, recompute=False)
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        for recompute in (False, True):
            assert_identical(run(problem, recompute=recompute), once)


def test_weights_laid_out_by_the_threads_of_a_call_before_are_not_read(keep_num_threads, monkeypatch):
    """Threads lay the transposes of bfloat16 weights out in memory that the next call uses again; no thread does where
    there are as many as scenarios."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator).bfloat16()

    x, scenario, weight, bias = draw(1603, 700), torch.full((1603,), 3), draw(4, 700, 512), draw(4, 512)
    operator, calls = torch.ops.saml_kernels.trunk_backward, []

    def recorded(*arguments):
        calls.append(arguments)
        return operator(*arguments)

    monkeypatch.setattr(torch.ops.saml_kernels, "trunk_backward", recorded)
    leaf = x.requires_grad_()
    saml_kernels.grouped_mlp(leaf, scenario, [weight], [bias], backend="cpp").sum().backward()
    (arguments,) = calls

    def gradient(threads):
        torch.set_num_threads(threads)
        # A copy, so that the next call finds the memory of this one.
        return operator(*arguments)[0].clone()

    before = gradient(1)
    weight.add_(1)
    by_thread = gradient(1)
    assert torch.equal(by_thread, gradient(4))
    assert not torch.equal(by_thread, before)


# One tile, whose products are large enough for the threads to share them out. Of 3 and 4 threads some take columns of a
# matrix: 96 of them and what is left.
SHARED_TILE = [
    Case(M=5, B=1, local_dim=133, hidden_dims=(301, 205), aux_dims=(217, 301), activation="relu"),
    Case(M=2, B=13, hidden_dims=(217, 301, 133), aux_dims=(301, 301, 301), mutual_layers=(1, 2), activation="silu"),
    Case(M=3, B=64, hidden_dims=(301, 133), aux_dims=(133, 217), per_branch=True, foreign_dtype=torch.bfloat16),
    Case(M=6, B=96, hidden_dims=(301, 133), aux_dims=(133, 217), mutual_layers=(), activation="gelu"),
    # So many rows of so many branches that their scores are shared out as well.
    Case(M=6, B=96, hidden_dims=(301, 133), aux_dims=(133, 217), gate="scalar", activation="gelu"),
    Case(M=6, B=96, hidden_dims=(257, 301, 133), aux_dims=(65, 133, 217), mutual_layers=(1, 2)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", SHARED_TILE, ids=str)
def test_results_of_few_rows_are_the_same_bits(case, dtype, keep_num_threads):
    problem = make(case).to(dtype)
    torch.set_num_threads(1)
    once = run(problem)
    for threads in (2, 3, 4):
        torch.set_num_threads(threads)
        assert_identical(run(problem), once)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_rows_of_weights_larger_than_caches(dtype, keep_num_threads):
    """They are read past the caches, as far as rows follow that are read together; the bits are those of many rows."""
    problem = make(Case(M=48, B=30, local_dim=253, hidden_dims=(509, 66), aux_dims=(510, 66))).to(dtype)
    torch.set_num_threads(2)
    with torch.no_grad():
        many = problem.run(backend="cpp")
        for rows in (1, 2, 3, 9, 24):
            few = problem.rows(slice(0, rows)).run(backend="cpp")
            assert torch.equal(few.own, many.own[:rows])
            assert torch.equal(few.aux, many.aux[:rows])


@pytest.mark.parametrize("rows", [1, 13, 64])
def test_all_branches_and_kept_layouts_of_few_rows_are_the_same_bits(rows, keep_num_threads):
    """Column blocks of kept panels, and of the layers that every branch runs."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    x, gated, scenario = draw(rows, 301), draw(rows, 301), torch.randint(3, (rows,), generator=generator)
    weights = [draw(3, 301, 217).requires_grad_(), draw(3, 217, 301).requires_grad_()]
    biases = [draw(3, 217).requires_grad_(), draw(3, 301).requires_grad_()]

    def outputs():
        arguments = x, scenario, weights, biases
        return [
            saml_kernels.branch_scores(*arguments, backend="cpp"),
            saml_kernels.grouped_mlp(*arguments, gated=gated, backend="cpp"),
        ]

    torch.set_num_threads(1)
    with torch.no_grad():
        once = outputs()
        for threads in (2, 3, 4):
            torch.set_num_threads(threads)
            with saml_kernels.keep_layouts():
                kept = outputs()
            for results in (outputs(), kept):
                assert all(torch.equal(out, ref) for out, ref in zip(results, once, strict=True))


NUM_THREADS = """
import os
import torch
from saml_kernels import extension
torch.set_num_threads(3)
streams, weight = torch.randn(500, 2, 8), torch.randn(2, 8, 8)
permutation, offsets = torch.arange(500), torch.tensor([0, 250, 500])
before = len(os.listdir("/proc/self/task"))
torch.ops.saml_kernels.mutual_forward(streams, permutation, offsets, weight, weight[0], 0, 1.0, False)
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc to count threads")
def test_the_threads_of_torch_are_used():
    """An extension compiled without OpenMP runs at::parallel_for on one thread, silently."""
    result = subprocess.run([sys.executable, "-c", NUM_THREADS], capture_output=True, text=True, check=True)
    assert int(result.stdout) == 2


def test_calls_from_several_python_threads():
    inputs = [make(case).to(torch.float32) for case in SEVERAL_TILES]
    alone = [run(problem) for problem in inputs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(run, inputs * 4))
    for out, ref in zip(together, alone * 4, strict=True):
        assert_identical(out, ref)


class Outputs(Dataset):
    def __init__(self, problem):
        self.problem = problem

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return run(self.problem)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_inside_a_forked_data_loader_worker(keep_num_threads):
    torch.set_num_threads(2)
    problem = make(SEVERAL_TILES[0]).to(torch.float32)
    here = run(problem)
    loader = DataLoader(Outputs(problem), batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=60)
    (there,) = loader
    assert_identical(there, here)
