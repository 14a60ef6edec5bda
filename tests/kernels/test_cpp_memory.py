"""The memory that the compiled CPU kernels keep between calls."""

import copy
import dataclasses
import random
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from cpp_runs import CPP_ONLY
from problems import Case, make

import saml_kernels

pytestmark = CPP_ONLY

VARIABLE = "SAML_KERNELS_KEEP_MEMORY"
MIB = 2**20
LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")
# Weights of 2 to 4 MiB; with 800 rows what is saved is larger than they are.
CASE = Case(M=3, B=40, local_dim=300, global_dim=40, hidden_dims=(310, 305), aux_dims=(290, 60), mutual_layers=(1,))
TINY = Case(M=2, B=3, local_dim=500, global_dim=7, hidden_dims=(600,), aux_dims=(20,), mutual_layers=())


@pytest.fixture(autouse=True)
def nothing_kept_from_before(monkeypatch):
    monkeypatch.setenv(VARIABLE, "1")
    saml_kernels.release_memory()
    yield
    saml_kernels.release_memory()


def problem_of(case=CASE, **changes):
    return make(dataclasses.replace(case, **changes)).to(torch.float32).leaves()


def step(problem):
    """A step's results, by name."""
    return problem.results(lambda problem: problem.run(backend="cpp"))


def large(results):
    """Where the results stand that are kept when they are gone."""
    return {tensor.data_ptr() for tensor in results.values() if tensor.nbytes >= MIB}


def same(left, right):
    return all(torch.equal(left[name], right[name]) for name in left | right)


def addresses(mapping):
    """Those of a mapping of /proc/self/smaps."""
    begin, end = mapping.split(maxsplit=1)[0].split("-")
    return range(int(begin, 16), int(end, 16))


def test_results_are_the_same_bits(monkeypatch, capability):
    problem = problem_of(B=800)
    kept = [step(problem) for _ in range(3)]
    monkeypatch.setenv(VARIABLE, "0")
    expected = step(problem)
    assert all(same(results, expected) for results in kept)


def test_the_next_step_gets_the_same_pages():
    problem = problem_of()
    first = large(step(problem))
    assert first
    assert large(step(problem)) == first
    assert large(step(problem)) == first


@pytest.mark.skipif(not LARGE_PAGES.is_dir(), reason="needs a system with pages of 2 MiB")
def test_the_system_is_asked_for_large_pages():
    result = block(1.25)
    flags = next(
        words[1:]
        for mapping in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
        if mapping and result.data_ptr() in addresses(mapping)
        for words in map(str.split, mapping.splitlines())
        if words[0] == "VmFlags:"
    )
    assert "hg" in flags


def test_what_is_in_use_stays():
    problem = problem_of()
    held = step(problem)
    before = {name: tensor.clone() for name, tensor in held.items()}
    for seed in range(1, 4):
        assert not large(step(problem_of(seed=seed))) & large(held)
    assert same(held, before)


def test_release():
    results = step(problem_of(B=800))
    held = sum(tensor.nbytes for tensor in results.values() if tensor.nbytes >= MIB)
    saml_kernels.release_memory()
    assert saml_kernels.release_memory() == 0
    del results
    assert held <= saml_kernels.release_memory() < 2 * held + MIB
    assert saml_kernels.release_memory() == 0


def test_nothing_is_kept_where_that_is_asked_for(monkeypatch):
    monkeypatch.setenv(VARIABLE, "0")
    step(problem_of())
    assert saml_kernels.release_memory() == 0


def test_a_value_that_means_nothing_is_refused(monkeypatch):
    problem = problem_of()
    monkeypatch.setenv(VARIABLE, "yes")
    with pytest.raises(ValueError, match="SAML_KERNELS_KEEP_MEMORY must be 0 or 1, got yes"):
        step(problem)


def block(mib):
    """A result of that size, and no other large block."""
    x = torch.ones(int(mib * MIB) // (2 * 32 * 4), 4)
    with torch.no_grad():
        return saml_kernels.expert_outputs(x, [torch.ones(2, 4, 32)], [torch.zeros(2, 32)], backend="cpp")


def test_kept_and_used_pages_are_no_more_than_were_once_used():
    """Gaps between blocks cannot take larger ones; their pages go back when others are touched in their place."""
    blocks = [block(1.25) for _ in range(20)]
    assert saml_kernels.release_memory() == 0
    del blocks[::2]
    blocks += [block(2.5) for _ in range(4)]
    assert saml_kernels.release_memory() == (20 * 1.25 - 10 * 1.25 - 4 * 2.5) * MIB


def test_batches_of_many_sizes():
    chosen = random.Random(0)
    step(problem_of(B=2000))
    most = saml_kernels.release_memory()
    step(problem_of(B=2000))
    held = []
    for _ in range(40):
        held = [*held[-2:], step(problem_of(B=chosen.randrange(30, 500)))]
    held.clear()
    assert 0 < saml_kernels.release_memory() <= most


def test_pages_that_nobody_needs_go_back():
    tiny = problem_of(TINY)
    step(tiny)
    step(tiny)
    needed = saml_kernels.release_memory()
    step(problem_of(B=2000))
    for _ in range(2 * 1024):
        step(tiny)
    assert saml_kernels.release_memory() == needed


def test_tensors_are_as_any_other():
    results = step(problem_of())
    gradient = max(results.values(), key=lambda tensor: tensor.nbytes)
    assert gradient.nbytes >= MIB
    assert torch.equal(copy.deepcopy(gradient), gradient)
    values = gradient.flatten().clone()
    gradient.resize_(gradient.numel() * 2)
    assert torch.equal(gradient[: values.numel()], values)


def test_several_threads():
    problems = [problem_of(seed=seed) for seed in range(4)]
    expected = [step(problem) for problem in problems]
    wrong = []

    def train(number):
        for _ in range(5):
            if not same(step(problems[number]), expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=train, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


FORKS = """
import os, sys, threading
import torch
import saml_kernels

torch.set_num_threads(1)
x = torch.ones(5000, 4)
weights, biases = [torch.ones(2, 4, 32)], [torch.zeros(2, 32)]

def call():
    with torch.no_grad():
        return saml_kernels.expert_outputs(x, weights, biases, backend="cpp")

def busy():
    while not done:
        saml_kernels.release_memory()

expected, done = call(), False
threads = [threading.Thread(target=busy) for _ in range(2)]
for thread in threads:
    thread.start()
children = []
for _ in range(50):
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(call(), expected) else 1)
    children.append(child)
codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
done = True
for thread in threads:
    thread.join()
sys.exit(any(codes))
"""


def test_a_process_that_forks_while_others_allocate():
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORKS], timeout=120, check=True)
