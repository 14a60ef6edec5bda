"""Which backend runs on the CPU, and why another one does not."""

import importlib.metadata
import importlib.util
import re

import pytest
import torch
from cpp_runs import CPP_ONLY, SEVERAL_TILES
from problems import Case, make

import saml_kernels
from saml_kernels.backends import choose_backend
from saml_kernels.backends.triton import availability

pytestmark = CPP_ONLY


@pytest.fixture
def calls(monkeypatch):
    """Which backend's functions ran, in order."""
    seen = []
    for name in ("cpp", "reference"):
        backend = choose_backend(name, "multi_branch", torch.empty(0))
        for operation in ("multi_branch", "mutual_unit"):
            function = getattr(backend, operation)

            def spy(*arguments, _function=function, _name=name, **options):
                seen.append(_name)
                return _function(*arguments, **options)

            monkeypatch.setattr(backend, operation, spy)
    return seen


def test_auto_prefers_the_extension(calls):
    make(Case()).run(backend="auto")
    assert calls == ["cpp"]


@pytest.mark.parametrize(
    ("options", "dtype", "why"),
    [
        ({"stop_gradient": False}, torch.float32, "stop_gradient=False needs the reference"),
        (
            {"foreign_dtype": torch.float8_e4m3fn},
            torch.float32,
            "foreign_dtype .* got torch.float8_e4m3fn.* no products",
        ),
        ({"foreign_dtype": torch.bfloat16}, torch.float64, "foreign_dtype .* float64"),
        ({"foreign_dtype": torch.int8}, torch.float64, "foreign_dtype .* float64"),
    ],
    ids=str,
)
def test_what_it_refuses_the_reference_runs(options, dtype, why, calls):
    problem = make(Case()).to(dtype)
    with pytest.raises(saml_kernels.BackendUnavailable, match=f"backend 'cpp' cannot run multi_branch: .*{why}"):
        problem.run(backend="cpp", **options)
    assert calls == []
    out = problem.run(backend="auto", **options)
    assert calls == ["reference"]
    assert torch.equal(out.own, problem.run(backend="reference", **options).own)


def test_the_mutual_unit_without_stop_gradient_goes_to_the_reference(calls):
    v, scenario, weight, bias = torch.randn(6, 3, 4), torch.arange(6) % 3, torch.randn(3, 4, 4), torch.randn(3, 4)
    with pytest.raises(saml_kernels.BackendUnavailable, match="stop_gradient=False needs the reference"):
        saml_kernels.mutual_unit(v, scenario, weight, bias, stop_gradient=False, backend="cpp")
    saml_kernels.mutual_unit(v, scenario, weight, bias, stop_gradient=False)
    saml_kernels.mutual_unit(v, scenario, weight, bias)
    assert calls == ["reference", "cpp"]


def test_other_devices_are_refused():
    problem = make(Case()).to(torch.float32, "meta")
    with pytest.raises(saml_kernels.BackendUnavailable, match="multi_branch kernel for meta"):
        problem.run(backend="cpp")


@pytest.mark.parametrize(
    ("name", "version", "reason"),
    [
        ("triton", "3.4.0", "triton 3.4.0 is installed, 3.5 is needed"),
        ("pytorch-triton", "2.10.1+git9e5ebf8", "triton 2.10.1+git9e5ebf8 is installed, 3.5 is needed"),
        ("triton", "3.5.0", None),
        ("triton", "3.10.0", None),
        ("triton-rocm", "4.0", None),
        ("a-fork", "3.4", None),
    ],
)
def test_an_old_triton_is_refused(name, version, reason, monkeypatch):
    def version_of(distribution):
        if distribution == name:
            return version
        raise importlib.metadata.PackageNotFoundError(distribution)

    monkeypatch.setattr(importlib.metadata, "version", version_of)
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: module == "triton" or None)
    assert availability.version_reason() == reason
    monkeypatch.setattr(availability, "MISSING", reason)
    if reason is not None:
        with pytest.raises(saml_kernels.BackendUnavailable, match=re.escape(reason)):
            choose_backend("triton", "multi_branch", torch.empty(0))


def test_no_triton_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    assert availability.version_reason() == "triton is not installed"


@pytest.mark.parametrize(
    "options",
    [{}, {"foreign_dtype": torch.bfloat16}, {"foreign_dtype": torch.int8}],
    ids=["full", "bfloat16", "int8"],
)
def test_autocast(options, calls):
    problem = make(SEVERAL_TILES[0]).to(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        leaves = problem.leaves()
        out = leaves.run(**options)
    assert calls == ["cpp"]
    low = problem.to(torch.bfloat16)
    assert out.own.dtype == torch.bfloat16
    assert torch.equal(out.own, low.run(backend="cpp", **options).own)
    gradient = torch.autograd.grad(out.own.float().sum(), leaves.x_local)[0]
    assert gradient.dtype == torch.float32
    assert gradient.isfinite().all()
