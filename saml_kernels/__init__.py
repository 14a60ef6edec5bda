"""Fused kernels for multi-scenario recommenders: all scenario branches and their mutual scoring at once."""

from saml_kernels import layers
from saml_kernels.backends import BackendUnavailable, available_backends
from saml_kernels.functional import branch_scores, expert_outputs, grouped_mlp, multi_branch, mutual_unit
from saml_kernels.fusion import DomainIndicatorAdapter, FusedTowerDict, FusedTowers, fuse
from saml_kernels.grouping import group_by_scenario
from saml_kernels.kept import keep_layouts, release_memory
from saml_kernels.types import Grouping, TrunkOutput, TrunkParams

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "DomainIndicatorAdapter",
    "FusedTowerDict",
    "FusedTowers",
    "Grouping",
    "TrunkOutput",
    "TrunkParams",
    "available_backends",
    "branch_scores",
    "expert_outputs",
    "fuse",
    "group_by_scenario",
    "grouped_mlp",
    "keep_layouts",
    "layers",
    "multi_branch",
    "mutual_unit",
    "release_memory",
]
