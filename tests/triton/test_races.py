"""No launch has a race, a deadlock or counters left, with all its programs at once; and the checker finds what has.

    TRITON_INTERPRET=1 pytest -m races tests/triton

What an interleaving computes is compared as well. Whether the kernels are right one program at a time is for
test_interpreter.py, whether compiled code keeps the order for test_memory_order.py.
"""

import contextlib
import dataclasses
import re
import sys
from pathlib import Path

import problems
import pytest
import torch
from problems import FLOAT32_TOLERANCE, Case, assert_close, make

import saml_kernels
from saml_kernels.backends.triton import availability, schedule

sys.path.insert(0, str(Path(__file__).parent))
if availability.INTERPRETED:
    import races
    from triton.runtime.interpreter import InterpretedFunction

    from saml_kernels.backends.triton import configs, launch
    from saml_kernels.backends.triton.kernels import persistent, weight_gradient

pytestmark = [
    pytest.mark.races,
    pytest.mark.skipif(not availability.INTERPRETED, reason="needs TRITON_INTERPRET=1 before Python starts"),
]

PERSISTENT = ["persistent_kernel"]
STEP = [*PERSISTENT, *PERSISTENT, "weight_gradient_kernel"]

ONE_UNIT = Case(M=3, B=26, local_dim=5, hidden_dims=(9, 6), aux_dims=(7, 5), activation="silu")
TWO_UNITS = Case(M=3, B=26, local_dim=5, hidden_dims=(9, 6, 4), aux_dims=(7, 5, 3), mutual_layers=(1, 2))
NO_UNIT = Case(M=4, B=30, hidden_dims=(7, 6), aux_dims=(3, 2), mutual_layers=(), activation="tanh")
# More columns than a tile: several items of a tile in products as well.
WIDE = Case(M=2, B=20, hidden_dims=(35, 5), aux_dims=(6, 3), activation="gelu", gate="scalar", score="softmax")
QUANTIZED = Case(M=3, B=26, local_dim=7, hidden_dims=(9, 6), aux_dims=(9, 5), foreign_dtype=torch.int8)
QUANTIZED_TWICE = dataclasses.replace(QUANTIZED, hidden_dims=(9, 6, 4), aux_dims=(5, 4, 3), mutual_layers=(1, 2))
# Scenarios of more rows than a part of a weight gradient's sum.
MANY_ROWS = Case(M=2, B=90, hidden_dims=(6,), aux_dims=(5,))


@pytest.fixture(autouse=True)
def poisoned():
    """Whatever a kernel should have written and did not is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def running(programs, seed=0):
    """Checked launches of so many programs each, where a launch has a choice."""
    with pytest.MonkeyPatch.context() as patch, races.checking(seed) as launches:
        patch.setattr(configs, "multiprocessors", lambda index: programs)
        yield launches


def step(problem, backend, **options):
    return problems.with_gradients(lambda p: p.run(backend=backend, return_scores=True, **options), problem)


def check_step(case, programs, **options):
    """A training step without a fault and with the reference's numbers; the kernels it launched."""
    problem = make(case).to(torch.float32)
    # Values on the border between two integers fall to either side by the last bit of what they are made of.
    exact = step(problem if case.foreign_dtype else problem.to(torch.float64), "reference")
    with running(programs, seed=programs) as launches:
        out = step(problem, "triton", **options)
    assert_close(out, exact, 1e-4 if case.foreign_dtype else FLOAT32_TOLERANCE)
    return launches


def launched(*pairs):
    """Parametrises over cases, each with numbers of programs."""
    cases = [(case, number) for case, programs in pairs for number in programs]
    return pytest.mark.parametrize(("case", "programs"), cases, ids=str)


@launched((ONE_UNIT, range(1, 8)), (TWO_UNITS, (2, 4, 7)))
def test_persistent_forward_chain_and_weights(case, programs):
    assert check_step(case, programs, schedule="persistent") == STEP


@launched((NO_UNIT, (2,)), (WIDE, (5,)))
def test_persistent_without_unit_and_with_several_tiles_of_columns(case, programs):
    assert check_step(case, programs, schedule="persistent") == STEP


@launched((ONE_UNIT, (3,)), (TWO_UNITS, (1, 6)))
def test_per_layer(case, programs):
    launches = check_step(case, programs, schedule="per_layer")
    assert len(launches) > len(STEP)


