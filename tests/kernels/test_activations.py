"""The table of activations: its rows are what they say, and no other part of the package has others."""

import runpy

import click
import pytest
import torch
from torch import nn

from saml_kernels import activations, extension
from saml_kernels.activations import ACTIVATIONS, Activation
from saml_kernels.backends.triton import availability
from saml_rec.models.hyperparameters import HYPERPARAMETERS

LOADED = pytest.mark.skipif(extension.EXTENSION_MISSING is not None, reason=str(extension.EXTENSION_MISSING))
MISH = Activation("mish", torch.nn.functional.mish, nn.Mish, needs_preact=True)


def with_a_row_more():
    return ACTIVATIONS | {"mish": MISH}


def in_another_order():
    first, second, *rest = ACTIVATIONS.items()
    return dict([second, first, *rest])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_row_s_function_and_module_are_the_same(name):
    z = torch.linspace(-4, 4, 101, dtype=torch.float64)
    row = ACTIVATIONS[name]
    assert row.name == name
    assert torch.equal(row.function(z), row.module()(z))
    assert activations.name_of(row.module()) == name


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_slope_at_the_kink(name):
    z = torch.tensor([-1e-9, 1e-9], dtype=torch.float64, requires_grad=True)
    below, above = torch.autograd.grad(ACTIVATIONS[name].function(z).sum(), z)[0].tolist()
    slope = ACTIVATIONS[name].slope_below_kink
    if slope is None:
        assert below == pytest.approx(above, abs=1e-6)
    else:
        assert (below, above) == (slope, 1.0)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_derivative_follows_from_the_value_where_no_preactivation_is_needed(name):
    """Two z of one value and other slopes are what makes it needed: only a function that turns has them."""
    z = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    value = ACTIVATIONS[name].function(z)
    assert bool((value.diff() >= 0).all()) != ACTIVATIONS[name].needs_preact


@pytest.mark.parametrize("module", [nn.LeakyReLU(0.02), nn.GELU(), nn.Mish(), nn.Linear(1, 1)])
def test_no_row_computes_another_module(module):
    assert activations.name_of(module) is None


def test_no_row_computes_a_subclass():
    class Loud(nn.ReLU):
        pass

    assert activations.name_of(Loud()) is None


@LOADED
@pytest.mark.parametrize("table", [with_a_row_more(), in_another_order()])
def test_an_extension_of_other_activations_is_refused(monkeypatch, table):
    extension.check_numbering()
    monkeypatch.setattr(extension, "ACTIVATIONS", table)
    with pytest.raises(ImportError, match=rf"must be {', '.join(table)}, .*; found relu, leaky_relu, gelu"):
        extension.check_numbering()


@LOADED
def test_an_extension_that_keeps_other_preactivations_is_refused(monkeypatch):
    table = ACTIVATIONS | {"tanh": Activation("tanh", torch.tanh, nn.Tanh, needs_preact=True)}
    monkeypatch.setattr(extension, "ACTIVATIONS", table)
    with pytest.raises(ImportError, match=r"pre-activation must be .*tanh=True.*; found .*tanh=False"):
        extension.check_numbering()


@LOADED
def test_an_extension_of_other_scores_is_refused(monkeypatch):
    monkeypatch.setattr(extension, "SCORES", ("softmax", "ratio"))
    with pytest.raises(ImportError, match=r"scores of saml_kernels._ops must be softmax, ratio.*; found ratio"):
        extension.check_numbering()


@pytest.mark.skipif(availability.MISSING is not None, reason=str(availability.MISSING))
def test_triton_without_device_functions_for_a_row_is_refused(monkeypatch):
    monkeypatch.setattr(activations, "ACTIVATIONS", with_a_row_more())
    with pytest.raises(
        ImportError, match=r"Triton kernels must be .*identity, mish, sigmoid.*; found .*identity, sigm"
    ):
        runpy.run_module("saml_kernels.backends.triton.kernels.activations")


def test_the_command_line_takes_every_row(monkeypatch):
    option = HYPERPARAMETERS["activation"].type
    monkeypatch.setattr(activations, "ACTIVATIONS", with_a_row_more())
    assert [option.convert(name, None, None) for name in with_a_row_more()] == list(with_a_row_more())
    with pytest.raises(click.BadParameter, match=r"'swish' is not one of 'relu'.*'mish'"):
        option.convert("swish", None, None)
