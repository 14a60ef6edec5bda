"""Tuning in Triton's interpreter, with a clock that says what it is told: what is chosen, refused, written.

TRITON_INTERPRET=1 pytest -m interpreter tests/triton/test_tuning.py
"""

import dataclasses
import json

import pytest
import torch

from saml_kernels.backends.triton import availability, configs, tuning
from saml_kernels.backends.triton.tuning import Shape, TuningFailed, tune
from saml_kernels.testing import accuracy, timing

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not availability.INTERPRETED, reason="needs TRITON_INTERPRET=1 before Python starts"),
]

SHAPE = Shape(9, 2, 3, 2, (6, 4), torch.float32, torch.device("cpu"))
KEY = "interpreter/float32/rows=256/scenarios=2/width=64"
USUAL, NARROW = configs.candidates("forward", 4)[:2]
BUILT_IN = configs.Choice("persistent", USUAL, USUAL, USUAL)


@pytest.fixture(autouse=True)
def path(tmp_path, monkeypatch):
    """Where tuned choices go, a folder that does not exist yet."""
    path = tmp_path / "cache" / "tuned.json"
    monkeypatch.setenv(configs.CACHE_VARIABLE, str(path))
    configs.forget()
    yield path
    configs.forget()


def clock(seconds):
    """A timer that asks a function of the choice, and keeps what it was asked."""

    def timer(calls):
        timer.asked.append(tuple(calls))
        return {choice: seconds(choice) for choice in calls}

    timer.asked = []
    return timer


def narrow_is_fast(choice):
    """Narrow tiles forward and of the weights, wide ones backward, the per-layer schedule."""
    fast = choice.forward == NARROW, choice.schedule == "per_layer", choice.backward == USUAL, choice.weights == NARROW
    return 1.0 / (1 + sum(fast))


def test_the_fastest_is_chosen_written_and_read(path, monkeypatch):
    lines = []
    timer = clock(narrow_is_fast)
    found = tune(SHAPE, timer, lines.append)
    assert found.choice == configs.Choice("per_layer", NARROW, USUAL, NARROW)
    assert (found.key, found.path, found.built_in) == (KEY, path, BUILT_IN)
    assert found.forward.ratio == found.step.ratio == 2.5
    # One configuration at a time, tiles before rows; then the result beside the built-in choice, twice.
    parts = ["forward", "forward", "layer", "backward", "backward", "weights"]
    assert [len(contenders) for contenders in timer.asked] == [4, 2, 3, 2, 2, 2, 2, 2]
    forward = {"forward", "schedule"}
    for part, contenders in zip(parts, timer.asked, strict=False):
        for contender in contenders:
            differing = {
                f.name for f in dataclasses.fields(contender) if getattr(contender, f.name) != getattr(BUILT_IN, f.name)
            }
            # The forward's winner is what layers are tried with.
            assert differing <= forward | {part}
    assert [line.partition(":")[0] for line in lines] == parts
    assert json.loads(path.read_text())[KEY]["forward"]["block_n"] == 16
    # As a GPU reads it: the interpreter has its own choice whatever the file says.
    arguments = 200, 2, 6, torch.float32, torch.device("cpu")
    assert configs.choice(*arguments) == BUILT_IN
    monkeypatch.setattr(configs, "INTERPRETED", False)
    monkeypatch.setattr(configs, "device_name", lambda device: "interpreter")
    assert configs.choice(*arguments) == found.choice
    assert configs.choice(300, *arguments[1:]) == configs.built_in(configs.Bucket(1024, 2, 64), 4)


@pytest.fixture
def open_gate(monkeypatch):
    """Nothing is compared, which takes seconds a candidate here."""
    monkeypatch.setattr(tuning.ChoiceGate, "failure", lambda self, choice: None)


def test_other_entries_stay(path, open_gate):
    kept = {"other": configs.Choice("per_layer", NARROW, NARROW, NARROW)}
    configs.save(path, kept)
    found = tune(SHAPE, clock(lambda choice: 1.0))
    assert found.choice == BUILT_IN
    assert found.forward is found.step is None
    assert configs.tuned(path) == kept | {KEY: BUILT_IN}


def test_winners_that_do_not_win_together_are_not_kept(open_gate):
    def seconds(choice):
        changed = sum(getattr(choice, name) == NARROW for name in ("forward", "backward", "weights"))
        return {0: 1.0, 1: 0.5}.get(changed, 2.0)

    lines = []
    assert tune(SHAPE, clock(seconds), lines.append).choice == BUILT_IN
    assert lines[-1] == "the three together are not faster than the built-in choice"


@pytest.fixture
def weights_of(monkeypatch):
    """Calls a function with the gradients after every launch of weight gradients with narrow tiles."""
    from saml_kernels.backends.triton import launch

    original = launch.run_weight_gradients

    def replace(function):
        def run(program, config, tensors, *arguments, **options):
            original(program, config, tensors, *arguments, **options)
            if config == NARROW:
                function(tensors)

        monkeypatch.setattr(launch, "run_weight_gradients", run)

    return replace


