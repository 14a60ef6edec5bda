"""Every stage alone: its kernel in Triton's interpreter beside the same stage in plain PyTorch.

    TRITON_INTERPRET=1 pytest -m interpreter tests/triton/test_stages.py

The programs are those of real calls, so that no kind of stage and no option of one is forgotten.
"""

import dataclasses

import problems
import pytest
import torch
from problems import Case, make

import saml_kernels
from saml_kernels.backends.triton import availability

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not availability.INTERPRETED, reason="needs TRITON_INTERPRET=1 before Python starts"),
]

CASES = [
    Case(M=3, B=21, local_dim=5, hidden_dims=(6, 5, 4), aux_dims=(4, 3, 2), mutual_layers=(1, 2), activation="gelu"),
    Case(M=3, B=21, local_dim=5, hidden_dims=(6, 4), aux_dims=(4, 3), gate="scalar", score="softmax", per_branch=True),
    Case(M=4, B=19, hidden_dims=(6, 4), aux_dims=(5, 3), mutual_layers=(2,), activation="tanh"),
    Case(M=2, B=9, hidden_dims=(6, 4), aux_dims=(5, 3), mutual_layers=(), activation="leaky_relu"),
    Case(M=3, B=21, hidden_dims=(7, 6), aux_dims=(5, 3), mutual_layers=(1, 2), foreign_dtype=torch.int8),
]


def programs(case):
    """As :func:`programs_of` a trunk's training step."""
    problem = make(case).to(torch.float32)
    return programs_of(lambda: problems.with_gradients(lambda p: p.run(backend="triton"), problem))


def programs_of(step):
    """(program, config, tensors, grouped, options) of every launch of a training step, and what it wrote."""
    from saml_kernels.backends.triton import launch

    found = []

    def recorder(original):
        def record(program, *arguments, **options):
            before = len(found)
            config, tensors, grouped = arguments[-4:-1]
            found.append((program, config, {name: t.clone() for name, t in tensors.items()}, grouped, options))
            original(program, *arguments, **options)
            found[before] += ({name: t.clone() for name, t in tensors.items()},)

        return record

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "run", recorder(launch.run))
        patch.setattr(launch, "run_weight_gradients", recorder(launch.run_weight_gradients))
        step()
    return found


def run_kernel(stage, config, tensors, grouped, options):
    from saml_kernels.backends.triton import launch
    from saml_kernels.backends.triton.stages import Program, WeightGradient

    alone = Program((dataclasses.replace(stage, after=()),), {})
    rows = len(grouped.permutation)
    if isinstance(stage, WeightGradient):
        launch.run_weight_gradients(alone, config, tensors, grouped, rows, **options)
    else:
        launch.run(alone, "persistent", config, tensors, grouped, rows, **options)


def distance(out, expected):
    out, expected = out.detach().double(), expected.detach().double()
    return float((out - expected).norm() / (expected.norm() or 1.0))


def check_every_stage_alone(launches):
    """The kinds of stages there are."""
    from saml_kernels.backends.triton.stage_reference import Batch, run_reference

    kinds = set()
    assert len(launches) == 3
    for program, config, tensors, grouped, options, written in launches:
        scenario = torch.searchsorted(grouped.offsets[1:], torch.arange(len(grouped.permutation)), right=True)
        batch = Batch(grouped.permutation, scenario, options.get("temperature", 1.0))
        for stage in program.stages:
            kinds.add(type(stage).__name__)
            before = {name: tensor.clone() for name, tensor in tensors.items()}
            run_kernel(stage, config, before, grouped, options)
            run_reference(stage, tensors, batch)
            changed = {name for name in filter(None, stage.tensors()) if name in tensors}
            for name in changed:
                # A whole number apart where a quotient falls between two.
                bound = 2e-2 if tensors[name].dtype == torch.int8 else 1e-5
                same = tensors[name].float().nan_to_num(), before[name].float().nan_to_num()
                assert distance(*same[::-1]) <= bound, (stage.name, name)
                assert torch.equal(*(t.float().isnan() for t in (tensors[name], before[name]))), (stage.name, name)
        # All stages in turn are the program.
        for name in program.buffers:
            if not program.buffers[name].temporary and tensors[name].dtype == torch.float32:
                assert distance(written[name].nan_to_num(), tensors[name].nan_to_num()) <= 1e-4, name
    return kinds


PRODUCTS = {"Layer", "InputGradient", "WeightGradient"}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_stage_alone(case):
    kinds = check_every_stage_alone(programs(case))
    wanted = set(PRODUCTS)
    if case.mutual_layers:
        wanted |= {"MutualOwnRow", "MutualBackward"}
    if case.mutual_layers == (1, 2):
        wanted |= {"MutualTable"}
    if case.foreign_dtype is not None:
        wanted |= {"QuantizeRows", "QuantizedLayer"}
    assert kinds == wanted


@pytest.mark.parametrize("kind", ["gate", "experts"])
def test_every_stage_of_towers_alone(kind):
    generator = torch.Generator().manual_seed(0)
    shapes = (21, 5), (3, 5, 6), (3, 6, 4), (3, 6), (3, 4), (21, 4)
    leaves = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
    x, w0, w1, b0, b1, gated = leaves
    layers, options = ([w0, w1], [b0, b1]), {"activation": "gelu", "backend": "triton"}
    scenario = torch.randint(3, (21,), generator=generator)

    def step():
        if kind == "gate":
            out = saml_kernels.grouped_mlp(x, scenario, *layers, gated=gated, gate_scale=1.5, **options)
        else:
            out = saml_kernels.expert_outputs(x, *layers, **options)
        out.backward(torch.randn(out.shape, generator=generator))

    assert check_every_stage_alone(programs_of(step)) == PRODUCTS


def test_a_stage_of_odd_widths_is_cut_smaller_than_the_others_of_its_launch(monkeypatch):
    """Its tile of rows is a part of the launch's: every part is computed, and waited for."""
    from saml_kernels.backends.triton import configs

    monkeypatch.setattr(configs, "RAGGED_TILE", {4: (16, 16, 16)})
    config = configs.Config(64, 32, 32, 4, 1, item_rows=16, group_rows=8)
    case = Case(M=3, B=90, local_dim=8, global_dim=5, hidden_dims=(16, 8), aux_dims=(16, 8), gate="scalar")
    problem = make(case)
    with configs.forced(configs.Choice("persistent", config, config, config)):
        out = problems.with_gradients(lambda p: p.run(backend="triton"), problem.to(torch.float32))
    exact = problems.oracle(problem)
    problems.assert_close(out, {name: exact[name] for name in out}, problems.FLOAT32_TOLERANCE)
    assert {cut.tile.row_parts for cut in cut_stages(config, case)} == {1, 4}


def cut_stages(config, case):
    """The forward's products as a launch cuts them."""
    from saml_kernels.backends.triton import configs
    from saml_kernels.backends.triton.stages import ProductStage

    program, *_ = next(iter(programs(case)))
    for stage in program.stages:
        if isinstance(stage, ProductStage):
            tile = configs.tile(stage, config, torch.float32, True, "ieee")
            yield dataclasses.replace(stage, tile=tile)
