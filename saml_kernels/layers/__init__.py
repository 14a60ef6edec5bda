"""Drop-in modules over the functions of :mod:`saml_kernels.functional`.

Weights and biases start as those of nn.Linear, branch by branch: uniform in ±1/√(inputs).
"""

from saml_kernels.layers.grouped_mlp import GroupedMLP
from saml_kernels.layers.grouped_sequential import GroupedBatchNorm, GroupedSequential
from saml_kernels.layers.mixture import MixtureOfExperts, ScoreMixture
from saml_kernels.layers.pepnet import GatedTowers, GateUnit
from saml_kernels.layers.ple import ProgressiveExperts
from saml_kernels.layers.saml import MultiBranchMLP, MutualUnit
from saml_kernels.layers.star import STARMLP, PartitionedNorm

__all__ = [
    "STARMLP",
    "GateUnit",
    "GatedTowers",
    "GroupedBatchNorm",
    "GroupedMLP",
    "GroupedSequential",
    "MixtureOfExperts",
    "MultiBranchMLP",
    "MutualUnit",
    "PartitionedNorm",
    "ProgressiveExperts",
    "ScoreMixture",
]
