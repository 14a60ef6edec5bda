"""Shared by the tests of the compiled CPU kernels: instruction sets, problems, a run with every gradient."""

import pytest
import torch
from problems import FLOAT32_TOLERANCE, Case, make, with_gradients

from saml_kernels import extension

CPP_ONLY = [
    pytest.mark.cpu,
    pytest.mark.skipif(extension.EXTENSION_MISSING is not None, reason=str(extension.EXTENSION_MISSING)),
]

VARIABLE = "SAML_KERNELS_CPU_CAPABILITY"
INFO = extension.build_info()
CAPABILITIES = [] if INFO is None else INFO["cpu_capabilities"]
# Judged against sums in another order: the ratio divides by a sum of cosines, which costs a digit or two.
TOLERANCE = {torch.float32: FLOAT32_TOLERANCE, torch.float64: 1e-12}

# The last tile is short, and a tile holds rows of more than one scenario.
SEVERAL_TILES = [
    Case(M=5, B=1003, local_dim=33, hidden_dims=(33, 17), aux_dims=(17, 9), activation="relu"),
    Case(M=3, B=1003, hidden_dims=(17, 33, 5), aux_dims=(9, 7, 5), mutual_layers=(1, 2), activation="gelu"),
    Case(M=4, B=1003, hidden_dims=(33, 17), aux_dims=(9, 7), per_branch=True, foreign_dtype=torch.bfloat16),
    Case(M=6, B=1003, hidden_dims=(17, 9), aux_dims=(9, 7), mutual_layers=()),
    # Whole panels, which tiles lay out for each other while they multiply.
    Case(M=2, B=1003, local_dim=32, hidden_dims=(96, 64), aux_dims=(64, 32), activation="relu"),
]

TRAINED = Case(activation="tanh", mutual_layers=(1, 2))
NAMES = [name for name, _ in make(TRAINED).named()]


def run(problem, **options):
    options = {"backend": "cpp", "return_scores": True} | options
    return with_gradients(lambda p: p.run(**options), problem)


def assert_identical(out, ref):
    assert out.keys() == ref.keys()
    different = [name for name in ref if not torch.equal(out[name], ref[name])]
    assert not different