@launched((ONE_UNIT, (2,)), (TWO_UNITS, (4, 7)), (QUANTIZED, (5,)))
def test_streams_computed_again_a_tile_at_a_time(case, programs, monkeypatch):
    """Launches follow each other on the same counters, buffers and scratch."""
    monkeypatch.setattr(configs, "SCRATCH_BYTES", 1)
    assert len(check_step(case, programs, recompute=True)) > 6


@launched((QUANTIZED, (1,)), (QUANTIZED_TWICE, (2, 5)))
def test_quantised_foreign_streams(case, programs):
    """Here stages on tiles of any rows wait for stages on tiles of one scenario."""
    assert "quantize_weight_kernel" in check_step(case, programs)


@launched((MANY_ROWS, (2, 7)))
def test_weight_gradients_in_several_parts(case, programs):
    assert check_step(case, programs) == STEP


def test_inference_in_chunks(monkeypatch):
    monkeypatch.setattr(configs, "SCRATCH_BYTES", 1)
    problem = make(TWO_UNITS).to(torch.float32)
    exact = problem.to(torch.float64).run(backend="reference")
    with torch.inference_mode(), running(7) as launches:
        out = problem.run(backend="triton")
    assert_close({"own": out.own, "aux": out.aux}, {"own": exact.own, "aux": exact.aux}, FLOAT32_TOLERANCE)
    assert launches == 2 * PERSISTENT


@pytest.mark.parametrize(("rows", "programs"), [(0, 1), (20, 4)])
def test_all_rows_of_one_scenario_and_no_rows(rows, programs):
    problem = make(dataclasses.replace(TWO_UNITS, B=rows)).to(torch.float32)
    problem = dataclasses.replace(problem, scenario=torch.full_like(problem.scenario, 1))
    with running(programs):
        out = step(problem, "triton")
    exact = step(problem.to(torch.float64), "reference")
    assert_close(out, exact, FLOAT32_TOLERANCE)


def evaluate(operation, leaves, dtype, backend):
    """An operation's result and the gradients of its inputs."""
    inputs = [leaf.to(dtype).requires_grad_() for leaf in leaves]
    out = operation(inputs, backend)
    cotangent = torch.cos(torch.arange(out.numel())).reshape(out.shape).to(dtype)
    gradients = torch.autograd.grad(out, inputs, cotangent)
    return {str(number): tensor.detach() for number, tensor in enumerate((out, *gradients))}


def check_operation(operation, leaves, programs):
    with running(programs) as launches:
        out = evaluate(operation, leaves, torch.float32, "triton")
    assert_close(out, evaluate(operation, leaves, torch.float64, "reference"), FLOAT32_TOLERANCE)
    assert launches == STEP


def test_the_mutual_unit_alone():
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(shape, generator=generator) for shape in ((22, 3, 9), (3, 9, 9), (3, 9))]
    scenario = torch.randint(3, (22,), generator=generator)
    check_operation(
        lambda inputs, backend: saml_kernels.mutual_unit(inputs[0], scenario, *inputs[1:], backend=backend),
        leaves,
        programs=2,
    )


@pytest.mark.parametrize("operation", ["grouped_mlp", "branch_scores"])
def test_towers(operation):
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(shape, generator=generator) for shape in ((22, 5), (3, 5, 7), (3, 7, 4), (3, 7), (3, 4))]
    scenario = torch.randint(3, (22,), generator=generator)
    check_operation(
        lambda inputs, backend: getattr(saml_kernels, operation)(
            inputs[0], scenario, inputs[1:3], inputs[3:], activation="silu", backend=backend
        ),
        leaves,
        programs=5,
    )


def test_a_gate():
    generator = torch.Generator().manual_seed(0)
    shapes = (22, 5), (3, 5, 7), (3, 7, 4), (3, 7), (3, 4), (22, 4)
    scenario = torch.randint(3, (22,), generator=generator)
    check_operation(
        lambda inputs, backend: saml_kernels.grouped_mlp(
            inputs[0], scenario, inputs[1:3], inputs[3:5], activation="silu", gated=inputs[5], backend=backend
        ),
        [torch.randn(shape, generator=generator) for shape in shapes],
        programs=5,
    )


