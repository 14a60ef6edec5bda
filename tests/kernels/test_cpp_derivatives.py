"""Gradients of the compiled CPU kernels: what requires one gets one, once and twice."""

import pytest
import torch
from cpp_runs import CPP_ONLY, NAMES, TRAINED
from problems import assert_close, make

import saml_kernels
from saml_kernels.layers import MultiBranchMLP

pytestmark = CPP_ONLY


def gradient_of(problem, names, backend, second=False):
    """Gradients of what requires one, and nothing anywhere else."""
    leaves = problem.map(lambda t: t.clone())
    tensors = dict(leaves.named())
    wanted = [tensors[name].requires_grad_() for name in names]
    out = leaves.run(backend=backend)
    total = out.own.square().sum() + out.aux.square().sum()
    if second:
        first = torch.autograd.grad(total, wanted, create_graph=True)
        total = sum(gradient.square().sum() for gradient in first)
    total.backward()
    assert all(tensor.grad is None for name, tensor in tensors.items() if name not in names)
    return {name: tensor.grad for name, tensor in zip(names, wanted, strict=True)}


@pytest.mark.parametrize("only", NAMES)
def test_only_one_tensor_requires_a_gradient(only):
    problem = make(TRAINED)
    everything = gradient_of(problem, NAMES, "cpp")
    assert torch.equal(gradient_of(problem, [only], "cpp")[only], everything[only])
    assert_close(
        gradient_of(problem, [only], "cpp", second=True), gradient_of(problem, [only], "reference", second=True), 1e-10
    )


def test_nothing_requires_a_gradient():
    out = make(TRAINED).run(backend="cpp")
    assert not out.own.requires_grad
    assert not out.aux.requires_grad


def test_double_backward_is_the_references():
    problem = make(TRAINED)
    out = gradient_of(problem, NAMES, "cpp", second=True)
    assert_close(out, gradient_of(problem, NAMES, "reference", second=True), 1e-10)


@pytest.mark.parametrize("operation", ["multi_branch", "grouped_mlp", "mutual_unit"])
def test_double_backward_where_inputs_are_computed_from_each_other(operation):
    """The gradient of one input must not go on through another, in the first derivative or the second."""
    torch.manual_seed(0)
    scenario = torch.arange(20) % 3
    trunk = MultiBranchMLP(3, 5, 4, (7, 2), activation="tanh", dtype=torch.float64)
    start = torch.randn(20, 3, 5, dtype=torch.float64)

    def function(x, backend):
        if operation == "multi_branch":
            trunk.backend = backend
            return trunk(x, x[:, 0, :4], scenario).own
        if operation == "grouped_mlp":
            return saml_kernels.grouped_mlp(
                x[:, 0], scenario, [x[:3, :1].mT], [x[:3, 0, :1]], activation="tanh", backend=backend
            )
        return saml_kernels.mutual_unit(x, scenario, x[:3].mean(1)[:, :, None], x[:3, 0, :1], backend=backend)

    results = []
    for backend in ("cpp", "reference"):
        x = start.clone().requires_grad_()
        out = function(x, backend)
        (plain,) = torch.autograd.grad(out.square().sum(), x, retain_graph=True)
        (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        results.append({"plain": plain, "first": first.detach(), "second": second})
    assert_close(*results, 1e-10)
