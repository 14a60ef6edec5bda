"""What the extension tells about itself: the names behind the numbers that its operators take."""

import shutil
import subprocess
import sys

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
    needs = dict(zip(extension.activation_names(), extension.activations_need_preact(), strict=True))
    assert {name for name, needed in needs.items() if needed} == {"gelu", "silu"}


@pytest.mark.parametrize("number", [-1, 6])
def test_a_number_without_an_activation(number):
    x, permutation, offsets = torch.randn(2, 3), torch.arange(2), torch.tensor([0, 2])
    lists = [torch.randn(1, 3, 4)], [torch.randn(1, 4)], [], [], [], [], []
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
    """The nineteen arguments that describe it stand in a row in both schemas."""
    forward, backward, weights = (
        [argument.name for argument in getattr(torch.ops.saml_kernels, name).default._schema.arguments]
        for name in ("trunk_forward", "trunk_backward", "trunk_weight_gradients")
    )
    trunk = forward[: forward.index("gate_scale") + 1]
    assert len(trunk) == 19
    saved = ["scores", "factors", "saved"]
    assert backward == ["grad_own", "grad_aux", *saved, *trunk, "recompute", "need_local", "need_global"]
    assert weights == ["preact_gradients", "factors", *trunk]


def test_the_library_asks_nothing_of_python():
    """A C++ process loads it as it is."""
    if shutil.which("nm") is None:
        pytest.skip("binutils are not installed")
    path = extension.library_path(torch.__version__)
    symbols = subprocess.run(("nm", "-D", "--undefined-only", path), capture_output=True, text=True, check=True).stdout
    names = [line.split()[-1] for line in symbols.splitlines()]
    assert len(names) > 20
    assert [name for name in names if name.lstrip("_").startswith("Py") or "pybind" in name] == []


def imported_with(torch_version, *options):
    """The package in a process of its own, whose torch says that it is of another version."""
    code = f"""
import torch
torch.__version__ = {torch_version!r}
import saml_kernels
print(saml_kernels.available_backends()["cpp"])
"""
    return subprocess.run((sys.executable, *options, "-c", code), capture_output=True, text=True, check=False)


def test_a_library_for_another_torch_warns():
    built = extension.release(torch.__version__)
    done = imported_with("99.1.0+cpu")
    assert "ImportWarning: saml_kernels runs without its C++ kernels: the compiled extension was built for torch" in (
        done.stderr
    )
    reason = "and this is torch 99.1.0+cpu: rebuild it against this torch"
    assert built in done.stderr
    assert reason in done.stderr
    assert reason in done.stdout


def test_what_the_user_says_of_warnings_comes_first():
    assert imported_with("99.1.0", "-W", "ignore::ImportWarning").stderr == ""
    failed = imported_with("99.1.0", "-W", "error::ImportWarning")
    assert failed.returncode == 1
    assert "rebuild it against this torch" in failed.stderr


def test_a_later_version_of_the_same_release_loads():
    done = imported_with(f"{extension.release(torch.__version__)}.99+cu999")
    assert (done.stdout, done.stderr) == ("None\n", "")
