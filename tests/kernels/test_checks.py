"""The pass that lets good calls through lets exactly those through that the checks with messages do."""

import pytest
import torch
from problems import Case, make

from saml_kernels import checks
from saml_kernels.types import TrunkParams

pytestmark = pytest.mark.cpu

TRUNKS = {
    "a vector gate": Case(),
    "scalar gates after all layers": Case(gate="scalar", mutual_layers=(1, 2)),
    "no gate": Case(mutual_layers=()),
    "a view per branch": Case(per_branch=True),
    "one row of no width": Case(B=1, local_dim=0, global_dim=0),
    "a branch of width 1": Case(M=1, hidden_dims=(1, 4)),
}
WRONG = {
    "another type": lambda tensor: tensor.double(),
    "another device": lambda tensor: tensor.to("meta"),
    "a row more": lambda tensor: torch.cat([tensor, tensor[:1]]),
    "a row less": lambda tensor: tensor[1:],
    "a column more": lambda tensor: torch.cat([tensor, tensor[..., :1]], -1),
    "a dimension more": lambda tensor: tensor.unsqueeze(0),
    "a dimension less": lambda tensor: tensor[0],
    "no dimension": lambda tensor: tensor.new_zeros(()),
    "no tensor": lambda tensor: tensor.tolist(),
    "nothing": lambda tensor: None,
}
every_wrong = pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())


def trunk(case):
    """Arguments of check_trunk, flat: x_local, x_global, scenario and the six lists' entries."""
    problem = make(case).to(torch.float32)
    inputs = problem.x_local, problem.x_global, problem.scenario
    return [*inputs, *(entry for entries in problem.params for entry in entries)], len(problem.params[0])


def nested(flat, layers):
    lists = (flat[start : start + layers] for start in range(3, len(flat), layers))
    return *flat[:3], TrunkParams(*lists)


def accepts(check, arguments, **options):
    try:
        check(*arguments, **options)
    except (TypeError, ValueError):
        return False
    return True


@pytest.fixture
def in_one_pass(monkeypatch):
    """Good calls do not reach the checks with messages."""

    def reached(*arguments):
        raise AssertionError("reached the checks with messages")

    monkeypatch.setattr(checks, "check_same_kind", reached)


@pytest.mark.usefixtures("in_one_pass")
@pytest.mark.parametrize("case", TRUNKS.values(), ids=TRUNKS.keys())
def test_a_good_trunk_is_let_through(case):
    checks.check_trunk(*nested(*trunk(case)))


@every_wrong
@pytest.mark.parametrize("case", TRUNKS.values(), ids=TRUNKS.keys())
def test_a_trunk_is_let_through_where_the_checks_with_messages_accept_it(case, wrong):
    flat, layers = trunk(case)
    for place, tensor in enumerate(flat):
        if tensor is None or place == 2:
            continue
        try:
            changed = wrong(tensor)
        except IndexError:
            continue
        arguments = nested([*flat[:place], changed, *flat[place + 1 :]], layers)
        accepted = checks._trunk_fits(*arguments)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checks, "_trunk_fits", lambda *arguments: False)
            assert accepts(checks.check_trunk, arguments) == accepted, place


@pytest.mark.parametrize("scenario", [torch.zeros(6, dtype=torch.int64), torch.zeros(7, dtype=torch.int64).to("meta")])
def test_ids_that_do_not_fit_are_not_let_through(scenario):
    flat, layers = trunk(Case())
    assert not checks._trunk_fits(*nested([*flat[:2], scenario, *flat[3:]], layers))


def test_lists_that_do_not_fit_are_not_let_through():
    flat, layers = trunk(Case())
    *inputs, params = nested(flat, layers)
    shorter = TrunkParams(*(entries[:-1] for entries in params))
    for field in TrunkParams._fields:
        assert not checks._trunk_fits(*inputs, params._replace(**{field: getattr(shorter, field)}))
    assert not checks._trunk_fits(*inputs, TrunkParams([], [], [], [], [], []))
    assert not checks._trunk_fits(*inputs, tuple(params))
    assert not checks._trunk_fits(*inputs, params._replace(gate_biases=[None, None]))
    assert not checks._trunk_fits(*inputs, params._replace(gate_weights=[None, None]))


def test_an_unsupported_type_is_not_let_through():
    flat, layers = trunk(Case())
    whole = [None if tensor is None else tensor.to(torch.int64) for tensor in flat]
    assert not checks._trunk_fits(*nested(whole, layers))


def towers(per_branch=False):
    """x, scenario, gated, then weights, biases and shared weights of two layers: three towers, of widths 4, 6 and 2."""
    x = torch.zeros((7, 3, 4) if per_branch else (7, 4))
    layers = [torch.zeros(3, 4, 6), torch.zeros(3, 6, 2), torch.zeros(3, 6), torch.zeros(3, 2)]
    return [x, torch.zeros(7, dtype=torch.int64), torch.zeros(7, 2), *layers, torch.zeros(4, 6), torch.zeros(6, 2)]


def check_towers(flat, per_branch):
    x, scenario, gated, *layers = flat
    options = {"per_branch": per_branch, "gated": gated, "shared_weights": layers[4:]}
    checks.check_towers(x, scenario, layers[:2], layers[2:4], **options)


@pytest.mark.usefixtures("in_one_pass")
def test_good_towers_are_let_through():
    for per_branch in (False, True):
        check_towers(towers(), per_branch)
    check_towers(towers(per_branch=True), True)
    x, scenario, _, *layers = towers()
    checks.check_towers(x, scenario, layers[:2], layers[2:4])
    checks.check_experts(x, layers[:2], layers[2:4])


@every_wrong
@pytest.mark.parametrize("per_branch", [False, True])
def test_towers_are_let_through_where_the_checks_with_messages_accept_them(per_branch, wrong):
    flat = towers(per_branch)
    for place in (0, *range(2, len(flat))):
        try:
            changed = wrong(flat[place])
        except IndexError:
            continue
        x, scenario, gated, *layers = [*flat[:place], changed, *flat[place + 1 :]]
        arguments = x, scenario, layers[:2], layers[2:4]
        fit = checks._towers_fit(*arguments, per_branch, gated, layers[4:])
        width = checks._fitting_width(x, *arguments[2:], False)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checks, "_fitting_width", lambda *arguments: None)
            options = {"per_branch": per_branch, "gated": gated, "shared_weights": layers[4:]}
            assert accepts(checks.check_towers, arguments, **options) == fit, place
            assert accepts(checks.check_experts, (x, *arguments[2:])) == (width is not None), place


def test_towers_whose_ids_or_layers_do_not_fit_are_not_let_through():
    x, scenario, _, *layers = towers()
    weights, biases, shared = layers[:2], layers[2:4], layers[4:]
    for ids in (scenario[1:], scenario.to("meta")):
        assert not checks._towers_fit(x, ids, weights, biases, False, None, [])
    assert not checks._towers_fit(x, scenario, weights, biases, False, None, shared[:1])
    for some, others in (([], []), (weights[:1], biases), ([weights[0][:0]], [biases[0][:0]])):
        assert checks._fitting_width(x, some, others, False) is None
    assert checks._fitting_width(torch.zeros(7, 2, 4), weights, biases, True) is None
    assert checks._fitting_width(x.int(), [entry.int() for entry in weights], biases, False) is None
