"""Everything wrong with a call is one clear line: what was wrong, what was expected, what was given."""

import dataclasses
import re

import problems
import pytest
import torch
from problems import Case, make

import saml_kernels
from saml_kernels import checks
from saml_kernels.layers import GroupedMLP, MultiBranchMLP, MutualUnit

pytestmark = pytest.mark.cpu

# B 7, M 3, D_l 4, D_g 5, branches 6 and 4 wide, auxiliary network 5 and 3, a vector gate at layer 1.
PROBLEM = make(Case()).to(torch.float32)


class refused:  # noqa: N801
    """The block raises exactly this kind of error, in one line that contains every word told."""

    def __init__(self, kind, *told):
        self.kind, self.told = kind, told

    def __enter__(self): ...

    def __exit__(self, kind, error, traceback):
        assert error is not None, "accepted"
        if not isinstance(error, self.kind):
            return False
        message = str(error)
        assert "\n" not in message
        missing = [
            word for word in map(str, self.told) if not re.search(rf"(?<![\w-]){re.escape(word)}(?!\w)", message)
        ]
        assert not missing, f"{missing} not in {message!r}"
        return True


def with_param(field, layer, tensor):
    entries = list(getattr(PROBLEM.params, field))
    entries[layer] = tensor
    return {"params": PROBLEM.params._replace(**{field: entries})}


def call(**changes):
    arguments = {
        "x_local": PROBLEM.x_local,
        "x_global": PROBLEM.x_global,
        "scenario": PROBLEM.scenario,
        "params": PROBLEM.params,
    } | changes
    return saml_kernels.multi_branch(**arguments)


def ids(*values, dtype=torch.int64):
    return torch.tensor([*values, *[0] * (7 - len(values))], dtype=dtype)


def zeros(*shape, **options):
    return torch.zeros(shape, **options)