def test_experts():
    generator = torch.Generator().manual_seed(0)
    shapes = (22, 5), (3, 5, 7), (3, 7, 4), (3, 7), (3, 4)
    check_operation(
        lambda inputs, backend: saml_kernels.expert_outputs(
            inputs[0], inputs[1:3], inputs[3:], activation="silu", backend=backend
        ),
        [torch.randn(shape, generator=generator) for shape in shapes],
        programs=5,
    )


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A fault in the kernels that the checker must find."""

    name: str
    function: str
    old: str
    new: str
    finds: str = "Race"
    """The kind of fault it is found by."""
    case: Case = ONE_UNIT
    programs: int = 3

    def __str__(self):
        return self.name


WAIT = "wait(counters, value(LAUNCH.slots.after_{}, item.stage), item, batch, tiles, LAUNCH)"
RUN = "run(pointers, item, batch, LAUNCH)"
RELEASE = """
                if LAUNCH.persistent:
                    release(counters, item, tiles)"""
DRAW = "number = draw(counters, LAUNCH) if LAUNCH.persistent else total"
ADD = "tl.atomic_add(counter, 1)"
MUTANTS = [
    Mutant("no wait", "wait", "if stage >= 0:", "if stage >= 99:"),
    Mutant("first dependency not waited for", "persistent_kernel", WAIT.format(1), "pass"),
    Mutant("second dependency not waited for", "persistent_kernel", WAIT.format(2), "pass"),
    Mutant("only the first tile", "wait", "range(lowest, highest + 1)", "range(lowest, lowest + 1)"),
    # With few programs, whoever ends the last tile has often ended the first before, and releases both.
    Mutant("only the last tile", "wait", "range(lowest, highest + 1)", "range(highest, highest + 1)", programs=7),
    Mutant("one item too few", "wait", "< need", "< need - 1"),
    Mutant("one item too many", "wait", "< need", "< need + 1", "Deadlock"),
    Mutant("release relaxed", "release", 'sem="release"', 'sem="relaxed"'),
    Mutant("acquire relaxed", "wait", 'sem="acquire"', 'sem="relaxed"'),
    Mutant("no barrier before the release", "release", "tl.debug_barrier()", "pass"),
    Mutant("counted before the stores", "persistent_kernel", RUN + RELEASE, RELEASE[17:] + "\n" + 16 * " " + RUN),
    Mutant("an item drawn and not done", "persistent_kernel", DRAW, f"{DRAW[:31]}; {DRAW}", "Deadlock"),
    Mutant("reset by the first program", "reset", "== programs - 1", "== 0"),
    Mutant("end of programs relaxed", "reset", "FINISHED, 1)", 'FINISHED, 1, sem="relaxed")'),
    Mutant("no reset", "reset", "mask=place < used", "mask=place < 0", "CountersLeft"),
    Mutant("weights: relaxed", "store_sum", ADD, 'tl.atomic_add(counter, 1, sem="relaxed")', case=MANY_ROWS),
    Mutant("weights: release alone", "store_sum", ADD, 'tl.atomic_add(counter, 1, sem="release")', case=MANY_ROWS),
    Mutant("weights: acquire alone", "store_sum", ADD, 'tl.atomic_add(counter, 1, sem="acquire")', case=MANY_ROWS),
    Mutant("weights: no barrier", "store_sum", "tl.debug_barrier()", "pass", case=MANY_ROWS),
    Mutant("weights: first part adds", "store_sum", "== rows.count - 1", "== 0", case=MANY_ROWS),
    Mutant("weights: no reset", "store_sum", "tl.store(counter, 0)", "pass", "CountersLeft", MANY_ROWS),
]
SEEDS = 6


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_a_mutant_is_found(mutant):
    of_weights = hasattr(weight_gradient, mutant.function)
    function = getattr(weight_gradient if of_weights else persistent, mutant.function)
    assert isinstance(function, InterpretedFunction)
    with races.mutated(function, mutant.old, mutant.new):
        assert_found(mutant.case, mutant.finds, mutant.programs)


def assert_found(case, kind, programs):
    """The checker stops a step with a fault of a kind, at the latest with the last of a few seeds."""
    problem = make(case).to(torch.float32)
    faults = (fault_of(problem, programs, seed) for seed in range(SEEDS))
    found = next((fault for fault in faults if fault is not None), None)
    assert type(found).__name__ == kind, found


def fault_of(problem, programs, seed):
    with running(programs, seed):
        try:
            step(problem, "triton")
        except races.Fault as fault:
            return fault
    return None


POLLS = 40
"""More than any wait here takes, as one program runs at a time."""


@pytest.fixture
def bounded_waits(monkeypatch):
    monkeypatch.setenv(configs.DEBUG_WAITS, str(POLLS))
    configs.forget()
    yield
    monkeypatch.undo()
    configs.forget()


def test_bounded_waits_change_nothing(bounded_waits):
    problem = make(TWO_UNITS).to(torch.float32)
    assert_close(step(problem, "triton"), step(problem.to(torch.float64), "reference"), FLOAT32_TOLERANCE)


def test_a_hang_is_a_message(bounded_waits):
    """Who waited, for which stage and tile, how many items were needed and how many there."""
    problem = make(ONE_UNIT).to(torch.float32)
    said = (
        rf"after {POLLS} polls stage V0, tile 0, still waited for stage A0, tile 0: (\d+) items needed, (\d+) present "
        rf"\({configs.DEBUG_WAITS} bounds every wait\)"
    )
    with (
        races.mutated(persistent.wait, "need = value(", "need = 1 + value("),
        pytest.raises(launch.LaunchStuck, match=said) as found,
    ):
        step(problem, "triton")
    needed, present = re.search(said, str(found.value)).groups()
    assert int(needed) == int(present) + 1


def test_a_bound_that_is_no_number_is_refused(monkeypatch):
    monkeypatch.setenv(configs.DEBUG_WAITS, "soon")
    configs.forget()
    try:
        with pytest.raises(ValueError, match="SAML_KERNELS_DEBUG_WAITS must be a whole number of polls"):
            step(make(ONE_UNIT).to(torch.float32), "triton")
    finally:
        monkeypatch.undo()
        configs.forget()


@contextlib.contextmanager
def changed_tables(change):
    """Every launch is planned with tables of the order that ``change`` makes of the real ones' arguments."""
    from saml_kernels.backends.triton import trunk

    programs = trunk.forward_program, trunk.backward_program
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch.scheduling, "order", change)
        for each in programs:
            each.cache_clear()
        yield
    for each in programs:
        each.cache_clear()


