"""What a user's ``mypy --strict`` sees of the package: tensors and named tuples, nowhere Any."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy")
REPOSITORY = Path(__file__).parent.parent

PROGRAM = """
import torch
from torch import nn

import saml_kernels
from saml_kernels.layers import (
    STARMLP, GroupedMLP, MixtureOfExperts, MultiBranchMLP, MutualUnit, PartitionedNorm, ScoreMixture
)

x, scenario, flag = torch.randn(4, 8), torch.zeros(4, dtype=torch.int64), bool(torch.rand(()) > 0.5)
trunk = MultiBranchMLP(num_scenarios=2, local_dim=8, global_dim=8, hidden_dims=(4,))
towers = GroupedMLP(num_scenarios=2, in_dim=8, hidden_dims=(4,))
unit = MutualUnit(num_scenarios=2, dim=4)
streams = torch.randn(4, 2, 4)
weight, bias = torch.randn(2, 4, 4), torch.randn(2, 4)
params: saml_kernels.TrunkParams = trunk.params()
"""
REVEALED = {
    "saml_kernels.multi_branch(x, x, scenario, params)": "TrunkOutput",
    "saml_kernels.multi_branch(x, x, scenario, params).own": "Tensor",
    "saml_kernels.multi_branch(x, x, scenario, params).scores": "tuple[Tensor | None, ...] | None",
    "saml_kernels.grouped_mlp(x, scenario, [weight], [bias])": "Tensor",
    "saml_kernels.branch_scores(x, scenario, [weight], [bias])": "Tensor",
    "saml_kernels.grouped_mlp(x, scenario, [weight], [bias], gated=x)": "Tensor",
    "saml_kernels.expert_outputs(x, [weight], [bias])": "Tensor",
    "saml_kernels.mutual_unit(streams, scenario, weight, bias)": "Tensor",
    "saml_kernels.mutual_unit(streams, scenario, weight, bias, return_scores=True)": "tuple[Tensor, Tensor]",
    "saml_kernels.mutual_unit(streams, scenario, weight, bias, return_scores=flag)": "Tensor | tuple[Tensor, Tensor]",
    "saml_kernels.group_by_scenario(scenario, 2)": "Grouping",
    "saml_kernels.group_by_scenario(scenario, 2).offsets": "Tensor",
    "saml_kernels.available_backends()": "dict[str, str | None]",
    "trunk(x, x, scenario)": "TrunkOutput",
    "trunk(x, x, scenario).aux": "Tensor",
    "trunk.forward(x, x, scenario)": "TrunkOutput",
    "towers(x, scenario)": "Tensor",
    "unit(streams, scenario)": "Tensor",
    "unit(streams, scenario, return_scores=flag)": "Tensor | tuple[Tensor, Tensor]",
    "STARMLP(num_scenarios=2, in_dim=8, hidden_dims=(4,))(x, scenario)": "Tensor",
    "PartitionedNorm(2, 8)(x, scenario)": "Tensor",
    "ScoreMixture(num_scenarios=2, in_dim=8, hidden_dims=(4,))(x, scenario)": "Tensor",
    "MixtureOfExperts(num_experts=2, in_dim=8, hidden_dims=(4,))(x)": "Tensor",
    "saml_kernels.fuse(nn.Module())": "tuple[str, ...]",
}


def test_py_typed_is_there():
    assert (REPOSITORY / "saml_kernels" / "py.typed").exists()


def test_strict_users_see_types(tmp_path):
    """Imports are silent, as those of an installed package are."""
    first = PROGRAM.count("\n") + 1
    program = tmp_path / "program.py"
    program.write_text(PROGRAM + "".join(f"reveal_type({expression})\n" for expression in REVEALED), encoding="utf-8")
    options = ["--strict", "--no-error-summary", "--follow-imports=silent", "--config-file="]
    found = subprocess.run(
        [sys.executable, "-m", "mypy", *options, "--cache-dir", str(tmp_path / "cache"), "program.py"],
        cwd=tmp_path,
        env={"MYPYPATH": str(REPOSITORY), "PATH": ""},
        capture_output=True,
        text=True,
    )
    revealed = dict(re.findall(r'program\.py:(\d+): note: Revealed type is "(.*)"', found.stdout))
    short = {int(line): re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", kind) for line, kind in revealed.items()}
    lines = [line for line in found.stdout.splitlines() if "Revealed type" not in line]
    assert lines == [], found.stdout
    for line, (expression, expected) in enumerate(REVEALED.items(), start=first):
        assert plain(short[line]) == expected, expression


def plain(kind):
    """A named tuple by its name."""
    return re.sub(r"tuple\[.*, fallback=(\w+)\]", r"\1", kind)