BAD_CALLS = {
    "id too large": ({"scenario": ids(0, 1, 3)}, ValueError, "scenario", 3, 2),
    "id negative": ({"scenario": ids(0, -1)}, ValueError, "scenario", -1, 1),
    "first of several ids": ({"scenario": ids(0, 0, 0, 99, -5)}, ValueError, 99, 3),
    "int32 id too large": ({"scenario": ids(7, dtype=torch.int32)}, ValueError, 7, 0),
    "float ids": ({"scenario": ids(0, 1).float()}, TypeError, "scenario", "int32", "int64", "float32"),
    "bool ids": ({"scenario": ids(0, 1).bool()}, TypeError, "scenario", "bool"),
    "ids as list": ({"scenario": [0] * 7}, TypeError, "scenario", "list"),
    "ids of two dimensions": ({"scenario": ids(0)[:, None].expand(7, 2)}, ValueError, "scenario", 7, 2),
    "fewer ids than rows": ({"scenario": ids(0)[:5]}, ValueError, "scenario", 7, 5),
    "x_local of one dimension": ({"x_local": zeros(4)}, ValueError, "x_local", 4),
    "x_local of four dimensions": ({"x_local": zeros(7, 3, 4, 1)}, ValueError, "x_local"),
    "x_local too narrow": ({"x_local": zeros(7, 3)}, ValueError, 3, 9),
    "x_local views of too few branches": ({"x_local": zeros(7, 2, 4)}, ValueError, "x_local", 2, 3),
    "x_local as list": ({"x_local": [[0.0] * 4] * 7}, TypeError, "x_local", "list"),
    "x_local of integers": ({"x_local": zeros(7, 4, dtype=torch.int64)}, TypeError, "x_local", "int64"),
    "x_global of three dimensions": ({"x_global": zeros(7, 3, 5)}, ValueError, "x_global"),
    "x_global with other rows": ({"x_global": zeros(6, 5)}, ValueError, "x_global", 7, 6),
    "x_global too wide": ({"x_global": zeros(7, 8)}, ValueError, 5, 8),
    "x_global as None": ({"x_global": None}, TypeError, "x_global", "NoneType"),
    "x_global of another dtype": ({"x_global": zeros(7, 5).double()}, TypeError, "float32", "float64", "x_global"),
    "x_global on another device": ({"x_global": zeros(7, 5, device="meta")}, (TypeError, ValueError), "cpu", "meta"),
    "ids on another device": ({"scenario": ids(0).to("meta")}, (TypeError, ValueError), "cpu", "meta", "scenario"),
    "parameter on another device": (
        with_param("branch_biases", 1, zeros(3, 4, device="meta")),
        (TypeError, ValueError),
        "cpu",
        "meta",
    ),
    "parameter of another dtype": (
        with_param("gate_weights", 0, zeros(3, 6, 6, dtype=torch.float16)),
        TypeError,
        "float32",
        "float16",
        "gate_weights[0]",
    ),
    "branch weight with too few rows": (with_param("branch_weights", 0, zeros(3, 8, 6)), ValueError, 8, 9),
    "branch weight with the wrong rows": (with_param("branch_weights", 1, zeros(3, 4, 4)), ValueError, 4, 9),
    "branch weight of two dimensions": (with_param("branch_weights", 0, zeros(9, 6)), ValueError, 9, 6),
    "branch weight of other scenarios": (with_param("branch_weights", 1, zeros(2, 9, 4)), ValueError, 2, 3),
    "no scenario": (with_param("branch_weights", 0, zeros(0, 9, 6)), ValueError, 0),
    "branch bias too short": (with_param("branch_biases", 0, zeros(3, 5)), ValueError, 5, 6, "branch_biases[0]"),
    "branch bias of one dimension": (with_param("branch_biases", 0, zeros(6)), ValueError, 3, 6),
    "aux weight with the wrong rows": (with_param("aux_weights", 1, zeros(4, 3)), ValueError, 4, 5),
    "aux weight per scenario": (with_param("aux_weights", 0, zeros(3, 5, 5)), ValueError, "aux_weights[0]"),
    "aux bias too long": (with_param("aux_biases", 1, zeros(4)), ValueError, 3, 4, "aux_biases[1]"),
    "gate neither vector nor scalar": (with_param("gate_weights", 0, zeros(3, 6, 2)), ValueError, 6, 1, 2),
    "gate of other rows": (with_param("gate_weights", 0, zeros(3, 5, 6)), ValueError, 5, 6),
    "gate of other scenarios": (with_param("gate_weights", 0, zeros(2, 6, 6)), ValueError, 2, 3),
    "scalar gate with a vector's bias": (with_param("gate_weights", 0, zeros(3, 6, 1)), ValueError, 6, 1),
    "gate weight without bias": (with_param("gate_biases", 0, None), ValueError, "gate_weights[0]", "gate_biases[0]"),
    "gate bias without weight": (with_param("gate_weights", 0, None), ValueError, "gate_weights[0]", "gate_biases[0]"),
    "branch weight as None": (with_param("branch_weights", 0, None), TypeError, "branch_weights[0]", "NoneType"),
    "aux bias as list": (with_param("aux_biases", 0, [0.0] * 5), TypeError, "aux_biases[0]", "list"),
    "lists of different length": (
        {"params": PROBLEM.params._replace(aux_weights=PROBLEM.params.aux_weights[:1])},
        ValueError,
        "aux_weights",
        1,
        2,
    ),
    "gates of different length": (
        {"params": PROBLEM.params._replace(gate_weights=PROBLEM.params.gate_weights[:1])},
        ValueError,
        "gate_weights",
        1,
        2,
    ),
    "no layer": ({"params": saml_kernels.TrunkParams([], [], [], [], [], [])}, ValueError, "layer"),
    "params as tuple": ({"params": tuple(PROBLEM.params)}, TypeError, "TrunkParams", "tuple"),
    "params as None": ({"params": None}, TypeError, "TrunkParams", "NoneType"),
    "unknown activation": ({"activation": "rleu"}, ValueError, "rleu", "'relu'"),
    "activation in capitals": ({"activation": "GELU"}, ValueError, "GELU", "gelu"),
    "activation as function": ({"activation": torch.relu}, (TypeError, ValueError), "activation"),
    "unknown score": ({"score": "ration"}, ValueError, "ration", "ratio"),
    "unknown backend": ({"backend": "trition"}, ValueError, "trition", "triton"),
    "temperature of zero": ({"temperature": 0.0}, ValueError, "temperature", "0.0"),
    "temperature below zero": ({"temperature": -1.0}, ValueError, "temperature", "-1.0"),
    "temperature not a number": ({"temperature": float("nan")}, ValueError, "temperature", "nan"),
    "temperature as string": ({"temperature": "0.1"}, TypeError, "temperature", "str"),
    "unknown foreign_dtype": ({"foreign_dtype": torch.int16}, ValueError, "foreign_dtype", "torch.int16"),
    "foreign_dtype as string": ({"foreign_dtype": "int8"}, (TypeError, ValueError), "foreign_dtype", "int8"),
    "foreign_dtype of what is not constant": (
        {"foreign_dtype": torch.int8, "stop_gradient": False},
        ValueError,
        "foreign_dtype",
        "stop_gradient",
    ),
}