def test_a_wrong_candidate_is_skipped(weights_of):
    weights_of(lambda tensors: tensors["d_branch_weight0"].mul_(1.001))
    lines = []
    found = tune(SHAPE, clock(narrow_is_fast), lines.append)
    assert found.choice == configs.Choice("per_layer", NARROW, USUAL, USUAL)
    (line,) = (line for line in lines if "skipped" in line)
    assert line.startswith(f"weights: skipped {tuning.describe(configs.Choice('', USUAL, USUAL, NARROW), 'weights')}: ")
    assert "wrong: relative error of ∂branch_weights[1] is 1.0e-03, bound 1.0e-05" in line


def test_a_candidate_that_does_not_compile_fails_in_one_line(weights_of):
    def fail(tensors):
        raise RuntimeError("out of resource: shared memory\nRequired: 1")

    weights_of(fail)
    choice = dataclasses.replace(BUILT_IN, weights=NARROW)
    assert tuning.ChoiceGate(SHAPE.problem()).failure(choice) == "RuntimeError: out of resource: shared memory"


def test_nothing_is_written_where_no_candidate_is_right(path, monkeypatch):
    monkeypatch.setattr(accuracy, "FLOAT32_BOUND", -1.0)
    with pytest.raises(TuningFailed, match="no candidate for forward can be used; the last one: wrong: relative error"):
        tune(SHAPE, clock(narrow_is_fast))
    assert not path.exists()


def test_float16_passes_its_gate():
    shape = dataclasses.replace(SHAPE, rows=60, local_dim=17, hidden_dims=(18, 17), dtype=torch.float16)
    assert tuning.ChoiceGate(shape.problem()).failure(BUILT_IN) is None


@pytest.mark.parametrize("text", ["{", "[]", '{"a": {"schedule": "round"}}', '{"a": {"schedule": "persistent"}}'])
def test_a_damaged_file_is_an_error_before_any_work(path, text, monkeypatch):
    path.parent.mkdir()
    path.write_text(text)
    monkeypatch.setattr(Shape, "problem", pytest.fail)
    with pytest.raises(ValueError, match=r"tuned.json does not hold tuned choices .*; delete it, or write it again"):
        tune(SHAPE, clock(narrow_is_fast))
    assert path.read_text() == text


def test_a_file_of_version_0_1_is_read(path):
    path.parent.mkdir()
    parts = {name: dataclasses.asdict(NARROW) for name in ("forward", "backward", "weights")}
    path.write_text(json.dumps({"a": {"form": "staged", **parts}}))
    assert configs.tuned(path) == {"a": configs.Choice("per_layer", NARROW, NARROW, NARROW)}


def test_a_forced_choice_ends_with_its_block():
    arguments = 9, 2, 6, torch.float32, torch.device("cpu")
    wanted = configs.Choice("per_layer", NARROW, NARROW, NARROW)
    with configs.forced(BUILT_IN):
        with configs.forced(wanted):
            assert configs.choice(*arguments) == wanted
        assert configs.choice(*arguments) == BUILT_IN
    with pytest.raises(KeyError), configs.forced(wanted):
        raise KeyError
    assert configs.choice(*arguments) == BUILT_IN


def test_rows_near_a_kink_have_no_cotangent():
    problem = dataclasses.replace(SHAPE, rows=6).problem()
    with torch.no_grad():
        # Row 2: all of layer 1's arguments of the auxiliary network are its biases, made 0 for one unit.
        problem.x_global[2] = 0
        problem.params.aux_biases[0][3] = 0
    own, aux = accuracy.without_kinks(problem).cotangents
    assert not own[2].any()
    assert not aux[2].any()
    others = [0, 1, 3, 4, 5]
    assert torch.equal(own[others], problem.cotangents[0][others])


def test_the_command(path, open_gate, monkeypatch):
    from click.testing import CliRunner

    from saml_rec.cli import main

    monkeypatch.setattr(timing, "interleave", lambda calls, *_: {c: [narrow_is_fast(c)] for c in calls})

    out = path.parent.parent / "bench.json"
    options = "--rows 9 --scenarios 2 --local-dim 3 --global-dim 2 --hidden 6,4 --device cpu --budget 0.1 --tune --out"
    result = CliRunner().invoke(main, ["bench", *options.split(), str(out)])
    assert result.exit_code == 0, result.output
    assert f"wrote {path}: {KEY}" in result.stdout
    rows = "items of 8 rows, 4 at a time"
    assert f"backward: 16x32x16, 4 warps, 1 stages, 1 programs, {rows} (as built in)\n" in result.stdout
    assert "training step: 200 ms, 500 ms with the built-in choice: 2.50 times as fast\n" in result.stdout
    record = json.loads(out.read_text())
    assert record["tuned"]["key"] == KEY
    assert json.loads(path.read_text()) == {KEY: record["tuned"]["choice"]}