def without_longer_lag(stages, bodies, block_m, num_scenarios, programs):
    """Stages on tiles of any rows lag behind those on tiles of one scenario as if these had the same tiles."""
    return dataclasses.replace(ORDER(stages, bodies, block_m, 0, programs), num_scenarios=num_scenarios)


ORDER = schedule.order


def test_an_order_with_too_short_a_lag_is_a_deadlock():
    """A single program draws an item before one that it waits for."""
    case = dataclasses.replace(QUANTIZED_TWICE, M=6)
    with changed_tables(without_longer_lag):
        assert_found(case, "Deadlock", 1)


@pytest.mark.parametrize("field", ["after_1", "after_2"])
def test_a_dependency_that_the_tables_leave_out_is_found(field):
    """Of the last stage that has one."""

    def change(*arguments):
        order = ORDER(*arguments)
        last = max((n for n, slot in enumerate(order.slots) if getattr(slot, field) >= 0), default=None)
        slots = [dataclasses.replace(slot, **{field: -1}) if n == last else slot for n, slot in enumerate(order.slots)]
        return dataclasses.replace(order, slots=tuple(slots))

    with changed_tables(change):
        assert_found(ONE_UNIT, "Race", 3)


@pytest.mark.parametrize("case", [TWO_UNITS, QUANTIZED_TWICE], ids=str)
def test_a_launch_draws_the_items_of_its_table(case, monkeypatch):
    """A single program in the very order whose proof is in test_schedule.py."""
    drawn, orders = {}, {}
    run, planned = persistent.run.rewrite(), launch.planned

    def number(value):
        return int(value.handle.data.item()) if hasattr(value, "handle") else int(value)

    def record(pointers, item, batch, LAUNCH):
        found = item.stage, item.tile, item.part, item.first, item.end
        drawn.setdefault(id(LAUNCH), []).append(tuple(map(number, found)))
        run(pointers, item, batch, LAUNCH)

    def remember(*arguments):
        found = planned(*arguments)
        orders.update((id(each.launch), each.order) for each in found)
        return found

    monkeypatch.setitem(InterpretedFunction.rewritten_fn, persistent.run.fn, record)
    monkeypatch.setattr(launch, "planned", remember)
    problem = make(case).to(torch.float32)
    with running(1):
        step(problem, "triton")
    offsets = [0, *torch.bincount(problem.scenario, minlength=case.M).cumsum(0).tolist()]
    assert len(orders) > 1
    for key, order in orders.items():
        table = [item[1:] for item in schedule.items(order, offsets)]
        # A launch of one stage has a program for each item.
        assert (drawn[key] if len(order.slots) > 1 else sorted(drawn[key])) == table