@pytest.mark.parametrize(("changes", "kind", "told"), [(c, k, t) for c, k, *t in BAD_CALLS.values()], ids=[*BAD_CALLS])
def test_multi_branch(changes, kind, told):
    with refused(kind, *told):
        call(**changes)


def test_the_call_that_the_bad_ones_differ_from_is_good():
    assert call().own.shape == (7, 4)


@pytest.mark.parametrize(("form", "schedule"), [("single", "persistent"), ("staged", "per_layer"), ("auto", "auto")])
def test_the_old_spelling_of_schedule_is_taken_with_a_warning(form, schedule):
    with pytest.warns(DeprecationWarning, match=f'write schedule="{schedule}"'):
        layer = MultiBranchMLP(2, 3, 4, form=form)
    assert layer.schedule == schedule
    with refused(ValueError, "form", "round", "single"):
        MultiBranchMLP(2, 3, 4, form="round")
    with refused(ValueError, "form", "schedule"):
        MultiBranchMLP(2, 3, 4, form=form, schedule="per_layer")


@pytest.mark.parametrize(
    ("given", "nearest"),
    [("rel", "relu"), ("leaky-relu", "leaky_relu"), ("sigmoid", None), ("swish", None), ("", None), (None, None)],
)
def test_unknown_activation_names_the_nearest(given, nearest):
    with pytest.raises(ValueError, match="activation") as error:
        call(activation=given)
    assert repr(given) in str(error.value)
    assert all(repr(known) in str(error.value) for known in problems.ACTIVATIONS)
    suggestion = re.search(r"did you mean '(\w+)'", str(error.value))
    assert (suggestion and suggestion[1]) == nearest


MUTUAL_UNIT = {
    "v of two dimensions": ({"v": zeros(7, 5)}, ValueError, "v", 7, 5),
    "v of other branches than the gate": ({"v": zeros(7, 2, 5)}, ValueError, 2, 3),
    "v of another width than the gate": ({"v": zeros(7, 3, 4)}, ValueError, 4, 5),
    "v without branches": ({"v": zeros(7, 0, 5)}, ValueError, "v", 0),
    "v of another dtype": ({"v": zeros(7, 3, 5).half()}, TypeError, "float16", "float32"),
    "v on another device": ({"v": zeros(7, 3, 5, device="meta")}, (TypeError, ValueError), "meta", "cpu"),
    "v as list": ({"v": [1.0]}, TypeError, "v", "list"),
    "ids of other rows": ({"scenario": ids(0)[:6]}, ValueError, 6, 7),
    "float ids": ({"scenario": ids(0).double()}, TypeError, "float64"),
    "id out of range": ({"scenario": ids(0, 0, 5)}, ValueError, 5, 2),
    "negative id": ({"scenario": ids(-2)}, ValueError, -2, 0),
    "gate neither vector nor scalar": ({"gate_weight": zeros(3, 5, 3)}, ValueError, "gate_weight", 3, 5),
    "gate of two dimensions": ({"gate_weight": zeros(5, 5)}, ValueError, "gate_weight"),
    "gate bias that does not fit": ({"gate_bias": zeros(3, 1)}, ValueError, "gate_bias", 5, 1),
    "gate as None": ({"gate_weight": None}, TypeError, "gate_weight", "NoneType"),
    "unknown score": ({"score": "softmx"}, ValueError, "softmx", "softmax"),
    "temperature of zero": ({"temperature": 0}, ValueError, "temperature", 0),
    "unknown backend": ({"backend": "cp"}, ValueError, "cp", "cpp"),
}


@pytest.mark.parametrize(
    ("changes", "kind", "told"), [(c, k, t) for c, k, *t in MUTUAL_UNIT.values()], ids=[*MUTUAL_UNIT]
)
def test_mutual_unit(changes, kind, told):
    good = {"v": zeros(7, 3, 5), "scenario": ids(0), "gate_weight": zeros(3, 5, 5), "gate_bias": zeros(3, 5)}
    assert saml_kernels.mutual_unit(**good).shape == (7, 5)
    with refused(kind, *told):
        saml_kernels.mutual_unit(**(good | changes))


