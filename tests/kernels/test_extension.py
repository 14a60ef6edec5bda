"""What the extension tells about itself: the names behind the numbers that its operators take."""

import pytest
import torch
from cpp_runs import CPP_ONLY

from saml_kernels import extension

pytestmark = CPP_ONLY


def test_names_of_activations():
    assert extension.activation_names() == ("relu", "leaky_relu", "gelu", "silu", "tanh", "identity")


def test_names_of_scores():
    assert extension.score_names() == ("ratio", "softmax")


def test_where_the_derivative_needs_the_preactivation():
    """δ' follows from δ(z) where δ is monotone."""
    needs = dict(zip(extension.activation_names(), extension._C.activations_need_preact(), strict=True))
    assert {name for name, needed in needs.items() if needed} == {"gelu", "silu"}


@pytest.mark.parametrize("number", [-1, 6])
def test_a_number_without_an_activation(number):
    x, permutation, offsets = torch.randn(2, 3), torch.arange(2), torch.tensor([0, 2])
    lists = [torch.randn(1, 3, 4)], [torch.randn(1, 4)], [], [], [], []
    options = [], [number], 0, 1.0, False, False, None, 1.0, False, False, False
    with pytest.raises(ValueError, match=rf"activations must lie in \[0, 6\), got {number}"):
        torch.ops.saml_kernels.trunk_forward(x, x[:, :0], permutation, offsets, *lists, *options)


@pytest.mark.parametrize("number", [-1, 2])
def test_a_number_without_a_score(number):
    streams, weight = torch.randn(2, 1, 3), torch.randn(1, 3, 3)
    permutation, offsets = torch.arange(2), torch.tensor([0, 2])
    with pytest.raises(ValueError, match=rf"score must lie in \[0, 2\), got {number}"):
        torch.ops.saml_kernels.mutual_forward(streams, permutation, offsets, weight, weight[0], number, 1.0, False)


def test_both_passes_take_the_same_trunk():
    """The eighteen arguments that describe it stand in a row in both schemas."""
    forward, backward = (
        [argument.name for argument in getattr(torch.ops.saml_kernels, name).default._schema.arguments]
        for name in ("trunk_forward", "trunk_backward")
    )
    trunk = forward[: forward.index("gate_scale") + 1]
    assert len(trunk) == 18
    assert backward == ["grad_own", "grad_aux", "scores", "saved", *trunk, "recompute", "need_local", "need_global"]
