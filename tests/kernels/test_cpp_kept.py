"""The compiled CPU kernels on few rows, and on layouts of weights that are kept between calls."""

import dataclasses
import threading

import pytest
import torch
from cpp_runs import CPP_ONLY
from problems import Case, make

import saml_kernels

pytestmark = CPP_ONLY

# Wide enough that few rows stream the weights, with a remainder in every direction.
CASE = Case(M=3, B=41, local_dim=37, global_dim=18, hidden_dims=(133, 71), aux_dims=(66, 129), mutual_layers=(1, 2))


def outputs(problem, **options):
    with torch.no_grad():
        out = problem.run(backend="cpp", return_scores=True, **options)
    return [out.own, out.aux, *(alpha for alpha in out.scores if alpha is not None)]


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gate", ["vector", "scalar"])
def test_a_row_does_not_depend_on_how_many_there_are(gate, dtype, capability):
    """However a weight is read for so many rows: in place, packed, laid out."""
    problem = make(dataclasses.replace(CASE, B=400, gate=gate)).to(dtype)
    whole = outputs(problem)
    for rows in (*range(1, 27), 60, 96, 97, 150):
        few = outputs(problem.rows(slice(7, 7 + rows)))
        for out, ref in zip(few, whole, strict=True):
            if capability == "amx":  # Its products in tiles round otherwise.
                torch.testing.assert_close(out, ref[7 : 7 + rows], rtol=1e-5, atol=1e-5)
            else:
                assert torch.equal(out, ref[7 : 7 + rows]), rows


@pytest.mark.parametrize("foreign_dtype", [None, torch.bfloat16, torch.int8])
def test_results_are_the_same_bits(foreign_dtype, capability):
    problem = make(dataclasses.replace(CASE, foreign_dtype=foreign_dtype)).to(torch.float32).leaves()
    for rows in (1, 8, 9, 24, 25, 41):
        batch = problem.rows(slice(0, rows))
        expected = outputs(batch)
        with saml_kernels.keep_layouts():
            for _ in range(3):
                assert same(outputs(batch), expected)


def test_experts_and_towers():
    torch.manual_seed(0)
    weights = [torch.randn(3, k, n, requires_grad=True) for k, n in ((9, 70), (70, 33))]
    biases = [torch.randn(3, n, requires_grad=True) for n in (70, 33)]
    x, scenario = torch.randn(5, 9), torch.tensor([0, 2, 1, 1, 0])

    def both():
        with torch.inference_mode():
            towers = saml_kernels.grouped_mlp(x, scenario, weights, biases, backend="cpp")
            return [towers, saml_kernels.expert_outputs(x, weights, biases, backend="cpp")]

    expected = both()
    with saml_kernels.keep_layouts():
        assert same(both(), expected)
        assert same(both(), expected)
        with torch.no_grad():
            weights[1].mul_(2)
        changed = both()
    assert not same(changed, expected)
    assert same(changed, both())


def write(problem, value):
    problem.params.branch_weights[0].fill_(value)


def load(problem, value):
    module = torch.nn.Module()
    module.weight = problem.params.branch_weights[0]
    module.load_state_dict({"weight": torch.full_like(module.weight, value)})


@pytest.mark.parametrize("change", [write, load])
def test_a_write_is_seen(change):
    problem = make(CASE).to(torch.float32).leaves()
    problem = problem.map(lambda t: torch.nn.Parameter(t.detach().clone()))
    with saml_kernels.keep_layouts():
        before = outputs(problem)
        assert same(outputs(problem), before)
        with torch.no_grad():
            change(problem, 0.25)
        after = outputs(problem)
    assert not same(after, before)
    assert same(after, outputs(problem))


def test_a_write_through_data_is_seen_in_the_next_block():
    """Within the block it is not: this shows that layouts are kept at all."""
    problem = make(CASE).to(torch.float32).leaves()
    with saml_kernels.keep_layouts():
        before = outputs(problem)
        with saml_kernels.keep_layouts():
            problem.params.branch_weights[0].data.zero_()
        assert same(outputs(problem), before)
    after = outputs(problem)
    assert not same(after, before)
    with saml_kernels.keep_layouts():
        assert same(outputs(problem), after)


def test_training_and_what_is_no_parameter_keep_nothing():
    problem = make(CASE).to(torch.float32)
    with saml_kernels.keep_layouts():
        before = outputs(problem)
        problem.params.branch_weights[0].data.zero_()
        assert not same(outputs(problem), before)
        trained = problem.leaves()
        own = trained.run(backend="cpp").own.detach()
        trained.params.branch_weights[0].data.fill_(0.5)
        assert not torch.equal(trained.run(backend="cpp").own, own)


def test_memory_that_comes_free_is_no_other_weight():
    """A weight that is kept stays, so that no other one can take its place."""
    expected = [outputs(make(dataclasses.replace(CASE, seed=seed)).to(torch.float32)) for seed in range(4)]
    with saml_kernels.keep_layouts():
        for seed in range(4):
            assert same(outputs(make(dataclasses.replace(CASE, seed=seed)).to(torch.float32).leaves()), expected[seed])


def test_several_threads():
    problem = make(CASE).to(torch.float32).leaves()
    expected, wrong = outputs(problem), []

    def serve():
        for _ in range(5):
            if not same(outputs(problem), expected):
                wrong.append(threading.get_ident())

    with saml_kernels.keep_layouts():
        threads = [threading.Thread(target=serve) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_an_end_without_a_beginning():
    with pytest.raises(RuntimeError, match="without a keep_layouts"):
        torch.ops.saml_kernels.keep_layouts(False)