GROUPED_MLP = {
    "x of three dimensions": ({"x": zeros(7, 3, 4)}, ValueError, "x"),
    "x too wide": ({"x": zeros(7, 6)}, ValueError, 6, 4),
    "x of another dtype": ({"x": zeros(7, 4).double()}, TypeError, "float64", "float32"),
    "x on another device": ({"x": zeros(7, 4, device="meta")}, (TypeError, ValueError), "meta", "cpu"),
    "x as list": ({"x": [1.0]}, TypeError, "x", "list"),
    "ids of other rows": ({"scenario": ids(0)[:6]}, ValueError, 6, 7),
    "float ids": ({"scenario": ids(0).float()}, TypeError, "float32"),
    "id out of range": ({"scenario": ids(0, 0, 0, 3)}, ValueError, 3),
    "negative id": ({"scenario": ids(0, -1)}, ValueError, -1, 1),
    "no layer": ({"weights": [], "biases": []}, ValueError, "weights", "biases", 0),
    "lists of different length": ({"biases": [zeros(3, 6)]}, ValueError, "weights", "biases", 1, 2),
    "layers that do not fit": ({"weights": [zeros(3, 4, 6), zeros(3, 5, 2)]}, ValueError, 5, 6),
    "weight of other scenarios": ({"weights": [zeros(3, 4, 6), zeros(2, 6, 2)]}, ValueError, 2, 3),
    "bias that does not fit": ({"biases": [zeros(3, 6), zeros(3, 3)]}, ValueError, "biases[1]", 3, 2),
    "weight as None": ({"weights": [zeros(3, 4, 6), None]}, TypeError, "weights[1]", "NoneType"),
    "unknown activation": ({"activation": "sillu"}, ValueError, "sillu", "silu"),
    "unknown output activation": ({"output_activation": "linear"}, ValueError, "output_activation", "linear"),
    "fewer shared weights": ({"shared_weights": [zeros(4, 6)]}, ValueError, "shared_weights", 2, 1),
    "a shared weight that does not fit": (
        {"shared_weights": [zeros(4, 6), zeros(6, 3)]},
        ValueError,
        "shared_weights[1]",
        2,
        3,
    ),
    "a shared weight of another dtype": (
        {"shared_weights": [zeros(4, 6), zeros(6, 2).double()]},
        TypeError,
        "shared_weights[1]",
        "float64",
    ),
    "a shared weight as None": ({"shared_weights": [None, zeros(6, 2)]}, TypeError, "shared_weights[0]", "NoneType"),
    "unknown backend": ({"backend": "refrence"}, ValueError, "refrence", "reference"),
}


@pytest.mark.parametrize(
    ("changes", "kind", "told"), [(c, k, t) for c, k, *t in GROUPED_MLP.values()], ids=[*GROUPED_MLP]
)
def test_grouped_mlp(changes, kind, told):
    good = {
        "x": zeros(7, 4),
        "scenario": ids(0),
        "weights": [zeros(3, 4, 6), zeros(3, 6, 2)],
        "biases": [zeros(3, 6), zeros(3, 2)],
    }
    assert saml_kernels.grouped_mlp(**good).shape == (7, 2)
    with refused(kind, *told):
        saml_kernels.grouped_mlp(**(good | changes))


# --- layers ---------------------------------------------------------------------------------------------------------

MULTI_BRANCH_MLP = {
    "no scenario": ({"num_scenarios": 0}, ValueError, "num_scenarios", 0),
    "scenarios as float": ({"num_scenarios": 3.0}, TypeError, "num_scenarios", "float"),
    "negative width": ({"local_dim": -1}, ValueError, "local_dim", -1),
    "no layer": ({"hidden_dims": ()}, ValueError, "hidden_dims"),
    "layer of width zero": ({"hidden_dims": (4, 0)}, ValueError, "hidden_dims", 0),
    "aux_dims of other length": ({"aux_dims": (4,)}, ValueError, "hidden_dims", "aux_dims", 2, 1),
    "mutual layer too high": ({"mutual_layers": (3,)}, ValueError, "mutual_layers", 3, 2),
    "mutual layer zero": ({"mutual_layers": (0,)}, ValueError, "mutual_layers", 0),
    "unknown gate": ({"gate": "vektor"}, ValueError, "vektor", "vector"),
    "unknown score": ({"score": "ratios"}, ValueError, "ratios", "ratio"),
    "unknown activation": ({"activation": "tan"}, ValueError, "tan", "tanh"),
    "unknown backend": ({"backend": "cuda"}, ValueError, "backend", "cuda"),
    "temperature": ({"temperature": -0.1}, ValueError, "temperature", "-0.1"),
    "foreign_dtype": ({"foreign_dtype": torch.int8, "stop_gradient": False}, ValueError, "foreign_dtype"),
}


@pytest.mark.parametrize(
    ("changes", "kind", "told"), [(c, k, t) for c, k, *t in MULTI_BRANCH_MLP.values()], ids=[*MULTI_BRANCH_MLP]
)
def test_multi_branch_mlp(changes, kind, told):
    good = {"num_scenarios": 3, "local_dim": 4, "global_dim": 5, "hidden_dims": (6, 4)}
    MultiBranchMLP(**good)
    with refused(kind, *told):
        MultiBranchMLP(**(good | changes))


