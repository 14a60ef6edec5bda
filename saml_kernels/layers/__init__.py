"""Drop-in modules over the functions of :mod:`saml_kernels.functional`.

Weights and biases start as those of nn.Linear, branch by branch: uniform in ±1/√(inputs).
"""

from saml_kernels.layers.mixture import MixtureOfExperts, ScoreMixture
from saml_kernels.layers.star import STARMLP, PartitionedNorm
from saml_kernels.layers.trunk import GroupedMLP, MultiBranchMLP, MutualUnit

__all__ = [
    "STARMLP",
    "GroupedMLP",
    "MixtureOfExperts",
    "MultiBranchMLP",
    "MutualUnit",
    "PartitionedNorm",
    "ScoreMixture",
]