@pytest.mark.parametrize(
    ("build", "kind", "told"),
    [
        (lambda: GroupedMLP(0, 4, (3,)), ValueError, ["num_scenarios", 0]),
        (lambda: GroupedMLP(2, -4, (3,)), ValueError, ["in_dim", -4]),
        (lambda: GroupedMLP(2, 4, ()), ValueError, ["hidden_dims"]),
        (lambda: GroupedMLP(2, 4, (3,), activation="rely"), ValueError, ["rely", "relu"]),
        (lambda: GroupedMLP(2, 4, (3,), output_activation="none"), ValueError, ["output_activation", "none"]),
        (lambda: MutualUnit(2, 0), ValueError, ["dim", 0]),
        (lambda: MutualUnit(2, 4, gate="Scalar"), ValueError, ["Scalar", "scalar"]),
        (lambda: MutualUnit(2, 4, temperature=0.0), ValueError, ["temperature", "0.0"]),
        (lambda: MutualUnit(2, 4)(zeros(7, 3, 4), ids(0)), ValueError, [3, 2]),
        (lambda: GroupedMLP(2, 4, (3,))(zeros(7, 4), ids(0, 2)), ValueError, [2, 1]),
        (lambda: MultiBranchMLP(2, 4, 5, (3,))(zeros(7, 4), zeros(7, 4), ids(0)), ValueError, [5, 4]),
    ],
)
def test_other_layers(build, kind, told):
    with refused(kind, *told):
        build()


# --- backends -------------------------------------------------------------------------------------------------------

OPERATIONS = {
    "multi_branch": lambda backend: call(backend=backend),
    "mutual_unit": lambda backend: saml_kernels.mutual_unit(
        zeros(7, 3, 5), ids(0), zeros(3, 5, 5), zeros(3, 5), backend=backend
    ),
    "grouped_mlp": lambda backend: saml_kernels.grouped_mlp(
        zeros(7, 4), ids(0), [zeros(3, 4, 2)], [zeros(3, 2)], backend=backend
    ),
    "expert_outputs": lambda backend: saml_kernels.expert_outputs(
        zeros(7, 4), [zeros(3, 4, 2)], [zeros(3, 2)], backend=backend
    ),
    "group_by_scenario": lambda backend: saml_kernels.group_by_scenario(ids(0), 3, backend=backend),
}
every_operation = pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS.keys())


def test_backends_have_names_and_reasons():
    backends = saml_kernels.available_backends()
    assert backends == saml_kernels.available_backends("multi_branch")
    assert {"reference", "cpp", "triton"} <= backends.keys()
    assert backends["reference"] is None
    assert all(reason is None or (reason and "\n" not in reason) for reason in backends.values())
    assert issubclass(saml_kernels.BackendUnavailable, RuntimeError)


@pytest.mark.parametrize("backend", ["cpp", "triton"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_named_backend_runs_or_says_why_not(operation, backend):
    """Never another backend in its place."""
    reason = saml_kernels.available_backends(operation)[backend]
    if reason is None and problems.device_of(backend) == "cpu":
        OPERATIONS[operation](backend)
        return
    with pytest.raises(saml_kernels.BackendUnavailable) as error:
        OPERATIONS[operation](backend)
    assert "\n" not in str(error.value)
    assert operation in str(error.value)
    assert (reason or "cpu") in str(error.value)


def test_available_backends_of_an_unknown_operation():
    with refused(ValueError, "multibranch", "multi_branch"):
        saml_kernels.available_backends("multibranch")


@every_operation
def test_auto_and_reference_always_run(operation):
    operation("auto")
    operation("reference")


def test_bad_input_is_told_before_an_unavailable_backend():
    with refused(ValueError, "x_global", 7, 6):
        call(x_global=zeros(6, 5), backend="triton")


@pytest.mark.parametrize("rows", [slice(0, 0), slice(0, 1)], ids=["none", "one"])
def test_small_batches_are_not_bad_input(rows):
    problem = dataclasses.replace(
        PROBLEM, x_local=PROBLEM.x_local[rows], x_global=PROBLEM.x_global[rows], scenario=PROBLEM.scenario[rows]
    )
    assert problem.run().own.shape == (len(problem.scenario), 4)


def test_a_long_name_is_cut_in_the_message():
    with pytest.raises(ValueError, match=r"^score must be one of 'ratio', 'softmax', got 'x{76}\.\.\.$"):
        checks.check_choice("score", "x" * 10_000, checks.SCORES)
